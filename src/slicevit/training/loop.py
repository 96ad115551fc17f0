"""The training loop: steps, epochs, evaluation, and what stops a run."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from slicevit import checkpoint
from slicevit.data import Batch, StreamSet, Transform, eval_batches, eval_transform
from slicevit.data.transforms import PairTransform
from slicevit.evaluation.calibrating import BATCH, Source, take_statistics
from slicevit.evaluation.widths import measure_accuracy, measure_widths_latency, result_rows
from slicevit.training.config import TrainConfig
from slicevit.training.fits import fit_rows
from slicevit.training.keeper import Keeper
from slicevit.training.monitor import mean_losses, merge_losses
from slicevit.training.progress import TrainProgress
from slicevit.training.ranks import is_shared
from slicevit.training.rewired import is_due, rewire_when_due
from slicevit.training.signals import Interrupted, StopRequest
from slicevit.training.trackers import Trackers
from slicevit.training.trainee import Trainee

LATENCY_SECONDS = 0.5
_SHOWN = {"top1": "top-1", "miou": "mIoU", "map": "mAP"}


class Run(Trainee):
    """One training run in `folder`; `train` starts it, or goes on from its checkpoint.

    Raises ValueError for whatever in `config` cannot be had, naming the flag.
    """

    def __init__(self, config: TrainConfig, folder: Path, console: Console | None = None):
        super().__init__(config)
        self.folder = folder
        self.keeper = Keeper(self, folder)
        self.console = (console or Console()) if self.ranks.is_main else Console(quiet=True)
        self._scores: dict[str, Any] = {}

    def train(self) -> Sequence[Any]:
        """Train to the end and evaluate every width; returns its rows (`WidthResult`, or without labels `FitResult`).

        Raises Interrupted after a signal, with the state saved, NotFinite when a loss is not finite, and RankLost
        when another process is gone or only one met an error, with the state saved by the first that notices.
        """
        with StopRequest(self.ranks.count > 1) as stop, self._progress() as progress:
            try:
                self.keeper.begin(progress)
                names = self.config.log_with if self.ranks.is_main else ()
                self.trackers = Trackers(names, self.folder, asdict(self.config), self.step)
                try:
                    return self._epochs(stop, progress)
                finally:
                    self.trackers.finish()
            except (RuntimeError, ValueError) as error:
                if self.ranks.count == 1 or is_shared(error):
                    raise
                raise self.keeper.rescue(error) from None

    def _epochs(self, stop: StopRequest, progress: TrainProgress) -> Sequence[Any]:
        epoch_steps = self.loader.steps_per_epoch
        first_epoch = max(0, self.step - 1) // epoch_steps
        progress.start_at(self.step)
        for epoch in range(first_epoch, math.ceil(self.total_steps / epoch_steps)):
            for images, targets in progress.waiting(self._batches(epoch)):
                if is_due(self):
                    self.keeper.save()  # what was trained so far, if it is finite
                if self.change_grid(self.step) | rewire_when_due(self, progress):
                    self.ranks.from_main(self.keeper.describe)
                self.train_step(images, targets, bool(stop.signum))
                signum = self._agreed(stop)
                progress.step(self.monitor.shown)
                self.trackers.losses(self.monitor.shown, self.step)
                if signum:
                    self.keeper.save()
                    raise Interrupted(self.folder, signum, self.command)
                if self.config.checkpoint_steps and self.step % self.config.checkpoint_steps == 0:
                    self.keeper.save()
            self._end_epoch(epoch, progress)
            self._stop_if_asked(stop)
        rows = self._finish()
        self._stop_if_asked(stop)
        return rows

    def _stop_if_asked(self, stop: StopRequest) -> None:
        """Between epochs, where all is saved, and all ranks can be asked."""
        if signum := max(self.ranks.gather(stop.signum)):
            raise Interrupted(self.folder, signum, self.command)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        end = min(self.total_steps, (epoch + 1) * self.loader.steps_per_epoch)
        for images, targets in self.loader.epoch(epoch, self.step - epoch * self.loader.steps_per_epoch):
            if self.step == end:
                return
            yield images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        if self.step < end:
            raise ValueError(f"--data {self.config.data} ended {end - self.step} steps before the end of the epoch")

    def _agreed(self, stop: StopRequest) -> int:
        """The signal that asks to stop, or 0, as all ranks see it at this step. Raises NotFinite."""
        bad_step = self.monitor.lagged_bad_step()
        if self.gradients is None:
            self.keeper.check_finite(bad_step)
            return stop.signum
        asked, bad = self.gradients.last_flags()
        self.keeper.check_finite(self.step - 2 if bad else None)
        return (stop.signum or signal.SIGTERM) if asked else 0

    def _end_epoch(self, epoch: int, progress: TrainProgress) -> None:
        saves = self._is_due(epoch, self.config.save_every)
        if saves:
            self.keeper.save()
        if not self.ranks.from_main(lambda: any(row["epoch"] == epoch for row in self.keeper.metrics.rows)):
            self._scores = self._scored() if self._is_due(epoch, self.config.eval_every) else {}
            means = mean_losses(merge_losses(self.ranks.gather(self.monitor.state_dict())))
            self.ranks.from_main(lambda: self._record(epoch, means, progress, saves))
        self.monitor.reset()

    def _is_due(self, epoch: int, every: int) -> bool:
        """Whether what comes after `every` epochs, and after the last, comes after this one."""
        return self.step >= self.total_steps or (epoch + 1) % every == 0

    def _record(self, epoch: int, means: dict[str, float], progress: TrainProgress, saves: bool) -> None:
        rows: list[dict[str, Any]] = []
        for name in map(str, self.model.widths):
            row: dict[str, Any] = {"epoch": epoch, "step": self.step, "width": name}
            row |= {"train_loss": means.get(name), "lr": self.optimizer.param_groups[-1]["lr"]}
            if name in self._scores:
                scores = self._scores[name]
                row |= {column: getattr(scores, column, None) for column in self.figures}
            rows.append(row)
        if saves:
            checkpoint.save_weights(self.evaluated, self.folder)
        self.keeper.metrics.append(rows)
        self.trackers.log(_figures(rows, self.figures) | {"data_wait": progress.data_wait()}, self.step)
        progress.say(f"{_epoch_line(epoch, rows, self.figures[0])}  (data wait {100 * progress.data_wait():.1f} %)")

    def _evaluate(self) -> dict[str, Any]:
        """Every width on the test images: its accuracy or, without labels, how near it comes to the teacher."""
        config = self.config
        batches = eval_batches(
            self.val_set,
            eval_transform(self.transform),
            config.eval_batch_size,
            config.workers,
            config.max_bad_share,
            rank=self.ranks.index,
            world_size=self.ranks.count,
        )
        scores = self._scores_on(batches)
        if isinstance(self.val_set, StreamSet):
            self.val_set.check_complete(next(iter(scores.values())).images, config.max_bad_share)
        return scores

    def _scores_on(self, batches: Iterator[Batch]) -> dict[str, Any]:
        if self.distiller is not None:
            return self.distiller.evaluate(self.evaluated, self._trained_widths(), batches, self.ranks)
        return measure_accuracy(self.evaluated, self._trained_widths(), batches)

    def _trained_widths(self) -> Sequence[Fraction]:
        """The legal widths, or the full one where no other was trained yet."""
        alone = 0 < self.step <= self.full_width_steps < self.total_steps
        return self.model.widths[-1:] if alone else self.model.widths

    def _scored(self) -> dict[str, Any]:
        """What `_evaluate` gives, with BatchNorm statistics of the weights as they are, the same ones on every rank."""
        config = self.config
        if self.evaluated.has_batch_norm:
            take_statistics(
                Source(self.evaluated, self.loader.dataset, self._statistics_transform()),
                config.statistics_images,
                max(2, min(BATCH, config.eval_batch_size)),
                config.workers,
                config.max_bad_share,
                config.seed,
            )
        return self._evaluate()

    def _statistics_transform(self) -> Transform | PairTransform:
        return eval_transform(self.transform)

    def _finish(self) -> Sequence[Any]:
        self.evaluated.eval()
        scores: dict[str, Any] = self._scores or self._scored()
        return self.ranks.from_main(lambda: self._rows(scores))

    def _rows(self, scores: dict[str, Any]) -> Sequence[Any]:
        model = self.evaluated
        latency = measure_widths_latency(model, model.widths, LATENCY_SECONDS)
        if self.distiller is not None:
            return fit_rows(model, scores, latency, self.transform, self.config.method)
        return result_rows(model, scores, latency, self.transform, self.config.method, model.widths)

    def _progress(self) -> TrainProgress:
        return TrainProgress(self.console, self.total_steps, self.config.batch_size)


def _figures(rows: list[dict[str, Any]], columns: Sequence[str]) -> dict[str, float]:
    """An epoch's rows as named figures: top1/1/2 and so on."""
    figures: dict[str, float] = {"lr": rows[0]["lr"]}
    for row in rows:
        names = [name for name in columns if row.get(name) is not None]
        figures |= {f"{name}/{row['width']}": row[name] for name in names}
    return figures


def _epoch_line(epoch: int, rows: list[dict[str, Any]], figure: str) -> str:
    parts = []
    for row in rows:
        if row.get(figure) is not None:
            parts.append(f"{row['width']} {row[figure]:.1f}")
    if parts:
        return f"epoch {epoch + 1}: {_SHOWN[figure]} " + "  ".join(parts)
    tested = any(row.get("loss") is not None for row in rows)  # without labels: against the teacher
    name, column = ("distillation loss", "loss") if tested else ("loss", "train_loss")
    losses = [f"{row['width']} {row[column]:.2f}" for row in rows if row.get(column) is not None]
    return f"epoch {epoch + 1}: {name} " + "  ".join(losses)
