"""Exact widths: a width is a `fractions.Fraction` of the full model's channels, on a `WidthGrid`.

No float is ever compared, and `channels` is the only place where a width becomes a channel count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias, get_args

Width: TypeAlias = Fraction | float | int | str
End: TypeAlias = Literal["leading", "trailing"]
Isolation: TypeAlias = Literal["smallest", "b", "c", "off", "mirror"]
ISOLATIONS: tuple[str, ...] = get_args(Isolation)

FULL = Fraction(1)
_FINEST = 1024


def parse_fraction(value: Width) -> Fraction:
    """Read 0.25, "1/4", "0.25" or Fraction(1, 4) as the same exact fraction.

    Raises ValueError when `value` is no number, or a float that is no fraction with a denominator
    of at most 1024.
    """
    if isinstance(value, str):
        try:
            return Fraction(value.strip())
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{value!r} is not a width: write a fraction such as 1/2 or 0.5") from None
    if isinstance(value, bool) or not isinstance(value, (int, float, Fraction)):
        raise ValueError(f"{value!r} is not a width: give a Fraction, a float or a string such as '1/2'")
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"{value!r} is not a width: write a fraction such as 1/2 or 0.5")
        exact = Fraction(value).limit_denominator(_FINEST)
        if float(exact) != value:
            raise ValueError(f"{value!r} is no fraction with a denominator up to {_FINEST}: write it as '3/16'")
        return exact
    return Fraction(value)


def channels(width: Fraction, full_channels: int) -> int:
    """Channels of an axis of `full_channels` at `width`. Raises ValueError when that is no whole number."""
    count = width * full_channels
    if count.denominator != 1:
        raise ValueError(f"{width} of {full_channels} channels is no whole number")
    return int(count)


@dataclass(frozen=True)
class WidthGrid:
    """The legal widths smallest, smallest + step, ..., 1 (paper section 3: bound [s, l], granularity ε).

    Raises ValueError unless 0 < smallest <= 1, largest = 1, step > 0, and whole steps lead from smallest to 1.
    """

    smallest: Fraction
    largest: Fraction
    step: Fraction

    def __post_init__(self) -> None:
        if self.largest != 1:
            raise ValueError(f"grid {self}: the largest width must be 1 (the full model)")
        if not 0 < self.smallest <= 1:
            raise ValueError(f"grid {self}: the smallest width must lie in (0, 1]")
        if self.step <= 0:
            raise ValueError(f"grid {self}: the step must be above 0")
        if (self.largest - self.smallest) % self.step != 0:
            raise ValueError(
                f"grid {self}: from {self.smallest} to {self.largest} is no whole number of steps of {self.step}"
            )

    @classmethod
    def parse(cls, text: str | WidthGrid) -> WidthGrid:
        """Read "smallest:largest:step", such as "1/4:1:1/16". Raises ValueError for anything else."""
        if isinstance(text, WidthGrid):
            return text
        parts = str(text).split(":")
        if len(parts) != 3:
            raise ValueError(f"{text!r} is not a grid: write smallest:largest:step, such as 1/4:1:1/16")
        smallest, largest, step = (parse_fraction(part) for part in parts)
        return cls(smallest, largest, step)

    def __str__(self) -> str:
        return f"{self.smallest}:{self.largest}:{self.step}"

    def __len__(self) -> int:
        return int((self.largest - self.smallest) / self.step) + 1

    def __iter__(self) -> Iterator[Fraction]:
        return (self.smallest + k * self.step for k in range(len(self)))

    def __contains__(self, width: object) -> bool:
        return (
            isinstance(width, Fraction)
            and self.smallest <= width <= self.largest
            and (width - self.smallest) % self.step == 0
        )

    @property
    def midpoint(self) -> Fraction:
        """m̄ = (s + l) / 2, which parts the two sampled widths (paper section 3.3, Stable Sampling)."""
        return (self.smallest + self.largest) / 2

    def width(self, value: Width, *, embed_dim: int | None = None) -> Fraction:
        """The legal width that `value` names. Raises ValueError when the grid does not hold it.

        With `embed_dim` given, a channel count such as 192 is refused with the fraction that it stands for.
        """
        width = parse_fraction(value)
        if width in self:
            return width
        if embed_dim and 1 < width <= embed_dim and width.denominator == 1:
            raise ValueError(
                f"width {value} is not a fraction: {width} channels is {Fraction(int(width), embed_dim)} of {embed_dim}"
            )
        legal = ", ".join(map(str, self))
        raise ValueError(f"width {value} is not on the grid {self}; its widths are {legal}")

    def end(self, width: Fraction, isolation: Isolation) -> End:
        """Which channels `width` takes (Isolated Activation, paper section 3.1 and its appendix's alternatives).

        smallest: the smallest width takes the trailing channels, all others the leading ones (the paper's).
        b, c: besides the smallest, the widths that m1 (b) or m2 (c) can draw take the trailing ones.
        off: all leading. mirror: smallest and full leading, those between trailing (the published code).
        """
        between = self.smallest < width < self.largest
        trailing = {
            "smallest": width == self.smallest,
            "b": width == self.smallest or (between and width <= self.midpoint),
            "c": width == self.smallest or (between and width > self.midpoint),
            "off": False,
            "mirror": between,
        }[isolation]
        return "trailing" if trailing and width != self.largest else "leading"

    def neighbours(self) -> Iterator[WidthGrid]:
        """Other grids, nearest first: by step, then by smallest width. For naming one that works."""
        steps = {Fraction(1, n) for n in range(2, 65)} | {self.step}
        grids = {
            WidthGrid(k * step, FULL, step) for step in steps if step.numerator == 1 for k in range(1, step.denominator)
        }

        def distance(grid: WidthGrid) -> tuple[float, float, int]:
            def ratio(a: Fraction, b: Fraction) -> float:
                return float(max(a, b) / min(a, b))

            return (
                ratio(grid.step, self.step) * ratio(grid.smallest, self.smallest),
                ratio(grid.smallest, self.smallest),
                len(grid),
            )

        return iter(sorted(grids, key=distance))
