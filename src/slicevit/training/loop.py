"""The training loop. Everything random comes from (seed, epoch, sample) or (seed, step)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from slicevit import checkpoint
from slicevit.data import TrainLoader, eval_batches, eval_transform, train_transform
from slicevit.elastic import ElasticModel
from slicevit.evaluation.accuracy import Accuracy
from slicevit.evaluation.results import MetricsLog, WidthResult
from slicevit.evaluation.widths import measure_accuracy, measure_widths_latency, result_rows
from slicevit.training import setup
from slicevit.training.config import TrainConfig
from slicevit.training.monitor import LossMonitor
from slicevit.training.objectives import Objective
from slicevit.training.progress import TrainProgress
from slicevit.training.sampling import draw_widths
from slicevit.training.signals import Interrupted, StopRequest
from slicevit.training.state import load_checkpoint, save_checkpoint
from slicevit.training.step import accumulate_gradients
from slicevit.widths import FULL

LATENCY_SECONDS = 0.5


class NotFinite(ValueError):
    """A loss was nan or infinite; nothing was saved over."""


class Run:
    """One training run in `folder`; `train` starts it, or goes on from its checkpoint.

    Raises ValueError for whatever in `config` cannot be had, naming the flag.
    """

    def __init__(self, config: TrainConfig, folder: Path, console: Console | None = None):
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config, self.folder = config.resolved(), folder
        self.console = console or Console()
        self.device = setup.pick_device(config.device)
        self._open_data()
        self.optimizer = setup.build_optimizer(self.config, self.model)
        epoch_steps = self.loader.steps_per_epoch
        self.total_steps = max(1, round(self.config.epochs * epoch_steps))
        self.schedule = setup.build_schedule(self.config, self.optimizer, self.total_steps, epoch_steps)
        self.ema = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        assert self.config.transfer is not None
        assert self.config.calibration is not None
        self.objective = Objective(
            self.config.transfer,
            self.config.calibration,
            config.smoothing,
            config.distillation,
            config.teacher_share,
        )
        self.monitor = LossMonitor(self.device)
        self.step = 0
        self._last_images: Tensor | None = None
        self._scores: dict[str, Accuracy] = {}

    def _open_data(self) -> None:
        config = self.config
        channels = int(config.model_args.get("in_chans", 3))
        train_set = setup.open_split(config, "train", channels)
        self.val_set = setup.open_split(config, "val", channels)
        self.num_classes = setup.class_count(config, train_set)
        self.class_names = getattr(train_set, "classes", None)
        self.model = setup.build_model(config, self.num_classes).to(self.device)
        if change := config.change():
            self.model.set_grid(change[0])
            self.model.set_grid(config.grid)
        self.transform = setup.transform_config(config, self.model)
        self.teacher = None
        if config.teacher:
            self.teacher = setup.Teacher(config.teacher, self.transform, self.num_classes, self.device)
        self.mixer = setup.Mixer(config, self.num_classes)
        self.loader = TrainLoader(
            train_set,
            train_transform(self.transform),
            config.batch_size,
            config.seed,
            workers=config.workers,
            max_bad_share=config.max_bad_share,
            repeats=config.repeats,
            pin_memory=self.device.type == "cuda",
        )

    # The loop

    def train(self) -> list[WidthResult]:
        """Train to the end and evaluate every width; returns the rows of results.csv.

        Raises Interrupted after a signal, with the state saved, and NotFinite when a loss is not finite.
        """
        self._begin()
        epoch_steps = self.loader.steps_per_epoch
        first_epoch = max(0, self.step - 1) // epoch_steps
        with StopRequest() as stop, self._progress() as progress:
            for epoch in range(first_epoch, math.ceil(self.total_steps / epoch_steps)):
                for images, targets in self._batches(epoch):
                    self._train_step(images, targets)
                    progress.step(self.monitor.shown)
                    self._check_finite(self.monitor.lagged_bad_step())
                    if stop.signum:
                        self._save()
                        raise Interrupted(self.folder, stop.signum)
                    if self.config.checkpoint_steps and self.step % self.config.checkpoint_steps == 0:
                        self._save()
                self._end_epoch(epoch, progress, stop)
            rows = self._finish()
            if stop.signum:
                raise Interrupted(self.folder, stop.signum)
        return rows

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        done = self.step - epoch * self.loader.steps_per_epoch
        for images, targets in self.loader.epoch(epoch, done):
            if self.step >= self.total_steps:
                return
            yield images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def _train_step(self, images_BCHW: Tensor, targets: Tensor) -> None:
        config = self.config
        self._change_grid(self.step)
        setup.seed_step(config.seed, self.step)
        self.schedule.step_update(self.step)
        images_BCHW, targets = self.mixer(images_BCHW, targets)
        with self._autocast():
            external_BK = self.teacher(images_BCHW) if self.teacher is not None else None
        losses = accumulate_gradients(
            self.model,
            images_BCHW,
            targets,
            self.widths_of(self.step),
            self.objective,
            external_BK=external_BK,
            transfer_weight=self.transfer_weight(),
            autocast=self._autocast,
        )
        if config.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        self.monitor.add(self.step, losses)
        self.step += 1
        self._last_images = images_BCHW

    def widths_of(self, step: int) -> tuple[Fraction, ...]:
        """The widths that `step` trains, widest first."""
        if step < self.config.full_width_epochs * self.loader.steps_per_epoch:
            return (self.model.grid.largest,)
        assert self.config.sampling is not None
        return draw_widths(self.model.grid, self.config.sampling, self.config.seed, step)

    def transfer_weight(self) -> float:
        """λ at this step: it grows from 0 over `transfer_ramp` of the run."""
        ramp = self.config.transfer_ramp * self.total_steps
        return self.config.transfer_weight * min(1.0, self.step / ramp if ramp else 1.0)

    def _change_grid(self, step: int) -> None:
        change = self.config.change()
        if change is None or step < change[1] * self.total_steps or self.model.grid == change[0]:
            return
        self.model.set_grid(change[0])
        if self.ema is not None:
            self.ema.module.set_grid(change[0])
        self._describe()

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.amp == "off":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    # Epochs, saving and resuming

    @property
    def evaluated(self) -> ElasticModel:
        """The weights that are evaluated and saved: the moving average where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def _begin(self) -> None:
        for left in (*self.folder.glob(".*.tmp"), *self.folder.glob(".saving-*/*")):  # by a run that was killed
            left.unlink()
        for left in self.folder.glob(".saving-*"):
            left.rmdir()
        state = load_checkpoint(self.folder)
        if state is None:
            self._describe()
        else:
            self._restore(state)
        self.metrics = MetricsLog(self.folder)
        self.metrics.truncate(self.step)

    def _describe(self) -> None:
        checkpoint.save_pretrained(
            self.evaluated,
            self.folder,
            data_config=self._data_config(),
            label_names=self.class_names,
            extra={"training": asdict(self.config)},
        )

    def _data_config(self) -> dict[str, Any]:
        cfg = self.transform
        return {
            "input_size": (cfg.in_chans, *cfg.img_size),
            "mean": cfg.mean,
            "std": cfg.std,
            "interpolation": cfg.interpolation,
            "crop_pct": cfg.crop_pct,
        }

    def _save(self) -> None:
        self._check_finite(self.monitor.bad_step())
        if not self._answers_are_finite():
            self._check_finite(self.step)
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "losses": self.monitor.state_dict(),
        }
        save_checkpoint(self.folder, state)

    @torch.inference_mode()
    def _answers_are_finite(self) -> bool:
        """Whether the weights after the last step still give finite logits, narrowest and widest."""
        if self._last_images is None:
            return True
        self.model.eval()
        with self._autocast():
            answers = [self.model(self._last_images, width=width) for width in (self.model.widths[0], FULL)]
        self.model.train()
        return all(bool(answer.isfinite().all()) for answer in answers)

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(
                f"--resume {self.folder}: its checkpoint does not fit its config.json ({reason})"
            ) from None
        self.monitor.load_state_dict(state["losses"])
        self.step = int(state["step"])
        self._change_grid(self.step - 1)  # the grid of the last step: its epoch may still want its metrics

    def _check_finite(self, step: int | None) -> None:
        if step is None:
            return
        saved = load_checkpoint(self.folder)
        good = f"the checkpoint of step {saved['step']} in {self.folder} is good" if saved else "nothing was saved yet"
        widths = ", ".join(map(str, self.widths_of(step)))
        raise NotFinite(
            f"the loss of step {step} (widths {widths}) is not finite; {good}. "
            "Start again in another folder with a lower --lr or with --clip-grad 1"
        )

    def _end_epoch(self, epoch: int, progress: TrainProgress, stop: StopRequest) -> None:
        self._save()
        if not any(row["epoch"] == epoch for row in self.metrics.rows):
            last = self.step >= self.total_steps
            scores = self._accuracy() if last or (epoch + 1) % self.config.eval_every == 0 else {}
            self._scores = scores
            means = self.monitor.means()
            rows: list[dict[str, Any]] = []
            for name in map(str, self.model.widths):
                row: dict[str, Any] = {"epoch": epoch, "step": self.step, "width": name}
                row |= {"train_loss": means.get(name), "lr": self.optimizer.param_groups[-1]["lr"]}
                if name in scores:
                    row |= {"top1": scores[name].top1, "top5": scores[name].top5, "loss": scores[name].loss}
                rows.append(row)
            checkpoint.save_weights(self.evaluated, self.folder)
            self.metrics.append(rows)
            progress.say(_epoch_line(epoch, rows))
        self.monitor.reset()
        if stop.signum:
            raise Interrupted(self.folder, stop.signum)

    def _accuracy(self) -> dict[str, Accuracy]:
        config, transform = self.config, eval_transform(self.transform)
        batches = eval_batches(self.val_set, transform, config.eval_batch_size, config.workers, config.max_bad_share)
        model = self.evaluated
        return measure_accuracy(model, model.widths, batches)

    def _finish(self) -> list[WidthResult]:
        model = self.evaluated.eval()
        scores = self._scores or self._accuracy()
        latency = measure_widths_latency(model, model.widths, LATENCY_SECONDS)
        return result_rows(model, scores, latency, self.transform, self.config.method, model.widths)

    def _progress(self) -> TrainProgress:
        return TrainProgress(self.console, self.total_steps, self.step, self.config.batch_size)


def _epoch_line(epoch: int, rows: list[dict[str, Any]]) -> str:
    parts = []
    for row in rows:
        if row.get("top1") is not None:
            parts.append(f"{row['width']} {row['top1']:.1f}")
    if parts:
        return f"epoch {epoch + 1}: top-1 " + "  ".join(parts)
    losses = [f"{row['width']} {row['train_loss']:.2f}" for row in rows if row["train_loss"] is not None]
    return f"epoch {epoch + 1}: loss " + "  ".join(losses)
