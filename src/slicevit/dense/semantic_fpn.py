"""Semantic FPN (Kirillov et al., arXiv 1901.02446): a feature pyramid, and its levels upsampled and added up.

The pyramid is torchvision's. Norms are group norms whose groups hold the same number of channels at every width, so
that a narrow decoder's groups are groups of the full one.

Legend of axis names: B images, K classes, H, W of the finest level.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

from slicevit.widths import WidthGrid

GROUP = 4  # channels
STRIDES = (4, 8, 16, 32)


def group_norm(channels: int) -> nn.GroupNorm:
    """Over groups of `GROUP` channels. Raises ValueError when they do not divide."""
    if channels % GROUP:
        raise ValueError(f"{channels} channels of the decoder do not divide into groups of {GROUP}")
    return nn.GroupNorm(channels // GROUP, channels)


def check_groups(flag: str, channels: int, grid: WidthGrid, parts: int) -> None:
    """Raises ValueError naming `flag` where a width's `channels`, divided by `parts`, are not groups of `GROUP`."""
    least = lcm(*(GROUP * parts * width.denominator for width in grid))
    for width in grid:
        if channels * width % (GROUP * parts):
            raise ValueError(
                f"{flag} {channels} does not go with the grid {grid}: at width {width} its norms have no whole groups "
                f"of {GROUP} channels; give a multiple of {least}, or a coarser --grid"
            )


class SemanticFpn(nn.Module):
    """Feature maps of several levels to logits of the finest level's size.

    Args:
        inputs: channels of each feature map, finest first.
        channels: of the pyramid; the branches have half as many.
        num_classes: K.
        dropout: of whole channels, before the classifier.
    """

    def __init__(self, inputs: Sequence[int], channels: int, num_classes: int, dropout: float = 0.1):
        super().__init__()
        self.pyramid = FeaturePyramidNetwork(list(inputs), channels, norm_layer=group_norm)
        inner = channels // 2
        self.branches = nn.ModuleList(
            nn.ModuleList(
                Conv2dNormActivation(channels if step == 0 else inner, inner, norm_layer=group_norm)
                for step in range(max(1, level))
            )
            for level in range(len(inputs))
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(inner, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits (B, K, H, W) of feature maps, finest first."""
        levels = list(self.pyramid({str(place): level for place, level in enumerate(features)}).values())
        total = levels[0].new_zeros(())
        for place, branch in enumerate(self.branches):
            x = levels[place]
            for step, convolution in enumerate(branch.children()):
                x = convolution(x)
                if place > step:
                    x = resized(x, levels[place - step - 1].shape[2:])
            total = total + x
        return self.classifier(self.dropout(total))


def resized(maps_BCHW: Tensor, size: Sequence[int] | torch.Size) -> Tensor:
    """Bilinear, to (height, width) `size`; the same where it is that already."""
    if tuple(maps_BCHW.shape[2:]) == tuple(size):
        return maps_BCHW
    return F.interpolate(maps_BCHW, size=tuple(size), mode="bilinear", align_corners=False)
