"""Shards that are cut short, whose last images webdataset leaves out without a word."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

_logger = logging.getLogger("slicevit")
_END_OF_TAR = bytes(1024)


def warn_of_cut_shards(root: str, names: Iterable[str]) -> None:
    """Names the .tar files below `root` that do not end as an archive does."""
    paths = (Path(root, name) for name in names)
    cut = [path.name for path in paths if path.suffix == ".tar" and path.is_file() and not _has_end(path)]
    if cut:
        _logger.warning(
            "%s: cut short or no archive: %s%s; what they lost is left out, copy them again",
            root,
            ", ".join(cut[:3]),
            f" and {len(cut) - 3} more" if len(cut) > 3 else "",
        )


def _has_end(path: Path) -> bool:
    """Whether a file ends with the two blocks of zeros of a tar archive."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(_END_OF_TAR)))
        return file.read() == _END_OF_TAR
