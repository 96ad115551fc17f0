"""What a run's folder says when it is gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from slicevit.training import runs
from slicevit.training.config import TrainConfig
from slicevit.version import versions


def test_other_versions_are_said_and_do_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("slicevit.training.loop.LATENCY_SECONDS", 0.01)
    args = {"img_size": 28, "patch_size": 14, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    config = TrainConfig(
        model_args=args, grid="1:1:1", crop="pad", epochs=0.05, batch_size=200, eval_batch_size=5000, log_with=()
    )
    runs.start(config, tmp_path, Console(quiet=True))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["versions"] == versions()
    runs.resume(tmp_path, Console(quiet=True))
    assert not caplog.records
    torch.save(state | {"versions": state["versions"] | {"torch": "2.11.0"}}, tmp_path / "checkpoint.pt")
    runs.resume(tmp_path, Console(quiet=True))
    assert [record.message for record in caplog.records] == [
        f"{tmp_path} was begun with torch 2.11.0: its end may differ in the last bits"
    ]
