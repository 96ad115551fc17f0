"""Tiny images with masks, and `slicevit segment` in the test's own process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mask_files import write_pairs
from segmenting import FLAGS, MODEL_FLAGS

from slicevit import cli

Segment = Callable[..., None]


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    """On one thread: runs and slices are compared bit for bit."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), {"train": 16, "val": 4, "test": 5})


@pytest.fixture
def segment(data: Path, monkeypatch: pytest.MonkeyPatch) -> Segment:
    """`slicevit segment` on `data` with these flags beside the usual ones; without --init on a new small ViT."""
    monkeypatch.setattr("slicevit.training.loop.LATENCY_SECONDS", 0.01)

    def call(out: Path, *flags: object) -> None:
        model = [] if "--init" in flags else MODEL_FLAGS
        cli.main(["segment", "--data", str(data), "--out", str(out), *FLAGS, *model, *map(str, flags)])

    return call


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter of four widths that has learned its images."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slicevit.training.loop.LATENCY_SECONDS", 0.01)
        names = ("--epochs", "8", "--class-names", "sky", "sea", "land")
        cli.main(["segment", "--data", str(data), "--out", str(run), *FLAGS, *MODEL_FLAGS, *names])
    return run


@pytest.fixture
def trained(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to change or to break."""
    monkeypatch.setattr("slicevit.training.loop.LATENCY_SECONDS", 0.01)
    return Path(shutil.copytree(finished, tmp_path / "tiny"))
