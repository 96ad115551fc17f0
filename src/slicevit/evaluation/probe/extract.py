"""Features of every width in one pass over the images; of a clip, the mean over its frames.

Legend of axis names: B images of a batch, C channels, H height, W width, N images of a split, D channels at a width.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from slicevit.data import ImageSet, Transform, eval_batches
from slicevit.evaluation.probe.cache import FeatureCache, Features
from slicevit.evaluation.probe.probed import Driver

_PART_IMAGES, _PART_SECONDS = 8192, 60.0  # a part is written when one of them is reached


class _Numbered(ImageSet):
    """The images of `source` from `start` on; their number is packed into the class: number * classes + class."""

    def __init__(self, source: ImageSet, start: int):
        super().__init__(source.spec, source.split, source.in_chans, source.classes, source.num_classes)
        self.frames = source.frames
        self._source, self._start = source, start

    def __len__(self) -> int:
        return len(self._source) - self._start

    def _read(self, index: int) -> tuple[Image.Image, int]:
        image, target = self._source._read(self._start + index)
        return image, (self._start + index) * self.num_classes + target

    def name(self, index: int) -> str:
        return self._source.name(self._start + index)


def pooled(module: nn.Module, images_BCHW: Tensor) -> Tensor:
    """The features that the module's own head reads, float32 (B, D).

    Of a model with two heads it is their mean. Raises ValueError where they are no vector an image.
    """
    model: Any = module
    features = model.forward_head(model.forward_features(images_BCHW), pre_logits=True)
    if features.ndim != 2:
        raise ValueError(f"the features of {type(module).__name__} are no vector an image: no linear probe")
    return features.float()


def fingerprint(dataset: ImageSet) -> dict[str, Any]:
    """What tells these images from others: their names and classes, and of files also their size and date."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        described: tuple[Any, ...] = (dataset.name(index),)
        with suppress(OSError):  # where the name is no file's
            status = os.stat(described[0])
            described = (os.path.abspath(described[0]), status.st_size, status.st_mtime_ns)
        digest.update(repr(described).encode())
    classes = dataset.classes or dataset.num_classes
    return {"images": len(dataset), "classes": classes, "digest": digest.hexdigest()}


@torch.inference_mode()
def extract(
    modules: dict[str, nn.Module],
    dataset: ImageSet,
    transform: Transform,
    cache: FeatureCache,
    *,
    batch_size: int,
    workers: int,
    max_bad_share: float,
    driver: Driver,
) -> None:
    """Put into `cache` what it lacks of the features of `dataset`.

    Args:
        modules: a stock module for each name of a width.
        transform: from an image to the modules' input (C, H, W).

    Raises Stopped when asked to, and ValueError when too many images are unreadable; what was extracted is kept.
    """
    split, total, frames = dataset.split, len(dataset), dataset.frames
    batch_size = max(1, batch_size // frames) * frames
    start, what = cache.done(split), f"features, {split}"
    waiting: list[tuple[int, Features]] = []  # with the number of images done after each
    since = time.monotonic()

    def keep(done: int) -> None:
        if done > cache.done(split):
            cache.add(split, done, _joined([features for _, features in waiting]))
        waiting.clear()

    driver.step(what, start, total)
    batches = eval_batches(_Numbered(dataset, start), transform, batch_size, workers, max_bad_share=1.0)
    try:
        for images_BCHW, packed_B in batches:
            images_BCHW = images_BCHW.to(driver.device, non_blocking=True)
            by_width = {name: pooled(module, images_BCHW).cpu() for name, module in modules.items()}
            whole_batches = (int(packed_B[-1]) // dataset.num_classes - start) // batch_size + 1
            done = min(total, start + whole_batches * batch_size)
            waiting.append((done, _of_clips(by_width, packed_B, dataset)))
            read = cache.read(split) + sum(len(features.targets_N) for _, features in waiting)
            _check_readable(dataset, done // frames - read, max_bad_share)
            driver.step(what, done, total)
            if done - cache.done(split) >= _PART_IMAGES or time.monotonic() - since >= _PART_SECONDS:
                keep(done)
                since = time.monotonic()
    except BaseException:
        keep(waiting[-1][0] if waiting else 0)
        raise
    keep(total)
    _check_readable(dataset, total // frames - cache.read(split), max_bad_share)
    driver.progress(what, total, total)


def _of_clips(by_width: dict[str, Tensor], packed_B: Tensor, dataset: ImageSet) -> Features:
    """Of each clip the mean over its readable frames; the features themselves where an image stands for itself."""
    targets_B = packed_B % dataset.num_classes
    if dataset.frames == 1:
        return Features(by_width, targets_B)
    clips, clip_B, count = torch.unique_consecutive(
        packed_B // dataset.num_classes // dataset.frames, return_inverse=True, return_counts=True
    )
    means = {
        name: features_BD.new_zeros(len(clips), features_BD.shape[1]).index_add_(0, clip_B, features_BD)
        / count[:, None]
        for name, features_BD in by_width.items()
    }
    return Features(means, targets_B[count.cumsum(0) - 1])


def _joined(batches: list[Features]) -> Features:
    names = batches[0].by_width if batches else ()
    return Features(
        {name: torch.cat([batch.by_width[name] for batch in batches]) for name in names},
        torch.cat([torch.empty(0, dtype=torch.int64), *(batch.targets_N for batch in batches)]),
    )


def _check_readable(dataset: ImageSet, bad: int, max_bad_share: float) -> None:
    total, things = len(dataset) // dataset.frames, "images" if dataset.frames == 1 else "clips"
    if bad > int(max_bad_share * total):
        raise ValueError(
            f"--data {dataset.spec}: {bad} or more of its {total} {things} cannot be read ({bad / total:.2%}, above "
            f"the {max_bad_share:.2%} allowed). Restore or delete these files, or raise --max-bad-share."
        )
