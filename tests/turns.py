"""How tests share a machine: a file's go to one worker of pytest-xdist, and those that race a clock run alone, last."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

_RACE_A_CLOCK = {
    *("test_app", "test_batcher", "test_connections", "test_page", "test_serve_command"),  # of a server's deadlines
    *("test_predict_budget", "test_predict_pool", "test_measured", "test_profile", "test_latency"),
}


def wants_quiet(item: pytest.Item) -> bool:
    """Whether a test is one of those that other tests would disturb."""
    return item.path.stem in _RACE_A_CLOCK


def order(item: pytest.Item) -> tuple[bool, bool]:
    """To sort by: the long files first, so that no worker is left alone with one, and the quiet ones last."""
    return wants_quiet(item), item.path.parent.name not in ("training", "tests")


class Files(LoadScopeScheduling):
    """A file's tests stay on one worker, with its fixtures; those that start Ray on the same one, as Ray finds Ray."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "ray" if file.endswith(("/test_ray.py", "/test_predict_ray.py")) else file


@contextmanager
def turn(alone: bool) -> Iterator[None]:
    """Hold the machine, with other workers' tests or alone; whoever wants it alone lets no new test begin."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        yield
        return
    folder = Path(tempfile.gettempdir())
    with open(folder / f"slicevit-{run}.gate", "w") as gate, open(folder / f"slicevit-{run}.machine", "w") as machine:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(machine, fcntl.LOCK_UN)  # for the processes that a test left behind, too
