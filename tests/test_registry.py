"""timm's registry against the committed list, and the proofs on a small model of every class that is sliceable."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import slicevit
from slicevit import architectures, cli, constructors, exactness, families, registry
from slicevit.costs import width_costs
from slicevit.fusing import ATTENTION, Family
from slicevit.registry import COUNTED, Architecture

TABLE = registry.read_table()
SLICEABLE = [entry for entry in TABLE if entry.grid]
REFUSED = [entry for entry in TABLE if entry.kind in COUNTED and not entry.grid]


def one_each(entries: list[Architecture]) -> set[str]:
    """A name of each class and reason, the shortest; numbers make no other reason."""
    names: dict[tuple[str, str], str] = {}
    for entry in sorted(entries, key=lambda entry: (len(entry.name), entry.name)):
        names.setdefault((entry.model, re.sub(r"\d+", "0", entry.reason)), entry.name)
    return set(names.values())


PROVEN = registry.representatives(TABLE)


@pytest.fixture(autouse=True)
def _own_table(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it; one thread, for bitwise equality."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))


# --- the list ----------------------------------------------------------------------------------------------


def test_the_list_holds_every_name_of_timms_registry() -> None:
    """If timm has changed: slicevit families --out src/slicevit/architectures.csv"""
    assert [entry.name for entry in TABLE] == timm.list_models()


def test_nine_of_ten_transformers_mixers_hybrids_and_convnexts_are_sliceable() -> None:
    sliceable, counted = registry.share(TABLE)
    assert counted > 700
    assert sliceable >= 0.9 * counted


def test_our_own_models_are_in_the_list_and_not_in_the_share() -> None:
    own = [entry for entry in TABLE if not registry.is_timms(entry.name)]
    assert [(entry.name, entry.kind) for entry in own] == [("uniformer_small", "hybrid"), ("uniformer_xs", "hybrid")]
    assert registry.share(own) == (0, 0)
    assert registry.share(TABLE) == registry.share([entry for entry in TABLE if entry not in own]) == (715, 789)


def test_every_family_has_a_sliceable_architecture_and_every_entry_a_grid_or_a_reason() -> None:
    assert {entry.model for entry in SLICEABLE} >= set(families._FAMILIES)
    assert all(bool(entry.grid) != bool(entry.reason) for entry in TABLE)
    assert all(entry.kind in registry.KINDS for entry in TABLE)


@pytest.mark.parametrize("name", sorted({*PROVEN.values(), *one_each(REFUSED)}))
def test_the_walk_says_what_the_list_says(name: str) -> None:
    assert registry.examine(name) == next(entry for entry in TABLE if entry.name == name)


# --- the proofs --------------------------------------------------------------------------------------------


def layer_macs(module: nn.Module, images: torch.Tensor) -> int:
    """Multiply-accumulates of linear layers, convolutions and LSTMs, counted by hooks."""
    total = 0

    def count(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.LSTM):
            total += inputs[0][..., 0].numel() * sum(
                weight.numel() for weight in layer.parameters() if weight.ndim == 2
            )
        else:
            total += output.numel() * layer.weight[0].numel()

    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LSTM)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        module(images[:1])
    return total


@pytest.mark.parametrize("kind", sorted(PROVEN))
def test_a_slice_is_a_stock_model_to_the_bit_and_the_right_one_and_its_costs_are_right(kind: str) -> None:
    model, images = exactness.small_model(PROVEN[kind])
    assert type(model._full).__name__ == kind
    assert exactness.stock_difference(model, images) is None
    assert exactness.structure_difference(model, images) is None
    width = model.widths[0]
    alone, costs = model.to_timm(width).eval().requires_grad_(False), width_costs(model, width, tuple(images.shape[1:]))
    assert costs.params == sum(parameter.numel() for parameter in alone.parameters())
    for layer in alone.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = False  # the counter does not know a CPU's fused one
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        alone(images[:1])
    layers = layer_macs(alone, images)
    counted = layers if kind == "Sequencer2d" else counter.get_total_flops() // 2  # nor does it know a fused LSTM
    assert costs.macs == pytest.approx(counted, rel=0.01)
    assert costs.macs >= 0.99 * layers


_LAYERS_OF_THEIR_OWN = [
    *("botnet26t_256", "halonet26t", "lambda_resnet26t", "mobilevit_s", "mobilevitv2_050"),  # all of one class
    *("davit_huge_fl", "gmixer_12_224", "qwen3_vit_88m_merge", "tnt_s_legacy_patch16_224", "vit_base_patch16_sapiens2"),
]


@pytest.mark.parametrize("name", _LAYERS_OF_THEIR_OWN)
def test_architectures_with_other_layers_than_their_class(name: str) -> None:
    assert exactness.prove(name) is None


def test_a_convolutional_backbone_below_a_vit_stays_as_it_is() -> None:
    kwargs = {"depth": 1, "num_heads": 3, "num_classes": 5, "img_size": 64}
    model = slicevit.create_model("vit_tiny_r_s16_p8_224", grid="1/4:1:1/4", embed_dim=96, **kwargs).eval()
    exactness.fill(model.requires_grad_(False))
    images = torch.randn(2, 3, 64, 64)
    for width in model.widths:
        alone = model.to_timm(width).eval().requires_grad_(False)
        stock = timm.create_model("vit_tiny_r_s16_p8_224", embed_dim=int(96 * width), **kwargs).eval()
        stock.requires_grad_(False).load_state_dict(alone.state_dict())
        for name, value in alone.patch_embed.backbone.state_dict().items():
            assert torch.equal(value, model.patch_embed.backbone.state_dict()[name])
        for logits in (alone(images), model(images, width=width), model.subnet(width)(images)):
            assert torch.equal(logits, stock(images))


def test_the_structure_of_an_axis_that_is_cut_flat_is_found() -> None:
    families.register_family(Family(frozenset({"Beit"}), channels=("embed_dim",)))
    model, images = exactness.small_model("beit_base_patch16_224")
    assert exactness.stock_difference(model, images) is None
    assert "cut through its structure" in str(exactness.structure_difference(model, images))


def test_a_slice_that_is_not_a_stock_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = exactness.small_model("convnext_atto")
    module = model.to_timm("1/2").eval()
    with torch.no_grad():
        module.head.fc.bias.add_(1)
    monkeypatch.setattr(model, "subnet", lambda width: module)
    assert exactness.stock_difference(model, images) is not None


def test_a_family_without_small_model_says_why() -> None:
    with pytest.raises(ValueError, match="ResNet"):
        exactness.small_model("resnet18")
    assert "resnet18" not in PROVEN.values()


# --- refusals ----------------------------------------------------------------------------------------------

_ATTENTION = {"qkv.weight": architectures.QKV, "qkv.bias": architectures.QKV, "proj.weight": architectures.HEAD_INPUTS}
_ATTEMPTS = [
    Family(frozenset({"EfficientVitMsra"}), channels=("embed_dim", "key_dim")),
    Family(frozenset({"SHViT"}), channels=("embed_dim", "partial_dim", "qk_dim")),
    Family(frozenset({"EdgeNeXt"}), channels=("dims",), structure={ATTENTION: _ATTENTION}),
    Family(frozenset({"CSATv2"}), channels=("dims",)),
    Family(frozenset({"LowFormer"}), channels=("width_list", "head_widths")),
    Family(frozenset({"CPUBone"}), channels=("width_list", "head_widths")),
    Family(
        frozenset({"GlobalContextVit"}),
        channels=("embed_dim",),
        structure={
            "WindowAttentionGlobal": {
                **dict.fromkeys(
                    ("qkv.weight", "qkv.bias"),
                    lambda owner: architectures.KV if owner.use_global else architectures.QKV,
                ),
                "proj.weight": architectures.HEAD_INPUTS,
            }
        },
    ),
]


@pytest.mark.parametrize("family", _ATTEMPTS, ids=lambda family: min(family.classes))
def test_what_is_refused_for_its_structure_fails_the_proof_of_it(family: Family) -> None:
    """With an entry in the table it would have no small model, or its slices would cut through the structure."""
    (kind,) = family.classes
    assert registry.REFUSED[kind]
    families.register_family(family)
    (name,) = one_each([entry for entry in REFUSED if entry.model == kind])
    assert exactness.prove(name) is not None


def test_a_constructor_without_widths_has_none() -> None:
    make = partial(timm.create_model, "nextvit_small", pretrained=False)
    _, given = constructors.construct(make, timm.models.nextvit.NextViT, {})
    assert not {"embed_dim", "embed_dims", "dims", "widths"} & given.keys()


# --- the command -------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_for_every_name_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["families", "*resnet18", "--json"])
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["name"] for entry in entries] == timm.list_models("*resnet18")
    assert all(entry["kind"] == "other" and entry["reason"] for entry in entries)


def test_an_architecture_with_neither_halves_nor_quarters_is_proven_on_its_own_grid(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli.main(["families", "coat_tiny", "--check"])
    printed = capsys.readouterr().out
    assert "5/19:1:1/19" in printed
    assert "exact" in printed


def test_the_command_proves_prints_a_table_and_writes_the_list(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cli.main(["families", "convnext_atto", "--check", "--out", str(tmp_path / "list.csv")])
    printed = capsys.readouterr().out
    assert "ConvNeXt" in printed
    assert "exact" in printed
    assert "100.0%" in printed
    expected = [entry for entry in TABLE if entry.name == "convnext_atto"]
    assert (tmp_path / "list.csv").read_text() == registry.table_text(expected)


def test_the_command_fails_if_a_proof_does(capsys: pytest.CaptureFixture[str]) -> None:
    families.register_family(Family(frozenset({"Beit"}), channels=("embed_dim",)))
    with pytest.raises(SystemExit) as stop:
        cli.main(["families", "beit_base_patch16_224", "--check"])
    assert stop.value.code == 2
    assert "not proven: Beit (" in capsys.readouterr().err


def test_the_command_refuses_a_pattern_that_fits_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["families", "no_such_*"])
    assert "no_such_*" in capsys.readouterr().err
