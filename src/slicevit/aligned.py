"""Attention of compiled narrow widths on a GPU, its heads padded to 8, 16, 24, … channels.

Fused attention takes head widths that are multiples of 8. It pads others by copies of q, k, v, of what it gives, and
of all their gradients. Zeros in the weights, which are smaller than what they are multiplied with, make q, k and v
wider at no copy, and change nothing: a channel of zeros adds nothing to the product of q and k, and that of v meets
zeros in the output projection.
"""

from __future__ import annotations

from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention

MULTIPLE = 8


class AlignedAttention(Attention):
    """timm's attention, which on a CUDA device computes in padded heads."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens (B, N, E) to tokens (B, N, E); the arguments are those of timm's."""
        if x.is_cuda:
            return attend_in_padded_heads(self, x, attn_mask, is_causal)
        return super().forward(x, attn_mask, is_causal)


def align_heads(module: nn.Module) -> None:
    """Let every plain attention in `module` whose heads are no multiple of 8 channels wide compute in padded ones."""
    for part in module.modules():
        if type(part) is Attention and part.head_dim % MULTIPLE and _is_plain(part):
            part.__class__ = AlignedAttention


def _is_plain(attention: Attention) -> bool:
    norms = (attention.q_norm, attention.k_norm, attention.norm)
    return attention.fused_attn and attention.gate is None and all(type(norm) is nn.Identity for norm in norms)


def attend_in_padded_heads(
    attention: Attention, tokens_BNE: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """What `attention`, one without norms and gate, gives for tokens (B, N, E), its heads padded to a multiple of 8."""
    head_dim = attention.head_dim
    qkv_weight = _pad_rows(attention.qkv.weight, head_dim)
    qkv_bias = None if attention.qkv.bias is None else _pad_rows(attention.qkv.bias[:, None], head_dim)[:, 0]
    qkv = linear(tokens_BNE, qkv_weight, qkv_bias).unflatten(2, (3, attention.num_heads, -1))
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        dropout_p=attention.attn_drop.p if attention.training else 0.0,
        is_causal=is_causal,
        scale=attention.scale,
    )
    proj_weight = _pad_rows(attention.proj.weight.t(), head_dim).t()
    return attention.proj_drop(linear(mixed.transpose(1, 2).flatten(2), proj_weight, attention.proj.bias))


def _pad_rows(weight: Tensor, head_dim: int) -> Tensor:
    """`weight` (heads times head_dim, C) with rows of zeros after those of every head."""
    return pad(weight.unflatten(0, (-1, head_dim)), (0, 0, 0, -head_dim % MULTIPLE)).flatten(0, 1)
