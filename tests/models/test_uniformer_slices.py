"""UniFormers at every width: the right slices, by the tests' own index map, with tokens pruned; and as files.

What is expected comes from `index_map` and from stock models of the narrow widths, built by themselves.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from index_map import LAYOUTS, UNIFORMER_TABLES, index_of
from torch import Tensor, nn

import slicevit
from slicevit import cli, exactness
from slicevit.costs import width_costs
from slicevit.models.hourglass import ScoringAttention

GRID, WIDTHS = "1/4:1:1/4", [Fraction(k, 4) for k in range(1, 5)]
DIMS, HEADS = (16, 32, 32, 64), (0, 0, 2, 4)
TINY: dict[str, Any] = {"depths": (1, 1, 2, 2), "num_heads": HEADS, "num_classes": 5}

each_name = pytest.mark.parametrize("name", UNIFORMER_TABLES)
pytestmark = pytest.mark.usefixtures("one_thread")


def stock(name: str, width: Fraction = Fraction(1)) -> nn.Module:
    return timm.create_model(name, embed_dims=tuple(int(dim * width) for dim in DIMS), **TINY).eval()


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@functools.cache
def calibrated(name: str, **settings: Any) -> slicevit.ElasticModel:
    model = slicevit.create_model(name, GRID, embed_dims=DIMS, **TINY, **settings).eval().requires_grad_(False)
    exactness.fill(model)
    slicevit.calibrate(model, [images()])
    return model


@each_name
def test_the_map_has_no_idle_entry(name: str) -> None:
    names = list(stock(name).state_dict())
    assert all(any(re.fullmatch(pattern, name) for name in names) for pattern in UNIFORMER_TABLES[name])


@pytest.mark.parametrize(
    ("name", "layout"), [("uniformer_small", "per_head"), *(("uniformer_xs", layout) for layout in LAYOUTS)]
)
@torch.no_grad()
def test_every_width_is_the_right_slice_to_the_bit(name: str, layout: str) -> None:
    model = calibrated(name, layout=layout)
    full = model.state_dict()
    for width in WIDTHS:
        narrow, alone = stock(name, width).requires_grad_(False), model.to_timm(width)
        state = alone.state_dict()
        for key, value in full.items():
            index = index_of(name, key, tuple(value.shape), HEADS, width, width == WIDTHS[0], layout)
            if not key.endswith(("running_mean", "running_var", "num_batches_tracked")):  # which are the width's own
                assert torch.equal(state[key], torch.from_numpy(value.numpy()[np.ix_(*index)])), key
            assert state[key].shape == tuple(map(len, index))
        narrow.load_state_dict(state, strict=True)
        for logits in (model(images(), width=width), model.subnet(width)(images()), alone(images())):
            assert torch.equal(logits, narrow(images()))


@torch.no_grad()
def test_every_width_halves_its_tokens_by_its_own_scores() -> None:
    model = calibrated("uniformer_xs")
    chosen: list[list[int]] = []
    for width in WIDTHS:
        alone, seen = model.to_timm(width), []
        for layer in alone.modules():
            if isinstance(layer, ScoringAttention):
                layer.register_forward_hook(lambda layer, inputs, output, seen=seen: seen.append(inputs[0].shape[1]))
        alone(images())
        assert seen == [1 + 16, 1 + 8 + 1, 1 + 2 + 1, 1 + 2 + 1]  # of 4 x 4 tokens and of 2 x 2
        _, _, scores = alone.stages(images())
        chosen.append(scores.argsort(descending=True)[:, :2].flatten().tolist())
    assert len({tuple(tokens) for tokens in chosen}) > 1
    whole = slicevit.create_model("uniformer_xs", "1/4:1:3/4", embed_dims=DIMS, keep_rate=1.0, **TINY)
    some, all_of_them = (width_costs(one, "1/4", (3, 64, 64)) for one in (model, whole))
    assert some.macs < all_of_them.macs
    assert some.params == all_of_them.params


def exported(model: slicevit.ElasticModel, folder: Path, to: str) -> Path:
    """Width 1/2, which the command checks on images."""
    model.save_pretrained(folder / "run")
    cli.main(["export", str(folder / "run"), str(folder / "out"), "--width", "1/2", "--to", to, "--images", "16"])
    return folder / "out"


def test_saved_and_as_a_timm_folder_it_answers_the_same_and_says_what_to_import(tmp_path: Path) -> None:
    model, x = calibrated("uniformer_xs"), images()
    folder = exported(model, tmp_path, "timm")
    back = slicevit.from_pretrained(tmp_path / "run")
    for width in WIDTHS:
        assert torch.equal(back(x, width=width), model(x, width=width))
    half = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(half(x), model(x, width="1/2"))
    assert "`import slicevit` timm loads" in (tmp_path / "run" / "README.md").read_text()
    assert "import slicevit  # registers it\nimport timm" in (folder / "README.md").read_text()


@each_name
def test_of_grey_images_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    slicevit.create_model(name, "1/4:1:3/4", embed_dims=DIMS, in_chans=1, **TINY).save_pretrained(tmp_path)
    model = slicevit.from_pretrained(tmp_path).eval()
    assert model(images()[:, :1]).shape == (len(images()), 5)


@pytest.mark.extra
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="needs ONNX")
def test_onnx_prunes_the_same_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its logits are those of torch to 1e-4 of the largest, which they are not with another token."""
    short = {"embed_dims": (8, 16), "depths": (1, 2), "num_heads": (0, 2), "num_classes": 5}
    model = slicevit.create_model("uniformer_xs", "1/2:1:1/2", **short).eval().requires_grad_(False)
    exactness.fill(model)
    slicevit.calibrate(model, [images()])
    exported(model, tmp_path, "onnx")
    assert "top-1 agreement 100.0%" in capsys.readouterr().out
