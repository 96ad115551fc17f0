"""What only a GPU can show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from slicevit.training.config import TrainConfig
from slicevit.training.loop import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("compiled", [False, True])
def test_no_step_waits_for_the_device(compiled: bool, tmp_path: Path) -> None:
    """After the first steps, which fill caches and compile, a step holds nothing that makes the host wait."""
    config = TrainConfig(
        model_args={"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 128, "depth": 2, "num_heads": 4},
        grid="1/4:1:1/4",
        batch_size=64,
        amp="bf16",
        compile=compiled,
        mixup=0.8,
        smoothing=0.1,
        clip_grad=1.0,
        device="cuda",
    )
    run = Run(config, tmp_path / "run", Console(quiet=True))
    batch = next(run._batches(0))
    for _ in range(3):
        run.train_step(*batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run.train_step(*batch)
            run.monitor.lagged_bad_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
