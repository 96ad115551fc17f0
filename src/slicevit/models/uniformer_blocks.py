"""The parts of a UniFormer: its two kinds of block, a stage of them, and what makes images smaller in front of it.

Written from the paper (Li et al., arXiv 2201.09450, section 3). A block is

    X = DPE(X_in) + X_in,    Y = MHRA(Norm(X)) + X,    Z = FFN(Norm(Y)) + Y

with a depthwise convolution as the dynamic position embedding (DPE), and a multi-head relation aggregator (MHRA) that
is local, a learned affinity to the neighbours, or global, self-attention.

Legend of axis names: B images, C channels, H height, W width, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import Attention, ConvMlp, DropPath, LayerNorm2d, Mlp
from timm.models import checkpoint
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6


def position_embedding(dim: int) -> nn.Conv2d:
    """DPE: a depthwise convolution of 3 x 3 pixels, (B, C, H, W) to itself."""
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


class LocalRelation(nn.Module):
    """Local MHRA, (B, C, H, W) to itself: every channel is a head, its affinity a learned one of 5 x 5 neighbours."""

    def __init__(self, dim: int):
        super().__init__()
        self.value = nn.Conv2d(dim, dim, 1)
        self.affinity = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The related map (B, C, H, W)."""
        return self.proj(self.affinity(self.value(x_BCHW)))


class LocalBlock(nn.Module):
    """A block of the shallow stages, (B, C, H, W) to itself, with BatchNorms.

    Args:
        dim: C.
        mlp_ratio: hidden channels of the FFN over C.
        proj_drop: rate of dropout in the FFN.
        drop_path: rate at which a branch is left out.
    """

    def __init__(self, dim: int, mlp_ratio: float = 4.0, proj_drop: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.pos_conv = position_embedding(dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = LocalRelation(dim)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), act_layer=nn.GELU, drop=proj_drop)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The map (B, C, H, W) after the block."""
        x_BCHW = x_BCHW + self.pos_conv(x_BCHW)
        x_BCHW = x_BCHW + self.drop_path1(self.attn(self.norm1(x_BCHW)))
        return x_BCHW + self.drop_path2(self.mlp(self.norm2(x_BCHW)))


class GlobalBlock(nn.Module):
    """A block of the deep stages, (B, C, H, W) to itself, with LayerNorms: global MHRA is self-attention.

    Args:
        dim: C, a multiple of num_heads.
        num_heads: heads of the attention.
        mlp_ratio: hidden channels of the FFN over C.
        qkv_bias: whether queries, keys and values have a bias.
        proj_drop, attn_drop: rates of dropout behind projections, and of attention weights.
        drop_path: rate at which a branch is left out.
        attn_layer: makes the attention, as timm's `Attention` is made.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        attn_layer: Callable[..., nn.Module] = Attention,
    ):
        super().__init__()
        self.pos_conv = position_embedding(dim)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = attn_layer(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Any) -> Any:
        """The map (B, C, H, W) after the block."""
        x_BCHW: Tensor = x + self.pos_conv(x)
        x_BNC = x_BCHW.flatten(2).transpose(1, 2)
        x_BNC = x_BNC + self.drop_path1(self.attn(self.norm1(x_BNC)))
        x_BNC = x_BNC + self.drop_path2(self.mlp(self.norm2(x_BNC)))
        return x_BNC.transpose(1, 2).reshape(x_BCHW.shape)


class PatchEmbed(nn.Module):
    """Patches that do not overlap, (B, in_dim, H, W) to (B, dim, H / size, W / size), normalised."""

    def __init__(self, in_dim: int, dim: int, size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, size, stride=size)
        self.norm = LayerNorm2d(dim, eps=1e-5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The smaller map."""
        return self.norm(self.proj(x_BCHW))


class OverlappedStem(nn.Module):
    """Two convolutions of 3 x 3 pixels and stride 2, (B, in_dim, H, W) to (B, dim, H / 4, W / 4)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim // 2, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(dim // 2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The smaller map."""
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x_BCHW)))))


class Stage(nn.Module):
    """What makes the map smaller, and blocks of one width behind it."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Any) -> Any:
        """The map (B, C, H, W) of this stage, of that of the stage before."""
        return self.run_blocks(self.downsample(x))

    def run_blocks(self, x: Any) -> Any:
        """What the last block gives of what the first one takes."""
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x
