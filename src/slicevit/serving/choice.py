"""The next call of a server: the policies of `slicevit.runtime.policy`, with shedding, and requests that name a width.

Times are milliseconds on the clock of the requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Literal, TypeAlias

from slicevit.runtime.policy import Decision, Request, budget, by_urgency, deadline_slack
from slicevit.runtime.profile import Profile, Row

PolicyName: TypeAlias = Literal["deadline-slack", "fixed", "budget"]
Policy: TypeAlias = Callable[[Profile, Sequence[Request], float], Decision]


def policy_of(name: PolicyName, budget_ms: float | None = None, headroom: float = 0.0) -> Policy:
    """The policy of that name, which lists in `Decision.shed` whoever no width that it may choose answers in time.

    `headroom` is that of "deadline-slack", `budget_ms` of "budget".
    "fixed" is for a table of one width; its batches keep the deadlines as those of "deadline-slack" do.
    """
    if name == "fixed":
        return _fixed
    if name == "budget":
        assert budget_ms is not None
        return partial(_budget, budget_ms)
    return partial(deadline_slack, shed_late=True, headroom=headroom)


def _fixed(profile: Profile, queue: Sequence[Request], now: float) -> Decision:
    (row,) = profile.rows
    decision = deadline_slack(profile, queue, now, shed_late=True)
    return replace(decision, reason=f"width {row.width} is fixed; batch {decision.batch} of {len(queue)} waiting")


def _budget(budget_ms: float, profile: Profile, queue: Sequence[Request], now: float) -> Decision:
    rows = profile.frontier().rows
    soonest = now + min(row.latency(1) for row in rows)
    late = tuple(request for request in queue if request.deadline_ms < soonest)
    in_time = [request for request in queue if request.deadline_ms >= soonest]
    if not in_time:
        return _all_late(rows[0].width, late)
    return replace(budget(profile, in_time, budget_ms), shed=late)


def _all_late(width: Fraction, late: tuple[Request, ...]) -> Decision:
    return Decision(width, (), f"all {len(late)} waiting are too late for any width: shed", late)


def served(row: Row, deadlines: Sequence[float], start: float) -> tuple[float, bool]:
    """When all are done that this width can answer in time, batch after batch, and whether the last one is of them.

    `deadlines` are in rising order; the first batch begins at `start`.
    """
    done, last = 0, False
    while done < len(deadlines):
        batch = row.best_within(deadlines[done] - start, len(deadlines) - done)
        start += row.latency(batch) if batch else 0.0
        done += max(batch, 1)
        last = batch > 0
    return start, last


@dataclass(frozen=True)
class Named:
    """A request that names its width."""

    request: Request
    width: Fraction


@dataclass(frozen=True)
class Choice:
    """Decides the next call.

    A request that names its width is run with others of that width, when it is the most urgent and nobody who leaves
    the width to the server gets too late by it. So in overload those who insist on a width are shed first.

    Attributes:
        policy: of the requests that leave the width to the server.
        legal: the widths that the policy may choose.
        every: the widths that a request may name.
    """

    policy: Policy
    legal: Profile
    every: Profile

    def __call__(self, free: Sequence[Request], named: Sequence[Named], now: float) -> Decision:
        """The next call and whom to shed; at least one request must wait."""
        if not named:
            return self.policy(self.legal, free, now)
        theirs = self._of_named(named, now)
        if not free:
            return theirs
        ours = self.policy(self.legal, free, now)
        late = ours.shed + theirs.shed
        if not theirs.requests:
            return replace(ours, shed=late)
        if not ours.requests:
            return replace(theirs, shed=late)
        urgent = by_urgency(free)[len(ours.shed)].deadline_ms
        after = now + self.every.row(theirs.width).latency(theirs.batch)
        spare = len(self.policy(self.legal, free, after).shed) == len(ours.shed)
        return replace(theirs if theirs.requests[0].deadline_ms < urgent and spare else ours, shed=late)

    def _of_named(self, named: Sequence[Named], now: float) -> Decision:
        """The call of the most urgent that is not late, with those that name the same width."""
        width_of = {each.request.key: each.width for each in named}
        order = by_urgency(each.request for each in named)
        slack = {request.key: request.deadline_ms - now for request in order}
        late = tuple(
            request for request in order if slack[request.key] < self.every.row(width_of[request.key]).latency(1)
        )
        going = [request for request in order if request not in late]
        if not going:
            return replace(_all_late(width_of[order[0].key], late), reason="all who named a width are too late for it")
        row = self.every.row(width_of[going[0].key])
        same = [request for request in going if width_of[request.key] == row.width]
        batch = row.best_within(slack[going[0].key], len(same))
        reason = f"width {row.width} is what the request named; batch {batch} of {len(order)} that name a width"
        return Decision(row.width, tuple(same[:batch]), reason, late)
