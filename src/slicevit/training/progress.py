"""What a run shows on the screen."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

T = TypeVar("T")


class TrainProgress:
    """A bar with throughput, the loss of the last step's widths and the time left; lines where no terminal."""

    def __init__(self, console: Console, total_steps: int, batch_size: int):
        self.console, self.batch_size = console, batch_size
        self._wait, self._took, self._since = 0.0, 1.0, time.perf_counter()
        self._bar = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("training", total=total_steps, rate="", loss="")

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def start_at(self, step: int) -> None:
        """The steps that were done before this process began."""
        self._bar.update(self._task, completed=step)

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """`batches`, with the time that each is waited for counted from here on."""
        self._wait, self._since = 0.0, time.perf_counter()
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._wait += time.perf_counter() - start
            self._took = time.perf_counter() - self._since
            if batch is None:
                return
            yield batch

    def counted(self, items: Sequence[T], what: str) -> Iterator[T]:
        """`items`, on a bar of their own that names what is done with them."""
        task = self._bar.add_task(what, total=len(items), rate=what, loss="")
        for item in items:
            yield item
            self._bar.advance(task)
        self._bar.remove_task(task)

    def data_wait(self) -> float:
        """Share of the epoch's training time that was spent waiting for batches."""
        return self._wait / self._took

    def step(self, losses: dict[Fraction, float]) -> None:
        """One optimizer step done; `losses` are the last known of each width."""
        task = self._bar.tasks[0]
        rate = f"{task.speed * self.batch_size:,.0f} img/s" if task.speed else ""
        loss = "loss " + "  ".join(f"{width} {losses[width]:.2f}" for width in sorted(losses)) if losses else ""
        self._bar.update(self._task, advance=1, rate=rate, loss=loss)

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.console.print(line, highlight=False, soft_wrap=True)
