"""Token merging at any width: a Vision Transformer that averages alike patches on its way, without training.

Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023 (arXiv:2210.09461). Legend of axis names: B images, C
channels, H height, W width, N tokens, E embedding, A and P every first and second patch, R patches that are merged,
D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from slicevit.subnet import refresh


class MergedTokens(nn.Module):
    """A timm Vision Transformer that merges `merged` pairs of patches in every block, for inference.

    In each block, between attention and MLP, every second patch is matched with the most alike of the others (cosine
    of the mean of their keys over the heads); the `merged` most alike pairs become their mean, in which each patch of
    the image counts once (section 3 of the paper). A merged token counts in attention as often as it has patches
    ("proportional attention", equation 1), and so it does where patches are averaged for the head. Class and
    distillation tokens are never merged. With 0 the logits are the model's own, to the bit.

    Args:
        model: a bound subnet, what `to_timm` gives, or any timm Vision Transformer; its weights are shared, not copied.
        merged: pairs a block, or one number for every block. Never more than half of the patches that are left.

    Raises:
        ValueError: another class, blocks that are no plain pre-norm blocks, a pooling that merged tokens do not go
            with, or numbers that are negative or not one a block.
    """

    def __init__(self, model: nn.Module, merged: int | Sequence[int]):
        super().__init__()
        _check(model)
        depth = len(model.blocks)  # type: ignore[arg-type]
        self.merged = tuple(merged) if isinstance(merged, Sequence) else (merged,) * depth
        whole = all(isinstance(pairs, int) and pairs >= 0 for pairs in self.merged)
        if len(self.merged) != depth or not whole:
            raise ValueError(f"merged={merged}: give a number of 0 or more, or one for each of the {depth} blocks")
        self._model: Any = model
        self.eval()

    def train(self, mode: bool = True) -> MergedTokens:
        """Refuses train mode: merging is for inference. Raises RuntimeError."""
        if mode:
            raise RuntimeError("tokens are merged for inference alone: train the model that was given")
        return super().train(False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, classes)."""
        tokens_BNE, patches_BN = self.forward_features(images_BCHW)
        if self._model.global_pool == "avg" and any(self.merged):
            tokens_BNE = tokens_BNE * self._shares(patches_BN)[..., None]
        return self._model.forward_head(tokens_BNE)

    def forward_features(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that are left, normalised, (B, N, E), and of how many patches each is the mean, (B, N)."""
        model = self._model
        refresh(model)
        tokens_BNE = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images_BCHW))))
        patches_BN = tokens_BNE.new_ones(tokens_BNE.shape[:2])
        all_alike = True
        for block, merged in zip(model.blocks, self.merged, strict=True):
            attended_BNE, keys_BND = _attend(block.attn, block.norm1(tokens_BNE), None if all_alike else patches_BN)
            tokens_BNE = tokens_BNE + block.ls1(attended_BNE)
            if merged:
                tokens_BNE, patches_BN = merge(tokens_BNE, patches_BN, keys_BND, merged, model.num_prefix_tokens)
                all_alike = False
            tokens_BNE = tokens_BNE + block.ls2(block.mlp(block.norm2(tokens_BNE)))
        return model.norm(tokens_BNE), patches_BN

    def _shares(self, patches_BN: Tensor) -> Tensor:
        """What each token is multiplied by so that the mean over the tokens is that over the patches."""
        first = 0 if self._model.pool_include_prefix else self._model.num_prefix_tokens
        pooled_BN = patches_BN[:, first:]
        return patches_BN * pooled_BN.shape[1] / pooled_BN.sum(1, keepdim=True)


def merge(tokens_BNE: Tensor, patches_BN: Tensor, keys_BND: Tensor, merged: int, prefix: int) -> tuple[Tensor, Tensor]:
    """One step of bipartite soft matching (section 3 of the paper).

    Args:
        tokens_BNE: the tokens.
        patches_BN: how many patches each stands for.
        keys_BND: what says how alike two of them are.
        merged: how many pairs become one, at most half of the patches.
        prefix: how many tokens at the beginning stay as they are.

    Returns:
        The same of the tokens that are left: the prefix, those of the first half that were not merged, the other half.
    """
    keys_BND = normalize(keys_BND[:, prefix:], dim=-1)
    merged = min(merged, keys_BND.shape[1] // 2)
    if not merged:
        return tokens_BNE, patches_BN
    alike_BAP = keys_BND[:, ::2] @ keys_BND[:, 1::2].transpose(1, 2)
    best_BA, partner_BA = alike_BAP.max(2)
    order_BA = best_BA.argsort(1, descending=True)
    kept_BA = order_BA[:, merged:].sort(1).values
    gone_BR = order_BA[:, :merged]
    into_BR = partner_BA.gather(1, gone_BR)

    weighted_BNE = tokens_BNE * patches_BN[..., None]
    sums = []
    for values in (weighted_BNE, patches_BN[..., None]):
        first, second = values[:, prefix::2], values[:, prefix + 1 :: 2]
        added = second.scatter_add(1, _like(into_BR, values), first.gather(1, _like(gone_BR, values)))
        sums.append(torch.cat([values[:, :prefix], first.gather(1, _like(kept_BA, values)), added], 1))
    return sums[0] / sums[1], sums[1][..., 0]


def _like(index: Tensor, values: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, values.shape[2])


def _attend(attention: Any, tokens_BNE: Tensor, patches_BN: Tensor | None) -> tuple[Tensor, Tensor]:
    """What timm's attention gives with every token counted as often as it has patches, and its mean keys."""
    heads = (*tokens_BNE.shape[:2], 3, attention.num_heads, attention.head_dim)
    queries, keys, values = attention.qkv(tokens_BNE).reshape(heads).permute(2, 0, 3, 1, 4).unbind(0)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    bias = None if patches_BN is None else patches_BN.log()[:, None, None].to(queries.dtype)
    mixed = scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
    mixed_BNE = attention.norm(mixed.transpose(1, 2).flatten(2))
    return attention.proj(mixed_BNE), keys.mean(1)


def _check(model: nn.Module) -> None:
    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"tokens are merged in timm's VisionTransformer, and this is {name}: of an ElasticModel give a width, "
            "model.subnet('1/2') or model.to_timm('1/2')"
        )
    plain = all(
        type(block) is Block and type(block.attn) is Attention and block.attn.gate is None for block in model.blocks
    )
    if not plain:
        raise ValueError(f"tokens are merged in plain pre-norm blocks, and this {name} has others")
    if model.attn_pool is not None or model.global_pool not in ("token", "avg"):
        raise ValueError(
            f"merged tokens go with global_pool 'token' or 'avg', and this {name} has {model.global_pool!r}"
        )
