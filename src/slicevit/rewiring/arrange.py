"""Which channel comes to which place, so that every width of a grid keeps much of what matters.

Legend of axis names: R rows that are arranged each by itself (such as heads), N channels.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from slicevit.widths import FULL, Isolation, WidthGrid


def arrange(scores_RN: Tensor, grid: WidthGrid, isolation: Isolation) -> Tensor:
    """The channel (R, N) for each place, given the importance (R, N), none negative, of each channel.

    Where every width takes leading channels, that is their descending order. Where some take trailing ones, leading
    and trailing widths compete for the important channels. From the most important on, each goes where it adds most
    to the sum over the widths of visits · log(share of the importance that the width keeps). A step of training visits
    the smallest width once, and two of those between (paper section 3.3); this is how often a width counts here.

    Within the places that the same widths take, and whatever lies nearer to the end that they start from, channels
    stand in descending order.
    """
    rows, size = scores_RN.shape
    cells = _cells(size, grid, isolation)
    members_CW = np.array([[cell in span for span in _spans(size, grid, isolation)] for cell, _ in cells])
    visits_W = _visits(grid)
    scores = scores_RN.double().cpu().numpy()
    ranked = np.argsort(-scores, axis=1, kind="stable")
    total = scores.sum(1, keepdims=True)
    shares = np.where(total > 0, scores / np.where(total > 0, total, 1), 1 / size)
    kept_RW = np.full((rows, len(visits_W)), 1 / size)  # as of one channel, so that the first is worth no infinity
    free_RC = np.tile([count for _, count in cells], (rows, 1))
    starts = np.array([start for start, _ in cells])
    places = np.empty((rows, size), dtype=np.int64)
    filled_RC = np.zeros_like(free_RC)
    every = np.arange(rows)
    for rank in range(size):
        channel_R = ranked[:, rank]
        share_R1 = shares[every, channel_R][:, None]
        gain_RC = (np.log1p(share_R1 / kept_RW) * visits_W) @ members_CW.T
        cell_R = np.where(free_RC > 0, gain_RC, -np.inf).argmax(1)
        kept_RW += share_R1 * members_CW[cell_R]
        places[every, starts[cell_R] + filled_RC[every, cell_R]] = channel_R
        filled_RC[every, cell_R] += 1
        free_RC[every, cell_R] -= 1
    return torch.from_numpy(places)


def trailing_places(size: int, grid: WidthGrid, isolation: Isolation) -> int:
    """How many of `size` places, at the end, the trailing widths take."""
    return max((round(w * size) for w in grid if grid.end(w, isolation) == "trailing"), default=0)


def _spans(size: int, grid: WidthGrid, isolation: Isolation) -> list[range]:
    """The places that each width takes, but for the full one."""
    spans = []
    for width in grid:
        count = round(width * size)
        if width != FULL:
            spans.append(range(size - count, size) if grid.end(width, isolation) == "trailing" else range(count))
    return spans


def _cells(size: int, grid: WidthGrid, isolation: Isolation) -> list[tuple[int, int]]:
    """(first place, number of places) of the runs of places that the same widths take, front to back."""
    spans = _spans(size, grid, isolation)
    edges = sorted({0, size, *(span.start for span in spans), *(span.stop for span in spans)})
    return [(start, end - start) for start, end in pairwise(edges)]


def _visits(grid: WidthGrid) -> np.ndarray:
    """How often a step of training visits each width but the full one, on average."""
    between = max(1, len(grid) - 2)
    return np.array([1.0 if width == grid.smallest else float(Fraction(2, between)) for width in grid if width != FULL])
