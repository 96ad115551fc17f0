"""The image files below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timm.utils.misc import natural_key


def image_paths(folder: str | Path, endings: tuple[str, ...]) -> list[str]:
    """Paths of the files with these endings, at any depth, relative to `folder`, in natural order of their parts.

    What begins with a dot is left out. Links to folders are followed, and none is visited twice.
    Raises ValueError naming a folder that cannot be listed.
    """
    return sorted(_walk(str(folder), endings), key=_natural)


def _walk(folder: str, endings: tuple[str, ...]) -> Iterator[str]:
    visited = set()
    for here, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        place = os.stat(here)
        if (place.st_dev, place.st_ino) in visited:
            folders.clear()
            continue
        visited.add((place.st_dev, place.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if is_image(name, endings):
                yield os.path.relpath(os.path.join(here, name), folder)


def is_image(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a file's name is that of an image."""
    return not name.startswith(".") and name.lower().endswith(endings)


def _unreadable(error: OSError) -> None:
    raise ValueError(
        f"{error.filename} cannot be listed ({error.strerror}): make it readable, or move it away"
    ) from None


def _natural(path: str) -> list[Any]:
    return [(natural_key(part), part) for part in Path(path).parts]
