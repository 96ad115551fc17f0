"""Parameters and MACs per width agree with counted ones within 1 % (issue 2, point 8)."""

from __future__ import annotations

import logging
import warnings
from fractions import Fraction
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import slicevit
from slicevit.costs import width_costs

GRID = "1/4:1:1/4"


def test_deit_small_has_the_papers_macs_and_parameters() -> None:
    """4.6 GMACs and 22 M; the four widths apart are 43 M, with the distillation token."""
    model = slicevit.create_model("deit_small_patch16_224", grid=GRID)
    costs = [width_costs(model, width) for width in ("1/4", "1/2", "3/4", "1")]
    assert [round(cost.macs / 1e9, 1) for cost in costs] == [0.4, 1.3, 2.7, 4.6]
    assert [cost.channels for cost in costs] == [96, 192, 288, 384]
    distilled = [cost.params + (1000 + 2) * cost.channels + 1000 for cost in costs]  # its token, position and head
    assert round(distilled[-1] / 1e6) == 22
    assert round(sum(distilled) / 1e6) == 43


def test_mobilenet_v2_has_the_published_costs() -> None:
    """300 M multiply-adds (Sandler et al., CVPR 2018, table 4), and torchvision's parameters."""
    costs = width_costs(slicevit.create_model("mobilenetv2_100", grid=GRID), "1")
    with torch.device("meta"):
        params = sum(parameter.numel() for parameter in torchvision.models.mobilenet_v2().parameters())
    assert (costs.channels, costs.params, costs.macs // 10**6) == (1280, params, 300)


@pytest.mark.parametrize(
    ("name", "pixels", "millions", "gmacs"),
    [("uniformer_small", 224, 22, 3.6), ("uniformer_xs", 192, 16.5, 1.4), ("uniformer_xs", 224, 16.5, 2.0)],
)
def test_uniformers_have_the_published_costs(name: str, pixels: int, millions: float, gmacs: float) -> None:
    """Of github.com/Sense-X/UniFormer, image_classification/README.md, whose fvcore counts norms too."""
    costs = width_costs(slicevit.create_model(name, grid="1/2:1:1/2"), "1", (3, pixels, pixels))
    assert costs.params / 1e6 == pytest.approx(millions, abs=0.5 if millions == 22 else 0.05)
    assert costs.macs / 1e9 == pytest.approx(gmacs, abs=0.07)


# name, arguments, pixels
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("deit_tiny_patch16_224", {"depth": 2, "img_size": 64}, 64),
    ("deit_tiny_distilled_patch16_224", {"depth": 2, "img_size": 64}, 64),
    ("vit_base_patch16_siglip_224", {"depth": 2, "img_size": 64, "embed_dim": 192, "num_heads": 3}, 64),
    ("eva02_tiny_patch14_224", {"depth": 2, "img_size": 56, "num_heads": 3}, 56),
    ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "num_heads": (3, 6), "img_size": 56}, 56),
    ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, 64),
    ("mobilenetv2_100", {}, 64),
    ("uniformer_small", {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 2, 2), "num_heads": (0, 0, 5, 8)}, 64),
    ("uniformer_xs", {"embed_dims": (16, 32, 64, 64), "depths": (1, 1, 2, 2), "num_heads": (0, 0, 4, 4)}, 64),
]


PRODUCTS = {"linear", "conv", "matmul", "addmm", "bmm", "einsum"}


def counted(module: nn.Module, size: int) -> tuple[int, int]:
    """fvcore's MACs: of matrix products and convolutions, and of all that it counts (its norms are the rest)."""
    fvcore = pytest.importorskip("fvcore.nn", reason="counting MACs needs fvcore: pip install 'slicevit[test]'")
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    for layer in module.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = False  # fvcore does not know the fused one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace, under fvcore
        flops = fvcore.FlopCountAnalysis(module.eval(), torch.zeros(1, 3, size, size))
        by_operator = flops.unsupported_ops_warnings(False).tracer_warnings("none").by_operator()
        left_out = {op for op in flops.unsupported_ops() if "mm" in op or "conv" in op or "attention" in op}
    assert not left_out, f"fvcore leaves out {left_out}"
    return sum(by_operator[op] for op in PRODUCTS), sum(by_operator.values())


@pytest.mark.extra
@pytest.mark.parametrize(("name", "kwargs", "size"), CASES, ids=[case[0] for case in CASES])
def test_costs_are_fvcores(name: str, kwargs: dict[str, Any], size: int) -> None:
    model = slicevit.create_model(name, grid=GRID, num_classes=10, **kwargs)
    for width in model.widths:
        alone = model.to_timm(width)
        costs = width_costs(model, width, (3, size, size))
        assert costs.macs == pytest.approx(counted(alone, size)[0], rel=0.01)
        assert costs.params == sum(parameter.numel() for parameter in alone.parameters())


@pytest.mark.extra
@pytest.mark.parametrize("width", ["1/4", "1/2", "3/4", "1"])
def test_a_deit_small_block_is_within_a_per_cent_of_all_that_fvcore_counts(width: str) -> None:
    model = slicevit.create_model("deit_small_patch16_224", grid=GRID, depth=2)
    assert width_costs(model, width).macs == pytest.approx(counted(model.to_timm(width), 224)[1], rel=0.01)


@pytest.mark.parametrize("layout", ["per_head", "flat"])
@pytest.mark.parametrize("scope", ["all", "mlp"])
def test_parameters_are_the_stock_models(layout: str, scope: str) -> None:
    kwargs = {"img_size": 32, "depth": 2, "num_classes": 7}
    model = slicevit.create_model("deit_tiny_patch16_224", grid=GRID, layout=layout, scope=scope, **kwargs)
    for width in model.widths:
        own = {"mlp_ratio": float(4 * width)} if scope == "mlp" else {"embed_dim": int(192 * width)}
        narrow = timm.create_model("deit_tiny_patch16_224", **kwargs | own)
        assert width_costs(model, width).params == sum(p.numel() for p in narrow.parameters())


def test_costs_follow_head_and_input_size() -> None:
    model = slicevit.create_model("deit_tiny_patch16_224", grid=GRID, img_size=32, depth=1, num_classes=10)
    before = width_costs(model, "1/2")
    model.reset_classifier(20)
    assert width_costs(model, "1/2").params - before.params == 10 * (96 + 1)
    assert width_costs(model, "1/2").macs - before.macs == 10 * 96
    model.set_input_size(img_size=64)
    assert width_costs(model, "1/2").macs > 3 * before.macs


def test_counting_leaves_the_model_alone() -> None:
    """No weight is read, nothing drawn, nothing moved; a `meta` model of any size can be counted."""
    model = slicevit.create_model("deit_tiny_patch16_224", grid=GRID, img_size=32, depth=1, num_classes=10).eval()
    x, state = torch.randn(1, 3, 32, 32), torch.get_rng_state()
    before = [model(x, width=width) for width in model.widths]
    for width in model.widths:
        width_costs(model, width)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(model(x, width=w), b) for w, b in zip(model.widths, before, strict=True))


def test_an_illegal_width_has_no_costs() -> None:
    model = slicevit.create_model("deit_tiny_patch16_224", grid=GRID, img_size=32, depth=1)
    with pytest.raises(ValueError, match="3/8"):
        width_costs(model, "3/8")


class _Kept:
    """Distinct storages that autograd keeps for a backward pass, parameters apart, all held alive."""

    def __init__(self, parameters: Any):
        self.skip = {p.untyped_storage().data_ptr() for p in parameters}
        self.tensors: dict[int, torch.Tensor] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in self.skip:
            self.tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


@pytest.mark.parametrize("width", ["1/4", "1/2", "1"])
def test_activation_memory_is_what_autograd_keeps(width: str) -> None:
    """Attention kernels differ by device, hence the wide margin. Weights are no activations."""
    model = slicevit.create_model("deit_tiny_patch16_224", grid=GRID, img_size=64, depth=4, num_classes=10).train()
    alone: nn.Module = model.to_timm(Fraction(width))
    kept = _Kept(alone.parameters())
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
        logits = alone(torch.randn(1, 3, 64, 64))
    assert logits.requires_grad
    assert width_costs(model, width).activations == pytest.approx(kept.bytes, rel=0.25)
