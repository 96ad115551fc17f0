"""What only a GPU can show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

import slicevit
from slicevit.training.config import TrainConfig
from slicevit.training.graphs import Graphs
from slicevit.training.loop import Run
from slicevit.training.objectives import Objective
from slicevit.training.step import accumulate_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("compiled", "graphs"), [(False, False), (True, False), (False, True), (True, True)])
def test_no_step_waits_for_the_device(compiled: bool, graphs: bool, tmp_path: Path) -> None:
    """After the first steps, which fill caches and compile, a step holds nothing that makes the host wait."""
    config = TrainConfig(
        model_args={"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 128, "depth": 2, "num_heads": 4},
        grid="1/4:1:1/4",
        batch_size=64,
        amp="bf16",
        compile=compiled,
        cuda_graphs=graphs,
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


@pytest.mark.parametrize("compiled", [False, True])
def test_replayed_passes_give_the_gradients_of_launched_ones(compiled: bool) -> None:
    """At every width and call, drop path included, while the weights move."""
    torch.manual_seed(0)
    model = slicevit.create_model(
        "vit_tiny_patch16_224", grid="1/4:1:1/4", img_size=32, depth=2, num_classes=5, drop_path_rate=0.2
    )
    model.cuda().train()
    if compiled:
        model.compile_blocks()
    images, targets = torch.randn(8, 3, 32, 32, device="cuda"), torch.randint(5, (8,), device="cuda")
    widths = tuple(reversed(model.widths))
    graphs = Graphs(torch.device("cuda"))
    graphs.hold_gradients(model.parameters())

    def gradients(step: int, graphs: Graphs | None) -> tuple[list[Tensor], list[float]]:
        torch.manual_seed(step)
        model.zero_grad(set_to_none=False)
        losses = accumulate_gradients(
            model, images + step, targets, widths, Objective(), transfer_weight=0.1 * step, graphs=graphs
        )
        return [parameter.grad.clone() for parameter in model.parameters()], [float(loss) for loss in losses.values()]

    for step in range(5):
        launched, losses = gradients(step, None)
        replayed, replayed_losses = gradients(step, graphs)
        assert replayed_losses == pytest.approx(losses, rel=1e-4)
        for one, other in zip(launched, replayed, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), launched, strict=True):
                parameter -= 0.1 * gradient


def test_a_run_with_graphs_learns_what_one_without_learns(tmp_path: Path) -> None:
    """Losses of the last of some steps, replayed for most of them."""
    last = {}
    for graphs in (False, True):
        config = TrainConfig(
            model_args={"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 64, "depth": 2, "num_heads": 4},
            grid="1/4:1:1/4",
            batch_size=64,
            lr=1e-3,
            crop="pad",
            in_memory=True,
            cuda_graphs=graphs,
            device="cuda",
        )
        run = Run(config, tmp_path / str(graphs), Console(quiet=True))
        for batch, _ in zip(run._batches(0), range(12), strict=False):
            run.train_step(*batch)
        last[graphs] = {width: float(total) for width, total in run.monitor.sums.items()}
    assert last[True] == pytest.approx(last[False], rel=1e-3)


def test_compiled_heads_that_are_padded_learn_what_stock_ones_learn() -> None:
    """At widths whose heads are no multiple of 8 channels, in bfloat16, against the eager gradients in float32."""
    torch.manual_seed(0)
    model = slicevit.create_model("vit_tiny_patch16_224", grid="1/4:1:1/16", img_size=32, depth=2, num_classes=5)
    model.cuda().train()
    images = torch.randn(8, 3, 32, 32, device="cuda")

    def gradients(half: bool) -> list[Tensor]:
        model.zero_grad()
        for width in ("5/16", "11/16", "15/16"):
            with model.backward_at(width) as net, torch.autocast("cuda", torch.bfloat16, enabled=half):
                net(images).float().square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    exact, rounded = gradients(False), gradients(True)
    model.compile_blocks()
    for padded, stock, truth in zip(gradients(True), rounded, exact, strict=True):
        assert (padded - truth).norm() <= 1.5 * (stock - truth).norm() + 1e-3 * truth.norm()
