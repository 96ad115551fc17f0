"""Batches whose content depends on (seed, epoch, step) alone, not on worker processes or interruptions.

Legend of axis names: B images of a batch, C channels, H height, W width, N images of the data set.
"""

from __future__ import annotations

import hashlib
import logging
import random
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from .boxes import Boxes
from .datasets import ImageSet, StreamSet, UnreadableImageError
from .transforms import PairTransform, Transform

Batch = tuple[Tensor, Tensor]  # images_BCHW float32, targets_B int64 (of masks: targets_BHW; of boxes: targets_BN6)

_logger = logging.getLogger("slicevit")


class TrainLoader:
    """Shuffled, augmented batches of equal size.

    An epoch's order is a permutation drawn from (seed, epoch). What the augmentation of an image draws from
    python's, numpy's and torch's global generators is fixed by (seed, epoch, image, repeat). So batches are
    bitwise the same for any number of workers and when resumed; the caller's generators stay as they were.

    An unreadable image is named in a warning of the logger "slicevit" and replaced by the next readable one.

    A `StreamSet` is shuffled by timm's reader, which shares it out to the ranks of torch.distributed. Its
    batches are the same only for the same number of workers, a resumed epoch reads past the skipped part, and
    unreadable images are the reader's to skip. A rank whose shards end before the epoch does reads them again.

    Args:
        dataset: what to load.
        transform: from a PIL image to a float32 tensor (C, H, W).
        batch_size: images a batch, of this rank.
        seed: of the order and the augmentation.
        workers: processes that load; 0 loads in the caller's.
        max_bad_share: the share of the data set's images that may be unreadable.
        repeats: how often, at most, an epoch shows an image, differently augmented (repeated augmentation, as
            DeiT's); the epoch's length stays.
        rank, world_size: this process takes images rank, rank + world_size, … of the common permutation.
        pin_memory: put batches in page-locked memory, for fast copies to a GPU.

    Raises:
        ValueError: if the data set is smaller than one batch of all ranks, or a stream is to be repeated.
    """

    def __init__(
        self,
        dataset: ImageSet | StreamSet,
        transform: Transform | PairTransform,
        batch_size: int,
        seed: int,
        workers: int = 0,
        max_bad_share: float = 0.01,
        repeats: int = 1,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ):
        self.dataset = dataset
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers
        self.repeats = repeats
        self.rank = rank
        self.world_size = world_size
        self.pin_memory = pin_memory
        self._bad = _BadImages(dataset, max_bad_share, "replaced by the next readable image")
        if not self.steps_per_epoch:
            raise ValueError(
                f"--data {dataset.spec} has {len(dataset)} training images, fewer than a batch of "
                f"{batch_size} x {world_size} processes: lower --batch-size."
            )
        if isinstance(dataset, StreamSet) and repeats > 1:
            raise ValueError(f"--data {dataset.spec} is a stream and cannot be repeated: leave repeats at 1.")

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch; what does not fill a batch of all ranks is left out."""
        return len(self.dataset) // (self.batch_size * self.world_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches `start_step`, …, `steps_per_epoch` - 1 of an epoch, without loading the earlier ones.

        Yields:
            images_BCHW, float32, and targets_B, int64.

        Raises:
            ValueError: if more than `max_bad_share` of the images are unreadable.
        """
        if isinstance(self.dataset, StreamSet):
            return self._stream_epoch(self.dataset, epoch, start_step)
        steps = range(start_step, self.steps_per_epoch)
        order_N = torch.randperm(len(self.dataset), generator=_generator(self.seed, epoch))
        batches = _TrainBatches(self, self.dataset, self._bad, order_N, epoch)
        loader = _loader(batches, self.workers, sampler=steps, pin_memory=self.pin_memory)
        return _run(loader, self._bad)

    def _stream_epoch(self, stream: StreamSet, epoch: int, start_step: int) -> Iterator[Batch]:
        step = 0
        for lap in count():
            first, draw = step, (self.seed, epoch + lap * 1_000_000)
            source = stream.open(
                training=True, seed=self.seed, epoch=draw[1], batch_size=self.batch_size, workers=self.workers
            )
            batches = _StreamBatches(source, self.transform, self.batch_size, draw, start_step - first)
            loader = _loader(batches, self.workers, generator=_generator(*draw), pin_memory=self.pin_memory)
            for batch in _run(loader, self._bad, keep_empty=True):
                step += 1
                if step > start_step:
                    yield batch
                if step == self.steps_per_epoch:
                    return
            if step == first:
                raise ValueError(
                    f"--data {stream.spec} gave process {self.rank} of {self.world_size} no batch of "
                    f"{self.batch_size}: make more shards than there are processes and workers, or lower --batch-size."
                )
            _logger.warning("%s gave %d of %d batches: it is read again", stream.spec, step, self.steps_per_epoch)


def eval_batches(
    dataset: ImageSet | StreamSet,
    transform: Transform | PairTransform,
    batch_size: int,
    workers: int = 0,
    max_bad_share: float = 0.01,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """All images once, in order; the last batch may be smaller. Of several ranks each takes every so many-th image.

    An unreadable image is named in a warning of the logger "slicevit" and left out. (A `StreamSet` keeps its
    order with 0 or 1 workers alone, and its unreadable images are the reader's to skip.)

    Yields:
        images_BCHW, float32, and targets_B, int64.

    Raises:
        ValueError: if more than `max_bad_share` of the images are unreadable.
    """
    bad = _BadImages(dataset, max_bad_share, "left out")
    if isinstance(dataset, StreamSet):
        source = dataset.open(workers=workers)
        return _run(_loader(_StreamBatches(source, transform, batch_size), workers), bad)
    share = range(rank, len(dataset), world_size)
    batches = _EvalBatches(dataset, transform, [share[i : i + batch_size] for i in range(0, len(share), batch_size)])
    return _run(_loader(batches, workers, sampler=range(len(batches.shares))), bad)


class _BadImages:
    """The unreadable images met so far: index -> name and reason."""

    def __init__(self, dataset: ImageSet | StreamSet, max_share: float, fate: str):
        self.known: dict[int, str] = {}
        self.limit = int(max_share * len(dataset))
        self._max_share = max_share
        self._fate = fate
        self._spec = dataset.spec
        self._images = len(dataset)

    def add(self, found: dict[int, str]) -> None:
        """Logs the newly found ones, once each, and raises the ValueError when they are too many."""
        new = {index: reason for index, reason in found.items() if index not in self.known}
        self.known.update(new)
        if len(self.known) > self.limit:
            examples = "; ".join(list(self.known.values())[:3])
            share = len(self.known) / self._images
            raise ValueError(
                f"--data {self._spec}: {len(self.known)} or more of its {self._images} images cannot be read "
                f"({share:.2%}, above the {self._max_share:.2%} allowed), such as {examples}. "
                "Restore or delete these files, or raise --max-bad-share."
            )
        if new:
            _logger.warning("unreadable, %s: %s", self._fate, "; ".join(dict.fromkeys(new.values())))


class _TrainBatches(Dataset):
    """By step: images_BCHW, targets_B, and the unreadable images met on the way."""

    def __init__(self, loader: TrainLoader, dataset: ImageSet, bad: _BadImages, order_N: Tensor, epoch: int):
        self._dataset = dataset
        self._transform = loader.transform
        self._batch_size = loader.batch_size
        self._repeats = loader.repeats
        self._rank, self._world_size = loader.rank, loader.world_size
        self._draw = (loader.seed, epoch)
        self._order_N = order_N
        self._bad = dict(bad.known)
        self._bad_limit = bad.limit

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, dict[int, str]]:
        samples: list[tuple[Tensor, Any]] = []
        found: dict[int, str] = {}
        with _own_randomness():
            for place in range(step * self._batch_size, (step + 1) * self._batch_size):
                slot, repeat = divmod(place * self._world_size + self._rank, self._repeats)
                index = int(self._order_N[slot])
                loaded = self._next_readable(index, found)
                if loaded is None:  # too many are unreadable: the main process, told of them, ends the run
                    return *_stack([]), found
                image, target = loaded
                _seed(*self._draw, index, repeat)
                samples.append(_sample(self._transform, image, target))
        return *_stack(samples), found

    def _next_readable(self, index: int, found: dict[int, str]) -> tuple[Image.Image, Any] | None:
        while len(self._bad) <= self._bad_limit:
            if index not in self._bad:
                try:
                    return self._dataset.load(index)
                except UnreadableImageError as error:
                    self._bad[index] = found[index] = str(error)
            index = (index + 1) % len(self._dataset)
        return None


class _EvalBatches(Dataset):
    """By the number of the batch: images_BCHW, targets_B, and the unreadable images left out."""

    def __init__(self, dataset: ImageSet, transform: Transform | PairTransform, shares: list[range]):
        self._dataset = dataset
        self._transform = transform
        self.shares = shares

    def __getitem__(self, batch: int) -> tuple[Tensor, Tensor, dict[int, str]]:
        samples: list[tuple[Tensor, Any]] = []
        found: dict[int, str] = {}
        for index in self.shares[batch]:
            try:
                image, target = self._dataset.load(index)
            except UnreadableImageError as error:
                found[index] = str(error)
            else:
                samples.append(_sample(self._transform, image, target))
        return *_stack(samples), found


class _StreamBatches(IterableDataset):
    """A worker's batches of a stream: augmented from `draw` and full for training, as they come without it.

    The loader takes batches from the workers in turn, so that the skipped steps must come out too, empty.
    """

    def __init__(
        self,
        source: Any,
        transform: Any,
        batch_size: int,
        draw: tuple[int, int] | None = None,
        start_step: int = 0,
    ):
        self._source = source
        self._transform = transform
        self._batch_size = batch_size
        self._draw = draw
        self._start_step = start_step

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, dict[int, str]]]:
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        stream = iter(self._source)
        step = worker_id
        while sources := list(islice(stream, self._batch_size)):
            if self._draw and len(sources) < self._batch_size:
                return
            if step < self._start_step:
                yield *_stack([]), {}
            else:
                yield *_stack(self._transformed(sources, step)), {}
            step += workers

    def _transformed(self, sources: list[tuple[Image.Image, int]], step: int) -> list[tuple[Tensor, int]]:
        with _own_randomness():
            samples = []
            for place, (image, target) in enumerate(sources):
                if self._draw:
                    _seed(*self._draw, step, place)
                samples.append((self._transform(image), target))
        return samples


def _sample(transform: Any, image: Image.Image, target: Any) -> tuple[Tensor, Any]:
    """What `transform` makes of an image; of an image with its mask or boxes, where its target is that."""
    return transform(image, target) if isinstance(target, (Image.Image, Boxes)) else (transform(image), target)


def _stack(samples: list[tuple[Tensor, Any]]) -> Batch:
    if not samples:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(targets) if isinstance(targets[0], Tensor) else torch.tensor(targets)


def _loader(batches: Dataset, workers: int, **options: Any) -> DataLoader:
    # a generator of its own, because DataLoader else draws its workers' seed from the caller's
    options.setdefault("generator", torch.Generator())
    return DataLoader(batches, batch_size=None, num_workers=workers, worker_init_fn=ignore_signals, **options)


def _run(loader: DataLoader, bad: _BadImages, keep_empty: bool = False) -> Iterator[Batch]:
    iterator = iter(loader)
    try:
        for images_BCHW, targets_B, found in iterator:
            bad.add(found)
            if len(targets_B) or keep_empty:
                yield images_BCHW, targets_B
    finally:
        del iterator  # ends the worker processes now, even while an error's traceback still holds this frame


def ignore_signals(worker_id: int = 0) -> None:
    """In a worker process: a signal to the whole process group is the parent's to answer."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def _hash64(*numbers: int) -> int:
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(_hash64(*numbers) >> 1)


def _seed(*numbers: int) -> None:
    """Seeds the global generators that transforms draw from. (torch.manual_seed would seed GPUs too.)"""
    value = _hash64(*numbers)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.default_generator.manual_seed(value >> 1)


@contextmanager
def _restored_randomness() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _own_randomness() -> Any:
    """In the caller's process, puts the global generators back afterwards; a worker's are its own."""
    return nullcontext() if get_worker_info() else _restored_randomness()
