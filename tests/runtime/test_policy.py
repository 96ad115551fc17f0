"""What each policy guarantees, for any table and queue, and deadline-slack against fixed widths on bursts."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from simulator import (
    Answer,
    attainment,
    gamma_arrivals,
    profiles,
    queues,
    regular_profiles,
    simulate,
    synthetic_profile,
)

from slicevit.runtime.cascade import Cascade
from slicevit.runtime.policy import Decision, Request, budget, by_urgency, cascade, deadline_slack, fixed
from slicevit.runtime.profile import Profile, Row

relaxed = settings(max_examples=50, deadline=None)

ADAPTIVE: dict[str, Callable[[Profile, list[Request]], Decision]] = {
    "budget per batch": lambda profile, queue: budget(profile, queue, 8.0),
    "budget per image": lambda profile, queue: budget(profile, queue, 1.5, per="image"),
    "deadline-slack": lambda profile, queue: deadline_slack(profile, queue, 0.0),
    "deadline-slack, shedding": lambda profile, queue: deadline_slack(profile, queue, 0.0, shed_late=True),
    "cascade": lambda profile, queue: cascade(profile, queue, 0.0, cascade_over(profile)),
}
ALL = ADAPTIVE | {"fixed": lambda profile, queue: fixed(profile, queue, profile.rows[-1].width)}


def cascade_over(profile: Profile, threshold: float = 0.8) -> Cascade:
    widths = tuple(row.width for row in profile.frontier().rows)
    return Cascade(widths, (threshold,) * (len(widths) - 1), 80.0, 1.0)


# --- every policy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decide", ALL.values(), ids=ALL)
@relaxed
@given(profile=profiles(), queue=queues())
def test_the_most_urgent_run_first_in_a_batch_that_was_measured(
    decide: Callable[[Profile, list[Request]], Decision], profile: Profile, queue: list[Request]
) -> None:
    decision = decide(profile, queue)
    order = by_urgency(queue)
    shed = len(decision.shed)
    assert decision.shed == tuple(order[:shed])
    assert decision.requests == tuple(order[shed : shed + decision.batch])
    assert decision.batch <= profile.row(decision.width).max_batch
    assert decision.batch or shed == len(queue)
    assert str(decision.width) in decision.reason or not decision.requests
    assert decision.reason
    assert "\n" not in decision.reason


@pytest.mark.parametrize("decide", ALL.values(), ids=ALL)
@relaxed
@given(profile=profiles(), queue=queues(), data=st.data())
def test_a_decision_depends_on_nothing_but_who_waits(
    decide: Callable[[Profile, list[Request]], Decision], profile: Profile, queue: list[Request], data: st.DataObject
) -> None:
    queue = [replace(request, arrival_ms=request.arrival_ms + k / 100) for k, request in enumerate(queue)]
    copy = list(queue)
    assert decide(profile, queue) == decide(profile, data.draw(st.permutations(queue)))
    assert queue == copy


@pytest.mark.parametrize("decide", ADAPTIVE.values(), ids=ADAPTIVE)
@relaxed
@given(profile=profiles(), queue=queues())
def test_a_dominated_width_is_never_chosen(
    decide: Callable[[Profile, list[Request]], Decision], profile: Profile, queue: list[Request]
) -> None:
    assert decide(profile, queue).width in {row.width for row in profile.frontier().rows}


@pytest.mark.parametrize("decide", ALL.values(), ids=ALL)
@relaxed
@given(profile=profiles(), queue=queues(), floor=st.integers(0, 100), energy=st.integers(1, 5))
def test_no_limit_is_ever_broken(
    decide: Callable[[Profile, list[Request]], Decision],
    profile: Profile,
    queue: list[Request],
    floor: int,
    energy: int,
) -> None:
    assume(any(row.top1 >= floor and (row.energy_j or 0) <= energy for row in profile.rows))
    row = profile.row(decide(profile.within(min_top1=floor, max_energy=energy), queue).width)
    assert row.top1 >= floor
    assert (row.energy_j or 0) <= energy


@pytest.mark.parametrize("decide", ALL.values(), ids=ALL)
def test_an_empty_queue_is_refused(decide: Callable[[Profile, list[Request]], Decision]) -> None:
    with pytest.raises(ValueError, match="queue is empty"):
        decide(synthetic_profile(), [])


@relaxed
@given(queue=queues())
def test_equal_deadlines_are_first_come_first_served(queue: list[Request]) -> None:
    order = by_urgency(replace(request, deadline_ms=9.0) for request in queue)
    assert [request.arrival_ms for request in order] == sorted(request.arrival_ms for request in queue)


@pytest.mark.parametrize(
    "change",
    [
        {"deadline_ms": math.inf},
        {"arrival_ms": math.nan},
        {"width": Fraction(1, 2)},
        {"confidence": 0.5},
        {"width": Fraction(1, 2), "confidence": math.nan},
    ],
    ids=str,
)
def test_a_request_that_could_not_be_ordered_is_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="request 'cat'"):
        Request(**({"key": "cat", "arrival_ms": 0.0, "deadline_ms": 1.0} | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("now", [math.nan, math.inf])
def test_a_time_that_is_none_is_refused(now: float) -> None:
    profile = synthetic_profile()
    with pytest.raises(ValueError, match="now is"):
        deadline_slack(profile, [Request(0, 0.0, 1.0)], now)
    with pytest.raises(ValueError, match="now is"):
        cascade(profile, [Request(0, 0.0, 1.0)], now, cascade_over(profile))


def test_the_policies_import_no_model_library() -> None:
    """Of their own; the package's front door loads torch."""
    room = Path(sys.modules["slicevit.runtime.policy"].__file__ or "").parent
    code = f"""
import sys, types
for name, path in (("slicevit", {str(room.parent)!r}), ("slicevit.runtime", {str(room)!r})):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [path]
import slicevit.runtime.policy
print(*sys.modules)"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "slicevit.runtime.policy" in loaded
    assert not {"torch", "timm", "torchvision"} & set(loaded)


# --- fixed -----------------------------------------------------------------------------------------------


@relaxed
@given(profile=profiles(), queue=queues(), data=st.data())
def test_fixed_runs_its_width(profile: Profile, queue: list[Request], data: st.DataObject) -> None:
    row = data.draw(st.sampled_from(profile.rows))
    decision = fixed(profile, queue, row.width)
    assert decision.width == row.width
    assert decision.batch == row.best_within(math.inf, len(queue))


def test_fixed_at_an_illegal_width_is_refused() -> None:
    with pytest.raises(ValueError, match="width 1/4 is not in the table"):
        fixed(synthetic_profile().within(min_top1=82), [Request(0, 0.0, 1.0)], "1/4")


# --- budget ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["batch", "image"])
@relaxed
@given(profile=profiles(), queue=queues(), limit=st.integers(1, 100).map(lambda n: n / 5))
def test_budget_is_the_most_accurate_width_within_it(
    per: str, profile: Profile, queue: list[Request], limit: float
) -> None:
    decision = budget(profile, queue, limit, per=per)  # type: ignore[arg-type]
    rows = profile.frontier().rows
    sizes = range(1, min(len(queue), rows[0].max_batch) + 1)

    def cost(row: Row, batch: int) -> float:
        return row.latency(batch) / (batch if per == "image" else 1)

    keeping = [(row, batch) for row in rows for batch in sizes if cost(row, batch) <= limit]
    chosen = profile.row(decision.width)
    if keeping:
        assert (chosen, decision.batch) in keeping
        assert chosen.top1 == max(row.top1 for row, _ in keeping)
        assert decision.batch == max(batch for row, batch in keeping if row == chosen)
    else:
        assert chosen == rows[0]
        assert cost(chosen, decision.batch) == min(cost(chosen, batch) for batch in sizes)
        assert "no width keeps" in decision.reason


@relaxed
@given(profile=profiles(), queue=queues(), limits=st.tuples(st.integers(1, 30), st.integers(1, 30)).map(sorted))
def test_a_larger_budget_is_never_less_accurate(profile: Profile, queue: list[Request], limits: list[int]) -> None:
    less, more = (profile.row(budget(profile, queue, limit).width) for limit in limits)
    narrowest = profile.frontier().rows[0]
    assert more.top1 >= less.top1 or less == narrowest


def test_a_budget_that_is_none_is_refused() -> None:
    queue = [Request(0, 0.0, 1.0)]
    with pytest.raises(ValueError, match=r"budget_ms is 0: it must be positive"):
        budget(synthetic_profile(), queue, 0)
    with pytest.raises(ValueError, match=r"per 'second': write 'batch' or 'image'"):
        budget(synthetic_profile(), queue, 5, per="second")  # type: ignore[arg-type]


# --- deadline-slack --------------------------------------------------------------------------------------


def meets_all(profile: Profile, queue: list[Request], now: float = 0.0) -> bool:
    later = [replace(request, arrival_ms=now) for request in queue]
    answers = simulate(profile, later, lambda waiting, at: deadline_slack(profile, waiting, at))
    return all(answer.in_time for answer in answers)


@relaxed
@given(profile=profiles(), queue=queues())
def test_a_queue_that_was_accepted_keeps_every_deadline(profile: Profile, queue: list[Request]) -> None:
    queue = [replace(request, arrival_ms=0.0) for request in queue]
    accepted = "keeps every deadline" in deadline_slack(profile, queue, 0.0).reason
    assert not accepted or meets_all(profile, queue)


@relaxed
@given(profile=profiles(), queue=queues())
def test_whoever_can_be_answered_first_in_time_is(profile: Profile, queue: list[Request]) -> None:
    rows = profile.frontier().rows
    first = by_urgency(queue)[0]
    decision = deadline_slack(profile, queue, 0.0)
    took = profile.row(decision.width).latency(decision.batch)
    if first.deadline_ms >= min(row.latency(1) for row in rows):
        assert took <= first.deadline_ms
    else:
        assert decision.width == rows[0].width
        assert first in decision.requests
        assert "late" in decision.reason


@relaxed
@given(profile=profiles(), queue=queues(max_size=1))
def test_alone_it_gets_the_most_accurate_width_in_time_or_else_the_narrowest(
    profile: Profile, queue: list[Request]
) -> None:
    rows = profile.frontier().rows
    in_time = [row.top1 for row in rows if row.latency(1) <= queue[0].deadline_ms]
    chosen = profile.row(deadline_slack(profile, queue, 0.0).width)
    assert chosen.top1 == max(in_time) if in_time else chosen == rows[0]


@relaxed
@given(profile=regular_profiles(), slo=st.integers(1, 100), count=st.integers(1, 40))
def test_a_longer_queue_gets_larger_batches_and_narrower_widths(profile: Profile, slo: int, count: int) -> None:
    queue = [Request(k, 0.0, float(slo)) for k in range(count + 1)]
    shorter, longer = deadline_slack(profile, queue[:-1], 0.0), deadline_slack(profile, queue, 0.0)
    assert longer.width <= shorter.width
    assert longer.batch >= shorter.batch or longer.width < shorter.width


@relaxed
@given(profile=regular_profiles(), slo=st.integers(1, 100), more=st.integers(0, 50), count=st.integers(1, 40))
def test_more_slack_is_never_less_accurate(profile: Profile, slo: int, more: int, count: int) -> None:
    def choice(deadline: int) -> Fraction:
        return deadline_slack(profile, [Request(k, 0.0, float(deadline)) for k in range(count)], 0.0).width

    assert choice(slo + more) >= choice(slo)


@relaxed
@given(profile=profiles(), queue=queues(), headroom=st.sampled_from([0.25, 0.5, 0.9]))
def test_headroom_plans_with_less_time_and_sheds_nobody_for_it(
    profile: Profile, queue: list[Request], headroom: float
) -> None:
    queue = [replace(request, arrival_ms=0.0) for request in queue]
    hurried = [  # (1 - headroom) * deadline would round otherwise: 0.9 of 10 ms leaves 1 ms, in which a call may fit
        replace(request, deadline_ms=request.deadline_ms - headroom * max(request.deadline_ms, 0.0))
        for request in queue
    ]
    decision, expected = deadline_slack(profile, queue, 0.0, headroom=headroom), deadline_slack(profile, hurried, 0.0)
    assert (decision.width, decision.batch) == (expected.width, expected.batch)
    assert set(decision.requests) <= set(queue)
    assert f"{headroom:.0%} of the time kept free" in decision.reason
    shed = deadline_slack(profile, queue, 0.0, shed_late=True, headroom=headroom).shed
    assert shed == deadline_slack(profile, queue, 0.0, shed_late=True).shed


def test_headroom_leaves_room_for_a_burst() -> None:
    """A load somewhat above what the full width answers, and four times 32 at once."""
    rows = [
        {"width": "1/4", "top1": 70.0, "latency_ms": {1: 5.0}},
        {"width": "1", "top1": 80.0, "latency_ms": {1: 20.0}},
    ]
    arrivals = sorted([*(16.0 * k for k in range(200)), *(600.0 * burst for burst in (1, 2, 3, 4) for _ in range(32))])
    coming = [Request(number, at, at + 200.0) for number, at in enumerate(arrivals)]
    profile = Profile.parse(rows)

    def late(headroom: float) -> int:
        answers = simulate(profile, coming, lambda queue, at: deadline_slack(profile, queue, at, headroom=headroom))
        return sum(not answer.in_time for answer in answers)

    assert (late(0.5), late(0.0) > 5) == (0, True)


@pytest.mark.parametrize("headroom", [-0.1, 1.0])
def test_headroom_is_a_share(headroom: float) -> None:
    profile = Profile.parse([{"width": "1", "top1": 80.0, "latency_ms": {1: 20.0}}])
    with pytest.raises(ValueError, match="headroom"):
        deadline_slack(profile, [Request(0, 0.0, 1.0)], 0.0, headroom=headroom)


@relaxed
@given(profile=profiles(), queue=queues())
def test_only_who_is_late_is_shed_and_only_when_asked(profile: Profile, queue: list[Request]) -> None:
    quickest = min(row.latency(1) for row in profile.frontier().rows)
    late = [request for request in by_urgency(queue) if request.deadline_ms < quickest]
    assert deadline_slack(profile, queue, 0.0).shed == ()
    decision = deadline_slack(profile, queue, 0.0, shed_late=True)
    assert decision.shed == tuple(late)
    assert (decision.batch > 0) == (len(late) < len(queue))
    assert not late or "shed" in decision.reason


@relaxed
@given(profile=regular_profiles(), late=st.integers(1, 5), slack=st.integers(1, 100))
def test_the_late_do_not_make_others_late_that_can_be_saved(profile: Profile, late: int, slack: int) -> None:
    """Narrowest, either all in one call or the next one right after it."""
    narrowest = profile.rows[0]
    assume(narrowest.latency(1) <= slack)
    queue = [Request(k, 0.0, -1.0) for k in range(late)] + [Request("saved", 0.0, float(slack))]
    decision = deadline_slack(profile, queue, 0.0)
    takes = narrowest.latency(decision.batch)
    savable = 2 * narrowest.latency(1) <= slack or (late < narrowest.max_batch and narrowest.latency(late + 1) <= slack)
    saved = takes <= slack if queue[-1] in decision.requests else takes + narrowest.latency(1) <= slack
    assert saved or not savable


@relaxed
@given(profile=profiles(), queue=queues(), shed_late=st.booleans())
def test_nobody_starves(profile: Profile, queue: list[Request], shed_late: bool) -> None:
    """Everybody is answered once, or shed where allowed; who waits as long is not overtaken by the less urgent."""
    coming = [Request(request.key, request.arrival_ms + 50, request.deadline_ms + 50) for request in queue]
    answers = simulate(profile, coming, lambda waiting, at: deadline_slack(profile, waiting, at, shed_late=shed_late))
    assert sorted(answer.request.key for answer in answers) == list(range(len(queue)))
    answered = [answer.request for answer in answers if answer.width is not None]
    assert shed_late or len(answered) == len(queue)
    for before, after in combinations(answered, 2):
        assert after.arrival_ms > before.arrival_ms or after.deadline_ms >= before.deadline_ms


SLO_MS = 60.0
SEEDS = range(8)


def accuracy(profile: Profile, answers: list[Answer]) -> float:
    return sum(profile.row(answer.width).top1 for answer in answers if answer.width) / len(answers)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("cv2", "mean_gap_ms"), [(1, 2.5), (4, 3.0), (8, 2.5)])
def test_bursts_that_full_width_fails_keep_their_deadlines_at_more_than_the_best_fixed_accuracy(
    seed: int, cv2: float, mean_gap_ms: float
) -> None:
    profile = synthetic_profile()
    trace = gamma_arrivals(seed, 1000, mean_gap_ms, cv2, SLO_MS)
    attains = {}
    for row in profile.rows:
        answers = simulate(profile, trace, lambda waiting, now, width=row.width: fixed(profile, waiting, width))
        attains[row.top1] = attainment(answers) == 1
    assert not attains[profile.rows[-1].top1]

    answers = simulate(profile, trace, lambda waiting, now: deadline_slack(profile, waiting, now))
    assert attainment(answers) == 1
    assert accuracy(profile, answers) > max((top1 for top1, kept in attains.items() if kept), default=0)


# --- cascade ---------------------------------------------------------------------------------------------


@relaxed
@given(profile=profiles(), queue=queues(), data=st.data())
def test_a_cascade_call_is_one_stage_and_first_answers_come_first(
    profile: Profile, queue: list[Request], data: st.DataObject
) -> None:
    fitted = cascade_over(profile)
    asked = st.sampled_from([None, *fitted.widths[:-1]])
    queue = [
        replace(request, width=width, confidence=None if width is None else 0.5)
        for request, width in ((request, data.draw(asked)) for request in queue)
    ]
    decision = cascade(profile, queue, 0.0, fitted)
    stages = {fitted.widths[0] if r.width is None else fitted.after(r.width, 0.5) for r in decision.requests}
    assert stages <= {decision.width}
    assert decision.requests or len(decision.settled) == len(queue)
    assert not set(decision.requests) & set(decision.settled)
    assert all(request.width is not None for request in decision.settled)
    ends = profile.row(decision.width).latency(decision.batch) if decision.requests else 0.0
    for request in queue:
        if request.width is not None:
            wider = profile.row(fitted.after(request.width, 0.5) or "1").latency(1)
            if request in decision.requests:
                assert ends <= request.deadline_ms
            else:
                assert (request in decision.settled) == (ends + wider > request.deadline_ms)


def run_cascade(
    profile: Profile, fitted: Cascade, trace: list[Request], confidences: dict[int | str, float]
) -> dict[int | str, tuple[Fraction, float, float]]:
    """Key -> the width of the answer given, when, and when the first answer was there."""
    coming, waiting, now = list(trace), [], 0.0
    first: dict[int | str, float] = {}
    given_at: dict[int | str, tuple[Fraction, float, float]] = {}
    while coming or waiting:
        if not waiting:
            now = max(now, coming[0].arrival_ms)
        while coming and coming[0].arrival_ms <= now:
            waiting.append(coming.pop(0))
        decision = cascade(profile, waiting, now, fitted)
        for request in decision.settled:
            assert request.width is not None
            given_at[request.key] = (request.width, now, first[request.key])
        if decision.requests:
            now += profile.row(decision.width).latency(decision.batch)
        gone = {request.key for request in (*decision.requests, *decision.settled)}
        waiting = [request for request in waiting if request.key not in gone]
        for request in decision.requests:
            first.setdefault(request.key, now)
            sure = confidences[request.key]
            if fitted.after(decision.width, sure) is None:
                given_at[request.key] = (decision.width, now, first[request.key])
            else:
                waiting.append(replace(request, width=decision.width, confidence=sure))
    return given_at


@relaxed
@given(
    profile=profiles(),
    gaps=st.lists(st.integers(0, 20), min_size=1, max_size=25),
    slo=st.integers(1, 60),
    data=st.data(),
)
def test_who_has_an_answer_in_time_is_never_answered_late(
    profile: Profile, gaps: list[int], slo: int, data: st.DataObject
) -> None:
    trace, at = [], 0.0
    for key, gap in enumerate(gaps):
        at += gap
        trace.append(Request(key, at, at + slo))
    confidences = {request.key: data.draw(st.sampled_from([0.2, 0.9])) for request in trace}
    fitted = cascade_over(profile)
    answers = run_cascade(profile, fitted, trace, confidences)
    assert answers.keys() == confidences.keys()
    for request in trace:
        width, at, first_at = answers[request.key]
        assert first_at > request.deadline_ms or at <= request.deadline_ms + 1e-9
        assert confidences[request.key] < 0.8 or width == fitted.widths[0]


def test_with_time_the_unsure_are_widened_and_the_sure_are_not() -> None:
    profile = synthetic_profile()
    fitted = Cascade((Fraction(1, 4), Fraction(1)), (0.8,), 83.0, 1.0)
    trace = gamma_arrivals(0, 200, 50.0, 1, 1000.0)
    confidences = {request.key: 0.9 if int(request.key) % 3 else 0.1 for request in trace}
    answers = run_cascade(profile, fitted, trace, confidences)
    assert {key for key, (width, _, _) in answers.items() if width == 1} == {
        k for k, c in confidences.items() if c < 0.8
    }


def test_a_cascade_over_illegal_or_dominated_stages_is_refused() -> None:
    profile, queue = synthetic_profile(), [Request(0, 0.0, 1.0)]
    with pytest.raises(ValueError, match="stage 1/4 is not among the undominated widths 1/2, 5/8, 3/4, 7/8, 1"):
        cascade(profile.within(min_top1=82), queue, 0.0, cascade_over(profile))
    with pytest.raises(ValueError, match="request 0: its answer of width 1/4 stands"):
        cascade(profile, [replace(queue[0], width=Fraction(1, 4), confidence=0.9)], 0.0, cascade_over(profile))
    with pytest.raises(ValueError, match="width 5/16 is no stage of the cascade 1/4, 3/8"):
        cascade(profile, [replace(queue[0], width=Fraction(5, 16), confidence=0.9)], 0.0, cascade_over(profile))
