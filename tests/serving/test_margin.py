"""The running estimate of what service takes beyond the table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_fakes import FULL, QUARTER, TABLE

from slicevit.serving.margin import Margin


def test_without_calls_the_table_is_believed() -> None:
    margin = Margin(TABLE, 0.95)
    assert margin.table(0.0) == TABLE
    assert (margin.ratio(0.0), margin.event_loop(0.0)) == (1.0, 0.0)


def test_calls_that_take_longer_scale_the_table() -> None:
    margin = Margin(TABLE, 0.95)
    for n in range(40):
        margin.call_took(float(n), predicted=2.0, compute=3.0, around=0.25)
        margin.delivery_took(float(n), 0.5)
    scaled = margin.table(100.0)
    for row, own in zip(scaled.rows, TABLE.rows, strict=True):
        assert (row.width, row.top1) == (own.width, own.top1)
        for batch, latency in own.latency_ms.items():
            assert row.latency_ms[batch] == pytest.approx(1.5 * latency + 0.3)  # 0.25 rounded up to 0.1
    assert margin.event_loop(100.0) == 1.0


def test_an_interruption_costs_a_narrow_width_no_more_than_a_wide_one() -> None:
    """A quarter of the calls waits 6 ms for the core: the narrowest width, which takes 1 ms, does not take seven."""
    margin = Margin(TABLE, 0.95)
    for n in range(40):
        margin.call_took(float(n), predicted=1.0, compute=7.0 if n % 4 == 0 else 1.0, around=0.0)
    assert margin.ratio(100.0) == 1.0
    scaled = margin.table(100.0)
    for width in (QUARTER, FULL):
        assert scaled.row(width).latency(1) == pytest.approx(TABLE.row(width).latency(1) + 6.0)


@given(
    st.lists(st.tuples(st.floats(0.5, 50.0), st.floats(0.1, 500.0), st.floats(0.0, 5.0)), min_size=20, max_size=60),
    st.sampled_from([0.5, 0.9, 0.95]),
)
def test_the_estimate_covers_that_share_of_the_calls(calls: list[tuple[float, float, float]], quantile: float) -> None:
    margin = Margin(TABLE, quantile)
    for n, (predicted, compute, around) in enumerate(calls):
        margin.call_took(float(n), predicted, compute, around)
    scaled, one = margin.table(100.0), TABLE.row(FULL).latency(1)
    four = TABLE.row(FULL).latency(4)
    ratio = (scaled.row(FULL).latency(4) - scaled.row(FULL).latency(1)) / (four - one)
    excess = scaled.row(FULL).latency(1) - ratio * one
    covered = sum(compute + around <= (ratio * predicted + excess) * 1.001 for predicted, compute, around in calls)
    assert covered >= quantile * (len(calls) - 1)


def test_calls_that_take_less_do_not() -> None:
    margin = Margin(TABLE, 0.95)
    for n in range(40):
        margin.call_took(float(n), predicted=2.0, compute=1.0, around=0.0)
    assert margin.table(100.0) == TABLE


def test_the_quantile_is_that_of_the_recent_calls() -> None:
    margin = Margin(TABLE, 0.75)
    for n in range(101):
        margin.delivery_took(float(n), n / 100)
    assert margin.event_loop(200.0) == pytest.approx(1.5)


def test_one_call_that_hung_does_not_count() -> None:
    margin = Margin(TABLE, 0.95)
    margin.call_took(0.0, predicted=1.0, compute=1000.0, around=0.0)
    assert margin.table(100.0) == TABLE
    margin.call_took(0.0, predicted=1.0, compute=1000.0, around=0.0)
    assert margin.table(200.0).row(FULL).latency(1) == 999.0 + TABLE.row(FULL).latency(1)


def test_what_is_older_than_ten_seconds_is_forgotten() -> None:
    margin = Margin(TABLE, 0.95)
    for n in range(30):
        margin.call_took(float(n), predicted=1.0, compute=500.0, around=0.0)
    assert margin.table(9_000.0).row(FULL).latency(1) == 500.0 * TABLE.row(FULL).latency(1)
    assert margin.table(10_100.0) == TABLE


def test_the_table_is_not_made_anew_for_every_call() -> None:
    margin = Margin(TABLE, 0.95)
    for n in range(30):
        margin.call_took(float(n), predicted=1.0, compute=1.5 + n * 1e-4, around=0.0)
    first = margin.table(100.0)
    margin.call_took(101.0, predicted=1.0, compute=1.503, around=0.0)
    assert margin.table(200.0) is first
    assert first.row(QUARTER).latency(1) >= 1.5
