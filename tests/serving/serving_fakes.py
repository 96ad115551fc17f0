"""An engine without a model, its table, images in every format, and requests to an app in this process.

Legend of axis names: B images of a batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from slicevit.evaluation.figures import TOP1
from slicevit.runtime.profile import Profile

CLASSES = 7
SIZE = 8
QUARTER, HALF, FULL = Fraction(1, 4), Fraction(1, 2), Fraction(1)
TABLE = Profile.parse(
    [
        {"width": "1/4", "top1": 70.0, "latency_ms": {1: 1.0, 4: 2.0, 8: 3.0}},
        {"width": "1/2", "top1": 80.0, "latency_ms": {1: 2.0, 4: 5.0, 8: 9.0}},
        {"width": "1", "top1": 90.0, "latency_ms": {1: 5.0, 4: 14.0, 8: 26.0}},
    ]
)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class FakeEngine:
    """Answers at once: class k where k is the red of the first pixel, modulo the number of classes.

    Attributes:
        calls: (width, batch) of every call, those of the warm-up too.
        before: runs before each call, in the thread that computes.
    """

    task: str | None = None
    figure = TOP1
    widths = (QUARTER, HALF, FULL)
    input_size = (3, SIZE, SIZE)
    num_classes = CLASSES
    architecture = "fake"
    name = "torch"
    device = "cpu"

    def __init__(self) -> None:
        self.label_names: tuple[str, ...] | None = tuple("abcdefg")
        self.calls: list[tuple[Fraction, int]] = []
        self.before: Callable[[Tensor, Fraction], None] = lambda images_BCHW, width: None

    def transform(self, image: Image.Image) -> Tensor:
        return pil_to_tensor(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.NEAREST)).float()

    def ready(self, width: Fraction) -> None:
        assert width in self.widths

    def run(self, images_BCHW: Tensor, width: Fraction) -> Tensor:
        self.calls.append((width, len(images_BCHW)))
        self.before(images_BCHW, width)
        classes_B = images_BCHW[:, 0, 0, 0].long() % CLASSES
        return 4.0 * torch.nn.functional.one_hot(classes_B, CLASSES).float()


class Gate:
    """Holds an engine's calls until it is opened."""

    def __init__(self, engine: FakeEngine):
        self._open, self.reached = threading.Event(), threading.Event()
        engine.before = self._pass

    def _pass(self, images_BCHW: Tensor, width: Fraction) -> None:
        self.reached.set()
        assert self._open.wait(20)

    def open(self) -> None:
        self._open.set()


def picture(red: int = 3, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> Image.Image:
    """One colour."""
    return Image.new("RGB", size, (red, 100, 200)).convert(mode)


def noise(size: tuple[int, int] = (24, 20), seed: int = 0) -> Image.Image:
    """An image that does not compress to nothing."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The file of an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
