"""What a probe is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from slicevit.evaluation.probe.heads import RATES
from slicevit.evaluation.probe.knn import NEIGHBOURS, TEMPERATURE


@dataclass
class ProbeSettings:
    """A probe of the features of `run` on `data`; the fields say the rest."""

    run: str
    """A run's folder, any folder that slicevit saved, or a Hub repository such as owner/name."""
    data: str
    """The data set, as in train, or clips:FOLDER; ?classes=0:5 after it takes some of its classes."""
    data_root: str | None = None
    """Where a timm dataset string finds its files."""
    out: Path | None = None
    """Folder for features and results; RUN/probe/DATA by default."""
    knn: bool = False
    """Nearest neighbours instead of trained heads."""
    neighbours: tuple[int, ...] = (NEIGHBOURS,)
    """How many of them vote; several numbers give several columns."""
    temperature: float = TEMPERATURE
    """Of their votes."""
    widths: tuple[str, ...] = ()
    """These widths alone, such as 1/4 1/2 1; all by default."""
    rates: tuple[float, ...] = RATES
    """Learning rates to choose from, each for a batch of 256 images."""
    steps: int = 12_500
    """Optimizer steps of a head."""
    head_batch_size: int = 128
    """Images a step of a head."""
    seed: int = 0
    """Of the heads' first weights, the order of the images, and which of them are held out."""
    batch_size: int = 256
    """Images a step of the extraction of features."""
    workers: int = 0
    """Processes that load images."""
    max_bad_share: float = 0.01
    """Share of unreadable images of a split above which it stops."""
    device: str = "auto"
    """auto, cpu or cuda."""
    rebuild: bool = False
    """Discard features in --out that are of another model, data set, transform or other widths."""

    def check(self) -> None:
        """Raise ValueError naming the flag whose value cannot be."""
        for name in ("steps", "head_batch_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"--workers must not be negative, got {self.workers}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"--max-bad-share must lie in [0, 1], got {self.max_bad_share}")
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise ValueError("--rates: give one or more numbers above 0")
        if not self.neighbours or min(self.neighbours) < 1 or len(set(self.neighbours)) < len(self.neighbours):
            raise ValueError("--neighbours: give one or more numbers above 0, each once")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature must be above 0, got {self.temperature}")
