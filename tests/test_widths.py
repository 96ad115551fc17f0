"""Widths are exact fractions on a grid; nothing is ever compared as a float."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from slicevit import WidthGrid
from slicevit.widths import ISOLATIONS, channels, parse_fraction


@st.composite
def grids(draw: st.DrawFn) -> WidthGrid:
    """Any grid: `count` steps of 1/denominator (times a stride) down from 1."""
    denominator = draw(st.integers(2, 64))
    stride = draw(st.integers(1, denominator - 1))
    count = draw(st.integers(0, (denominator - 1) // stride))
    step = Fraction(stride, denominator)
    return WidthGrid(1 - count * step, Fraction(1), step)


fractions = st.fractions(min_value=Fraction(1, 64), max_value=1, max_denominator=64)


# --- reading a width -------------------------------------------------------------------------------------


@given(width=fractions)
def test_every_spelling_of_a_fraction_is_that_fraction(width: Fraction) -> None:
    n, d = width.numerator, width.denominator
    for spelling in (width, str(width), f" {n}/{d} ", f"{3 * n}/{3 * d}", float(width)):
        assert parse_fraction(spelling) == width
        assert type(parse_fraction(spelling)) is Fraction


def test_the_issues_four_spellings_of_one_half() -> None:
    assert {parse_fraction(value) for value in (0.5, "1/2", "0.5", "4/8", Fraction(1, 2))} == {Fraction(1, 2)}


@pytest.mark.parametrize(
    "value",
    ["", "half", "1/0", "1/2/3", "1:2", "nan", "inf", float("nan"), float("inf"), 0.1234567, None, True, [0.5], b"1/2"],
    ids=repr,
)
def test_what_is_no_width_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=r"\S") as refusal:
        parse_fraction(value)  # type: ignore[arg-type]
    assert str(value) in str(refusal.value)


@given(width=fractions, full=st.integers(1, 4096))
def test_channels_are_exact_or_refused(width: Fraction, full: int) -> None:
    if full * width.numerator % width.denominator:
        with pytest.raises(ValueError, match=str(full)):
            channels(width, full)
    else:
        assert channels(width, full) * width.denominator == full * width.numerator


# --- grids -----------------------------------------------------------------------------------------------


@given(grid=grids())
def test_a_grid_lists_its_widths_narrowest_first_in_equal_steps(grid: WidthGrid) -> None:
    widths = list(grid)
    assert widths[0] == grid.smallest
    assert widths[-1] == 1
    assert len(widths) == len(grid) == (1 - grid.smallest) / grid.step + 1
    assert {b - a for a, b in pairwise(widths)} <= {grid.step}
    assert all(type(width) is Fraction and width in grid for width in widths)


@given(grid=grids())
def test_a_grid_is_written_and_read_again(grid: WidthGrid) -> None:
    assert WidthGrid.parse(str(grid)) == grid
    assert WidthGrid.parse(grid) == grid
    assert hash(WidthGrid.parse(str(grid))) == hash(grid)


@given(grid=grids(), width=fractions)
def test_membership_is_being_listed(grid: WidthGrid, width: Fraction) -> None:
    assert (width in grid) == (width in list(grid))


@given(grid=grids(), width=fractions)
def test_a_legal_width_comes_back_and_any_other_is_refused_with_the_legal_ones(
    grid: WidthGrid, width: Fraction
) -> None:
    if width in list(grid):
        assert grid.width(str(width)) == grid.width(width) == grid.width(float(width)) == width
        return
    with pytest.raises(ValueError, match=r"\S") as refusal:
        grid.width(str(width))
    message = str(refusal.value)
    assert str(width) in message
    assert str(grid.smallest) in message


@pytest.mark.parametrize(("x", "text"), [(4, "1/4:1:1/4"), (7, "1/4:1:1/8"), (13, "1/4:1:1/16"), (25, "1/4:1:1/32")])
def test_the_papers_grids(x: int, text: str) -> None:
    assert len(WidthGrid.parse(text)) == x


@pytest.mark.parametrize("text", ["0.25:1:0.0625", " 1/4 : 1 : 1/16 ", "4/16:1.0:2/32"])
def test_a_grid_has_many_spellings(text: str) -> None:
    assert WidthGrid.parse(text) == WidthGrid(Fraction(1, 4), Fraction(1), Fraction(1, 16))


@pytest.mark.parametrize(
    "text",
    [
        *("", "1/4", "1/4:1", "1/4:1:1/4:1", "1/4,1,1/4", "a:b:c", "1/4:1:1/0"),
        *("1/4:1:0", "1/4:1:-1/4", "1/4:1:1/3", "1/4:1:1"),
        *("0:1:1/4", "-1/4:1:1/4", "5/4:1:1/4", "1/4:3/4:1/4", "1/4:2:1/4"),
    ],
)
def test_what_is_no_grid_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as refusal:
        WidthGrid.parse(text)
    assert text in str(refusal.value) or text.split(":")[-1] in str(refusal.value)


def test_channels_given_for_a_width_are_refused_with_the_fraction_they_are() -> None:
    grid = WidthGrid.parse("1/4:1:1/4")
    with pytest.raises(ValueError, match="192 channels is 1/2"):
        grid.width(192, embed_dim=384)
    with pytest.raises(ValueError, match="192 channels is 1/2"):
        grid.width("192", embed_dim=384)


# --- which end (Isolated Activation) ---------------------------------------------------------------------


@given(grid=grids())
def test_isolation_takes_the_ends_that_the_paper_says(grid: WidthGrid) -> None:
    assume(len(grid) > 1)
    middle = (grid.smallest + 1) / 2
    between = list(grid)[1:-1]
    low, high = {w for w in between if w <= middle}, {w for w in between if w > middle}
    trailing = {
        "smallest": {grid.smallest},  # (a), the paper's
        "b": {grid.smallest} | low,  # s and m1, which is drawn from (s, m̄]
        "c": {grid.smallest} | high,  # s and m2, which is drawn from (m̄, l)
        "off": set(),
        "mirror": low | high,  # the published code
    }
    assert set(ISOLATIONS) == set(trailing)
    for isolation, expected in trailing.items():
        ends = {width: grid.end(width, isolation) for width in grid}
        assert set(ends.values()) <= {"leading", "trailing"}
        assert {width for width, end in ends.items() if end == "trailing"} == expected


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_the_full_width_is_the_whole_axis(isolation: str) -> None:
    """On a grid of one width the smallest is the full one, which has no end to choose."""
    assert WidthGrid.parse("1:1:1").end(Fraction(1), isolation) == "leading"


@given(grid=grids())
def test_the_middle_is_half_way(grid: WidthGrid) -> None:
    assert grid.midpoint - grid.smallest == 1 - grid.midpoint
