"""`slicevit train --init RUN` on other classes: the backbone goes on, the head is new, every width is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import slicevit
from slicevit.cli.train import _parse_train
from slicevit.training.methods import METHODS

TINY = ["--model", "vit_tiny_patch16_224", "--model-args", "img_size=28", "patch_size=14", "in_chans=1", "embed_dim=16",
        "depth=1", "num_heads=2"]  # fmt: skip
COMMON = ["--grid", "1/4:1:1/4", "--crop", "pad", "--batch-size", "64", "--device", "cpu", "--threads", "1"]


def test_another_number_of_classes(tmp_path: Path, train_quickly: Callable[[list[str]], None]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    seen = ["--data", "fashion-mnist?classes=0:2", "--epochs", "0.02"]
    train_quickly([*seen, *TINY, *COMMON, "--out", str(first)])
    still = ["--lr", "1e-12", "--min-lr", "0", "--weight-decay", "0", "--epochs", "0.02"]
    unseen = ["--data", "fashion-mnist?classes=Bag,5:8"]
    train_quickly([*unseen, *COMMON, *still, "--init", str(first), "--out", str(second)])
    before, after = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    for name in before.keys() - {"head.weight", "head.bias"}:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)
    assert (before["head.weight"].shape, after["head.weight"].shape) == ((2, 16), (4, 16))
    model = slicevit.from_pretrained(second)
    assert slicevit.checkpoint.read_config(second)[0]["label_names"] == ["Bag", "Sandal", "Shirt", "Sneaker"]
    for width in ("1/4", "1/2", "3/4", "1"):
        images = torch.randn(2, 1, 28, 28)
        logits = model(images, width=width)
        assert logits.shape == (2, 4)
        torch.testing.assert_close(model.to_timm(width).eval()(images), logits, rtol=1e-5, atol=1e-6)


def test_the_slicing_is_that_of_the_run_unless_it_is_given(tmp_path: Path) -> None:
    own = {"layout": "per_projection", "attn_scale": "full", "isolation": "mirror", "norm_eps": 1e-5}
    small = {"img_size": 28, "patch_size": 14, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    slicevit.create_model("vit_tiny_patch16_224", "1/2:1:1/4", **own, **small).save_pretrained(tmp_path)
    init = ["--data", "DATA", "--init", str(tmp_path)]
    config = _parse_train(init, None)
    assert (config.model, config.model_args, config.grid) == ("vit_tiny_patch16_224", {}, "1/2:1:1/4")
    assert {name: getattr(config, name) for name in own} == own
    config = _parse_train([*init, "--grid", "1/2:1:1/8", "--layout", "flat", "--method", "usnet"], None)
    assert (config.grid, config.layout, config.attn_scale) == ("1/2:1:1/8", "flat", "full")
    assert config.slice_settings()["isolation"] == METHODS["usnet"].isolation != own["isolation"]


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        (["--model", "vit_small_patch16_224"], "is a vit_tiny_patch16_224"),
        (["--model-args", "depth=3"], "has depth=1"),
        (["--model-args", "mlp_ratio=2"], "has no mlp_ratio of its own"),
        (["--model-args", "img_size=56"], "has img_size=28"),
    ],
)
def test_another_model_than_the_runs_is_refused(flags: list[str], has: str, tmp_path: Path) -> None:
    """It is the saved one that trains; its own name and arguments may be said again."""
    small = {"img_size": 28, "patch_size": 14, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    slicevit.create_model("vit_tiny_patch16_224", "1:1:1", **small).save_pretrained(tmp_path)
    init = ["--data", "DATA", "--init", str(tmp_path)]
    assert _parse_train([*init, *TINY], None).model == "vit_tiny_patch16_224"
    with pytest.raises(ValueError, match=f"{flags[0]} .*{has}; leave one of them out"):
        _parse_train([*init, *flags], None)


def test_the_grid_of_a_model_of_one_width_is_not_taken(tmp_path: Path) -> None:
    small = {"img_size": 28, "patch_size": 14, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    slicevit.create_model("vit_tiny_patch16_224", "1:1:1", **small).save_pretrained(tmp_path)
    plain = _parse_train(["--data", "DATA"], None)
    assert _parse_train(["--data", "DATA", "--init", str(tmp_path)], None).grid == plain.grid != "1:1:1"


@pytest.mark.parametrize(("grid", "layout"), [("1:1:1", "per_head"), ("1/4:1:1/4", "flat")])
def test_a_flat_model_is_trained_by_another_method_than_the_presets(tmp_path: Path, grid: str, layout: str) -> None:
    """`rotated`, which the preset has, would refuse its layout; a model of one width has none of its own."""
    small = {"img_size": 28, "patch_size": 14, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    slicevit.create_model("vit_tiny_patch16_224", grid, layout="flat", **small).save_pretrained(tmp_path)
    for flags in ([], ["--method", "scala"], ["--method", "usnet"]):
        config = _parse_train(["--init", str(tmp_path), *flags], "fashion")
        assert config.layout == layout


def test_only_a_model_of_one_width_is_turned_by_the_method(tmp_path: Path) -> None:
    """In one of several widths the narrow ones are trained already; --rewire says otherwise."""
    small = {"img_size": 28, "patch_size": 14, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    for grid, isolation in (("1:1:1", "off"), ("1/4:1:1/4", "smallest")):
        init = tmp_path / isolation
        slicevit.create_model("vit_tiny_patch16_224", grid, isolation=isolation, **small).save_pretrained(init)
        config = _parse_train(["--init", str(init)], "fashion").resolved()
        several = isolation == "smallest"
        assert config.full_width_first == 0.0
        got = (config.method, config.rewire, config.isolation)
        assert got == (("scala", "off", "smallest") if several else ("rotated", "rotate", "off"))
        assert _parse_train(["--init", str(init), "--rewire", "permute"], "fashion").resolved().rewire == "permute"
