"""Folders of images: with a folder a class, or without classes.

Legend of axis names: N images.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torchvision.datasets.folder import make_dataset

from .image_set import ImageSet
from .walk import image_paths, is_image

HELD_OUT = 20  # where images without classes have no val/, one in so many is kept for validation
_FOLDER_NAMES = {"train": ("train",), "val": ("val", "validation", "test")}


class FolderSet(ImageSet):
    """Image files with a class index each."""

    def __init__(
        self, spec: str, split: str, in_chans: int, files: list[tuple[str, int]], classes: list[str] | None = None
    ):
        super().__init__(spec, split, in_chans, classes, len(classes or ()))
        # arrays, not lists of objects: a worker that touches them copies nothing, and they pickle compactly
        self._paths_N = np.array([os.fsencode(path) for path, _ in files])
        self._targets_N = np.array([target for _, target in files])

    def __len__(self) -> int:
        return len(self._targets_N)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.name(index)) as image:
            return image.convert(self._mode), int(self._targets_N[index])

    def name(self, index: int) -> str:
        return os.fsdecode(self._paths_N[index])

    def targets(self) -> np.ndarray:
        return self._targets_N


def open_labelled(
    spec: str, split: str, in_chans: int, folder: Path, endings: tuple[str, ...] | None = None
) -> FolderSet:
    """The images of `split` in class folders, which may hold them at any depth; `endings` are timm's by default.

    Raises ValueError when a folder is missing, there are no images, or train and val have different classes.
    """
    train_folder = _split_folder(spec, folder, "train")
    classes = _class_folders(spec, train_folder)
    endings = endings or get_img_extensions()
    if split == "train":
        return _labelled(spec, split, in_chans, train_folder, classes, endings)
    val_folder = _split_folder(spec, folder, "val")
    val_classes = _class_folders(spec, val_folder)
    if val_classes != classes:
        raise ValueError(
            f"--data {spec}: {train_folder} and {val_folder} must hold the same class folders; "
            f"only in train: {_some(set(classes) - set(val_classes))}; "
            f"only in val: {_some(set(val_classes) - set(classes))}. "
            "Rename, add or remove folders until they match."
        )
    return _labelled(spec, split, in_chans, val_folder, classes, endings)


def open_unlabelled(spec: str, split: str, in_chans: int, folder: Path) -> FolderSet:
    """The images of `split` at any depth, in natural order of their paths, without classes.

    They are those below train/ and val/ (or validation/ or test/) where the folder has them. Without val/, one in
    `HELD_OUT` of all others, evenly spaced and at least one, is kept for validation. Without train/ all images below
    the folder are taken. What begins with a dot is left out. Raises ValueError when a split has no images.
    """
    train_folder = _find_split(folder, "train")
    val_folder = _find_split(folder, "val") if train_folder else None
    if val_folder is not None:
        wanted = val_folder if split == "val" else train_folder
        paths = _below(wanted or folder)
    else:
        wanted = train_folder or folder
        paths = _below(wanted)
        held = set(paths[HELD_OUT // 2 :: HELD_OUT] or paths[-1:])
        paths = [path for path in paths if (path in held) == (split == "val")]
    if not paths:
        raise ValueError(
            f"--data {spec}: no images for {split} below {wanted}: put files ending in "
            f"{', '.join(get_img_extensions())} there, at least two."
        )
    return FolderSet(spec, split, in_chans, [(path, 0) for path in paths])


def _below(folder: Path) -> list[str]:
    return [os.path.join(folder, path) for path in image_paths(folder, get_img_extensions())]


def _labelled(
    spec: str, split: str, in_chans: int, folder: Path, classes: list[str], endings: tuple[str, ...]
) -> FolderSet:
    class_to_index = {name: index for index, name in enumerate(classes)}
    files = make_dataset(folder, class_to_index, extensions=endings, allow_empty=True)
    if not files:
        raise ValueError(
            f"--data {spec}: no images in the class folders of {folder}: "
            f"put files ending in {', '.join(endings)} there."
        )
    return FolderSet(spec, split, in_chans, files, classes)


def _find_split(folder: Path, split: str) -> Path | None:
    return next((folder / name for name in _FOLDER_NAMES[split] if (folder / name).is_dir()), None)


def _split_folder(spec: str, folder: Path, split: str) -> Path:
    found = _find_split(folder, split)
    if found is not None:
        return found
    names = " or ".join(f"{name}/" for name in _FOLDER_NAMES[split])
    raise ValueError(
        f"--data {spec}: no {names} in {folder}: put the {split} images there, a folder a class.{_advice(folder)}"
    )


def _class_folders(spec: str, folder: Path) -> list[str]:
    """The names of the class folders in timm's order, where names that timm holds equal (a, A) go by code."""
    names = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if not names:
        raise ValueError(
            f"--data {spec}: no class folders in {folder}: put each class's images in its own folder.{_advice(folder)}"
        )
    return sorted(names, key=lambda name: (natural_key(name), name))


def _advice(folder: Path) -> str:
    """What to do with images that have no classes, where `folder` holds such."""
    if any(is_image(entry.name, get_img_extensions()) for entry in folder.iterdir()):
        return " Images without classes are for --teacher NAME --teacher-objective features."
    return ""


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
