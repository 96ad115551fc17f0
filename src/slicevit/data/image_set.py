"""What every data set of images by number is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from PIL import Image

IMAGE_MODES = {1: "L", 3: "RGB"}


class UnreadableImageError(OSError):
    """An image which cannot be decoded; the message says which and why."""


class ImageSet(ABC):
    """Images with a class each, by index; small to pickle into worker processes.

    Attributes:
        spec: what `open_dataset` was given.
        split: "train" or "val".
        classes: the name of each class, by class index; None when the source does not name them.
        num_classes: how many classes there are; 0 for images without classes, which all have class index 0.
        in_chans: channels of the images.
        frames: how many images, one after another, are one thing, such as the frames of a clip; 1 for images.
    """

    frames = 1

    def __init__(self, spec: str, split: str, in_chans: int, classes: list[str] | None, num_classes: int):
        self.spec = spec
        self.split = split
        self.classes = classes
        self.num_classes = num_classes
        self.in_chans = in_chans
        self._mode = IMAGE_MODES[in_chans]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, index: int) -> tuple[Image.Image, Any]:
        """The decoded image, in mode `self._mode`, and its class index."""

    def load(self, index: int) -> tuple[Image.Image, Any]:
        """The decoded image (mode "L" or "RGB") and its class index; of a `MaskSet` its mask.

        Raises:
            UnreadableImageError: if it cannot be decoded, for whatever reason the decoder has.
        """
        try:
            return self._read(index)
        except Exception as error:
            raise UnreadableImageError(f"{self.name(index)} ({error or type(error).__name__})") from error

    def name(self, index: int) -> str:
        """The file of an image, or where there is none its index, for messages."""
        return f"{self.spec} {self.split} image {index}"

    def targets(self) -> np.ndarray:
        """The class index of every image, (N,); decodes them where the source does not say it otherwise.

        Raises:
            UnreadableImageError: if it has to decode them and cannot.
        """
        return np.array([self.load(index)[1] for index in range(len(self))])
