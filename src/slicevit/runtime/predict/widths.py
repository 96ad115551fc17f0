"""Which width answers each image of an offline job: one for all, or those that fill a budget of seconds.

Legend of axis names: R images of a batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from slicevit.runtime.predict.budget import Option, Speed, expected_ms, margin, next_width, plan, unrest_after

Clock = Callable[[], float]  # seconds, never falling

RESERVE = 0.02  # share of a budget kept for what comes after the last batch, and for the unforeseen


class Runs(Protocol):
    """The part of `slicevit.runtime.engine.Engine` that a job needs."""

    def ready(self, width: Fraction) -> None: ...

    def run(self, images_BCHW: Tensor, width: Fraction) -> Tensor: ...


class Answer(NamedTuple):
    """Logits of a batch, and the width that answered each image."""

    logits_RK: Tensor
    widths: list[Fraction]


class Answering(Protocol):
    """Answers one batch after another, in order."""

    def __call__(self, images_RCHW: Tensor, left: int) -> Answer:
        """`left`: images of the job that have no answer yet, these included."""

    def memory(self) -> dict[str, Any]:
        """What a resumed job needs of it, as JSON."""


class AtOneWidth:
    """All images at `width`."""

    def __init__(self, engine: Runs, width: Fraction):
        self._engine, self._width = engine, width

    def __call__(self, images_RCHW: Tensor, left: int) -> Answer:
        return Answer(self._engine.run(images_RCHW, self._width), [self._width] * len(images_RCHW))

    def memory(self) -> dict[str, Any]:
        return {}


class Watch:
    """Counts the seconds of work of a job over all its processes, in this one from now on.

    Args:
        clock: seconds.
        spent: seconds that this process has worked for it already.

    Attributes:
        now: the clock.
        before: seconds of the processes before this one.
    """

    def __init__(self, clock: Clock = time.monotonic, spent: float = 0.0):
        self.now, self.before = clock, 0.0
        self._began = clock() - spent

    def seconds(self) -> float:
        """All of them."""
        return self.before + self.now() - self._began

    def set(self, seconds: float) -> None:
        """There are so many by now, as another process has counted."""
        self.before += seconds - self.seconds()


class WithinBudget:
    """Every batch at the width with which all that are left get the best mean accuracy in the seconds left.

    The narrowest width runs first. What each batch takes is measured from the end of the one before it, so that
    reading, running and saving count alike.

    Args:
        engine: runs the widths.
        budget: seconds of the whole job.
        top1: width -> accuracy, in per cent, of those to choose from.
        macs: width -> multiply-accumulates of an image, in any unit.
        batch_size: of a whole batch.
        watch: the job's seconds so far.
        memory: what `memory` gave to the process before.
        say: takes one sentence, once, when it first looks as if the budget cannot be kept.
    """

    def __init__(
        self,
        engine: Runs,
        budget: float,
        top1: Mapping[Fraction, float],
        macs: Mapping[Fraction, float],
        batch_size: int,
        watch: Watch,
        memory: Mapping[str, Any],
        say: Callable[[str], None],
    ):
        self._engine, self._budget, self._batch_size, self._watch, self._say = engine, budget, batch_size, watch, say
        self._top1, self._macs = top1, macs
        self._speeds = {Fraction(width): Speed(*speed) for width, speed in memory.get("speeds", {}).items()}
        self._setup: float = memory.get("setup", 0.0)
        self._unrest: float = memory.get("unrest", 0.0)
        self._batches: int = memory.get("batches", 0)
        self._ready: set[Fraction] = set()
        self._since, self._kept = watch.now(), True

    def __call__(self, images_RCHW: Tensor, left: int) -> Answer:
        width = self._choose(min(self._batch_size, left), left)
        built = 0.0
        if width not in self._ready:
            start = self._watch.now()
            self._engine.ready(width)
            built = self._watch.now() - start
            self._setup = built  # the next width's will be near it
        logits_RK = self._engine.run(images_RCHW, width)
        now = self._watch.now()
        self._measure(width, 1000 * (now - self._since - built) / len(images_RCHW))
        self._since = now
        self._batches += 1
        return Answer(logits_RK, [width] * len(images_RCHW))

    def memory(self) -> dict[str, Any]:
        speeds = {str(width): [speed.ms, speed.calls] for width, speed in self._speeds.items()}
        return {"speeds": speeds, "setup": self._setup, "unrest": self._unrest, "batches": self._batches}

    def _choose(self, batch: int, left: int) -> Fraction:
        narrowest = min(self._top1)
        if narrowest not in self._speeds or not self._speeds[narrowest].settled:
            return narrowest
        seconds = self._budget * (1 - RESERVE) - self._watch.seconds()
        options = self._options()
        width, planned = next_width(batch, self._batches, left, seconds - margin(seconds, self._unrest), options)
        if self._kept and planned.seconds > seconds:
            self._kept = False
            reason = plan(left, seconds, options).reason
            self._say(f"as it goes now, the budget of {self._budget:g} s cannot be kept: {reason}")
        return width

    def _options(self) -> list[Option]:
        expected = expected_ms(self._speeds, self._macs)
        return [
            Option(width, top1, expected[width], 0.0 if width in self._ready else self._setup)
            for width, top1 in self._top1.items()
        ]

    def _measure(self, width: Fraction, ms: float) -> None:
        """The first call of a width in a process is a warm-up: it counts only where nothing else is known."""
        old = self._speeds.get(width)
        if old is None:
            self._speeds[width] = Speed(ms)
        elif width in self._ready:
            if old.settled:
                self._unrest = unrest_after(self._unrest, ms, old.ms)
            self._speeds[width] = old.updated(ms)
        self._ready.add(width)
