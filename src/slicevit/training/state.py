"""A run's checkpoint: all that resuming needs, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from slicevit.reasons import one_line

CHECKPOINT = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict[str, Any], command: str = "train") -> None:
    """Write checkpoint.pt beside the old one, flush it to the disk, then put it in its place.

    `command` is the sub-command that resumes the run.

    Raises ValueError naming the file when the disk is full or not writable; the old checkpoint stays.
    """
    path = folder / CHECKPOINT
    temporary = folder / f".{CHECKPOINT}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"{path} cannot be written ({_reason(error)}): what was saved before is kept; make room and run "
            f"slicevit {command} --resume {folder}"
        ) from None


def _reason(error: BaseException | None) -> str:
    """What the system said; torch raises its own error over the one of a full disk."""
    first = str(error).splitlines()[0]
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        error = error.__cause__ or error.__context__
    return first


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote, or None where there is none yet. Raises ValueError when it is broken."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= {"step", "model", "ema", "optimizer", "losses"}:
            raise ValueError("it holds no run's state")
        return state
    except Exception as error:  # torch and zipfile raise many kinds for a broken file
        raise ValueError(f"{path} is broken ({one_line(error, 120)}): delete it to start again") from None


def claim(folder: Path) -> bool:
    """Whether this process is the first of those left after one was lost; the next start sweeps the mark away."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / ".lost.tmp").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a full disk: better said twice than not at all
        return True
    return True
