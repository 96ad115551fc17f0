"""Files: written so that a reader finds the old one or the new one, never half of one; and what tells two apart."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` when the block ends without an error.

    Folders on the way are made. After an error the temporary file is gone and `path` is as it was.
    Raises ValueError naming `path` when the disk does not take it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror or error}): what it held is kept") from None
    finally:
        temporary.unlink(missing_ok=True)


def files_digest(*paths: Path) -> str:
    """SHA-256 of what the files hold, one after another. Raises OSError when one cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text in one step (see `replacing`); line ends are written as they are."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())
