"""Opening a data set by name: the bundled one, a folder, or any timm data set string.

Legend of axis names: N images, H height, W width.
"""

from __future__ import annotations

import importlib.util
import logging
import lzma
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image
from timm.data import create_dataset

from slicevit.reasons import one_line

from .clips import clip_source, open_clips
from .folders import open_labelled, open_unlabelled
from .image_set import IMAGE_MODES, ImageSet, UnreadableImageError
from .shards import warn_of_cut_shards
from .subset import of_classes, take_classes

_logger = logging.getLogger("slicevit")

__all__ = ["BUNDLED", "ImageSet", "StreamSet", "UnreadableImageError", "open_dataset"]

BUNDLED = "fashion-mnist"
FASHION_CLASSES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
FASHION_FOLDER = Path(__file__).parent / "fashion"

_TIMM_SPLITS = {"train": ("train",), "val": ("validation", "val", "test")}
# the module that timm imports for a prefix, and what installs it
_TIMM_NEEDS = {
    "torch": ("torchvision", "torchvision"),
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
    "wds": ("webdataset", "webdataset"),
}
_STREAMED = ("hfids", "tfds", "wds")
_SPECS = f"'{BUNDLED}', a folder that holds train/ and val/, a timm string (hfds/…, wds/…, torch/…) or clips:FOLDER"


class _BundledSet(ImageSet):
    def __init__(self, split: str, in_chans: int):
        super().__init__(BUNDLED, split, in_chans, FASHION_CLASSES, len(FASHION_CLASSES))
        self._images_NHW = _read_idx(FASHION_FOLDER / f"{split}-images.idx.xz")
        self._targets_N = _read_idx(FASHION_FOLDER / f"{split}-labels.idx.xz")

    def __len__(self) -> int:
        return len(self._targets_N)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._images_NHW[index]).convert(self._mode), int(self._targets_N[index])

    def targets(self) -> np.ndarray:
        return self._targets_N


@lru_cache
def _read_idx(path: Path) -> np.ndarray:
    """The array of uint8 in an IDX file compressed with xz."""
    content = lzma.decompress(path.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">u4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


class _TorchvisionSet(ImageSet):
    def __init__(self, spec: str, split: str, in_chans: int, source: Any):
        classes = [name if isinstance(name, str) else ", ".join(name) for name in source.classes]
        super().__init__(spec, split, in_chans, classes, len(classes))
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        image, target = self._source[index]
        return image.convert(self._mode), int(target)

    def targets(self) -> np.ndarray:
        known = getattr(self._source, "targets", None)
        return super().targets() if known is None else np.asarray(known)


class _ReaderSet(ImageSet):
    """A map-style timm reader, without timm's own silent skipping of unreadable images."""

    def __init__(self, spec: str, split: str, in_chans: int, reader: Any):
        classes = list(reader.class_to_idx) or None
        num_classes = len(classes) if classes else 1 + max(reader.iter_targets())
        super().__init__(spec, split, in_chans, classes, num_classes)
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        stream, target = self._reader[index]
        with stream, Image.open(stream) as image:
            return image.convert(self._mode), int(target)

    def targets(self) -> np.ndarray:
        return np.array(list(self._reader.iter_targets()))


class StreamSet:
    """A timm data set that can only be read in order (wds/, tfds/, hfids/).

    Attributes:
        spec, split, classes: as those of `ImageSet`.
        num_classes: how many classes there are; 0 when the source does not say, as webdataset's do not.
    """

    def __init__(self, spec: str, split: str, root: str | None, in_chans: int):
        self.spec = spec
        self.split = split
        self._root = root
        self._mode = IMAGE_MODES[in_chans]
        reader = self.open().reader
        self._length = int(reader.num_samples)
        self.classes: list[str] | None = list(reader.class_to_idx) or None
        self.num_classes = len(reader.class_to_idx)
        if _timm_prefix(spec) == "wds":
            warn_of_cut_shards(reader.root, reader.split_info.filenames)

    def __len__(self) -> int:
        """How many images the source says it has."""
        return self._length

    def open(
        self, *, training: bool = False, seed: int = 0, epoch: int = 0, batch_size: int = 1, workers: int = 0
    ) -> Any:
        """A fresh `timm.data.IterableImageDataset` of (PIL image, class index), at its beginning.

        Args:
            training: shuffled and repeated by timm's reader, from (seed, epoch), if true; else in order.
            batch_size, workers: as of the loader that reads it; timm shares the images out by them.
        """
        options: dict[str, Any] = {"is_training": training, "seed": seed, "batch_size": batch_size}
        dataset = _create_timm(self.spec, self.split, self._root, input_img_mode=self._mode, **options)
        dataset.set_loader_cfg(num_workers=workers)
        dataset.set_epoch(epoch)
        return dataset

    def check_complete(self, images: int, max_bad_share: float) -> None:
        """Compare how many images a whole pass gave, on all ranks, with how many the source says it has.

        A few that are missing are named in a warning of the logger "slicevit". Raises ValueError when they are more
        than `max_bad_share` of all.
        """
        missing = len(self) - images
        if missing > int(max_bad_share * len(self)):
            raise ValueError(
                f"--data {self.spec}: {missing} of the {len(self)} images of its {self.split} split did not come "
                f"({missing / len(self):.2%}, above the {max_bad_share:.2%} allowed): restore the shards that are "
                "missing or cut short, correct the number of images in --data, or raise --max-bad-share."
            )
        if missing > 0:
            _logger.warning("%s: %d of its %d %s images did not come", self.spec, missing, len(self), self.split)


def open_dataset(
    spec: str, split: str, *, root: str | None = None, in_chans: int = 3, labels: bool = True
) -> ImageSet | StreamSet:
    """Opens one split of a data set.

    Args:
        spec: one of
            - "fashion-mnist": the bundled part of Fashion-MNIST, 20,000 and 5,000 gray images of 28 x 28;
            - a folder that holds train/ and val/ (or validation/ or test/), each with a folder a class;
              the classes are numbered in timm's natural order of their names;
            - a timm data set string: "hfds/…", "torch/…", "wds/…", "tfds/…" or "hfids/…". What follows a "?"
              goes to timm's reader ("hfds/uoft-cs/cifar100?input_key=img&target_key=fine_label",
              "torch/cifar10?download=1"), except `train=` and `val=`, which name the source's own splits
              ("wds/shards?train=train-{000..009}.tar|10000&val=val-000.tar|1000");
            - "clips:FOLDER" or "ucf101:FOLDER": video clips, as the frames that stand for them (see
              `slicevit.data.clips.open_clips`).
            "?classes=" after any but a stream (or "&classes=" after other keys) takes some classes alone, numbered
            anew in the order given: names, and slices of their numbers ("fashion-mnist?classes=0:5,Bag").
        split: "train" or "val".
        root: timm's root folder, for timm strings alone.
        in_chans: 3 for RGB images, 1 for gray.
        labels: false for images alone: a folder then needs no class folders, train/ or val/ (see
            `slicevit.data.folders.open_unlabelled`); other sets give their classes nonetheless.

    Returns:
        A `StreamSet` for wds/, tfds/ and hfids/, else an `ImageSet`.

    Raises:
        ValueError: if there is no such data set or split, if train and val have different classes, if there
            are no images, or if a package is missing. The message says what to do.
    """
    if split not in _TIMM_SPLITS:
        raise ValueError(f"split must be 'train' or 'val', not {split!r}.")
    if in_chans not in IMAGE_MODES:
        raise ValueError(f"--in-chans {in_chans}: images are read with 1 (gray) or 3 (RGB) channels.")
    whole, chosen = take_classes(spec)
    dataset = _open_whole(whole, split, root, in_chans, labels)
    if chosen is None:
        return dataset
    if isinstance(dataset, StreamSet):
        raise ValueError(f"--data {spec}: a stream can only be read whole: leave out classes=")
    return of_classes(dataset, chosen, spec)


def _open_whole(spec: str, split: str, root: str | None, in_chans: int, labels: bool) -> ImageSet | StreamSet:
    if spec == BUNDLED:
        return _BundledSet(split, in_chans)
    prefix = _timm_prefix(spec)
    if prefix in _STREAMED:
        return StreamSet(spec, split, root, in_chans)
    if prefix == "torch":
        return _TorchvisionSet(spec, split, in_chans, _create_timm(spec, split, root))
    if prefix == "hfds":
        return _ReaderSet(spec, split, in_chans, _create_timm(spec, split, root).reader)
    if clip_source(spec):
        return open_clips(spec, split, in_chans)
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--data {spec}: no such folder or data set; give {_SPECS}.")
    return (open_labelled if labels else open_unlabelled)(spec, split, in_chans, folder)


def _timm_prefix(spec: str) -> str | None:
    prefix, slash, _ = spec.partition("/")
    return prefix.lower() if slash and prefix.lower() in _TIMM_NEEDS else None


def _create_timm(spec: str, split: str, root: str | None, **options: Any) -> Any:
    """timm's own data set of `spec`, at the first of the names that its source may have given `split`."""
    name, _, query = spec.partition("?")
    prefix = name.partition("/")[0].lower()
    module, packages = _TIMM_NEEDS[prefix]
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"--data {spec} needs a package that is not installed: pip install {packages}")
    arguments: dict[str, Any] = {key: int(text) if text.isdigit() else text for key, text in parse_qsl(query)}
    split_names = {key: (arguments.pop(key),) for key in _TIMM_SPLITS if key in arguments}
    tried = split_names.get(split, _TIMM_SPLITS[split])
    if prefix == "wds" and root is None:
        root = name.partition("/")[2]
    if prefix == "torch" and root is None:
        raise ValueError(f"--data {spec} needs --data-root, the folder that torchvision reads it from")
    reasons = []
    for split_name in tried:
        try:
            return create_dataset(name, root=root, split=split_name, **options, **arguments)
        except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            reasons.append(one_line(error))
    raise ValueError(
        f"--data {spec}: timm could not open its {split} split, tried as {', '.join(tried)}: "
        f"{'; '.join(dict.fromkeys(reasons))}. "
        f"Check the name and --data-root{f' {root}' if root else ''}; name another split with '?{split}=…', "
        "and the source's columns with '?input_key=…&target_key=…'."
    )
