"""Tokens merged at any width."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.flop_counter import FlopCounterMode

import slicevit
from slicevit import MergedTokens
from slicevit.merging import merge

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


def elastic(name: str = "vit_tiny_patch16_224", **changes: Any) -> slicevit.ElasticModel:
    torch.manual_seed(0)
    model = slicevit.create_model(name, "1/4:1:1/4", **(SMALL | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


KINDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "averaged patches": {"global_pool": "avg", "class_token": False},
    "averaged beside a class token": {"global_pool": "avg"},
    "registers": {"reg_tokens": 3},
    "query and key norms": {"qk_norm": True},
    "layer scale": {"init_values": 0.5},
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("width", ["1/4", "3/4", "1"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_none_merged_it_is_the_model_to_the_bit(kind: str, width: str) -> None:
    model = elastic(**KINDS[kind])
    assert torch.equal(MergedTokens(model.subnet(width), 0)(images()), model(images(), width=width))
    assert torch.equal(MergedTokens(model.to_timm(width).eval(), (0, 0, 0))(images()), model(images(), width=width))


@pytest.mark.parametrize("width", ["1/4", "1"])
@pytest.mark.parametrize("kind", [*KINDS, "two tokens"])
def test_patches_that_are_twins_merge_without_a_trace(kind: str, width: str) -> None:
    """Every second patch is like the one before it, and no position tells them apart: half of them say the same."""
    name = "deit_tiny_distilled_patch16_224" if kind == "two tokens" else "vit_tiny_patch16_224"
    model = elastic(name, **KINDS.get(kind, {})).double()
    with torch.no_grad():
        model.pos_embed.zero_()
    twins = images().double()
    twins[..., 8:16], twins[..., 24:32] = twins[..., 0:8], twins[..., 16:24]
    merged = MergedTokens(model.subnet(width), (8, 0, 0))
    assert merged.forward_features(twins)[0].shape[1] == model.num_prefix_tokens + 8
    torch.testing.assert_close(merged(twins), model(twins, width=width), rtol=1e-9, atol=1e-9)
    other = images().double()
    assert not torch.allclose(merged(other), model(other, width=width), rtol=1e-4, atol=1e-4)


@given(patches=st.integers(1, 9), prefix=st.integers(0, 2), merged=st.integers(1, 6), seed=st.integers(0, 1000))
def test_a_step_of_merging_is_that_of_the_paper(patches: int, prefix: int, merged: int, seed: int) -> None:
    """Against loops over the pairs: who goes where, and means in which every patch counts once."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, prefix + patches, 4, generator=rng, dtype=torch.double)
    counts = torch.randint(1, 5, (2, prefix + patches), generator=rng).double()
    keys = torch.randn(2, prefix + patches, 3, generator=rng, dtype=torch.double)
    left, left_counts = merge(tokens, counts, keys, merged, prefix)
    for image in range(2):
        first, second = list(range(prefix, prefix + patches, 2)), list(range(prefix + 1, prefix + patches, 2))
        groups = {index: [index] for index in range(prefix + patches)}
        pairs = []
        for a in first if second else []:
            alike, p = max((float(cosine_similarity(keys[image, a], keys[image, b], 0)), b) for b in second)
            pairs.append((alike, a, p))
        for _, a, p in sorted(pairs, reverse=True)[: min(merged, len(second))]:
            groups[p] += groups.pop(a)
        expected = {
            (float(counts[image, group].sum()), *(tokens[image, group].T @ counts[image, group]).tolist())
            for group in groups.values()
        }
        found = {(float(n), *(n * token).tolist()) for token, n in zip(left[image], left_counts[image], strict=True)}
        assert len(left[image]) == len(groups)
        torch.testing.assert_close(torch.tensor(sorted(found)), torch.tensor(sorted(expected)))
        torch.testing.assert_close(left[image, :prefix], tokens[image, :prefix])


def test_never_more_than_half_of_the_patches_that_are_left() -> None:
    merged = MergedTokens(elastic().subnet("1/2"), 100)
    tokens_BNE, patches_BN = merged.forward_features(images())
    assert tokens_BNE.shape[1] == 1 + 2  # 16 patches, 8, 4, 2
    assert patches_BN.sum(1).tolist() == [17.0, 17.0]


def test_it_costs_less() -> None:
    subnet = elastic().subnet("1/2")
    macs = []
    for merged in (0, 2, 4):
        with FlopCounterMode(display=False) as counter:
            MergedTokens(subnet, merged)(images())
        macs.append(counter.get_total_flops())
    assert macs == sorted(macs, reverse=True)
    assert macs[2] < 0.8 * macs[0]


def test_weights_that_change_are_taken_over() -> None:
    model = elastic()
    merged = MergedTokens(model.subnet("1/2"), 2)
    before = merged(images())
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.mul_(2)
    after = merged(images())
    assert not torch.equal(before, after)
    assert torch.equal(after, MergedTokens(model.subnet("1/2"), 2)(images()))


def test_a_stock_model_is_taken_too() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    assert MergedTokens(model, 2)(images()).shape == (2, 5)


def plain_timm(name: str, **arguments: Any) -> nn.Module:
    return timm.create_model(name, **arguments)


@pytest.mark.parametrize(
    ("make", "merged", "said"),
    [
        (lambda: elastic(), 2, "of an ElasticModel give a width"),
        (lambda: plain_timm("resnet18"), 2, "this is ResNet"),
        (lambda: plain_timm("vit_base_patch16_plus_240", img_size=32, depth=1, global_pool="max"), 2, "has 'max'"),
        (lambda: plain_timm("vit_small_patch16_384.augreg_in1k", img_size=32, global_pool="map"), 2, "global_pool"),
        (lambda: plain_timm("vit_base_patch32_clip_224", depth=1), -1, "0 or more"),
        (lambda: elastic().subnet("1/2"), (1, 2), "one for each of the 3 blocks"),
        (lambda: elastic().subnet("1/2"), -1, "give a number of 0 or more"),
        (lambda: elastic().subnet("1/2"), 2.5, "give a number of 0 or more"),
    ],
)
def test_what_cannot_be_merged(make: Any, merged: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MergedTokens(make(), merged)


def test_blocks_of_another_kind() -> None:
    model = timm.create_model("vit_base_patch16_rpn_224", img_size=32, depth=1)
    with pytest.raises(ValueError, match="plain pre-norm blocks"):
        MergedTokens(model, 1)


def test_it_is_for_inference() -> None:
    merged = MergedTokens(elastic().to_timm("1/2"), 1)
    assert not merged.training
    with pytest.raises(RuntimeError, match="inference"):
        merged.train()
