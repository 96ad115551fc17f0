"""The settings of an offline job."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Job:
    """Predict the classes of all images of a folder, or of a data set, into one table."""

    run: str
    """A run's folder, any folder that slicevit saved, or a Hub repository such as owner/name."""
    images: str
    """A folder of images at any depth, or a data set as train's --data takes it."""
    out: Path
    """The table to write; it ends in .csv, .jsonl or .parquet."""
    width: str | None = None
    """One width for all images, such as 1/2; the full width by default."""
    budget: float | None = None
    """Seconds that the whole job may take, from the start of the command; widths are chosen to keep them."""
    cascade: tuple[str, ...] = ()
    """Widths, narrowest first: each image goes to the next one only where it is unsure. Needs --max-macs."""
    max_macs: float | None = None
    """Of a cascade: the average of an image, as a share of the full width's multiply-accumulates."""
    top_k: int = 1
    """Classes of each image, best first."""
    logits: bool = False
    """Write all logits too (.jsonl and .parquet)."""
    split: str | None = None
    """train or val of a data set; with it a folder is one that holds train/ and val/."""
    data_root: str | None = None
    """Where a timm dataset string finds its files."""
    engine: str = "torch"
    """torch, torch-compile, onnxruntime or openvino."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "float32"
    """float32 or bfloat16."""
    threads: int = 0
    """Of the CPU; 0 is the engine's own choice."""
    batch_size: int = 64
    """Images of a call."""
    workers: int = 0
    """Processes that load images; over a cluster, batches that each worker reads at a time, at least one."""
    ray: str | None = None
    """Work over a Ray cluster: HOST:PORT, ray://HOST:PORT or local; without a value RAY_ADDRESS or this machine's."""
    ray_workers: int = 0
    """Of --ray: workers, each with a model of its own; 0: as many as the cluster has room for."""
    num_cpus: float = 1
    """Of --ray: CPUs that each worker reserves. On a GPU it reserves one of those, too."""
    max_bad_share: float = 0.01
    """Share of unreadable images above which it stops."""
    overwrite: bool = False
    """Replace a finished table, and discard what another job left unfinished."""

    def check(self) -> None:
        """Raises ValueError, naming the flag, for a value that is none or flags that do not go together."""
        for name, lowest in (("batch_size", 1), ("top_k", 1), ("workers", 0), ("ray_workers", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: give {lowest} or more")
        if not 0 < self.num_cpus < math.inf or (self.num_cpus > 1 and self.num_cpus % 1):
            raise ValueError(f"--num-cpus {self.num_cpus:g}: give a whole number, or a part of one CPU above 0")
        if self.ray is None and (self.ray_workers, self.num_cpus) != (0, 1):
            raise ValueError("--ray-workers and --num-cpus say how to work over a cluster: give --ray, too")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"--max-bad-share {self.max_bad_share:g}: give a share from 0 to 1")
        if self.split not in (None, "train", "val"):
            raise ValueError(f"--split {self.split}: give train or val")
        chosen = [f"--{name}" for name in ("width", "budget", "cascade") if getattr(self, name) not in (None, ())]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} each say which widths answer: give one of them")
        if bool(self.cascade) != (self.max_macs is not None):
            raise ValueError(
                "--cascade and --max-macs go together: widths, narrowest first, and the share of the full width's "
                "multiply-accumulates that an image may take on average"
            )
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise ValueError(f"--budget {self.budget:g}: give a number of seconds above 0")
