"""Which width to run next, at which batch size, and why: pure functions of a measured table and a queue.

Times are milliseconds on one clock of the caller's. Nothing here reads a clock, a file or a model, and the same
arguments give the same decision. `fixed`, `budget`, `deadline_slack` and `cascade` are the policies. All of them serve
the earliest deadline first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, TypeAlias

from slicevit.runtime.cascade import Cascade
from slicevit.runtime.profile import Profile, Row, names, positive
from slicevit.widths import Width

Per: TypeAlias = Literal["batch", "image"]


@dataclass(frozen=True)
class Request:
    """One image that waits for an answer.

    Attributes:
        key: the caller's name of it.
        arrival_ms: when it came.
        deadline_ms: when its answer is due (arrival plus SLO). It must be finite: any request is then, in time, the
            most urgent one, and none starves.
        width: for `cascade`, the width that has answered it already, or None.
        confidence: for `cascade`, how sure that answer is: the top softmax probability, or the margin.

    Raises:
        ValueError: a time or confidence that is not finite, or one of width and confidence without the other.
    """

    key: int | str
    arrival_ms: float
    deadline_ms: float
    width: Fraction | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        for name in ("arrival_ms", "deadline_ms", "confidence"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"request {self.key!r}: {name} {value} is not finite")
        if (self.width is None) != (self.confidence is None):
            raise ValueError(f"request {self.key!r}: an answer has both a width and a confidence")


@dataclass(frozen=True)
class Decision:
    """What to do next.

    Attributes:
        width: the width to run.
        requests: whom to run it on, most urgent first. Empty only when all that wait are in `shed` or `settled`.
        reason: why, in a sentence.
        shed: requests to drop without an answer (`deadline_slack`, where asked to).
        settled: requests to answer with what they have (`cascade`: the wider run would come too late).
    """

    width: Fraction
    requests: tuple[Request, ...]
    reason: str
    shed: tuple[Request, ...] = ()
    settled: tuple[Request, ...] = ()

    @property
    def batch(self) -> int:
        """The batch size: the number of `requests`."""
        return len(self.requests)


def by_urgency(queue: Iterable[Request]) -> list[Request]:
    """Earliest deadline first; among equal deadlines, first come first served."""
    return sorted(queue, key=lambda request: (request.deadline_ms, request.arrival_ms))


def fixed(profile: Profile, queue: Sequence[Request], width: Width) -> Decision:
    """Always `width`, in the batch size with the fewest milliseconds an image that the queue fills.

    Raises ValueError when the queue is empty or `profile` has no such width.
    """
    order = _waiting(queue)
    row = profile.row(width)
    batch = row.best_within(math.inf, len(order))
    return Decision(row.width, tuple(order[:batch]), f"width {row.width} is fixed; {_of_waiting(batch, order)}")


def budget(profile: Profile, queue: Sequence[Request], budget_ms: float, per: Per = "batch") -> Decision:
    """The most accurate width whose latency keeps a budget, in the largest batch that still does.

    When no width keeps it: the narrowest, in the batch that comes nearest to it.

    Args:
        profile: the legal widths; dominated ones are left out.
        queue: who waits.
        budget_ms: milliseconds allowed.
        per: what they are for, a call ("batch") or each image of it ("image").

    Raises:
        ValueError: the queue is empty, the budget not positive, or `per` neither of the two.
    """
    order = _waiting(queue)
    positive(budget_ms, "budget_ms")
    if per not in ("batch", "image"):
        raise ValueError(f"per {per!r}: write 'batch' or 'image'")
    rows = profile.frontier().rows

    def cost(row: Row, batch: int) -> float:
        return row.latency(batch) / (batch if per == "image" else 1)

    sizes = range(min(len(order), rows[0].max_batch), 0, -1)
    for row in _most_accurate_first(rows):
        for batch in sizes:
            if cost(row, batch) <= budget_ms:
                reason = f"width {row.width} is the most accurate within {budget_ms:g} ms per {per}"
                return Decision(
                    row.width,
                    tuple(order[:batch]),
                    f"{reason}: {cost(row, batch):.3g} ms; {_of_waiting(batch, order)}",
                )
    narrowest = rows[0]
    batch = min(sizes, key=lambda size: cost(narrowest, size))
    reason = f"no width keeps {budget_ms:g} ms per {per}: the narrowest, {narrowest.width}, takes"
    return Decision(
        narrowest.width,
        tuple(order[:batch]),
        f"{reason} {cost(narrowest, batch):.3g} ms; {_of_waiting(batch, order)}",
    )


def deadline_slack(
    profile: Profile, queue: Sequence[Request], now: float, *, shed_late: bool = False, headroom: float = 0.0
) -> Decision:
    """The most accurate width at which all that wait are answered in time, after SlackFit.

    The slack of the most urgent request bounds the latency of the call, as in SlackFit (Khare et al., SuperServe, NSDI
    2025). SlackFit takes the slowest (width, batch) that fits this slack, and reads the load from the slack alone.
    Here the queue is read too: a width counts only if all that wait, served at it one batch after another, keep their
    deadlines. A long queue so gets larger batches, and then narrower widths. If nobody else comes, a queue that was
    accepted in this way keeps all its deadlines.

    When no width keeps all deadlines, the narrowest one that answers the most urgent in time runs. A request that no
    width can answer in time is late: it is still answered first, at the narrowest width.

    In every case the batch is the one with the fewest milliseconds an image among those that fit; a batch larger than
    that helps nobody.

    With `headroom` the width is chosen as if every request had so much less of its time, from arrival to deadline. A
    queue that a wide width answers just in time leaves no room for a burst that comes meanwhile; this keeps some.

    Args:
        profile: the legal widths; dominated ones are left out, and "narrowest" means of those left.
        queue: who waits.
        now: the time, in milliseconds on the clock of the requests.
        shed_late: list late requests in `Decision.shed` instead of running them.
        headroom: the share of its time, from 0 to below 1, that is not planned with.

    Raises:
        ValueError: the queue is empty, `now` is not finite, or `headroom` is out of range.
    """
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom {headroom}: give a share from 0 to below 1, such as 0.5")
    order = _waiting(queue)
    _finite(now)
    rows = profile.frontier().rows
    quickest = min(row.latency(1) for row in rows)
    shed: tuple[Request, ...] = ()
    if shed_late:
        shed = tuple(request for request in order if request.deadline_ms - now < quickest)
        order = order[len(shed) :]
        if not order:
            return Decision(rows[0].width, (), f"all {len(shed)} waiting are too late for any width: shed", shed)
    keeping = ""
    planned = order
    if headroom:
        keeping = f"; {headroom:.0%} of the time kept free"
        order = sorted(order, key=lambda request: _planned(request, headroom))
        planned = [replace(request, deadline_ms=_planned(request, headroom)) for request in order]
    row, batch, reason = _fit_slack(rows, planned, now, quickest)
    shedding = f"; {len(shed)} late shed" if shed else ""
    return Decision(row.width, tuple(order[:batch]), f"{reason}{keeping}; {_of_waiting(batch, order)}{shedding}", shed)


def _planned(request: Request, headroom: float) -> float:
    """By when its answer is planned."""
    return request.deadline_ms - headroom * max(0.0, request.deadline_ms - request.arrival_ms)


def _fit_slack(rows: tuple[Row, ...], order: list[Request], now: float, quickest: float) -> tuple[Row, int, str]:
    slack = order[0].deadline_ms - now
    if slack < quickest:
        row = rows[0]
        batch = _batch_for_late(row, order, now, quickest)
        return row, batch, f"the most urgent is late (slack {slack:.3g} ms): the narrowest width, {row.width}"
    for row in _most_accurate_first(rows):
        if _keeps_all(row, order, now):
            batch = row.best_within(slack, len(order))
            reason = f"width {row.width} takes {row.latency(batch):.3g} ms of {slack:.3g} ms slack"
            return row, batch, f"{reason} and is the most accurate that keeps every deadline"
    row = next(row for row in rows if row.latency(1) <= slack)
    reason = f"no width keeps every deadline: width {row.width} is the narrowest within {slack:.3g} ms slack"
    return row, row.best_within(slack, len(order)), reason


def _keeps_all(row: Row, order: list[Request], now: float) -> bool:
    """Whether all keep their deadlines when served at this width alone, batch after batch."""
    done = 0
    while done < len(order):
        batch = row.best_within(order[done].deadline_ms - now, len(order) - done)
        if not batch:
            return False
        now += row.latency(batch)
        done += batch
    return True


def _batch_for_late(row: Row, order: list[Request], now: float, quickest: float) -> int:
    """The most efficient batch that leaves the first request that is not late in time, if there is one to save.

    That request is in the batch, or is answered right after it.
    """
    late = sum(request.deadline_ms - now < quickest for request in order)
    if late < len(order):
        slack = order[late].deadline_ms - now
        together = row.best_within(slack, len(order))
        if together > late:
            return together
        if before := row.best_within(slack - row.latency(1), late):
            return before
    return row.best_within(math.inf, len(order))


def cascade(profile: Profile, queue: Sequence[Request], now: float, fitted: Cascade) -> Decision:
    """The next stage of the most urgent request, with others that wait for the same stage.

    After each answer the caller asks `fitted.after(width, confidence)`, and queues the request again, with that width
    and confidence, until it is None. First answers go before wider ones: nobody is widened while that would make a
    first answer late. Who has an answer and can no longer be widened in time, after this call, is in
    `Decision.settled`: it is to get the answer that it has, now. So whoever has an answer in time is never answered
    late. A request without an answer is always run, late or not.

    The batch is the one with the fewest milliseconds an image that keeps the most urgent one's deadline, or of all
    batches when that one is late.

    Raises:
        ValueError: the queue is empty, `now` is not finite, a stage is illegal or dominated, or a request's answer
            stands already.
    """
    order = _waiting(queue)
    _finite(now)
    rows = {row.width: row for row in profile.frontier().rows}
    if missing := [width for width in fitted.widths if width not in rows]:
        raise ValueError(f"cascade: stage {missing[0]} is not among the undominated widths {names(rows.values())}")
    stages = [(request, rows[_next_stage(request, fitted)]) for request in order]
    going = [stage for stage in stages if not _too_late_to_widen(*stage, now)]
    fresh = [stage for stage in going if stage[0].width is None]
    run: list[Request] = []
    row, until, reason = rows[fitted.widths[0]], now, "all keep the answers that they have: it is too late to widen"
    if going:
        row, run = _call_of(going[0], going, now)
        if going[0][0].width is not None and not _keeps_all(
            rows[fitted.widths[0]], [request for request, _ in fresh], now + row.latency(len(run))
        ):
            row, run = _call_of(fresh[0], going, now)
        until += row.latency(len(run))
        reason = _reason_of_stage(row, run[0])
    running = set(map(id, run))
    settled = tuple(stage[0] for stage in stages if id(stage[0]) not in running and _too_late_to_widen(*stage, until))
    settling = f"; {len(settled)} settled" if settled else ""
    return Decision(row.width, tuple(run), f"{reason}; {_of_waiting(len(run), order)}{settling}", (), settled)


def _too_late_to_widen(request: Request, row: Row, now: float) -> bool:
    return request.width is not None and row.latency(1) > request.deadline_ms - now


def _call_of(first: tuple[Request, Row], going: list[tuple[Request, Row]], now: float) -> tuple[Row, list[Request]]:
    """The call that answers `first`, and who is in it: the most urgent of its stage."""
    request, row = first
    same = [other for other, its in going if its is row]
    batch = row.best_within(request.deadline_ms - now, len(same)) or row.best_within(math.inf, len(same))
    return row, same[:batch]


def _reason_of_stage(row: Row, first: Request) -> str:
    if first.width is None:
        return f"width {row.width} is the first stage of the most urgent without an answer"
    return f"the most urgent is unsure at width {first.width} ({first.confidence:.3g}): widened to {row.width}"


def _next_stage(request: Request, fitted: Cascade) -> Fraction:
    if request.width is None or request.confidence is None:
        return fitted.widths[0]
    width = fitted.after(request.width, request.confidence)
    if width is None:
        raise ValueError(f"request {request.key!r}: its answer of width {request.width} stands, give it")
    return width


def _most_accurate_first(rows: Iterable[Row]) -> list[Row]:
    """Of equals, the narrower first."""
    return sorted(rows, key=lambda row: (-row.top1, row.width))


def _waiting(queue: Sequence[Request]) -> list[Request]:
    if not queue:
        raise ValueError("the queue is empty: there is nothing to decide")
    return by_urgency(queue)


def _of_waiting(batch: int, order: list[Request]) -> str:
    return f"batch {batch} of {len(order)} waiting"


def _finite(now: float) -> None:
    if not math.isfinite(now):
        raise ValueError(f"now is {now}: it must be finite")
