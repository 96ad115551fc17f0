"""What a server needs of `slicevit.runtime.Engine`; what each is, is said there."""

from __future__ import annotations

from fractions import Fraction
from typing import Protocol

from PIL import Image
from torch import Tensor

from slicevit.evaluation.figures import Figure


class Runs(Protocol):
    """An engine."""

    @property
    def task(self) -> str | None: ...

    @property
    def figure(self) -> Figure: ...

    @property
    def widths(self) -> tuple[Fraction, ...]: ...

    @property
    def input_size(self) -> tuple[int, ...]: ...

    @property
    def label_names(self) -> tuple[str, ...] | None: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def architecture(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str: ...

    def transform(self, image: Image.Image) -> Tensor: ...

    def ready(self, width: Fraction) -> None: ...

    def run(self, images_BCHW: Tensor, width: Fraction) -> Tensor: ...
