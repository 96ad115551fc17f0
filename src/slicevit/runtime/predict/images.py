"""The images of an offline job: a folder of them, or a data set, in batches that are the same however often it stops.

Legend of axis names: R readable images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from slicevit.data import BUNDLED, ImageSet, StreamSet, Transform, UnreadableImageError, ignore_signals, open_dataset
from slicevit.data.image_set import IMAGE_MODES
from slicevit.data.walk import image_paths

ENDINGS = tuple(sorted({*IMG_EXTENSIONS, *get_img_extensions()}))


class ImageFolder(ImageSet):
    """Every image below a folder, at any depth, in natural order of the paths; none has a class.

    What begins with a dot is left out, and so is what does not end as an image does (`ENDINGS`).
    Raises ValueError when no image is there, or for a number of channels that images are not read with.
    """

    def __init__(self, folder: str, in_chans: int):
        if in_chans not in IMAGE_MODES:
            raise ValueError(
                f"{folder}: images are read with 1 (gray) or 3 (RGB) channels, and the model has {in_chans}"
            )
        super().__init__(folder, "", in_chans, None, 0)
        self._folder = os.path.expanduser(folder)
        paths = image_paths(self._folder, ENDINGS)
        if not paths:
            raise ValueError(f"{folder} holds no images: put files ending in {', '.join(ENDINGS)} there")
        self._paths_N = np.array([os.fsencode(path) for path in paths])  # as an array workers copy nothing of it

    def __len__(self) -> int:
        return len(self._paths_N)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.name(index)) as image:
            return image.convert(self._mode), -1

    def name(self, index: int) -> str:
        return os.path.join(self._folder, os.fsdecode(self._paths_N[index]))

    def path(self, index: int) -> str:
        """Relative to the folder, with forward slashes; what is no UTF-8 in it is written as \\x.."""
        return printable(Path(os.fsdecode(self._paths_N[index])).as_posix())

    def digest(self) -> str:
        """Of all paths, in order."""
        return hashlib.sha256(b"\0".join(self._paths_N.tolist())).hexdigest()


def printable(text: str) -> str:
    """One line of valid UTF-8."""
    return " ".join(text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").split())


def open_images(source: str, split: str | None, root: str | None, in_chans: int) -> ImageSet | StreamSet:
    """The images of a job.

    Args:
        source: a folder, of which all images are taken, without classes; else what `slicevit train --data` takes.
        split: "train" or "val" of a data set, val by default. A folder with a split is a data set, too.
        root: timm's root folder of a data set.
        in_chans: 1 or 3.

    Raises ValueError when there is no such folder or data set, or no image in it.
    """
    if source != BUNDLED and split is None:
        path = Path(source).expanduser()
        if path.is_dir():
            return ImageFolder(source, in_chans)
        if path.is_file():
            raise ValueError(f"{source} is a file: name the folder that it is in")
    try:
        dataset = open_dataset(source, split or "val", root=root, in_chans=in_chans)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("--data ")) from error
    if not len(dataset):
        raise ValueError(f"{source} holds no images")
    return dataset


def describe(images: ImageSet | StreamSet, root: str | None) -> dict[str, Any]:
    """What makes two lists of images the same, for JSON."""
    listed = (
        images.digest() if isinstance(images, ImageFolder) else f"{images.spec} {images.split} {root or ''}".strip()
    )
    return {"images": listed, "total": len(images)}


@dataclass(frozen=True)
class Loaded:
    """A batch as it was read.

    Attributes:
        first, count: which of the job's images it covers, the unreadable ones included.
        images_RCHW: the readable ones, float32; (0,) when there is none.
        places: their numbers, R of them.
        targets: their class indices; -1 where they have none.
        errors: number -> why it cannot be read, for the others.
    """

    first: int
    count: int
    images_RCHW: Tensor
    places: list[int]
    targets: list[int]
    errors: dict[int, str] = field(default_factory=dict)


def load_batch(images: ImageSet, transform: Transform, numbers: range) -> Loaded:
    """Read these images and prepare them; none of them stops the others."""
    tensors, places, targets, errors = [], [], [], {}
    for number in numbers:
        try:
            image, target = images.load(number)
            tensors.append(transform(image))
        except UnreadableImageError as error:
            errors[number] = _reason(error.__cause__ or error)
        except Exception as error:  # a transform has its own: an image of no height, say
            errors[number] = _reason(error)
        else:
            places.append(number)
            targets.append(target)
    stacked_RCHW = torch.stack(tensors) if tensors else torch.empty(0)
    return Loaded(numbers.start, len(numbers), stacked_RCHW, places, targets, errors)


def _reason(error: BaseException) -> str:
    return printable(str(error)) or type(error).__name__


def batches(
    images: ImageSet | StreamSet, transform: Transform, batch_size: int, done: int = 0, workers: int = 0
) -> Generator[Loaded, None, None]:
    """The batches after the first `done` images, which are whole batches or all images.

    Batch k covers images k * batch_size and on, whatever was done before. `workers` processes read them; a stream is
    read by one at most, from its beginning, and its unreadable images are its reader's to skip.
    """
    if isinstance(images, StreamSet):
        workers = min(workers, 1)
        source: Dataset = _StreamBatches(images, transform, batch_size, done, workers)
        sampler = None
    else:
        source = _Batches(images, transform, batch_size)
        sampler = range(-(-done // batch_size), -(-len(images) // batch_size))
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # else it draws its workers' seed from the caller's
    )
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        del iterator  # ends the worker processes now


class _Batches(Dataset):
    def __init__(self, images: ImageSet, transform: Transform, batch_size: int):
        self._images, self._transform, self._batch_size = images, transform, batch_size

    def __getitem__(self, number: int) -> Loaded:
        first = number * self._batch_size
        numbers = range(first, min(first + self._batch_size, len(self._images)))
        return load_batch(self._images, self._transform, numbers)


class _StreamBatches(IterableDataset):
    def __init__(self, images: StreamSet, transform: Transform, batch_size: int, done: int, workers: int):
        self._images, self._transform, self._batch_size = images, transform, batch_size
        self._done, self._workers = done, workers

    def __iter__(self) -> Iterator[Loaded]:
        stream = islice(self._images.open(workers=self._workers), self._done, None)
        first = self._done
        while read := list(islice(stream, self._batch_size)):
            images_RCHW = torch.stack([self._transform(image) for image, _ in read])
            numbers = range(first, first + len(read))
            yield Loaded(first, len(read), images_RCHW, list(numbers), [int(target) for _, target in read])
            first = numbers.stop


def _as_it_is(batch: Any) -> Any:
    return batch
