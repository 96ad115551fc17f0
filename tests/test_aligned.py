"""Attention in padded heads computes what timm's does, in outputs and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers import Attention, LayerNorm

import slicevit
from slicevit.aligned import AlignedAttention, align_heads, attend_in_padded_heads


def attention(head_dim: int, **kwargs: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(24, num_heads=3, attn_head_dim=head_dim, **{"qkv_bias": True} | kwargs).double()


def answers(part: Attention, call: Any, *args: Any) -> list[Any]:
    """What `call` gives, and the gradients of the tokens and of every parameter."""
    torch.manual_seed(1)
    tokens = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    part.zero_grad()
    out = call(tokens, *args)
    out.square().sum().backward()
    return [out, tokens.grad, *(parameter.grad for parameter in part.parameters())]


@pytest.mark.parametrize("head_dim", [1, 4, 7, 8, 20])
@pytest.mark.parametrize("kwargs", [{}, {"qkv_bias": False, "proj_bias": False}, {"dim_out": 16}])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients_are_those_of_timm(head_dim: int, kwargs: dict[str, Any], masked: bool) -> None:
    part = attention(head_dim, **kwargs)
    mask = torch.tensor([[0.0, -1.0, 2.0, 0.5, -30.0]], dtype=torch.float64).expand(5, 5) if masked else None
    seen = answers(part, lambda tokens: attend_in_padded_heads(part, tokens, mask))
    for one, other in zip(seen, answers(part, part, mask), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_causal_attention_stays_causal() -> None:
    part = attention(7)
    tokens = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(attend_in_padded_heads(part, tokens, None, True), part(tokens, is_causal=True))


def test_dropout_is_drawn_in_training_alone() -> None:
    part = attention(7, attn_drop=0.5, proj_drop=0.5)
    tokens = torch.randn(2, 5, 24, dtype=torch.float64)
    assert not torch.equal(attend_in_padded_heads(part, tokens), attend_in_padded_heads(part, tokens))
    torch.testing.assert_close(attend_in_padded_heads(part.eval(), tokens), part(tokens))


@pytest.mark.parametrize(
    ("head_dim", "kwargs", "aligned"),
    [
        (7, {}, True),
        (8, {}, False),
        (7, {"qk_norm": True, "norm_layer": LayerNorm}, False),
        (7, {"scale_norm": True, "norm_layer": LayerNorm}, False),
        (7, {"gated": True}, False),
    ],
)
def test_only_plain_attention_in_odd_heads_is_aligned(head_dim: int, kwargs: dict[str, Any], aligned: bool) -> None:
    part = attention(head_dim, **kwargs)
    before = answers(part, copy.deepcopy(part))
    align_heads(part)
    assert isinstance(part, AlignedAttention) is aligned
    torch.testing.assert_close(answers(part, part)[0], before[0])


def test_a_compiled_model_aligns_what_it_trains_and_nothing_that_it_hands_out() -> None:
    model = slicevit.create_model("vit_tiny_patch16_224", "1/4:1:1/16", img_size=32, depth=2, num_classes=5)
    model.skeleton("5/16")
    model.compile_blocks(backend="aot_eager")
    modules: dict[str, Any] = {width: model.skeleton(width).module for width in ("1/4", "5/16", "1")}
    kinds = {width: type(module.blocks[1].attn) for width, module in modules.items()}
    assert kinds == {"1/4": Attention, "5/16": AlignedAttention, "1": Attention}
    handed_out: list[Any] = [model.subnet("5/16"), model.to_timm("5/16")]
    assert all(type(module.blocks[1].attn) is Attention for module in handed_out)
