"""Segmenter's decoder (Strudel et al., arXiv 2105.05633): a token for each class among those of the patches.

The blocks are timm's.

Legend of axis names: B images, C channels of the backbone's map, H, W its size, N = H * W patches, D channels of the
decoder, K classes.
"""

from __future__ import annotations

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from slicevit.architectures import HEAD_INPUTS, QKV
from slicevit.fusing import Structure

HEAD_WIDTH = 64


class DecoderAttention(Attention):
    """timm's, by a name of its own: backbones have other attentions that are called Attention too."""


STRUCTURE: Structure = {
    DecoderAttention.__name__: {"qkv.weight": QKV, "qkv.bias": QKV, "proj.weight": HEAD_INPUTS},
}


class MaskTransformer(nn.Module):
    """A feature map to logits of its size.

    Args:
        inputs: channels of the feature map.
        channels: of the decoder's tokens.
        heads: of its attention; as many at every width.
        num_classes: K.
        depth: blocks.
    """

    def __init__(self, inputs: int, channels: int, heads: int, num_classes: int, depth: int = 2):
        super().__init__()
        self.project = nn.Linear(inputs, channels)
        self.classes = nn.Parameter(torch.zeros(1, num_classes, channels))
        nn.init.trunc_normal_(self.classes, std=0.02)
        self.blocks = nn.ModuleList(
            Block(channels, heads, qkv_bias=True, attn_layer=DecoderAttention) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(channels)
        self.patch_map = nn.Linear(channels, channels, bias=False)
        self.class_map = nn.Linear(channels, channels, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits (B, K, H, W) of one feature map (B, C, H, W)."""
        (map_BCHW,) = features
        patches_BND = self.project(map_BCHW.flatten(2).transpose(1, 2))
        x = torch.cat([patches_BND, self.classes.expand(map_BCHW.shape[0], -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        patches_BND, classes_BKD = self.norm(x).split([patches_BND.shape[1], self.classes.shape[1]], 1)
        patches_BND = F.normalize(self.patch_map(patches_BND), dim=-1)
        classes_BKD = F.normalize(self.class_map(classes_BKD), dim=-1)
        logits_BNK = self.mask_norm(patches_BND @ classes_BKD.transpose(1, 2))
        return logits_BNK.transpose(1, 2).unflatten(2, tuple(map_BCHW.shape[2:]))
