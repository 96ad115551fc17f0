"""Ctrl-C and SIGTERM ask a run to save and stop."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A run was stopped by a signal after it saved its state.

    Attributes:
        folder: the run's folder. signum: the signal. exit_status: 128 + the signal's number.

    `command` is the sub-command that resumes it.
    """

    def __init__(self, folder: Path, signum: int, command: str = "train"):
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}; go on with: slicevit {command} --resume {folder}")
        self.folder, self.signum = folder, signum
        self.exit_status = 128 + signum


class StopRequest:
    """Within the block the first SIGINT or SIGTERM only sets `signum`; a second SIGINT acts at once.

    Unless it comes within a second, or the run has several processes: then it is the same request, which the terminal,
    the scheduler and `torchrun` all hand on.
    """

    def __init__(self, several: bool = False) -> None:
        self.signum, self._when, self._several = 0, 0.0, several
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._old[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._when = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self._when > 1 and not self._several:
            raise KeyboardInterrupt
