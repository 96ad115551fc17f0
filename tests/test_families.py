"""Architectures outside the table are added in a few lines; what cannot be sliced is refused with a way out."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import pytest
import timm
import torch
from torch import nn

import slicevit
from slicevit import Family, Fused, families, register_family
from slicevit.widths import channels

GRID = "1/4:1:1/4"
WIDTHS = [Fraction(k, 4) for k in range(1, 5)]
Blocks = dict[int, tuple[int, ...]]


@pytest.fixture(autouse=True)
def _own_table(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it; one thread, for bitwise equality."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))


def cut(full: torch.Tensor, shape: torch.Size, blocks: Blocks, trailing: bool) -> torch.Tensor:
    """The index map, stated again: each block of each axis gives its leading or trailing part."""
    index = []
    for axis, (big, small) in enumerate(zip(full.shape, shape, strict=True)):
        count = math.prod(blocks.get(axis, ()))
        b, s = big // count, small // count
        start = b - s if trailing else 0
        index.append(torch.cat([torch.arange(k * b + start, k * b + start + s) for k in range(count)]))
    return full[torch.meshgrid(*index, indexing="ij")]


def check(model: slicevit.ElasticModel, stock: Any, blocks_of: Any, x: torch.Tensor) -> None:
    """Every width holds what the index map says, and computes what the stock narrow model computes."""
    full = {name: torch.arange(value.numel()).view(value.shape) for name, value in model.state_dict().items()}
    full = {name: 0.1 * torch.sin(0.37 * value.float() + len(name)) for name, value in full.items()}
    model.load_state_dict(full)
    model.eval()
    for width in WIDTHS:
        narrow = stock(width).eval()
        state = {
            name: cut(full[name], value.shape, blocks_of(name), trailing=width == WIDTHS[0])
            for name, value in narrow.state_dict().items()
        }
        narrow.load_state_dict(state, strict=True)
        alone = model.to_timm(width)
        for name, value in alone.state_dict().items():
            assert torch.equal(value, state[name]), name
        for logits in (model(x, width=width), model.subnet(width)(x), alone(x)):
            assert torch.equal(logits, narrow(x))


def test_cait_is_added_in_ten_lines() -> None:
    qkv, kv_or_q, inputs = Fused(0, projections=3, heads=True), Fused(0, heads=True), Fused(1, heads=True)
    register_family(
        Family(
            classes=frozenset({"Cait"}),
            scale=lambda model, width: {"embed_dim": channels(width, model.embed_dim)},
            structure={
                "TalkingHeadAttn": {"qkv.weight": qkv, "qkv.bias": qkv, "proj.weight": inputs},
                "ClassAttn": {
                    **{f"{p}.{k}": kv_or_q for p in "qkv" for k in ("weight", "bias")},
                    "proj.weight": inputs,
                },
            },
        )
    )
    heads = 4
    kwargs = {"img_size": 32, "depth": 1, "depth_token_only": 1, "num_heads": heads, "num_classes": 3}

    def stock(width: Fraction) -> nn.Module:
        return timm.create_model("cait_xxs24_224", embed_dim=int(48 * width), **kwargs)

    def blocks_of(name: str) -> Blocks:
        if re.search(r"attn\.qkv\.", name):
            return {0: (3, heads)}
        if re.search(r"attn\.[qkv]\.", name):
            return {0: (heads,)}
        return {1: (heads,)} if name.endswith("attn.proj.weight") else {}

    model = slicevit.create_model("cait_xxs24_224", grid=GRID, embed_dim=48, **kwargs)
    check(model, stock, blocks_of, torch.randn(2, 3, 32, 32))


class Tiny(nn.Module):
    """A model of one's own: a packed gate, two plain layers and no more."""

    def __init__(self, embed_dim: int = 16, num_classes: int = 3):
        super().__init__()
        self.embed_dim = embed_dim
        self.stem = nn.Conv2d(3, embed_dim, 8, stride=8)
        self.gate = nn.Linear(embed_dim, 4 * embed_dim)
        self.head = nn.Linear(2 * embed_dim, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        gate, value = self.gate(self.stem(images).mean((2, 3))).chunk(2, dim=-1)
        return self.head(gate.sigmoid() * value)


def test_a_class_of_ones_own_is_added_in_six_lines() -> None:
    packed = Fused(0, copies=2)
    register_family(
        Family(
            classes=frozenset({"Tiny"}),
            scale=lambda model, width: {"embed_dim": channels(width, model.embed_dim)},
            structure={"Tiny": {"gate.weight": packed, "gate.bias": packed}},
        )
    )
    model = slicevit.ElasticModel(Tiny(16), GRID, model_args={"embed_dim": 16})
    check(
        model,
        lambda width: Tiny(int(16 * width)),
        lambda name: {0: (2,)} if name.startswith("gate") else {},
        torch.randn(2, 3, 16, 16),
    )
    with pytest.raises(ValueError, match="Tiny"):  # 6 channels at 1/4 are no whole number
        slicevit.ElasticModel(Tiny(6), GRID, model_args={"embed_dim": 6})


def test_a_registered_family_trains() -> None:
    register_family(Family(frozenset({"Tiny"}), lambda model, width: {"embed_dim": channels(width, model.embed_dim)}))
    model = slicevit.ElasticModel(Tiny(16), GRID, model_args={"embed_dim": 16})
    model(torch.randn(2, 3, 16, 16), width="1/2").square().sum().backward()
    assert model.stem.weight.grad[:8].any()
    assert not model.stem.weight.grad[8:].any()


# --- refusals --------------------------------------------------------------------------------------------


def refusal(name: str, grid: str = GRID, **kwargs: Any) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        slicevit.create_model(name, grid=grid, **kwargs)
    return str(caught.value)


def test_a_model_of_no_family_is_refused_with_how_to_add_one() -> None:
    message = refusal("resnet18")
    assert "ResNet" in message
    assert "register_family" in message


def test_an_unknown_model_is_refused_with_names_near_it() -> None:
    message = refusal("vit_tinny_patch16_224")
    assert "vit_tinny_patch16_224" in message
    assert "vit_" in message.replace("vit_tinny_patch16_224", "")
    assert "\n" not in message


VIT = {"img_size": 32, "depth": 1, "num_classes": 3}


@pytest.mark.parametrize(
    ("name", "grid", "kwargs", "nearest"),
    [
        # what is nearest is a matter of taste where the head width (12, 6) has several grids about as far off
        ("vit_tiny_patch16_224", "1/4:1:1/8", VIT | {"embed_dim": 36, "num_heads": 3}, {"1/4:1:1/4", "1/4:1:1/12"}),
        ("vit_tiny_patch16_224", "1/4:1:1/16", VIT | {"embed_dim": 24, "num_heads": 3}, {"1/4:1:1/8"}),
        ("vit_tiny_patch16_224", "1/2:1:1/4", VIT | {"embed_dim": 18, "num_heads": 3}, {"1/2:1:1/2", "1/2:1:1/6"}),
        # a rotary head width is a multiple of 4: 16 has quarters, no eighths
        ("eva02_tiny_patch14_224", "1/4:1:1/8", VIT | {"img_size": 28, "embed_dim": 48, "num_heads": 3}, {"1/4:1:1/4"}),
        ("pvt_v2_b0", "1/4:1:1/8", {"embed_dims": (8, 16, 20, 64), "depths": (1, 1, 1, 1)}, {"1/4:1:1/4"}),
    ],
    ids=["eighths", "sixteenths", "quarters", "rotary", "pvt"],
)
def test_a_refusal_says_why_and_names_the_nearest_grid_that_works(
    name: str, grid: str, kwargs: dict[str, Any], nearest: set[str]
) -> None:
    message = refusal(name, grid, **kwargs)
    assert grid in message
    named = set(re.findall(r"\d+(?:/\d+)?:1:\d+(?:/\d+)?", message)) - {grid}
    assert len(named) == 1, message
    assert named <= nearest
    slicevit.create_model(name, grid=named.pop(), **kwargs)


def test_the_reason_names_the_width_and_the_channels() -> None:
    message = refusal("vit_tiny_patch16_224", "1/4:1:1/8", **VIT | {"embed_dim": 36, "num_heads": 3})
    assert re.search(r"\b3/8\b", message)
    assert "\n" not in message


def test_set_grid_refuses_and_keeps_the_old_grid() -> None:
    model = slicevit.create_model("vit_tiny_patch16_224", grid=GRID, **VIT | {"embed_dim": 36, "num_heads": 3})
    with pytest.raises(ValueError, match="1/4:1:1/8"):
        model.set_grid("1/4:1:1/8")
    assert str(model.grid) == GRID
    assert model(torch.randn(1, 3, 32, 32), width="1/4").shape == (1, 3)


def test_after_a_grid_that_was_refused_every_width_is_cut_as_before() -> None:
    """On the refused one 1/2 would be the smallest, which takes the other end."""
    kwargs = VIT | {"embed_dim": 12, "num_heads": 3}
    model, images = slicevit.create_model("vit_tiny_patch16_224", grid=GRID, **kwargs).eval(), torch.randn(1, 3, 32, 32)
    before = model(images, width="1/2")
    with pytest.raises(ValueError, match="5/8"):
        model.set_grid("1/2:1:1/8")
    assert torch.equal(model(images, width="1/2"), before)


@pytest.mark.parametrize("setting", [{"heads": "scaled"}, {"scope": "mlp"}], ids=repr)
def test_what_a_family_has_no_rule_for_is_refused(setting: dict[str, str]) -> None:
    register_family(Family(frozenset({"Tiny"}), lambda m, width: {"embed_dim": channels(width, m.embed_dim)}))
    with pytest.raises(ValueError, match=next(iter(setting))):
        slicevit.ElasticModel(Tiny(16), GRID, model_args={"embed_dim": 16}, **setting)


def test_whole_heads_and_mlps_alone() -> None:
    """The baselines' slices: whole heads dropped keep their width; an MLP-only slice keeps everything else."""
    kwargs = VIT | {"embed_dim": 32, "num_heads": 4}
    by_heads = slicevit.create_model("vit_tiny_patch16_224", grid=GRID, heads="scaled", isolation="off", **kwargs)
    half = by_heads.to_timm("1/2")
    assert half.blocks[0].attn.num_heads == 2
    full = by_heads.blocks[0].attn.qkv.weight
    assert torch.equal(half.blocks[0].attn.qkv.weight, full.view(3, 4, 8, 32)[:, :2, :, :16].reshape(48, 16))

    by_mlp = slicevit.create_model("vit_tiny_patch16_224", grid=GRID, scope="mlp", isolation="off", **kwargs)
    for width in WIDTHS:
        narrow = by_mlp.to_timm(width)
        hidden = int(128 * width)
        for name, value in by_mlp.state_dict().items():
            expected = {"fc1.weight": value[:hidden], "fc1.bias": value[:hidden]}.get(name.split("mlp.")[-1], value)
            expected = value[:, :hidden] if name.endswith("fc2.weight") else expected
            assert torch.equal(narrow.state_dict()[name], expected), name


def test_a_width_that_timms_entry_point_cannot_make_is_still_cut_out_but_has_no_configuration() -> None:
    model = slicevit.create_model("mixer_s32_224", grid=GRID, img_size=64, num_classes=3)
    assert model.to_timm("1/2").num_features == 256
    with pytest.raises(ValueError, match=r"mixer_s32_224.*embed_dim.*onnx"):
        model.factory_arguments("1/2")
    assert model.factory_arguments("1") == {}
    convnext = slicevit.create_model("convnext_atto", grid="1/4:1:1/4", depths=(1, 1, 1, 1), num_classes=3)
    assert convnext.factory_arguments("1/2") == {"dims": (20, 40, 80, 160)}
