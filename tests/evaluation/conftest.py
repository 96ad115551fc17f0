from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_runs import write_run

from slicevit.evaluation.frontier import RunRecord, load_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunRecord]:
    """A function that writes a run's folder (see `write_run`) under a name and loads it."""

    def make(name: str, **options: Any) -> RunRecord:
        write_run(tmp_path / name, **options)
        return load_run(tmp_path / name)

    return make
