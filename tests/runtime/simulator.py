"""A discrete-event simulator of one machine, a table to run it on, and strategies for tables and queues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from slicevit.runtime.policy import Decision, Request
from slicevit.runtime.profile import Profile, Row

Decide = Callable[[list[Request], float], Decision]


@dataclass(frozen=True)
class Answer:
    """One request's fate; `width` is None when it was shed."""

    request: Request
    width: Fraction | None
    at_ms: float

    @property
    def in_time(self) -> bool:
        return self.width is not None and self.at_ms <= self.request.deadline_ms + 1e-9


def simulate(profile: Profile, requests: Sequence[Request], decide: Decide) -> list[Answer]:
    """Decide whenever the machine is free and somebody waits; a call takes what the table says."""
    coming = sorted(requests, key=lambda request: request.arrival_ms)
    waiting: list[Request] = []
    answers: list[Answer] = []
    now = 0.0
    while coming or waiting:
        if not waiting:
            now = max(now, coming[0].arrival_ms)
        while coming and coming[0].arrival_ms <= now:
            waiting.append(coming.pop(0))
        decision = decide(waiting, now)
        assert decision.requests or decision.shed, "the policy makes no progress"
        if decision.requests:
            now += profile.row(decision.width).latency(decision.batch)
        answers += [Answer(request, decision.width, now) for request in decision.requests]
        answers += [Answer(request, None, now) for request in decision.shed]
        gone = {request.key for request in (*decision.requests, *decision.shed)}
        waiting = [request for request in waiting if request.key not in gone]
    return answers


def attainment(answers: Sequence[Answer]) -> float:
    """The share of the requests that kept their deadline."""
    return sum(answer.in_time for answer in answers) / len(answers)


def gamma_arrivals(seed: int, count: int, mean_gap_ms: float, cv2: float, slo_ms: float) -> list[Request]:
    """Gamma gaps with squared coefficient of variation `cv2`: 1 is Poisson, above it come bursts."""
    gaps = np.random.default_rng(seed).gamma(1 / cv2, mean_gap_ms * cv2, count)
    return [Request(k, float(at), float(at) + slo_ms) for k, at in enumerate(np.cumsum(gaps))]


def synthetic_profile() -> Profile:
    """Seven widths: cost grows with the square of the width, and batches save up to 40 % an image."""
    accuracies = (79.2, 81.5, 82.3, 82.9, 83.3, 83.6, 83.8)
    rows = []
    for eighths, top1 in zip(range(2, 9), accuracies, strict=True):
        width = eighths / 8
        latencies = {batch: 1 + 0.5 * width + 4 * width**2 * (0.4 + 0.6 * batch) for batch in (1, 4, 16)}
        rows.append(Row(Fraction(eighths, 8), top1, latencies))
    return Profile(tuple(rows))


@st.composite
def profiles(draw: st.DrawFn, max_widths: int = 6) -> Profile:
    """Any table, dominated widths and latencies that fall with the batch included."""
    widths = sorted(
        draw(st.sets(st.fractions(Fraction(1, 16), 1, max_denominator=16), min_size=1, max_size=max_widths))
    )
    batches = sorted(draw(st.sets(st.integers(1, 24), min_size=1, max_size=4)))
    rows = []
    for width in widths:
        top1 = draw(st.integers(0, 20)) * 5.0
        latencies = {batch: draw(st.integers(1, 40)) / 2 for batch in batches}
        rows.append(Row(width, top1, latencies, draw(st.integers(1, 9)) / 2, draw(st.integers(1, 9)) * 10.0))
    return Profile(tuple(rows))


@st.composite
def regular_profiles(draw: st.DrawFn) -> Profile:
    """Wider is slower and more accurate, and a larger batch takes less time an image: base + slope * batch."""
    count, most = draw(st.integers(1, 5)), draw(st.integers(1, 16))
    rows, base, slope = [], 0.0, 0.0
    for k in range(count):
        base += draw(st.integers(1, 10)) / 4
        slope += draw(st.integers(1, 10)) / 4
        rows.append(Row(Fraction(k + 1, count), 50.0 + k, {batch: base + slope * batch for batch in {1, most}}))
    return Profile(tuple(rows))


@st.composite
def queues(draw: st.DrawFn, max_size: int = 30) -> list[Request]:
    """Requests of any urgency, late ones included, as seen at time 0."""
    deadlines = draw(st.lists(st.integers(-20, 120), min_size=1, max_size=max_size))
    return [Request(k, -draw(st.integers(0, 50)), float(deadline)) for k, deadline in enumerate(deadlines)]
