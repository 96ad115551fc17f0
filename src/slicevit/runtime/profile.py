"""The measured table of a model on a machine: accuracy and latency of every width.

Times are milliseconds, accuracies per cent.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from slicevit.widths import Width, parse_fraction


@dataclass(frozen=True)
class Row:
    """What one width scores and costs on one machine.

    Attributes:
        width: the exact fraction of the full width.
        top1: accuracy, in per cent: top-1, or of a segmenter mIoU.
        latency_ms: measured batch size -> milliseconds of a call.
        energy_j: joules of an image, or None where it was not measured.
        memory_mb: peak megabytes of a call, or None where it was not measured.

    Raises:
        ValueError: a latency, batch size, energy or memory that is not positive, or an accuracy outside 0 to 100.
    """

    width: Fraction
    top1: float
    latency_ms: Mapping[int, float]
    energy_j: float | None = None
    memory_mb: float | None = None

    def __post_init__(self) -> None:
        if self.width <= 0:
            raise ValueError(f"width {self.width}: it must be above 0")
        if not 0 <= self.top1 <= 100:
            raise ValueError(f"width {self.width}: top-1 of {self.top1} is no percentage from 0 to 100")
        if not self.latency_ms:
            raise ValueError(f"width {self.width}: no batch size has a latency")
        for batch, latency in self.latency_ms.items():
            if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
                raise ValueError(f"width {self.width}: batch size {batch!r} is no whole number above 0")
            positive(latency, f"width {self.width}: latency of batch {batch}")
        for name in ("energy_j", "memory_mb"):
            if getattr(self, name) is not None:
                positive(getattr(self, name), f"width {self.width}: {name}")

    @property
    def max_batch(self) -> int:
        """The largest measured batch size; no policy goes beyond it."""
        return max(self.latency_ms)

    def latency(self, batch: int) -> float:
        """Milliseconds to count on for a call of `batch` images.

        Between two measured batch sizes this is the line between them; below the smallest, the smallest's. A batch
        never counts for less than a smaller one does, so a measured dip is lifted to what came before it.

        Raises ValueError when `batch` is below 1 or above the largest measured.
        """
        if not 1 <= batch <= self.max_batch:
            raise ValueError(f"width {self.width}: batch {batch} is outside 1 to {self.max_batch}, those measured")
        return self._latencies[batch - 1]

    @cached_property
    def _latencies(self) -> tuple[float, ...]:
        """Of batches 1, 2, ..., max_batch; never falling."""
        measured = sorted(self.latency_ms)
        lines = np.interp(range(1, self.max_batch + 1), measured, [self.latency_ms[batch] for batch in measured])
        return tuple(float(latency) for latency in np.maximum.accumulate(lines))

    @cached_property
    def _efficient(self) -> tuple[int, ...]:
        """For at most 1, 2, ..., max_batch images: the batch size with the fewest milliseconds an image."""
        best, sizes = 1, []
        for batch in range(1, self.max_batch + 1):
            if self.latency(batch) / batch <= self.latency(best) / best:
                best = batch
            sizes.append(best)
        return tuple(sizes)

    def best_within(self, limit_ms: float, waiting: int) -> int:
        """Of the batches of at most `waiting` images that take at most `limit_ms`, the one with the fewest ms an image.

        Of equals the largest. 0 when none fits.
        """
        largest = min(bisect_right(self._latencies, limit_ms), waiting)
        return self._efficient[largest - 1] if largest else 0


@dataclass(frozen=True)
class Profile:
    """The measured table of one model on one machine: its widths, narrowest first.

    Raises:
        ValueError: no rows, a width twice, or widths measured at different batch sizes.
    """

    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("the table has no rows: measure at least one width")
        for above, below in pairwise(self.rows):
            if above.width >= below.width:
                raise ValueError(f"widths {above.width}, {below.width}: each width once, narrowest first")
            if set(above.latency_ms) != set(below.latency_ms):
                raise ValueError(
                    f"widths {above.width} and {below.width} are measured at different batch sizes: "
                    f"{sorted(above.latency_ms)} and {sorted(below.latency_ms)}"
                )

    @classmethod
    def parse(cls, rows: Iterable[Mapping[str, Any]]) -> Profile:
        """Read rows as JSON holds them, in any order; the keys are the names of `Row`'s attributes.

        A width may be "1/4" or 0.25, a batch size 4 or "4". Raises ValueError for a key that is missing or unknown,
        a cell that is no number, and all that `Row` and `Profile` refuse.
        """
        return cls(tuple(sorted((_parse_row(row) for row in rows), key=lambda row: row.width)))

    def row(self, width: Width) -> Row:
        """The row of `width`. Raises ValueError when there is none."""
        wanted = parse_fraction(width)
        for row in self.rows:
            if row.width == wanted:
                return row
        raise ValueError(f"width {width} is not in the table; its widths are {names(self.rows)}")

    def within(
        self, *, min_top1: float | None = None, max_energy: float | None = None, max_memory: float | None = None
    ) -> Profile:
        """The legal widths alone: a policy given this table cannot choose any other.

        Args:
            min_top1: the lowest top-1 accuracy allowed, in per cent.
            max_energy: the most joules an image may take.
            max_memory: the most megabytes a call may take.

        Raises:
            ValueError: no width keeps a limit, or the limited quantity was not measured. The message names the limit
                and the best width.
        """
        rows = self.rows
        if min_top1 is not None:
            best = max(rows, key=lambda row: row.top1)
            rows = tuple(row for row in rows if row.top1 >= min_top1)
            if not rows:
                raise ValueError(f"no width reaches min_top1 {min_top1}: the best is {best.width} with {best.top1}")
        for name, column, limit in (("max_energy", "energy_j", max_energy), ("max_memory", "memory_mb", max_memory)):
            if limit is not None:
                rows = _at_most(rows, name, column, limit)
        return Profile(rows)

    def frontier(self) -> Profile:
        """The widths that no other one dominates: is at least as accurate and fast at every batch, and better in one.

        What an adaptive policy chooses from. There is always one.
        """
        return self._frontier

    @cached_property
    def _frontier(self) -> Profile:
        return Profile(tuple(row for row in self.rows if self.better_than(row) is None))

    def better_than(self, row: Row) -> Row | None:
        """The row that dominates `row`, as `frontier` means it; of several the most accurate. None on the frontier."""
        better = [other for other in self.rows if _dominates(other, row)]
        return max(better, key=lambda other: other.top1, default=None)


def _parse_row(row: Mapping[str, Any]) -> Row:
    needed, optional = {"width", "top1", "latency_ms"}, {"energy_j", "memory_mb"}
    if not needed <= set(row) <= needed | optional:
        raise ValueError(f"row {dict(row)}: its keys are width, top1, latency_ms, and may be energy_j, memory_mb")
    try:
        latencies = {int(batch): float(latency) for batch, latency in row["latency_ms"].items()}
        extras = {name: None if row.get(name) is None else float(row[name]) for name in optional}
        return Row(parse_fraction(row["width"]), float(row["top1"]), latencies, **extras)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"row {dict(row)}: {error}") from error


def _at_most(rows: tuple[Row, ...], name: str, column: str, limit: float) -> tuple[Row, ...]:
    for row in rows:
        if getattr(row, column) is None:
            raise ValueError(f"{name} {limit} cannot be kept: width {row.width} has no {column} in the table")
    best = min(rows, key=lambda row: float(getattr(row, column)))
    rows = tuple(row for row in rows if getattr(row, column) <= limit)
    if not rows:
        raise ValueError(f"no width keeps {name} {limit}: the best is {best.width} with {getattr(best, column)}")
    return rows


def _dominates(row: Row, other: Row) -> bool:
    gains = [row.top1 - other.top1, *(other.latency_ms[batch] - row.latency_ms[batch] for batch in row.latency_ms)]
    return min(gains) >= 0 and max(gains) > 0


def names(rows: Iterable[Row]) -> str:
    return ", ".join(str(row.width) for row in rows)


def positive(value: float, name: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}: it must be positive")
