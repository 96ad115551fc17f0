"""What a run trains, and one step of it. Everything random comes from (seed, epoch, sample) or (seed, step)."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from slicevit.elastic import ElasticModel
from slicevit.evaluation.results import ACCURACY_FIGURES
from slicevit.reasons import one_line
from slicevit.training import setup
from slicevit.training.config import TrainConfig
from slicevit.training.distiller import Distiller
from slicevit.training.feature_step import accumulate_feature_gradients
from slicevit.training.graphs import Graphs
from slicevit.training.initial import image_channels
from slicevit.training.micro_batch import most_images
from slicevit.training.monitor import LossMonitor
from slicevit.training.objectives import Objective
from slicevit.training.ranks import SharedGradients, join, shared
from slicevit.training.sampling import draw_widths, leave_out_full
from slicevit.training.step import accumulate_gradients
from slicevit.training.teacher import Teacher
from slicevit.training.trackers import check_installed
from slicevit.version import versions
from slicevit.widths import FULL


class Trainee:
    """The model of a run with its data, teacher, optimizer, schedule and average, on this rank.

    Attributes:
        command: the sub-command that makes such runs, and goes on with them.
        figures: what an epoch measures of every width: columns of metrics.csv, the first on the screen.

    Raises ValueError for whatever in `config` cannot be had, naming the flag.
    """

    command = "train"
    figures: tuple[str, ...] = ACCURACY_FIGURES

    def __init__(self, config: TrainConfig):
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config.resolved()
        self.ranks = join(config.device)
        self.device = self.ranks.device
        self.ranks.together(self._open_data)
        self._compare_data()
        self._fit_memory()
        self.projections = self.distiller.projections if self.distiller is not None else None
        self.trained = list(self.model.parameters())
        if self.projections is not None:
            self.trained += self.projections.parameters()
        self.gradients = SharedGradients(self.trained, self.ranks) if self.ranks.count > 1 else None
        self.graphs = self._make_graphs() if self.config.cuda_graphs else None
        self.total_steps = max(1, round(self.config.epochs * self.loader.steps_per_epoch))
        self.full_width_steps = round((self.config.full_width_first or 0) * self.total_steps)
        self.rewired = self.config.rewire == "off"
        self._check_stages()
        self.begin_stage()
        self.ema = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.objective = self._objective()
        self.monitor = LossMonitor(self.device)
        self.step = 0
        self._last_images: Tensor | None = None

    def _check_stages(self) -> None:
        first, steps = self.config.full_width_first, self.full_width_steps
        if not self.rewired and first and not 0 < steps < self.total_steps:
            raise ValueError(
                f"--full-width-first {first:.3g} is {steps} of {self.total_steps} steps, and both the full width and "
                "all widths need some: give more --epochs, another share, or --method scala"
            )

    def begin_stage(self) -> None:
        """A new optimizer and schedule: of the whole run, or of its part before or after the rewiring."""
        self.optimizer = setup.build_optimizer(self.config, self.model, self.ranks, self.projections)
        self.build_schedule()

    def build_schedule(self) -> None:
        """The learning rate of the stage that this step lies in, for the optimizer as it is."""
        restarts = self.config.rewire != "off"
        self.stage_start = self.full_width_steps if restarts and self.rewired else 0
        end = self.total_steps if self.rewired or not self.full_width_steps else self.full_width_steps
        steps, epoch_steps = end - self.stage_start, self.loader.steps_per_epoch
        self.schedule = setup.build_schedule(self.config, self.optimizer, steps, epoch_steps)

    def _make_graphs(self) -> Graphs:
        if self.model.has_batch_norm:
            raise ValueError("--cuda-graphs: BatchNorm statistics are not followed in a graph; leave it out")
        graphs = Graphs(self.device)
        graphs.hold_gradients(self.trained)
        return graphs

    def _objective(self) -> Objective:
        config = self.config
        assert config.transfer is not None
        assert config.calibration is not None
        return Objective(
            config.transfer, config.calibration, config.smoothing, config.distillation, config.teacher_share
        )

    def _open_data(self) -> None:
        config = self.config
        check_installed(config.log_with)
        channels = image_channels(config)
        train_set = setup.open_split(config, "train", channels)
        self.val_set = setup.open_split(config, "val", channels)
        self.num_classes = setup.class_count(config, train_set)
        self.class_names = train_set.classes if self.num_classes else None
        self.model = setup.build_model(config, self.num_classes).to(self.device)
        if change := config.change():
            self.model.set_grid(change[0])
            self.model.set_grid(config.grid)
        if config.compile:
            self.model.compile_blocks()
        self.transform = setup.transform_config(config, self.model)
        self.teacher: Teacher | None = None
        self.distiller: Distiller | None = None
        if not config.learns_labels:
            self.distiller = Distiller(config, self.model, self.transform, self.device)
        elif config.teacher:
            self.teacher = Teacher(config.teacher, self.transform, self.num_classes, self.device, config.teacher_size)
        self.mixer = setup.Mixer(config, self.num_classes)
        self.loader = setup.open_loader(config, train_set, self.transform, self.ranks)

    def _compare_data(self) -> None:
        """Raise ValueError when the data set has not as many images on every machine."""
        counts = set(self.ranks.gather((len(self.loader.dataset), len(self.val_set))))
        if len(counts) > 1:
            seen = ", ".join(f"{train} + {val}" for train, val in sorted(counts))
            raise shared(ValueError(f"--data {self.config.data}: the processes see different images ({seen})"))

    def _fit_memory(self) -> None:
        """Fix `micro_batch` where it is to be found; the run's configuration keeps what was found."""
        if self.config.micro_batch == 0:
            loss = self.distiller.full_loss if self.distiller is not None else None
            drawn = self.loader.batch_size // self.config.width_draws
            fitting = self.ranks.together(
                lambda: most_images(self.model, drawn, self._image_shape(), self._autocast, loss)
            )
            if self.distiller is not None:
                self.distiller.projections.zero_grad()
            self.config = replace(self.config, micro_batch=min(self.ranks.gather(fitting)))

    def _image_shape(self) -> tuple[int, int, int]:
        return (self.transform.in_chans, *self.transform.img_size)

    def train_step(self, images_BCHW: Tensor, targets: Tensor, stop: bool = False) -> None:
        """One optimizer step on this rank's images (B, C, H, W) and class indices (B,).

        `stop` tells the other ranks that this one was asked to stop. Raises RankLost when one does not answer.
        """
        config = self.config
        setup.seed_step(config.seed, self.step, self.ranks.index)
        self.schedule.step_update(self.step - self.stage_start)
        images_BCHW, targets = self.mixer(images_BCHW, targets)
        losses = self._accumulate(images_BCHW, targets)
        if self.gradients is not None:
            self.gradients.reduce(stop, torch.stack(list(losses.values())).isfinite().all())
        if config.clip_grad:
            nn.utils.clip_grad_norm_(self.trained, config.clip_grad)
        self.optimizer.step()
        if self.gradients is not None:
            self.gradients.zero()
        else:
            self.optimizer.zero_grad(set_to_none=self.graphs is None)
        if self.ema is not None:
            self.ema.update(self.model, self.step - self.stage_start)
            self.ema.module.forget_statistics()
        if self.distiller is not None:
            self.distiller.update_average(self.step)
        self.monitor.add(self.step, losses)
        self.step += 1
        self._last_images = images_BCHW

    def _accumulate(self, images_BCHW: Tensor, targets: Tensor) -> dict[Fraction, Tensor]:
        """Gradients of this rank's images, `micro_batch` at a time; the mean loss of each width."""
        goals = targets
        if self.distiller is not None:
            goals = self.distiller.draw_masks(self.step, len(images_BCHW), self.ranks)
        drawn = len(images_BCHW) // self.config.width_draws
        size = min(self.config.micro_batch or drawn, drawn)
        sums: dict[Fraction, Tensor] = {}
        shares: dict[Fraction, float] = {}
        for draw, (images_of, goals_of) in enumerate(zip(images_BCHW.split(drawn), goals.split(drawn), strict=True)):
            widths = self.widths_of(self.step, draw)
            for images, goal in zip(images_of.split(size), goals_of.split(size), strict=True):
                part = len(images) / len(images_BCHW)
                for width, loss in self._gradients(images, goal, widths, part).items():
                    sums[width] = sums[width] + loss * part if width in sums else loss * part
                    shares[width] = shares.get(width, 0.0) + part
        return {width: sums[width] / shares[width] for width in sorted(sums, reverse=True)}

    def _gradients(
        self, images_BCHW: Tensor, goal: Tensor, widths: tuple[Fraction, ...], share: float
    ) -> dict[Fraction, Tensor]:
        """Of some of a step's images; `goal` are their targets or, without labels, the patches that are masked."""
        weight, autocast = self.transfer_weight(), self._autocast
        if self.distiller is not None:
            return accumulate_feature_gradients(
                self.model,
                self.distiller,
                images_BCHW,
                goal,
                widths,
                self.objective,
                transfer_weight=weight,
                share=share,
                autocast=autocast,
            )
        with autocast():
            external_BK = self.teacher(images_BCHW) if self.teacher is not None else None
        return accumulate_gradients(
            self.model,
            images_BCHW,
            goal,
            widths,
            self.objective,
            external_BK=external_BK,
            transfer_weight=weight,
            share=share,
            autocast=autocast,
            graphs=self.graphs,
        )

    def widths_of(self, step: int, draw: int = 0) -> tuple[Fraction, ...]:
        """The widths that a draw of `step` trains, widest first."""
        if step < self.full_width_steps:
            return (self.model.grid.largest,)
        assert self.config.sampling is not None
        rank = self.ranks.index if self.config.widths_per_rank == "own" else 0
        nth = rank * self.config.width_draws + draw
        widths = draw_widths(self.model.grid, self.config.sampling, self.config.seed, step, nth)
        return leave_out_full(widths, self.config.full_width_share, self.config.seed, step, nth)

    def transfer_weight(self) -> float:
        """λ at this step: it grows from 0 over `transfer_ramp` of the steps that train narrower widths."""
        ramp = self.config.transfer_ramp * (self.total_steps - self.full_width_steps)
        return self.config.transfer_weight * min(1.0, (self.step - self.full_width_steps) / ramp if ramp else 1.0)

    def change_grid(self, step: int) -> bool:
        """Take the grid of `step` where `grid_change` asks for it; returns whether it was another before."""
        change = self.config.change()
        if change is None or step < change[1] * self.total_steps or self.model.grid == change[0]:
            return False
        self.model.set_grid(change[0])
        if self.ema is not None:
            self.ema.module.set_grid(change[0])
        return True

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.amp == "off":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @property
    def evaluated(self) -> ElasticModel:
        """The weights that are evaluated and saved: the moving average where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def state(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """For the checkpoint, with the whole state of the optimizer."""
        return {
            "step": self.step,
            "rewired": self.rewired,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": optimizer,
            "distiller": self.distiller.state_dict() if self.distiller is not None else None,
            "losses": self.monitor.state_dict(),
            "versions": versions(),
        }

    def bad_step(self) -> int | None:
        """A step whose loss, or after which an answer, is not finite on this rank."""
        bad = self.monitor.bad_step()
        return self.step if bad is None and not self._answers_are_finite() else bad

    @torch.inference_mode()
    def _answers_are_finite(self) -> bool:
        """Whether the weights after the last step still give finite logits, narrowest and widest."""
        if self._last_images is None:
            return True
        self.model.eval()
        with warnings.catch_warnings(), self._autocast(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")  # of statistics that do not fit yet
            answers = [self.model(self._last_images, width=width) for width in (self.model.widths[0], FULL)]
        self.model.train()
        return all(bool(answer.isfinite().all()) for answer in answers)

    def restore(self, state: dict[str, Any]) -> bool:
        """From the checkpoint; returns whether its grid is another than the configuration's.

        Raises ValueError when it does not fit the configuration.
        """
        self.step, self.rewired = int(state["step"]), bool(state.get("rewired", True))
        self.build_schedule()  # which sets learning rates, as the optimizer's state does after it
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
            if self.distiller is not None:
                self.distiller.load_state_dict(state["distiller"])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = one_line(error, 160)
            raise ValueError(f"its checkpoint does not fit its config.json ({reason})") from None
        self.monitor.load_state_dict(state["losses"])
        return self.change_grid(self.step - 1)  # the grid of the last step: its epoch may still want its metrics
