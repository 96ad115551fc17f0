"""A data set decoded once into one tensor on the device.

Legend of axis names: B images of a batch, C channels, H height, W width, N images of the data set.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from .batch_augment import BatchAugmentation, Size, put
from .datasets import ImageSet, StreamSet, UnreadableImageError
from .loader import Batch, TrainLoader, _generator, _loader, _run
from .transforms import TransformConfig, _center_crop, _pad_crop

_CHUNK = 64  # images that a worker decodes at a time
_PROBES = 16  # images looked at for a common size


class MemoryLoader(TrainLoader):
    """A `TrainLoader` that decodes every image once, into one uint8 tensor (N, C, H, W) on the device.

    Each step shows the same images as `TrainLoader` does. Every image has its own draw of everything, for the whole
    batch at once, from (seed, epoch, step, rank): batches are the same for any number of workers and when resumed,
    and the caller's generators stay as they were. Crops, flips, erasing and colours follow the distributions of
    `train_transform`; the numbers drawn are others. What differs besides:

    - "rrc": where all images have one size, and no side of it is more than twice `img_size`, they are stored as they
      are, and crops are those of `train_transform`. Else an image is first resized and cropped centrally to
      `img_size`: crops see neither the ends of a long image nor more than `img_size` pixels, and small ones are
      enlarged. ("pad" and "center" store what `train_transform` would crop from: nothing is lost.)
    - Augmentations depend on the step and the rank, not on the image alone.
    - For the same draw pixels differ by rounding, by up to 2 of 255 levels. RandAugment's rotations, shears and
      translations use torch's bicubic filter (coefficient -0.75; Pillow's is -1) for any interpolation but "nearest"
      and "bilinear", and the blur of timm's set "3a" is a true Gaussian.

    With several ranks each holds all images. Unreadable images are found, named and counted at once.

    Args:
        dataset: what to load.
        config: the augmentation, and how images are stored.
        batch_size, seed, max_bad_share, repeats, rank, world_size: as of `TrainLoader`.
        device: where the images are kept, augmented and given out.
        workers: processes that decode, at the beginning alone; 0 decodes in the caller's.

    Raises:
        ValueError: if the data set is a stream, does not fit the device's free memory or is smaller than one batch
            of all ranks, or if more than `max_bad_share` of the images are unreadable.
    """

    def __init__(
        self,
        dataset: ImageSet | StreamSet,
        config: TransformConfig,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        workers: int = 0,
        max_bad_share: float = 0.01,
        repeats: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        if isinstance(dataset, StreamSet):
            raise ValueError(
                f"--in-memory: --data {dataset.spec} is a stream, which has no images by number: "
                "leave --in-memory out, or give a folder or a map-style set (hfds/…, torch/…)."
            )
        super().__init__(dataset, _stored(config), batch_size, seed, workers, max_bad_share, repeats, rank, world_size)
        self.device = torch.device(device)
        self._images_NCHW, self._targets_N = self._decode(dataset, config)
        self._shown_N = _next_readable(len(dataset), set(self._bad.known))
        self._augment = BatchAugmentation(config, self.device)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches `start_step`, …, `steps_per_epoch` - 1 of an epoch, without making the earlier ones.

        Yields:
            images_BCHW, float32 and normalised, and targets_B, int64, both on the device.
        """
        order_N = torch.randperm(len(self.dataset), generator=_generator(self.seed, epoch))
        for step in range(start_step, self.steps_per_epoch):
            places_B = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
            slots_B = (places_B * self.world_size + self.rank) // self.repeats
            index_B = put(self._shown_N[order_N[slots_B]], self.device)
            images_BCHW = self._augment(self._images_NCHW[index_B], self.seed, epoch, step, self.rank)
            yield images_BCHW, self._targets_N[index_B]

    def _decode(self, dataset: ImageSet, config: TransformConfig) -> Batch:
        """All images, uint8, and their classes, on the device; black where an image is unreadable."""
        size = _common_size(dataset, config.img_size) if config.crop == "rrc" else None
        if size is not None:
            with suppress(_OtherSizeError):
                return self._decode_as(dataset, transforms.PILToTensor(), (config.in_chans, *size))
        return self._decode_as(dataset, self.transform, (config.in_chans, *config.img_size))

    def _decode_as(self, dataset: ImageSet, store: Callable, shape: tuple[int, ...]) -> Batch:
        _check_fits(dataset, shape, self.device)
        images_NCHW = torch.empty((len(dataset), *shape), dtype=torch.uint8, device=self.device)
        targets_N = torch.empty(len(dataset), dtype=torch.int64, device=self.device)
        chunks = _Chunks(dataset, store, shape)
        start = 0
        for images, targets in _run(_loader(chunks, self.workers, sampler=range(len(chunks))), self._bad):
            images_NCHW[start : start + len(images)] = images
            targets_N[start : start + len(images)] = targets
            start += len(images)
        return images_NCHW, targets_N


class _OtherSizeError(Exception):
    """An image has another size than those before it."""


class _Chunks(Dataset):
    """By number of the chunk: images, uint8 and black where unreadable, targets, and the unreadable ones."""

    def __init__(self, dataset: ImageSet, store: Callable, shape: tuple[int, ...]):
        self._dataset = dataset
        self._store = store
        self._shape = shape

    def __len__(self) -> int:
        return math.ceil(len(self._dataset) / _CHUNK)

    def __getitem__(self, chunk: int) -> tuple[Tensor, Tensor, dict[int, str]]:
        indices = range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self._dataset)))
        images = torch.zeros((len(indices), *self._shape), dtype=torch.uint8)
        targets = torch.zeros(len(indices), dtype=torch.int64)
        found: dict[int, str] = {}
        for place, index in enumerate(indices):
            try:
                image, target = self._dataset.load(index)
            except UnreadableImageError as error:
                found[index] = str(error)
                continue
            stored_CHW = self._store(image)
            if stored_CHW.shape != self._shape:
                raise _OtherSizeError(self._dataset.name(index))
            images[place] = stored_CHW
            targets[place] = target
        return images, targets, found


def _stored(config: TransformConfig) -> Callable[[Image.Image], Tensor]:
    """From a PIL image to the uint8 tensor (C, H, W), of size `img_size`, that is kept of it."""
    if config.crop == "pad":
        resize = _pad_crop(config)[:1]
    else:
        resize = _center_crop(replace(config, crop_pct=1.0) if config.crop == "rrc" else config)
    return transforms.Compose([*resize, transforms.PILToTensor()])


def _common_size(dataset: ImageSet, img_size: Size) -> Size | None:
    """The size that images spread over the data set share; None when they differ or are more than twice `img_size`."""
    sizes = set()
    for index in range(0, len(dataset), math.ceil(len(dataset) / _PROBES)):
        with suppress(UnreadableImageError):
            width, height = dataset.load(index)[0].size
            sizes.add((height, width))
    if len(sizes) != 1:
        return None
    height, width = sizes.pop()
    return (height, width) if height <= 2 * img_size[0] and width <= 2 * img_size[1] else None


def _next_readable(images: int, bad: set[int]) -> Tensor:
    """By index: the image itself, or the next readable one."""
    readable_R = torch.tensor([index for index in range(images) if index not in bad])
    return readable_R[torch.searchsorted(readable_R, torch.arange(images)) % len(readable_R)]


def _check_fits(dataset: ImageSet, shape: tuple[int, ...], device: torch.device) -> None:
    needed, free = len(dataset) * math.prod(shape), _free_bytes(device)
    if needed > free:
        raise ValueError(
            f"--in-memory: --data {dataset.spec} needs {needed / 2**30:.2f} GiB ({len(dataset)} images of "
            f"{' x '.join(map(str, shape))}), and {free / 2**30:.2f} GiB are free on {device}: "
            "leave --in-memory out, give a smaller --model-args img_size=…, or free memory there."
        )


def _free_bytes(device: torch.device) -> int:
    """What can still be allocated; where a CPU's system does not say, all of its memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    available = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.M) if meminfo.exists() else None
    return int(available[1]) * 1024 if available else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
