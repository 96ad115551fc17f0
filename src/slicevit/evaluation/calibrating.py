"""`slicevit calibrate`: BatchNorm statistics of every width of a saved model, from training images.

Legend of axis names: B images of a batch, C channels, H height, W width, N images of the data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from slicevit.calibration import calibrate
from slicevit.checkpoint import from_pretrained, read_config, save_weights
from slicevit.data import ImageSet, StreamSet, Transform, eval_batches, eval_config, eval_transform, open_dataset
from slicevit.data.subset import Subset
from slicevit.data.transforms import PairTransform
from slicevit.elastic import ElasticModel
from slicevit.evaluation.widths import asked_width

IMAGES, BATCH = 2048, 256


def training_batches(
    dataset: ImageSet | StreamSet,
    transform: Transform | PairTransform,
    images: int = IMAGES,
    batch_size: int = BATCH,
    workers: int = 0,
    max_bad_share: float = 0.01,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Batches (B, C, H, W) of `images` training images drawn by `seed`, as `transform` gives them.

    All have `batch_size` images (what does not fill a batch is left out) unless there are fewer in all. Of a stream
    the first images are taken. Raises ValueError when too many are unreadable.
    """
    if isinstance(dataset, ImageSet):
        order_N = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        dataset = Subset(dataset, order_N[:images].numpy())
    batches = eval_batches(dataset, transform, min(batch_size, images), workers, max_bad_share)
    first = True
    for images_BCHW, _ in islice(batches, math.ceil(images / batch_size)):
        if first or len(images_BCHW) == batch_size:
            yield images_BCHW
        first = False


class Source(NamedTuple):
    """A saved model, and the training images that its statistics are taken from, as they are prepared for it."""

    model: ElasticModel
    images: ImageSet | StreamSet
    transform: Transform | PairTransform


def open_classifier(run: Path, data: str | None, data_root: str | None) -> Source:
    """The classifier in `run`, and its training images or those of `data`. Raises ValueError for what cannot be had."""
    config, _ = read_config(run)
    training = config.get("slicevit", {}).get("training", {})
    model = from_pretrained(run)
    require_batch_norm(model, run)
    spec = data or training.get("data")
    if spec is None:
        raise ValueError(f"{run} does not say which data it was trained on: name one with --data")
    transform = eval_config(config)
    root = data_root or training.get("data_root")
    images = open_dataset(spec, "train", root=root, in_chans=transform.in_chans, labels=bool(model.num_classes))
    return Source(model, images, eval_transform(transform))


def require_batch_norm(model: ElasticModel, run: Path) -> None:
    """Raises ValueError when the model in `run` has none."""
    if not model.has_batch_norm:
        raise ValueError(f"{run} has no BatchNorm: its widths need no statistics")


def take_statistics(
    source: Source,
    images: int,
    batch_size: int,
    workers: int,
    max_bad_share: float,
    seed: int,
    widths: Sequence[Fraction] | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Calibrate `widths` (by default all) of the model of `source`; returns how many images it saw.

    `seed` draws the images, and the crops where these have to be cut to one size; the global generator stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batches = training_batches(source.images, source.transform, images, batch_size, workers, max_bad_share, seed)
        return calibrate(source.model, batches, widths, progress)


def calibrate_saved(
    run: Path,
    source: Source,
    widths: tuple[str, ...],
    images: int,
    batch_size: int,
    workers: int,
    max_bad_share: float,
    device: torch.device,
    seed: int,
    progress: Callable[[int], None],
) -> tuple[list[Fraction], int]:
    """Calibrate `widths` (by default all) of the model in `run` and save it; returns them and how many images it took.

    Raises ValueError for images, a width or a number that cannot be had; the run is then as it was.
    """
    for name, value in (("images", images), ("batch-size", batch_size)):
        if value < 2:
            raise ValueError(f"--{name} must be above 1, got {value}")
    model = source.model
    legal = [asked_width(model, width) for width in widths] or list(model.widths)
    model.to(device)
    seen = take_statistics(source, images, batch_size, workers, max_bad_share, seed, legal, progress)
    save_weights(model.to("cpu"), run)
    return legal, seen
