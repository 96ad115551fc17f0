"""Which channel comes to which place, so that the widths of a grid keep as much of what matters as they can.

Legend of axis names: R rows that are arranged each by itself (such as heads), N channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slicevit.widths import FULL, Isolation, WidthGrid


def arrange(scores_RN: Tensor, grid: WidthGrid, isolation: Isolation) -> Tensor:
    """The channel (R, N) for each place, given the importance (R, N) of each channel.

    It has the largest sum over the widths of visits · importance of the channels that the width keeps. A step of
    training visits the smallest width once, and two of those between (paper section 3.3). So the most important
    channel gets the place that a step visits most often, and so on. Where every width takes leading channels, that is
    descending order. Where the smallest takes trailing ones (isolation), these rank after the leading half or so, but
    before what only the widest widths take. Among equal places the first comes first.
    """
    order_N = _visits(scores_RN.shape[1], grid, isolation).argsort(descending=True, stable=True)
    places_RN = torch.empty(scores_RN.shape, dtype=torch.long)
    places_RN[:, order_N] = scores_RN.cpu().argsort(stable=True, dim=1, descending=True)
    return places_RN


def trailing_places(size: int, grid: WidthGrid, isolation: Isolation) -> int:
    """How many of `size` places, at the end, the trailing widths take."""
    return max((round(width * size) for width in grid if grid.end(width, isolation) == "trailing"), default=0)


def _visits(size: int, grid: WidthGrid, isolation: Isolation) -> Tensor:
    """How often a step of training visits each of `size` places (N), in whole numbers; without the full width."""
    between = max(1, len(grid) - 2)
    visits_N = torch.zeros(size, dtype=torch.long)
    for width in grid:
        if width != FULL:
            count = round(width * size)
            trailing = grid.end(width, isolation) == "trailing"
            visits_N[size - count if trailing else 0 : size if trailing else count] += (
                between if width == grid.smallest else 2
            )
    return visits_N
