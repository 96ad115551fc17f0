"""The queue of a server and the one thread that computes.

Times are milliseconds on the batcher's clock. Legend of axis names: B images of a batch, C channels, H height,
W width, K classes.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import count

import torch
from torch import Tensor

from slicevit.runtime.policy import Decision, Request
from slicevit.runtime.profile import Profile, Row
from slicevit.serving.choice import Choice, Named, Policy, served
from slicevit.serving.margin import Margin
from slicevit.serving.refusal import EngineFailed, Refusal
from slicevit.serving.runs import Runs

_STOP_SECONDS = 10.0

logger = logging.getLogger("slicevit.serving")


@dataclass(frozen=True)
class Answer:
    """What the engine says of one image, or of one window of it.

    Attributes:
        output: what `outputs` of the batcher made of its logits.
        width: the width that answered.
        batch: how many images the call had.
        reason: why this width, in a sentence.
        started, ended: when the engine began and ended.
        finished: when the batcher was done with the call.
    """

    output: Tensor
    width: Fraction
    batch: int
    reason: str
    started: float
    ended: float
    finished: float


@dataclass(frozen=True)
class _Waiting:
    request: Request
    image_CHW: Tensor
    width: Fraction | None  # that the request names
    answer: Future[Answer] = field(default_factory=Future)


def milliseconds() -> float:
    """The clock of a server."""
    return time.perf_counter() * 1000


class Batcher:
    """Takes images from any thread; one thread of its own decides, computes and answers.

    The policy sees the table scaled by `margin`, and the time at which an answer would be delivered. Whoever no width
    can answer in time any more is refused with 429; so the queue drains at the rate at which the server can answer.
    A server that does nothing refuses only whom the table itself rules out: after a disturbance the margin sees so
    that it is over. An error of the engine is the answer to that batch alone.

    Args:
        engine: computes.
        table: latency and accuracy of every width that a request may name.
        legal: the widths of `table` that the policy may choose.
        policy: chooses among them (see `choice.policy_of`).
        margin: what service takes beyond the table; is kept up to date here.
        called: told of every call: its width, its number of images and its milliseconds in the engine.
        outputs: what the answers hold of a batch's logits.
        clock: milliseconds.
    """

    def __init__(
        self,
        engine: Runs,
        table: Profile,
        legal: Sequence[Fraction],
        policy: Policy,
        margin: Margin,
        called: Callable[[Fraction, int, float], None],
        outputs: Callable[[Tensor], Tensor],
        clock: Callable[[], float] = milliseconds,
    ):
        self._engine, self._legal, self._policy, self._margin = engine, set(legal), policy, margin
        self._called, self._outputs, self._clock = called, outputs, clock
        self._table, self._choice = table, self._choice_of(table)
        self._waiting: dict[int | str, _Waiting] = {}
        self._keys = count()
        self._changed = threading.Condition()
        self._stopping = False
        self._busy_since: float | None = None
        self._busy_until = -math.inf  # as the table has it
        self._thread = threading.Thread(target=self._work, name="slicevit-compute", daemon=True)

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def stop(self) -> None:
        """Answer whoever waits, then end the thread, unless its call is stuck. Nobody may submit from now on."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(_STOP_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def busy(self) -> float:
        """For how long the call that runs has run; 0 when none does."""
        since = self._busy_since
        return 0.0 if since is None else self._clock() - since

    def __len__(self) -> int:
        """How many wait; not those of the call that runs."""
        return len(self._waiting)

    def submit(
        self, image_CHW: Tensor, arrival: float, deadline: float, width: Fraction | None = None
    ) -> Future[Answer]:
        """Queue an image.

        Args:
            image_CHW: as `engine.transform` gives it.
            arrival: when the request came.
            deadline: when its answer is due.
            width: answer at this width and no other.

        Returns:
            What will be the answer, or raise `Refusal` (429: too late) or `EngineFailed`.
        """
        with self._changed:
            waiting = _Waiting(Request(next(self._keys), arrival, deadline), image_CHW, width)
            self._waiting[waiting.request.key] = waiting
            self._changed.notify()
        return waiting.answer

    def too_late(self, deadline: float, width: Fraction | None = None, count: int = 1) -> bool:
        """Whether a request of `count` images would be answered late now: at this width, or at the fastest legal one.

        The call that runs and those that wait with an earlier deadline go first. In overload this keeps the queue so
        short that large batches fit its deadlines; a queue of requests that are all about to be late is answered one by
        one.
        """
        now = self._clock()
        with self._changed:
            before = [each.request.deadline_ms for each in self._waiting.values()]
        if not before and self._busy_since is None:
            return deadline < now + _in_turns(self._quickest(width), count)
        table = self._margin.table(now)
        fastest = self._fastest(table)
        before = sorted(each for each in before if each <= deadline)
        start = max(now, self._busy_until) + self._margin.event_loop(now)
        if width is None:
            return not served(fastest, [*before, *[deadline] * count], start)[1]
        return deadline < served(fastest, before, start)[0] + _in_turns(table.row(width), count)

    def overloaded(self, why: str) -> Refusal:
        """A 429 with the whole seconds, at least 1, in which the fastest legal width works off the queue."""
        row = self._quickest()
        batch = row.best_within(math.inf, row.max_batch)
        seconds = max(1, math.ceil(len(self) * row.latency(batch) / batch / 1000))
        return Refusal(429, f"the server is overloaded, {why}: try again in {seconds} s", seconds)

    def _fastest(self, table: Profile) -> Row:
        return min((row for row in table.rows if row.width in self._legal), key=lambda row: row.latency(1))

    def _quickest(self, width: Fraction | None = None) -> Row:
        """The row of this width, or of the fastest legal one, as it was measured: without the margin."""
        return self._fastest(self._table) if width is None else self._table.row(width)

    def _choice_of(self, table: Profile) -> Choice:
        legal = Profile(tuple(row for row in table.rows if row.width in self._legal))
        return Choice(self._policy, legal, table)

    def _work(self) -> None:
        while waiting := self._wait():
            try:
                self._step(waiting)
            except Exception as error:
                logger.exception("the policy failed on %d that wait", len(waiting))
                for each in self._pop(list(self._waiting)):
                    _fail(each, EngineFailed(f"{type(error).__name__}: {error}"))

    def _wait(self) -> list[_Waiting]:
        """All that wait, as soon as there is one; nobody once the batcher stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            return list(self._waiting.values())

    def _step(self, waiting: list[_Waiting]) -> None:
        now = self._clock()
        table = self._margin.table(now)
        if table is not self._choice.every:
            self._choice = self._choice_of(table)
        free = [each.request for each in waiting if each.width is None]
        named = [Named(each.request, each.width) for each in waiting if each.width is not None]
        decision = self._choice(free, named, now + self._margin.event_loop(now))
        if not decision.requests:
            decision = self._trial(waiting, decision, now)
        shed = self._pop(request.key for request in decision.shed)
        batch = self._pop(request.key for request in decision.requests)
        for each in shed:
            _fail(each, self.overloaded("no answer in time"))
        batch = [each for each in batch if each.answer.set_running_or_notify_cancel()]
        if batch:
            self._busy_since, self._busy_until = now, now + table.row(decision.width).latency(len(batch))
            self._compute(batch, decision, now)
            self._busy_since, self._busy_until = None, -math.inf

    def _trial(self, waiting: list[_Waiting], refused: Decision, now: float) -> Decision:
        """Instead of refusing all: the one with the most time left, if the table has it in time without the margin."""
        last = max(waiting, key=lambda each: each.request.deadline_ms)
        row = self._quickest(last.width)
        if last.request.deadline_ms < now + row.latency(1):
            return refused
        others = tuple(request for request in refused.shed if request.key != last.request.key)
        reason = f"no width is in time if calls take as long as lately; width {row.width} is tried"
        return Decision(row.width, (last.request,), reason, others)

    def _compute(self, batch: list[_Waiting], decision: Decision, decided: float) -> None:
        try:
            images_BCHW = torch.stack([each.image_CHW for each in batch])
            started = self._clock()
            logits_BK = self._engine.run(images_BCHW, decision.width)
            ended = self._clock()
            if len(logits_BK) != len(batch) or not torch.isfinite(logits_BK).all():
                raise ArithmeticError(
                    f"{len(logits_BK)} rows of logits for {len(batch)} images, or some are not finite"
                )
            outputs = self._outputs(logits_BK)
        except Exception as error:
            logger.exception("the engine failed at width %s on %d images", decision.width, len(batch))
            for each in batch:
                each.answer.set_exception(EngineFailed(f"{type(error).__name__}: {error}"))
            return
        finished = self._clock()
        predicted = self._table.row(decision.width).latency(len(batch))
        self._margin.call_took(finished, predicted, ended - started, finished - ended + started - decided)
        self._called(decision.width, len(batch), ended - started)
        how = (decision.width, len(batch), decision.reason, started, ended, finished)
        for each, output in zip(batch, outputs, strict=True):
            each.answer.set_result(Answer(output, *how))

    def _pop(self, keys: Iterable[int | str]) -> list[_Waiting]:
        with self._changed:
            return [self._waiting.pop(key) for key in keys]


def together(answers: Sequence[Answer]) -> Answer:
    """Of the windows of one image: the narrowest width with its reason, the largest batch, the first begin, the end."""
    return replace(
        min(answers, key=lambda answer: answer.width),
        batch=max(answer.batch for answer in answers),
        started=min(answer.started for answer in answers),
        ended=max(answer.ended for answer in answers),
        finished=max(answer.finished for answer in answers),
    )


def _in_turns(row: Row, count: int) -> float:
    """Milliseconds of so many images, batch after batch."""
    return served(row, [math.inf] * count, 0.0)[0]


def _fail(waiting: _Waiting, error: Exception) -> None:
    if waiting.answer.set_running_or_notify_cancel():
        waiting.answer.set_exception(error)
