"""A segmenter's slices: bitwise those of stock modules, for a plain and a hierarchical backbone."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import timm
import torch

import slicevit
from slicevit.costs import width_costs
from slicevit.dense.segmenter import Decoder, Segmenter, picked_levels
from slicevit.dense.semantic_fpn import SemanticFpn
from slicevit.elastic import ElasticModel
from slicevit.tasks.segment.initial import Recipe, build

BACKBONES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
    "pvt_v2_b0": {"embed_dims": (32, 32, 64, 64), "num_heads": (1, 2, 2, 4), "depths": (1, 1, 1, 1)},
    "swin_tiny_patch4_window7_224": {
        "img_size": (32, 64), "embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 4
    },
}  # fmt: skip
GRID = "1/4:1:1/4"


def segmenter(name: str, decoder: Decoder = "fpn", channels: int = 32, **settings: Any) -> ElasticModel:
    torch.manual_seed(0)
    size = tuple(BACKBONES[name].get("img_size", (32, 64)))
    fields = {"layout": "per_head", "isolation": "smallest"} | settings
    recipe = Recipe(name, BACKBONES[name], None, size, channels, 5, GRID, fields, 3, (0.5,) * 3, (0.5,) * 3, decoder)
    return build(recipe).eval()


def images(model: ElasticModel) -> torch.Tensor:
    return torch.randn(2, 3, *model.size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_slice_is_a_narrow_segmenter_with_the_slices_of_backbone_and_decoder(name: str) -> None:
    model = segmenter(name)
    backbone = slicevit.create_model(name, GRID, num_classes=0, **BACKBONES[name])
    full = {key.removeprefix("backbone."): value for key, value in model.state_dict().items()}
    backbone.load_state_dict({key: full[key] for key in backbone.state_dict()})
    for width in model.widths:
        alone = model.to_timm(width)
        logits = alone(images(model))
        assert logits.shape == (2, 5, *model.size)
        assert torch.equal(model(images(model), width), logits)
        with torch.inference_mode():
            assert torch.equal(model.subnet(width)(images(model)), logits)
        for key, tensor in backbone.to_timm(width).state_dict().items():
            assert torch.equal(alone.backbone.state_dict()[key], tensor), key
        inputs = [level["num_chs"] for level in picked(alone.backbone)]
        stock = SemanticFpn(inputs, int(32 * width), 5).state_dict()
        for key, tensor in alone.decoder.state_dict().items():
            whole = model.decoder.state_dict()[key]
            ends = [slice(-size, None) if width == Fraction(1, 4) else slice(size) for size in stock[key].shape]
            assert torch.equal(tensor, whole[tuple(ends)]), key


@pytest.mark.parametrize("name", BACKBONES)
def test_the_mask_transformer_is_cut_head_by_head(name: str) -> None:
    """Two heads of 64 channels at full width: a narrow q, k or v takes of each head its own."""
    model = segmenter(name, "mask-transformer", 128)
    for width in model.widths:
        alone = model.to_timm(width)
        logits = alone(images(model))
        assert logits.shape == (2, 5, *model.size)
        assert torch.equal(model(images(model), width), logits)
        head = int(64 * width)
        end = slice(-head, None) if width == Fraction(1, 4) else slice(head)
        ends = slice(-2 * head, None) if width == Fraction(1, 4) else slice(2 * head)
        full, narrow = (module.decoder.blocks[1].attn for module in (model, alone))
        rows = full.qkv.weight.view(3, 2, 64, 128)[:, :, end, ends].reshape(-1, 2 * head)
        assert torch.equal(narrow.qkv.weight, rows)
        assert torch.equal(narrow.qkv.bias, full.qkv.bias.view(3, 2, 64)[:, :, end].flatten())
        columns = full.proj.weight.view(128, 2, 64)[ends, :, end].flatten(1)
        assert torch.equal(narrow.proj.weight, columns)
        assert torch.equal(alone.decoder.classes, model.decoder.classes[..., ends])
        assert torch.equal(alone.decoder.mask_norm.weight, model.decoder.mask_norm.weight)


def test_the_mask_transformer_stands_on_one_map() -> None:
    plain, hierarchical = (segmenter(name, "mask-transformer", 128) for name in ("vit_tiny_patch16_224", "pvt_v2_b0"))
    assert (plain.indices, hierarchical.indices) == ([3], [2])  # the last; that of 16 pixels


def picked(backbone: Any) -> list[dict[str, Any]]:
    return [backbone.feature_info[index] for index in picked_levels(backbone)[0]]


@pytest.mark.parametrize("decoder", ["fpn", "mask-transformer"])
@pytest.mark.parametrize("name", BACKBONES)
def test_a_training_step_reaches_every_parameter_that_a_narrow_one_uses(name: str, decoder: Decoder) -> None:
    """Gradients of the narrow module, added to the full one's, are those of autograd through the slices."""
    model = segmenter(name, decoder)
    model(images(model), "1/2").square().mean().backward()
    wanted = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    with model.backward_at("1/2") as net:
        net(images(model)).square().mean().backward()
    for key, parameter in model.named_parameters():
        if key in wanted:
            assert parameter.grad is not None, key
            torch.testing.assert_close(parameter.grad, wanted[key])
    assert {"decoder.classifier.weight", "decoder.classes"} & wanted.keys()
    assert any(key.startswith("backbone.") for key in wanted)


def test_levels_of_plain_and_hierarchical_backbones() -> None:
    assert picked_levels(timm.create_model("vit_tiny_patch16_224", depth=12)) == ([2, 5, 8, 11], True)
    assert picked_levels(timm.create_model("vit_tiny_patch16_224", depth=2)) == ([0, 0, 0, 1], True)
    assert picked_levels(timm.create_model("pvt_v2_b0")) == ([0, 1, 2, 3], False)
    with pytest.raises(ValueError, match="Linear gives no feature maps"):
        picked_levels(torch.nn.Linear(2, 2))


def test_a_backbone_of_fewer_blocks_than_levels_gives_some_twice() -> None:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    recipe = Recipe("vit_tiny_patch16_224", arguments, None, (32, 32), 16, 3, "1:1:1", {}, 3, (0.5,) * 3, (0.5,) * 3)
    model = build(recipe).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_costs_fall_with_the_width_and_count_the_decoder() -> None:
    model = segmenter("vit_tiny_patch16_224")
    costs = [width_costs(model, width, (3, 32, 48)) for width in model.widths]
    assert [cost.channels for cost in costs] == [8, 16, 24, 32]
    assert costs[-1].params == sum(parameter.numel() for parameter in model.parameters())
    assert [cost.macs for cost in costs] == sorted({cost.macs for cost in costs})


def test_weight_decay_spares_what_the_backbone_exempts() -> None:
    model = segmenter("vit_tiny_patch16_224")
    assert "backbone.pos_embed" in model.no_weight_decay()
    assert isinstance(model._full, Segmenter)
