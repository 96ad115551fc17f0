"""The measured table: what it refuses, conservative latencies, legal and undominated widths."""

from __future__ import annotations

import json
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator import profiles, synthetic_profile

from slicevit.runtime.profile import Profile, Row

relaxed = settings(max_examples=50, deadline=None)

HALF = Fraction(1, 2)


# --- what is refused -------------------------------------------------------------------------------------


def test_an_empty_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        Profile(())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": Fraction(0)}, "width 0"),
        ({"top1": 101.0}, "top-1 of 101"),
        ({"top1": float("nan")}, "top-1 of nan"),
        ({"latency_ms": {}}, "no batch size"),
        ({"latency_ms": {1: 0.0}}, "width 1/2: latency of batch 1 is 0.0: it must be positive"),
        ({"latency_ms": {1: 2.0, 4: -1.0}}, "latency of batch 4 is -1.0"),
        ({"latency_ms": {1: float("inf")}}, "latency of batch 1 is inf"),
        ({"latency_ms": {0: 1.0}}, "batch size 0"),
        ({"latency_ms": {True: 1.0}}, "batch size True"),
        ({"energy_j": 0.0}, "energy_j is 0.0"),
        ({"memory_mb": -3.0}, "memory_mb is -3.0"),
    ],
)
def test_a_bad_row_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Row(**({"width": HALF, "top1": 80.0, "latency_ms": {1: 2.0}} | change))


def test_rows_that_do_not_belong_together_are_refused() -> None:
    half, full = Row(HALF, 80.0, {1: 2.0}), Row(Fraction(1), 82.0, {1: 4.0})
    with pytest.raises(ValueError, match="narrowest first"):
        Profile((full, half))
    with pytest.raises(ValueError, match="narrowest first"):
        Profile((half, half))
    with pytest.raises(ValueError, match=r"1/2 and 1 are measured at different batch sizes: \[1\] and \[1, 4\]"):
        Profile((half, Row(Fraction(1), 82.0, {1: 4.0, 4: 8.0})))


def test_a_width_that_was_not_measured_is_refused_by_name() -> None:
    assert synthetic_profile().row(0.5).width == HALF
    with pytest.raises(ValueError, match=r"width 5/16 is not in the table; its widths are 1/4, 3/8, .*, 1"):
        synthetic_profile().row("5/16")


# --- reading ---------------------------------------------------------------------------------------------


@relaxed
@given(profile=profiles(), data=st.data())
def test_a_table_survives_json_in_any_order(profile: Profile, data: st.DataObject) -> None:
    rows = [asdict(row) | {"width": str(row.width)} for row in profile.rows]
    assert Profile.parse(json.loads(json.dumps(data.draw(st.permutations(rows))))) == profile


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"width": "1/2", "top1": 80},
        {"width": "1/2", "top1": 80, "latency_ms": 3.0},
        {"width": "1/2", "top1": 80, "latency_ms": {"one": 3.0}},
        {"width": "1/2", "top1": None, "latency_ms": {"1": 3.0}},
        {"width": "half", "top1": 80, "latency_ms": {"1": 3.0}},
        {"width": "1/2", "top1": 80, "latency_ms": {"1": 3.0}, "energy": 2},
    ],
    ids=str,
)
def test_what_is_no_row_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        Profile.parse([row])


# --- latency ---------------------------------------------------------------------------------------------


@relaxed
@given(profile=profiles())
def test_latency_is_never_below_the_line_between_measured_neighbours_and_never_falls(profile: Profile) -> None:
    for row in profile.rows:
        measured = sorted(row.latency_ms)
        sizes = range(1, row.max_batch + 1)
        lines = np.interp(sizes, measured, [row.latency_ms[batch] for batch in measured])
        latencies = [row.latency(batch) for batch in sizes]
        assert np.all(np.array(latencies) >= lines - 1e-12)
        assert latencies == sorted(latencies)
        assert max(latencies) == max(row.latency_ms.values())


@relaxed
@given(profile=profiles())
def test_where_measured_latencies_rise_they_are_kept_exactly(profile: Profile) -> None:
    for row in profile.rows:
        values = [row.latency_ms[batch] for batch in sorted(row.latency_ms)]
        if values == sorted(values):
            assert all(row.latency(batch) == latency for batch, latency in row.latency_ms.items())


def test_between_two_measured_batches_is_the_line_and_beyond_is_refused() -> None:
    row = Row(HALF, 80.0, {2: 3.0, 4: 5.0})
    assert [row.latency(batch) for batch in (1, 2, 3, 4)] == [3.0, 3.0, 4.0, 5.0]
    for batch in (0, 5):
        with pytest.raises(ValueError, match=f"width 1/2: batch {batch} is outside 1 to 4"):
            row.latency(batch)


@relaxed
@given(profile=profiles(), limit=st.integers(0, 50), waiting=st.integers(1, 40))
def test_the_best_batch_has_the_fewest_milliseconds_an_image(profile: Profile, limit: int, waiting: int) -> None:
    for row in profile.rows:
        fitting = [size for size in range(1, min(waiting, row.max_batch) + 1) if row.latency(size) <= limit]
        costs = {size: row.latency(size) / size for size in fitting}
        best = row.best_within(limit, waiting)
        assert best == (max(size for size in costs if costs[size] == min(costs.values())) if costs else 0)


# --- legal and undominated widths ------------------------------------------------------------------------


@relaxed
@given(
    profile=profiles(),
    min_top1=st.none() | st.integers(0, 100),
    max_energy=st.none() | st.integers(1, 5),
    max_memory=st.none() | st.integers(10, 90),
)
def test_within_keeps_exactly_the_legal_widths(
    profile: Profile, min_top1: int | None, max_energy: int | None, max_memory: int | None
) -> None:
    legal = [
        row
        for row in profile.rows
        if (min_top1 is None or row.top1 >= min_top1)
        and (max_energy is None or (row.energy_j or 0) <= max_energy)
        and (max_memory is None or (row.memory_mb or 0) <= max_memory)
    ]
    limits = {"min_top1": min_top1, "max_energy": max_energy, "max_memory": max_memory}
    if legal:
        assert profile.within(**limits).rows == tuple(legal)
    else:
        with pytest.raises(ValueError, match=r"^no width (reaches|keeps) (min_top1|max_energy|max_memory) \d"):
            profile.within(**limits)


def test_a_floor_that_no_width_reaches_is_refused_with_the_best() -> None:
    with pytest.raises(ValueError, match=r"no width reaches min_top1 90.0: the best is 1 with 83.8"):
        synthetic_profile().within(min_top1=90.0)
    rows = Row(HALF, 80.0, {1: 2.0}, energy_j=3.0, memory_mb=40.0), Row(Fraction(1), 82.0, {1: 4.0}, 6.0, 90.0)
    with pytest.raises(ValueError, match=r"no width keeps max_energy 1: the best is 1/2 with 3.0"):
        Profile(rows).within(max_energy=1)
    with pytest.raises(ValueError, match=r"no width keeps max_memory 9: the best is 1/2 with 40.0"):
        Profile(rows).within(max_memory=9)
    with pytest.raises(ValueError, match=r"max_energy 1 cannot be kept: width 1/4 has no energy_j"):
        synthetic_profile().within(max_energy=1)


@relaxed
@given(profile=profiles())
def test_the_frontier_is_what_nothing_dominates(profile: Profile) -> None:
    def no_worse(row: Row, other: Row) -> bool:
        return row.top1 >= other.top1 and all(row.latency_ms[b] <= other.latency_ms[b] for b in row.latency_ms)

    kept = profile.frontier().rows
    assert kept
    for row in profile.rows:
        dominated = any(no_worse(other, row) and not no_worse(row, other) for other in profile.rows)
        assert (row in kept) != dominated
