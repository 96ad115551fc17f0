"""Some classes of a data set: what follows `classes=` in its name.

Legend of axis names: N images of the whole set, M of the subset.
"""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

from .image_set import ImageSet

_CLASSES = re.compile(r"([?&])classes=([^&]*)(&?)")
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?")


class Subset(ImageSet):
    """The images `indices_M` of `source`; with `numbers`, these classes of it alone, numbered anew in this order."""

    def __init__(self, source: ImageSet, indices_M: np.ndarray, numbers: list[int] | None = None, spec: str = ""):
        kept = list(range(source.num_classes)) if numbers is None else numbers
        classes = [source.classes[number] for number in kept] if source.classes else None
        super().__init__(spec or source.spec, source.split, source.in_chans, classes, len(kept))
        self.frames = source.frames
        self._source, self._indices_M = source, indices_M
        self._numbers = None if numbers is None else {number: new for new, number in enumerate(numbers)}

    def __len__(self) -> int:
        return len(self._indices_M)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        image, target = self._source._read(int(self._indices_M[index]))
        return image, target if self._numbers is None else self._numbers[target]

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices_M[index]))

    def targets(self) -> np.ndarray:
        whole_M = self._source.targets()[self._indices_M]
        return whole_M if self._numbers is None else np.array([self._numbers[int(target)] for target in whole_M])


def take_classes(spec: str) -> tuple[str, str | None]:
    """The data set that `spec` names, and which of its classes; None for all of them."""
    found = _CLASSES.search(spec)
    if found is None:
        return spec, None
    first, chosen, more = found.groups()
    return spec[: found.start()] + (first if more else "") + spec[found.end() :], chosen


def of_classes(source: ImageSet, chosen: str, spec: str) -> Subset:
    """The images of some classes of `source`.

    Args:
        chosen: names of classes and slices of their numbers (start:stop:step, as in Python), joined by commas.
        spec: how the subset is called.

    Raises ValueError when it names a class that is not there, one twice, or none.
    """
    if not source.num_classes:
        raise ValueError(f"--data {spec}: the images have no classes to choose from")
    numbers: list[int] = []
    for part in chosen.split(","):
        numbers += _numbers(source, part, spec)
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"--data {spec}: classes={chosen} names {'a class twice' if numbers else 'no class'}")
    indices_M = np.flatnonzero(np.isin(source.targets(), numbers))
    if not len(indices_M):
        raise ValueError(f"--data {spec}: there are no {source.split} images of these classes")
    return Subset(source, indices_M, numbers, spec)


def _numbers(source: ImageSet, part: str, spec: str) -> list[int]:
    names = source.classes or []
    if part in names:
        return [names.index(part)]
    cut = _SLICE.fullmatch(part)
    if cut is None or cut[3] == "0":
        known = f", such as {names[0]}" if names else ""
        raise ValueError(
            f"--data {spec}: {part!r} is no class of it: give names of its {source.num_classes} classes{known}, or a "
            "slice of their numbers, such as 0:5"
        )
    return list(range(source.num_classes))[slice(*(int(end) if end else None for end in cut.groups()))]
