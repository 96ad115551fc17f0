"""Every width of a model with BatchNorm has statistics of its own: made, used, dropped and saved."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

import slicevit
from slicevit.calibration import require_statistics
from slicevit.saved_statistics import STATISTICS

BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d)
DIMS = (8, 16, 24, 32)
SWIFT: dict[str, Any] = {"layers": (1, 1, 1, 1), "embed_dims": DIMS, "num_classes": 5}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For bitwise equality."""


def swift(**changes: Any) -> slicevit.ElasticModel:
    torch.manual_seed(0)
    return slicevit.create_model("swiftformer_xs", "1/4:1:1/4", **SWIFT | changes).eval()


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.3 + torch.randn(6, 3, 32, 32, generator=generator) for _ in range(count)]


def calibrated() -> slicevit.ElasticModel:
    model = swift()
    slicevit.calibrate(model, batches())
    return model


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers() if "running_" in name}


# --- exactness -------------------------------------------------------------------------------------------


def stock_mobilenet(width: Fraction) -> nn.Module:
    """timm's class with every one of its channels times `width`."""
    plan = "ds_r1_k3_s1_c16 ir_r2_k3_s2_e6_c24 ir_r3_k3_s2_e6_c32 ir_r4_k3_s2_e6_c64 ir_r3_k3_s1_e6_c96"
    blocks = decode_arch_def([[text] for text in (plan + " ir_r3_k3_s2_e6_c160 ir_r1_k3_s1_e6_c320").split()])
    for block in (block for stage in blocks for block in stage):
        block["out_chs"] = int(block["out_chs"] * width)
    return EfficientNet(
        blocks,
        num_classes=5,
        num_features=int(1280 * width),
        stem_size=int(32 * width),
        fix_stem=True,
        round_chs_fn=lambda channels: channels,
        act_layer=nn.ReLU6,
    )


def stock_swift(width: Fraction) -> nn.Module:
    return timm.create_model("swiftformer_xs", **SWIFT | {"embed_dims": tuple(int(dim * width) for dim in DIMS)})


def stock_tiny_vit(width: Fraction) -> nn.Module:
    dims = tuple(int(dim * width) for dim in (16, 32, 32, 64))
    return timm.create_model("tiny_vit_5m_224", embed_dims=dims, **TINY)


def stock_uniformer(name: str) -> Callable[[Fraction], nn.Module]:
    return lambda width: timm.create_model(name, **UNI | {"embed_dims": tuple(int(dim * width) for dim in DIMS)})


UNI: dict[str, Any] = {"depths": (1, 1, 2, 2), "num_heads": (0, 0, 2, 2), "embed_dims": DIMS, "num_classes": 5}
TINY: dict[str, Any] = {"depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "num_classes": 5}
CASES: dict[str, tuple[Callable[[Fraction], nn.Module], dict[str, Any]]] = {
    "mobilenetv2_100": (stock_mobilenet, {"num_classes": 5}),
    "swiftformer_xs": (stock_swift, SWIFT),
    "tiny_vit_5m_224": (stock_tiny_vit, TINY | {"embed_dims": (16, 32, 32, 64)}),
    "uniformer_small": (stock_uniformer("uniformer_small"), UNI),
    "uniformer_xs": (stock_uniformer("uniformer_xs"), UNI),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_slice_and_its_statistics_are_those_of_the_stock_model(name: str) -> None:
    stock_at, arguments = CASES[name]
    torch.manual_seed(0)
    model = slicevit.create_model(name, "1/4:1:1/4", **arguments).eval().requires_grad_(False)
    images = batches()
    assert slicevit.calibrate(model, images) == 18
    assert not any(module.training for module in model.modules())
    for width in model.widths:
        stock = stock_at(width).eval().requires_grad_(False)
        alone = model.to_timm(width).requires_grad_(False)
        stock.load_state_dict({key: value for key, value in alone.state_dict().items() if "running_" not in key}, False)
        for layer in stock.modules():
            if isinstance(layer, BatchNorm):
                layer.reset_running_stats()
                layer.momentum, layer.training = None, True
        for batch in images:
            stock(batch)
        stock.eval()
        mine, theirs = alone.state_dict(), stock.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        expected = stock(images[0])
        for logits in (model(images[0], width=width), model.subnet(width)(images[0]), alone(images[0])):
            assert torch.equal(logits, expected)


def test_what_timm_rounds_in_a_mobilenet_is_the_first_part_of_an_expansion() -> None:
    model = slicevit.create_model("mobilenetv2_100", "1/4:1:1/4", num_classes=5)
    alone = model.to_timm("3/4")
    assert alone.blocks[1][1].conv_pw.weight.shape == (112, 18, 1, 1)  # 3/4 of 24 times 6 is 108
    assert torch.equal(alone.blocks[1][1].conv_pw.weight, model.blocks[1][1].conv_pw.weight[:112, :18])


# --- training passes -------------------------------------------------------------------------------------


def test_a_training_pass_at_a_narrow_width_leaves_the_full_widths_statistics_alone() -> None:
    model = swift().train()
    before = statistics(model)
    model(batches()[0], width="1/2").sum().backward()
    with model.backward_at("1/4") as net:
        net(batches()[0]).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
    model(batches()[0])
    assert not all(torch.equal(value, before[name]) for name, value in statistics(model).items())


@pytest.mark.parametrize("width", ["1/2", "1"])
def test_a_training_pass_drops_the_statistics_of_narrow_widths(width: str) -> None:
    model = calibrated().train()
    model(batches()[0], width=width)
    assert not model.is_calibrated("1/4")
    assert model.is_calibrated("1")


def test_frozen_batch_norms_keep_the_statistics_of_every_width() -> None:
    model = calibrated()
    expected = model(batches()[0], width="1/2")
    model.train()
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            layer.eval()
    with model.backward_at("1/2") as net:
        logits = net(batches()[0])
        logits.sum().backward()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert model.is_calibrated("1/2")


# --- without statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["forward", "subnet", "to_timm"])
def test_a_width_without_statistics_says_so_once(way: str) -> None:
    model = swift()
    with pytest.warns(UserWarning, match="width 1/2 has no BatchNorm statistics"):
        model(batches()[0], width="1/2") if way == "forward" else getattr(model, way)("1/2")
    model(batches()[0], width="1/4")
    model(batches()[0])


def test_a_model_without_batch_norm_needs_none() -> None:
    model = slicevit.create_model("vit_tiny_patch16_224", "1/2:1:1/2", img_size=32, depth=1)
    require_statistics(model, "RUN")
    with pytest.raises(ValueError, match="no BatchNorm"):
        slicevit.calibrate(model, batches())


@pytest.mark.parametrize("images", [[], [torch.zeros(1, 3, 32, 32)], [*batches(), torch.zeros(6, 5, 32, 32)]])
def test_an_error_leaves_all_statistics_and_modes_as_they_were(images: list[Tensor]) -> None:
    model = calibrated()
    model.stem.eval()
    own, full = model.statistics("1/2"), statistics(model)
    modes = [module.training for module in model.train().modules()]
    with pytest.raises((ValueError, RuntimeError)):
        slicevit.calibrate(model, images)
    assert model.statistics("1/2") is own
    assert all(torch.equal(value, full[name]) for name, value in statistics(model).items())
    assert [module.training for module in model.modules()] == modes
    assert all(layer.momentum == 0.1 for layer in model.modules() if isinstance(layer, BatchNorm))


def test_one_width_alone_is_calibrated() -> None:
    model = swift()
    full = statistics(model)
    slicevit.calibrate(model, batches(), ["1/2"])
    assert [width for width in model.widths if model.is_calibrated(width)] == [Fraction(1, 2), Fraction(1)]
    assert all(torch.equal(value, full[name]) for name, value in statistics(model).items())
    with pytest.raises(ValueError, match=r"RUN .* width 1/4.*slicevit calibrate RUN"):
        require_statistics(model, "RUN")


# --- copies, grids, devices ------------------------------------------------------------------------------


def test_a_subnet_refuses_after_new_statistics_and_follows_another_type() -> None:
    model = calibrated()
    bound = model.subnet("1/2")
    model.double()
    image = batches()[0].double()
    assert torch.equal(bound(image), model(image, width="1/2"))
    slicevit.calibrate(model, [batch.double() for batch in batches(1)])
    with pytest.raises(RuntimeError, match="call subnet"):
        bound(image)
    assert torch.equal(model.subnet("1/2")(image), model(image, width="1/2"))


def test_copies_have_statistics_of_their_own() -> None:
    model = calibrated()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(batches()[0], width="1/2"), model(batches()[0], width="1/2"))
        other.forget_statistics()
    assert model.is_calibrated("1/2")


def test_a_width_that_takes_other_channels_on_another_grid_has_other_statistics() -> None:
    model = calibrated()
    model.set_grid("1/2:1:1/4")
    assert model.is_calibrated("3/4")
    assert not model.is_calibrated("1/2")  # the smallest now: trailing channels
    model.set_grid("1/4:1:1/4")
    assert model.is_calibrated("1/2")


# --- saved -----------------------------------------------------------------------------------------------


def test_they_are_saved_and_loaded_and_timm_loads_the_full_width(tmp_path: Path) -> None:
    model, image = calibrated(), batches()[0]
    model.save_pretrained(tmp_path)
    back = slicevit.from_pretrained(tmp_path)
    for width in model.widths:
        assert torch.equal(back(image, width=width), model(image, width=width))
    stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(stock(image), model(image))
    swift().save_pretrained(tmp_path)
    assert not (tmp_path / STATISTICS).exists()


def test_beside_other_weights_or_another_slicing_they_count_as_not_there(tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path)
    assert not slicevit.from_pretrained(tmp_path, layout="flat").is_calibrated("1/2")
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"head.bias": weights["head.bias"] + 1}, tmp_path / "model.safetensors")
    assert not slicevit.from_pretrained(tmp_path).is_calibrated("1/2")


@pytest.mark.parametrize("damage", ["cut", "renamed"])
def test_a_broken_file_of_them_is_one_clear_error(damage: str, tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path)
    path = tmp_path / STATISTICS
    content = path.read_bytes()
    path.write_bytes(content[:-100] if damage == "cut" else content.replace(b":stem.", b":stam."))
    with pytest.raises(ValueError, match=STATISTICS) as error:
        slicevit.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
