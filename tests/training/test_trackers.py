"""Figures go to TensorBoard by default, to other trackers when asked, from one place."""

from __future__ import annotations

import csv
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slicevit import cli
from slicevit.training import runs
from slicevit.training.config import TrainConfig

SMALL: dict[str, Any] = {
    "img_size": 28, "patch_size": 14, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2,
}  # fmt: skip


def config(**changes: Any) -> TrainConfig:
    options: dict[str, Any] = {"model": "vit_tiny_patch16_224", "model_args": SMALL, "grid": "1/2:1:1/2", "crop": "pad"}
    return TrainConfig(**(options | {"epochs": 0.2, "batch_size": 200, "eval_batch_size": 5000} | changes))


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[dict[str, str]]:
    monkeypatch.setattr("slicevit.training.loop.LATENCY_SECONDS", 0.01)
    runs.start(config(**changes), folder, Console(quiet=True))
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_tensorboard_holds_what_metrics_csv_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = train(tmp_path, monkeypatch)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for row in rows:
        for name in ("top1", "top5", "loss"):
            (event,) = events.Scalars(f"{name}/{row['width']}")
            assert event.step == int(row["step"]) == 20
            assert event.value == pytest.approx(float(row[name]), rel=1e-6)
        assert [event.step for event in events.Scalars(f"train_loss/{row['width']}")] == [1, 11]
    assert 0 < events.Scalars("data_wait")[0].value < 1
    assert events.Scalars("lr")[0].value == pytest.approx(float(rows[0]["lr"]))


def test_no_tracker_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, monkeypatch, log_with=())
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_is_told_the_run_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []
    settings: dict[str, Any] = {}
    wandb: Any = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    run = types.SimpleNamespace(
        config=settings, log=lambda values, step: logged.append((step, values)), finish=lambda: None
    )
    wandb.init = lambda **options: started.append(options) or run
    wandb.config = types.SimpleNamespace(update=lambda values, **options: settings.update(values))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):
        rows = train(tmp_path / "run", monkeypatch, log_with=("wandb",))
        for left in (tmp_path / "run").iterdir():
            left.unlink()
    assert started[0]["project"] == "slicevit"
    assert started[0]["name"] == "run"
    assert started[0]["id"] == started[1]["id"]
    assert settings["batch_size"] == 200
    assert (20, float(rows[-1]["top1"])) in [(step, values.get("top1/1")) for step, values in logged]


def test_a_tracker_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--log-with", "mlflow", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("slicevit: --log-with mlflow")
    assert "pip install" in said
    assert not (tmp_path / "run").exists()
