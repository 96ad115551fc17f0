"""A saved model as exports and engines take it, whatever it is for.

Legend of axis names: C channels, H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from slicevit.elastic import ElasticModel
from slicevit.evaluation.figures import Figure
from slicevit.export.artefact import INPUT, OUTPUT
from slicevit.export.check import Checked, Comparison
from slicevit.export.images import Calibration, Images

Say = Callable[[int, int], None]  # how many images of how many


@dataclass(frozen=True)
class Options:
    """In which numbers an export is written, and on which images that is done and checked.

    Attributes:
        precision: fp32, or what the format has of fp16, bf16 and int8.
        data, data_root: the data set whose validation images check it, and its root folder; the run's own by default.
        images: how many check it; by default 64 in fp32, and all of them in what loses accuracy.
        calibrate: the data set, or folder of images, that int8 takes its ranges from; `data` by default.
        max_loss: the largest loss of the model's figure, in points, that is not refused.
    """

    precision: str = "fp32"
    data: str | None = None
    data_root: str | None = None
    images: int | None = None
    calibrate: str | None = None
    max_loss: float = 5.0


@dataclass(frozen=True)
class Opened(ABC):
    """A saved model with what surrounds it.

    Attributes:
        task: what it is for, as `slicevit.checkpoint.task_of` says it.
        figure: by which its widths are compared.
        run: its folder, or its Hub repository.
        model: in eval mode.
        config: of its config.json, what describes it.
        architecture: timm's name of the model, or of its backbone.
        input_size: (C, H, W) of what its modules take.
        num_classes: how many classes it tells apart.
        label_names: what they are called, in the order of the logits, or None.
    """

    task: ClassVar[str | None]
    figure: ClassVar[Figure]
    run: str | Path
    model: ElasticModel
    config: dict[str, Any]
    architecture: str
    input_size: tuple[int, int, int]
    num_classes: int
    label_names: tuple[str, ...] | None

    def prepared(self, image: Image.Image) -> Tensor:
        """The float32 tensor (C, H, W) of an image in any mode, as the model was evaluated."""
        return self.transform(image.convert("L" if self.input_size[0] == 1 else "RGB"))

    @abstractmethod
    def transform(self, image: Image.Image) -> Tensor:
        """The same of an image of as many channels as the model takes."""

    @abstractmethod
    def preprocessing(self) -> dict[str, Any]:
        """What a manifest says of it."""

    @abstractmethod
    def images(self, options: Options) -> Images:
        """What checks an export. Raises ValueError naming the flag when it cannot be had."""

    @abstractmethod
    def calibration(self, images: Images, options: Options) -> Calibration:
        """What int8 takes its ranges from. Raises ValueError naming the flag when it cannot be had."""

    @abstractmethod
    def check(
        self, comparison: Comparison, images: Images, largest_batch: int | None, options: Options, say: Say
    ) -> Checked:
        """The verdict on an artefact. Raises ValueError when it is off."""

    def manifest(self, checked: Checked, **entries: Any) -> dict[str, Any]:
        """What manifest.json says; `entries` come first."""
        return {
            **entries,
            **({"task": self.task} if self.task else {}),
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            **({"label_names": list(self.label_names)} if self.label_names else {}),
            "input": INPUT,
            "output": OUTPUT,
            **self.preprocessing(),
            **checked.entries(),
        }
