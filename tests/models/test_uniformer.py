"""UniFormers: what timm's models can do, the Hourglass block against a slow statement of it, published names."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from slicevit import exactness
from slicevit.models import HourglassUniFormer, UniFormer
from slicevit.models.hourglass import HourglassBlock, HourglassStage
from slicevit.models.uniformer import checkpoint_filter_fn

NAMES = ("uniformer_small", "uniformer_xs")
TINY: dict[str, Any] = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 2), "num_heads": (0, 0, 2, 4)}

each_name = pytest.mark.parametrize("name", NAMES)


def tiny(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 5} | TINY | changes).eval()
    exactness.fill(model)
    return model


def images(batch: int = 2, pixels: int = 64) -> Tensor:
    return torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


# --- in timm's manner ------------------------------------------------------------------------------------


@each_name
def test_timm_knows_it(name: str) -> None:
    assert name in timm.list_models("uniformer*")
    assert isinstance(tiny(name), UniFormer if name == "uniformer_small" else HourglassUniFormer)
    assert timm.get_pretrained_cfg(name).input_size == (3, 224, 224)


@each_name
@torch.no_grad()
def test_features_heads_and_intermediates_agree(name: str) -> None:
    model, x = tiny(name), images()
    features = model.forward_features(x)
    assert features.shape == (2, 32, 2, 2)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    last, maps = model.forward_intermediates(x, norm=True)
    assert torch.equal(last, features)
    assert torch.equal(maps[-1], features)
    found = [
        {"num_chs": m.shape[1], "reduction": 64 // m.shape[2], "module": f"stages.{i}"} for i, m in enumerate(maps)
    ]
    assert found == model.feature_info
    (second,) = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(second, maps[1])
    pyramid = timm.create_model(name, features_only=True, out_indices=(0, 2), **TINY).eval()
    pyramid.load_state_dict({f"model.{key}": value for key, value in model.state_dict().items()}, strict=False)
    assert all(map(torch.equal, pyramid(x), [maps[0], maps[2]]))


@each_name
def test_another_head_and_image_size(name: str) -> None:
    model = tiny(name)
    model.reset_classifier(3)
    assert model(images(1, 96)).shape == (1, 3)
    assert model.get_classifier().out_features == 3
    model.reset_classifier(0)
    assert model(images(1)).shape == (1, 32)
    assert tiny(name, in_chans=1)(images(1)[:, :1]).shape == (1, 5)
    assert model(images(1, 32)).shape == (1, 32)  # one token in the last stage: nothing to prune


@each_name
def test_recomputed_blocks_give_the_same_gradients(name: str) -> None:
    gradients = []
    for enable in (False, True):
        model = tiny(name).train()
        model.set_grad_checkpointing(enable)
        model(images()).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(map(torch.equal, *gradients))


@each_name
def test_every_parameter_belongs_to_a_layer_and_drop_path_grows(name: str) -> None:
    model = tiny(name, drop_path_rate=0.5)
    layers = timm.models.group_parameters(model, model.group_matcher())
    assert {key for keys in layers.values() for key in keys} == dict(model.named_parameters()).keys()
    assert len(layers) == 1 + 6 + 1  # the stem, every block, the head
    rates = [layer.drop_prob for layer in model.modules() if type(layer).__name__ == "DropPath"][::2]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert model.no_weight_decay() == ({"stages.2.cls_token"} if name == "uniformer_xs" else set())


def test_in_training_the_class_token_answers_too() -> None:
    model = tiny("uniformer_xs")
    expected = model(images())
    model.set_distilled_training()
    assert torch.equal(model(images()), expected)
    model.train()
    for layer in model.modules():
        layer.training = layer is model
    of_class, of_map = model(images())
    assert torch.equal(of_map, expected)
    assert of_class.shape == expected.shape
    model.set_distilled_training(False)
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize(
    ("name", "wrong", "named"),
    [
        ("uniformer_small", {"depths": (1, 1)}, "depths"),
        ("uniformer_small", {"num_heads": (0, 2, 0, 4)}, "num_heads"),
        ("uniformer_xs", {"num_heads": (0, 0, 5, 4)}, "24 channels do not divide into 5 heads"),
        ("uniformer_xs", {"keep_rate": 0.0}, "keep_rate"),
        ("uniformer_xs", {"score_rate": 2.0}, "score_rate"),
    ],
)
def test_stages_that_do_not_fit_are_refused(name: str, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny(name, **wrong)


def test_maps_are_nchw_alone() -> None:
    with pytest.raises(ValueError, match="NHWC"):
        tiny("uniformer_small").forward_intermediates(images(), output_fmt="NHWC")


# --- the Hourglass block, token by token ----------------------------------------------------------------


def mixed(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens (M, C) after attention and FFN, the first one's attention to the others (M - 1,)), head by head."""
    normed, heads = block.norm1(tokens), block.attn.num_heads
    q, k, v = block.attn.qkv(normed).chunk(3, dim=-1)
    parts, scores = [], torch.zeros(len(tokens) - 1)
    for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        weights = (q_h @ k_h.T / q_h.shape[-1] ** 0.5).softmax(-1)
        parts.append(weights @ v_h)
        scores += weights[0, 1:] / heads
    tokens = tokens + block.attn.proj(torch.cat(parts, -1))
    return tokens + block.mlp(block.norm2(tokens)), scores


def one_by_one(block: Any, x_CHW: Tensor, token_C: Tensor, scores_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the block does to one image: rank, keep, fuse, mix, recover."""
    x_CHW = x_CHW + block.pos_conv(x_CHW[None])[0]
    tokens, scores = list(x_CHW.flatten(1).T), scores_N.tolist()
    ranked = sorted(range(len(tokens)), key=lambda i: -scores[i])
    kept, others = ranked[: len(tokens) // 2], ranked[len(tokens) // 2 :]
    total = sum(scores[i] for i in others)
    fused = torch.stack([scores[i] / total * tokens[i] for i in others]).sum(0)
    before = torch.stack([token_C, *(tokens[i] for i in kept), fused])
    after, attention = mixed(block, before)
    for place, i in enumerate(kept):
        tokens[i], scores[i] = after[1 + place], 0.5 * scores[i] + 0.5 * float(attention[place])
    for i in others:
        tokens[i] = tokens[i] + (after[-1] - fused)
    return torch.stack(tokens).T.reshape(x_CHW.shape), after[0], torch.tensor(scores)


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
@torch.no_grad()
def test_half_of_the_tokens_go_through_a_block_and_all_come_out(size: tuple[int, int]) -> None:
    block = HourglassBlock(16, 4, mlp_ratio=2.0)
    exactness.fill(block)
    generator = torch.Generator().manual_seed(0)
    x, token = torch.randn(3, 16, *size, generator=generator), torch.randn(3, 1, 16, generator=generator)
    scores = torch.rand(3, size[0] * size[1], generator=generator)
    got = block((x, token, scores))
    for image in range(3):
        expected = one_by_one(block, x[image], token[image, 0], scores[image])
        for mine, theirs in zip((got[0][image], got[1][image, 0], got[2][image]), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_first_block_takes_all_tokens_and_scores_them() -> None:
    block = HourglassBlock(16, 4)
    exactness.fill(block)
    x, token = torch.randn(1, 16, 4, 4), torch.randn(1, 1, 16)
    tokens = torch.cat((token[0], (x + block.pos_conv(x))[0].flatten(1).T))
    expected, scores = mixed(block, tokens)
    got = block((x, token, None))
    torch.testing.assert_close(got[0][0].flatten(1).T, expected[1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1][0], expected[:1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[2][0], scores, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_next_stage_takes_over_class_token_and_scores() -> None:
    """Its tokens are four of the stage before, and so is their mean score; the sum stays."""
    stage = HourglassStage(nn.AvgPool2d(2), [], 16, class_dim=16)
    scores = torch.rand(1, 16)
    _, token, coarse = stage((torch.randn(1, 16, 4, 4), torch.randn(1, 1, 16), scores))
    assert token.shape == (1, 1, 16)
    patches = scores.view(2, 2, 2, 2).sum((1, 3)).flatten()
    torch.testing.assert_close(coarse, patches[None])


def test_what_is_fused_teaches_what_scored_it() -> None:
    """The shares of the fused token take gradients to the attention before."""
    model = tiny("uniformer_xs").train()
    model(images()).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "_cls" not in n)


# --- published weights ------------------------------------------------------------------------------------

PUBLISHED = {  # names in github.com/Sense-X/UniFormer, and ours
    "patch_embed2.proj.weight": "stages.1.downsample.proj.weight",
    "patch_embed4.norm.bias": "stages.3.downsample.norm.bias",
    "blocks1.0.pos_embed.weight": "stages.0.blocks.0.pos_conv.weight",
    "blocks1.0.conv1.bias": "stages.0.blocks.0.attn.value.bias",
    "blocks2.0.attn.weight": "stages.1.blocks.0.attn.affinity.weight",
    "blocks2.0.conv2.weight": "stages.1.blocks.0.attn.proj.weight",
    "blocks2.0.norm1.running_var": "stages.1.blocks.0.norm1.running_var",
    "blocks2.0.mlp.fc1.weight": "stages.1.blocks.0.mlp.fc1.weight",
    "blocks3.1.attn.qkv.weight": "stages.2.blocks.1.attn.qkv.weight",
    "blocks4.1.attn.proj.bias": "stages.3.blocks.1.attn.proj.bias",
    "norm.num_batches_tracked": "norm.num_batches_tracked",
    "head.weight": "head.fc.weight",
}
LIGHT = {
    "patch_embed1.proj.0.weight": "stages.0.downsample.conv1.weight",
    "patch_embed1.proj.1.running_mean": "stages.0.downsample.norm1.running_mean",
    "patch_embed1.proj.3.bias": "stages.0.downsample.conv2.bias",
    "patch_embed1.proj.4.weight": "stages.0.downsample.norm2.weight",
    "cls_token": "stages.2.cls_token",
    "cls_upsample.weight": "stages.3.cls_proj.weight",
    "norm_cls.weight": "norm_cls.weight",
    "head_cls.bias": "head_cls.bias",
}


CASES = [
    ("uniformer_small", PUBLISHED | {"patch_embed1.proj.weight": "stages.0.downsample.proj.weight"}),
    ("uniformer_xs", PUBLISHED | LIGHT),
]


@pytest.mark.parametrize(("name", "names"), CASES, ids=NAMES)
def test_published_weights_are_renamed(name: str, names: dict[str, str]) -> None:
    model = tiny(name)
    own = model.state_dict()
    assert checkpoint_filter_fn(own, model) is own
    published = {theirs: own[ours] for theirs, ours in names.items()}
    for state in (published, {"model": published}):
        renamed = checkpoint_filter_fn(state, model)
        assert list(renamed) == list(names.values())
        assert all(renamed[ours] is own[ours] for ours in renamed)
