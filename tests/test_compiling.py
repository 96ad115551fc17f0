"""torch.compile by repeated block: what is compiled, how often, and that it computes the same.

The backend is "aot_eager", which traces and differentiates as the default one does and needs no C++ compiler.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import slicevit
from slicevit.compiling import repeated_blocks

SMALL: dict[str, Any] = {
    "img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 10,
}  # fmt: skip

# dynamo looks at .grad of activations and hides the warning itself, which warnings as errors forestall
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small(grid: str = "1/4:1:1/4", **kwargs: Any) -> slicevit.ElasticModel:
    torch.manual_seed(0)
    return slicevit.create_model("vit_tiny_patch16_224", grid, **SMALL, **kwargs)


def gradients(model: slicevit.ElasticModel, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for width in model.widths[::-1]:
        with model.backward_at(width) as net:
            net(images).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_width_is_compiled_once_whatever_the_depth_and_nothing_falls_back() -> None:
    model, images = small("1/4:1:1/16"), torch.randn(4, 1, 28, 28)
    assert len(model.widths) == 13
    model.compile_blocks(backend="aot_eager")
    for _ in range(2):
        gradients(model, images)
    assert counters["stats"]["unique_graphs"] == 13
    assert not counters["graph_break"]


def test_stochastic_depth_has_one_program_a_width_too() -> None:
    """timm's blocks have a rate each, and the first none."""
    model, images = small(drop_path_rate=0.3), torch.randn(4, 1, 28, 28)
    model.compile_blocks(backend="aot_eager")
    gradients(model, images)
    assert counters["stats"]["unique_graphs"] == len(model.widths)
    assert not counters["graph_break"]


def test_compiled_stochastic_depth_drops_whole_paths_at_the_rate_of_the_block() -> None:
    model = small(drop_path_rate=0.5)
    model.compile_blocks(backend="aot_eager")
    rates = []
    for block in model.blocks:
        x = torch.ones(4000, 2, 3)
        dropped = block.drop_path1(x)
        assert torch.equal(dropped, dropped[:, :1, :1].expand_as(x))
        kept = dropped[:, 0, 0] != 0
        rates.append(1 - kept.float().mean().item())
        torch.testing.assert_close(dropped[kept][0, 0, 0].item(), 1 / (1 - block.drop_path1.drop_prob))
    assert rates == pytest.approx([0.0, 0.25, 0.5], abs=0.05)
    assert torch.equal(model.eval().blocks[2].drop_path1(x), x)


def test_compiled_gradients_are_the_eager_ones() -> None:
    model, images = small(), torch.randn(4, 1, 28, 28)
    eager = gradients(model, images)
    model.compile_blocks(backend="aot_eager")
    for name, gradient in gradients(model, images).items():
        torch.testing.assert_close(gradient, eager[name], rtol=1e-4, atol=1e-6)
    for width in model.widths:
        torch.testing.assert_close(model(images, width=width), model.to_timm(width)(images), rtol=1e-4, atol=1e-5)


def test_subnets_and_copies_stay_plain() -> None:
    model, images = small(), torch.randn(4, 1, 28, 28)
    model.compile_blocks(backend="aot_eager")
    with torch.inference_mode():
        model.eval().subnet("1/2")(images)
        model.to_timm("1/4")(images)
        copy.deepcopy(model)(images, width="1/2")
    assert counters["stats"]["unique_graphs"] == 0


def test_another_grid_is_compiled_too() -> None:
    model, images = small(), torch.randn(4, 1, 28, 28)
    model.compile_blocks(backend="aot_eager")
    gradients(model, images)
    model.set_grid("1/4:1:1/8")
    gradients(model, images)
    assert counters["stats"]["unique_graphs"] == 7


def test_a_grid_that_becomes_much_finer_is_compiled_too() -> None:
    model, images = small("1/2:1:1/2"), torch.randn(4, 1, 28, 28)
    model.compile_blocks(backend="aot_eager")
    gradients(model, images)
    model.set_grid("1/4:1:1/16")
    gradients(model, images)
    assert counters["stats"]["unique_graphs"] == 13
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("vit_tiny_patch16_224", 12),
        ("swin_tiny_patch4_window7_224", 12),
        ("pvt_v2_b0", 8),
        ("eva02_tiny_patch14_224", 12),
    ],
)
def test_repeated_blocks_of_a_family(name: str, blocks: int) -> None:
    found = repeated_blocks(slicevit.create_model(name, "1/2:1:1/2")._full)
    assert len(found) == blocks
    assert all(hasattr(block, "attn") for block in found)
