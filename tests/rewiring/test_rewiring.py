"""Rewiring leaves the full width as it is, and puts what matters where narrow widths look for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import slicevit
from slicevit import WidthGrid, measure_importance, rewire
from slicevit.exactness import fill, small_model
from slicevit.rewiring.arrange import arrange
from slicevit.rewiring.groups import channel_groups
from slicevit.rewiring.rotation import fold_norms

TINY: dict[str, Any] = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SEVENS = WidthGrid.parse("1/4:1:1/8")


def tiny(name: str = "vit_tiny_patch16_224", seed: int = 1, **arguments: Any) -> slicevit.ElasticModel:
    model = slicevit.create_model(name, "1/4:1:1/4", **(TINY | arguments))
    fill(model, seed)
    return model.eval()


def images(count: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(3), dtype=dtype)


def rewired(model: slicevit.ElasticModel, how: Any, batch: Tensor) -> None:
    if how == "rotate":
        fold_norms(model)
    rewire(model, measure_importance(model, [batch], rotate=how == "rotate"), how)


VITS: list[tuple[str, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {}),
    ("deit_tiny_distilled_patch16_224", {}),
    ("deit3_small_patch16_224", {}),
    ("vit_small_patch14_dinov2", {"init_values": 0.1}),
    ("vit_small_patch14_reg4_dinov2", {"init_values": 0.1}),
    ("vit_tiny_patch16_224", {"qk_norm": True}),
    ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
]
PERMUTED_ONLY: list[tuple[str, dict[str, Any]]] = [
    ("vit_base_patch16_clip_224", {}),
    ("vit_base_patch16_siglip_224", {}),
]


@pytest.mark.parametrize(
    ("name", "arguments", "how"),
    [(*vit, "permute") for vit in VITS + PERMUTED_ONLY] + [(*vit, "rotate") for vit in VITS],
)
def test_the_full_width_answers_as_before(name: str, arguments: dict[str, Any], how: str) -> None:
    model = tiny(name, **arguments)
    single, narrow = model(images()).detach(), model(images(), width="1/2").detach()
    model.double()
    exact = model(images(dtype=torch.float64)).detach()
    rewired(model, how, images(dtype=torch.float64))
    torch.testing.assert_close(model(images(dtype=torch.float64)), exact, rtol=0, atol=1e-12)
    assert not torch.allclose(model(images(dtype=torch.float64), width="1/2").float(), narrow, atol=1e-3)
    model = tiny(name, **arguments)
    rewired(model, how, images())
    largest = float(single.abs().max())
    torch.testing.assert_close(
        model(images()), single, rtol=0, atol=2e-6 * largest if how == "permute" else 1e-5 * largest
    )


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "eva02_tiny_patch14_224",
                                  "beit_base_patch16_224", "pvt_v2_b0", "convnext_tiny"])  # fmt: skip
def test_other_families_are_covered_by_permutation(name: str) -> None:
    model, batch = small_model(name)
    model.eval()
    before, narrow = model(batch).detach(), model(batch, width=model.widths[0]).detach()
    rewire(model, measure_importance(model, [batch]), images=batch)
    torch.testing.assert_close(model(batch), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert not torch.allclose(model(batch, width=model.widths[0]), narrow, atol=1e-3 * float(narrow.abs().max()))
    groups = channel_groups(model)
    assert {"stream", "hidden"} <= {group.kind for group in groups.values()}
    assert ("match" in {group.kind for group in groups.values()}) == (
        name not in ("convnext_tiny", "eva02_tiny_patch14_224")
    )


def test_a_family_whose_channels_are_tied_otherwise_is_refused_and_left_alone() -> None:
    model, batch = small_model("xcit_nano_12_p8_224")
    model.eval()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    importance = measure_importance(model, [batch])
    with pytest.raises(ValueError, match="rewiring does not cover Xcit"):
        rewire(model, importance, images=batch)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_dead_hidden_units_go_last_and_a_narrow_mlp_is_then_exact() -> None:
    model = slicevit.create_model("vit_tiny_patch16_224", "1/2:1:1/2", scope="mlp", isolation="off", **TINY)
    fill(model, 0)
    model.eval()
    dead = [torch.randperm(128, generator=torch.Generator().manual_seed(k))[:64] for k in range(2)]
    with torch.no_grad():
        for block, units in zip(model.blocks, dead, strict=True):
            block.mlp.fc2.weight[:, units] = 0
    full = model(images()).detach()
    assert (model(images(), width="1/2") - full).abs().max() > 1e-2
    rewire(model, measure_importance(model, [images()]))
    torch.testing.assert_close(model(images(), width="1/2"), full, rtol=0, atol=1e-5)
    for block in model.blocks:
        assert not bool(block.mlp.fc2.weight[:, 64:].any())


@pytest.mark.parametrize("how", ["permute", "rotate"])
def test_a_network_with_dead_channels_is_found_by_its_narrow_width(how: str) -> None:
    """A half-width network hidden among dead channels: the half width answers like the full one, as it did not."""
    model = slicevit.create_model("vit_tiny_patch16_224", "1/2:1:1/2", isolation="off", **TINY)
    narrow = tiny(embed_dim=16, seed=5)
    with torch.no_grad():
        for name, cut in model.skeleton("1/2").plan.items():
            cut.window(model.state_dict()[name].zero_()).copy_(
                narrow.state_dict()[name].reshape(cut.window(model.state_dict()[name]).shape)
            )
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter[16:] = 1
    scatter(model)
    model.eval()
    full = model(images()).detach()

    def likeness() -> float:
        half = model(images(), width="1/2").detach()
        return float(torch.cosine_similarity((half - half.mean(0)).flatten(), (full - full.mean(0)).flatten(), dim=0))

    before = likeness()
    rewired(model, how, images())
    assert before < 0.8
    assert likeness() > 0.9


def scatter(model: slicevit.ElasticModel) -> None:
    """Another order of the channels of every group, at random."""
    generator = torch.Generator().manual_seed(7)
    random = {name: torch.rand(group.size, generator=generator) for name, group in channel_groups(model).items()}
    rewire(model, random)


def test_without_isolation_channels_stand_in_descending_order() -> None:
    scores_RN = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(arrange(scores_RN, SEVENS, "off"), scores_RN.argsort(1, descending=True))


@pytest.mark.parametrize("isolation", ["smallest", "b", "c", "mirror", "off"])
def test_every_channel_has_one_place(isolation: Any) -> None:
    scores_RN = torch.rand(4, 32, generator=torch.Generator().manual_seed(1)) ** 4
    places = arrange(scores_RN, SEVENS, isolation)
    assert torch.equal(places.sort(1).values, torch.arange(32).expand(4, -1))


def test_the_isolated_width_ranks_between_the_leading_ones() -> None:
    """1/4:1:1/8 of 64 places: 3/8 to 7/8 lead and count 2 each, the trailing 1/4 counts 5; so 10, 8, 6, 4, 7, 5."""
    ranks = list(range(64))
    expected = ranks[:32] + ranks[40:48] + ranks[56:] + ranks[32:40] + ranks[48:56]
    assert arrange(-torch.arange(64.0)[None], SEVENS, "smallest").tolist() == [expected]


def test_random_signs_and_images_are_reproducible_and_leave_no_trace() -> None:
    model = tiny().train()
    model.blocks[0].eval()
    model.cls_token.requires_grad_(False)
    first, again = (measure_importance(model, [images(2), images(2)]) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert not model.blocks[0].training
    assert not model.cls_token.requires_grad


def test_hidden_units_score_as_removing_them_does() -> None:
    """To first order: with weights this small the measured squares follow those of removing a unit."""
    model = tiny()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc2.weight.mul_(1e-2)
    model.double()
    batch = images(1, torch.float64)
    outputs = lambda x: model(x)[:, :1]  # noqa: E731
    scores = measure_importance(model, [batch], outputs=outputs)["blocks.1.mlp.hidden"]
    before = float(outputs(batch).detach())
    for unit in (0, 17, 99):
        column = model.blocks[1].mlp.fc2.weight.data[:, unit].clone()
        model.blocks[1].mlp.fc2.weight.data[:, unit] = 0
        change = float(outputs(batch).detach()) - before
        model.blocks[1].mlp.fc2.weight.data[:, unit] = column
        assert float(scores[unit]) == pytest.approx(change**2, rel=0.1)


def test_what_does_not_go_is_refused() -> None:
    batch = images()
    with pytest.raises(ValueError, match="layout='flat'"):
        measure_importance(tiny(layout="flat"), [batch])
    with pytest.raises(ValueError, match="no narrower width"):
        measure_importance(slicevit.create_model("vit_tiny_patch16_224", "1:1:1", **TINY), [batch])
    with pytest.raises(ValueError, match="images holds none"):
        measure_importance(tiny(), [])
    with pytest.raises(ValueError, match="a norm before its blocks"):
        fold_norms(tiny("vit_base_patch16_clip_224"))
    with pytest.raises(ValueError, match="isolation='mirror'"):
        fold_norms(tiny(isolation="mirror"))
    with pytest.raises(ValueError, match="not LayerNorm"):
        fold_norms(tiny(norm_layer="rmsnorm"))
    model = tiny()
    with pytest.raises(ValueError, match="measure it on this model"):
        rewire(model, {"blocks.7.mlp.hidden": torch.ones(128)})
    with pytest.raises(ValueError, match="another number of channels than its 128"):
        rewire(model, {"blocks.0.mlp.hidden": torch.ones(64)})
    with pytest.raises(ValueError, match="measured for a rotation"):
        rewire(model, measure_importance(model, [batch], rotate=True))
    alone = VisionTransformer(**TINY)
    with pytest.raises(ValueError, match="give images"):
        rewire(slicevit.ElasticModel(alone, "1/2:1:1/2", model_args=TINY), {})


def test_statistics_of_narrow_widths_are_dropped() -> None:
    """They are of the channels that a narrow width had before."""
    model, batch = small_model("mobilenetv2_100")
    model.requires_grad_(True)
    assert model.is_calibrated("1/2")
    rewire(model, measure_importance(model, [batch]), images=batch)
    assert not model.is_calibrated("1/2")
