"""The widths of a step, drawn from (seed, step) alone."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from slicevit.training.methods import Draw
from slicevit.widths import WidthGrid

_WIDTHS, _FULL = 1, 3  # the streams of random numbers that draw widths, and whether the full one is among them


def generator(seed: int, step: int, stream: int, rank: int = 0) -> np.random.Generator:
    """A generator that depends on nothing but its arguments, so that a resumed run draws what it would have."""
    return np.random.default_rng((seed, step, stream, rank) if rank else (seed, step, stream))


def draw_widths(grid: WidthGrid, draw: Draw, seed: int, step: int, rank: int = 0) -> tuple[Fraction, ...]:
    """The widths of `step`, widest first. Another `rank` draws others.

    stable: full, m2, m1, smallest with m1 uniform on the legal widths in (s, m̄] and m2 on those in (m̄, l)
    (paper section 3.3). free: m1 < m2 uniform on all legal widths between s and l. one: a single width, uniform
    on the grid. full: the full width. A grid with too few widths between gives fewer.
    """
    random = generator(seed, step, _WIDTHS, rank)
    widths = list(grid)
    if draw == "full" or len(widths) == 1:
        return (grid.largest,)
    if draw == "one":
        return (widths[random.integers(len(widths))],)
    between = widths[1:-1]
    if draw == "free":
        picks = random.choice(len(between), size=min(2, len(between)), replace=False)
        middle = sorted((between[i] for i in picks), reverse=True)
    else:
        halves = [w for w in between if w > grid.midpoint], [w for w in between if w <= grid.midpoint]
        middle = [half[random.integers(len(half))] for half in halves if half]
    return (grid.largest, *middle, grid.smallest)


def leave_out_full(
    widths: tuple[Fraction, ...], share: float, seed: int, step: int, rank: int = 0
) -> tuple[Fraction, ...]:
    """`widths`, widest first; in all but a `share` of the draws without the first, where others remain."""
    if share >= 1 or len(widths) == 1 or generator(seed, step, _FULL, rank).random() < share:
        return widths
    return widths[1:]
