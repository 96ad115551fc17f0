"""A run's folder: what is written there during the run, and going on from it."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slicevit import checkpoint
from slicevit.checkpoint import CONFIG
from slicevit.data import preprocessing
from slicevit.evaluation.results import MetricsLog
from slicevit.training import setup
from slicevit.training.monitor import merge_losses
from slicevit.training.progress import TrainProgress
from slicevit.training.ranks import RankLost, is_connection, shared
from slicevit.training.rewired import prove_rewiring, rewire_when_due
from slicevit.training.state import claim, load_checkpoint, save_checkpoint
from slicevit.training.trainee import Trainee
from slicevit.version import versions

_logger = logging.getLogger("slicevit")


class NotFinite(ValueError):
    """A loss was nan or infinite; nothing was saved over."""


class Keeper:
    """Keeps `run` in `folder`; the main rank reads and writes, and tells the others."""

    metrics: MetricsLog

    def __init__(self, run: Trainee, folder: Path):
        self.run, self.folder = run, folder

    def begin(self, progress: TrainProgress) -> None:
        """Go on from what the folder holds; describe the run there when that is nothing.

        `progress` shows what a new run does before its first step.

        Raises ValueError when the folder's files do not fit together.
        """
        run, main = self.run, self.run.ranks.from_main
        main(self._sweep)
        state = main(lambda: load_checkpoint(self.folder))
        try:
            changed = state is None or run.restore(state)
        except ValueError as error:
            raise ValueError(f"--resume {self.folder}: {error}") from None
        if state is None:
            prove_rewiring(run)
            rewire_when_due(run, progress)
        if changed:
            main(self.describe)
        if run.ranks.is_main and state is not None and (others := _other_versions(state)):
            _logger.warning("%s was begun with %s: its end may differ in the last bits", self.folder, others)
        self.metrics = MetricsLog(self.folder, run.figures)
        main(lambda: self.metrics.truncate(run.step))

    def _sweep(self) -> None:
        """Remove what a run that was killed left half written."""
        for left in (*self.folder.glob(".*.tmp"), *self.folder.glob(".saving-*/*")):
            left.unlink()
        for left in self.folder.glob(".saving-*"):
            left.rmdir()

    def describe(self) -> None:
        """Write config.json, the model's card and its weights as they are."""
        run = self.run
        checkpoint.save_pretrained(
            run.evaluated,
            self.folder,
            data_config=preprocessing(run.transform),
            label_names=run.class_names,
            extra={"training": asdict(run.config)},
        )

    def save(self) -> None:
        """Write the checkpoint; every rank must call this. Raises NotFinite before anything is saved over."""
        run = self.run
        bad_steps = [step for step in run.ranks.gather(run.bad_step()) if step is not None]
        self.check_finite(min(bad_steps, default=None))
        state = run.state(setup.optimizer_state(run.optimizer, run.ranks))
        state["losses"] = merge_losses(run.ranks.gather(run.monitor.state_dict()))
        run.ranks.from_main(lambda: save_checkpoint(self.folder, state, run.command))

    def rescue(self, error: Exception) -> RankLost:
        """Save the state without the ranks that are gone, once, and say so; the error to raise.

        It is said here, on standard error, because the launcher's SIGTERM to this process is on its way.
        """
        run = self.run
        whole = not run.config.shard_optimizer and run.bad_step() is None
        if not claim(self.folder):
            return RankLost("another process says why", said=True)
        lost = isinstance(error, RankLost) or is_connection(error)
        reason = "a process of the run was lost" if lost else f"process {run.ranks.index}: {error}"
        advice = "start again"
        try:
            if whole and (self.folder / CONFIG).exists():
                save_checkpoint(self.folder, run.state(run.optimizer.state_dict()), run.command)
            if saved := load_checkpoint(self.folder):
                advice = (
                    f"step {saved['step']} is saved: go on, with any number of processes, with --resume {self.folder}"
                )
        except ValueError as unsaved:
            advice = str(unsaved)
        print(f"slicevit: {reason}; {advice}", file=sys.stderr, flush=True)
        return RankLost(f"{reason}; {advice}", 2 if isinstance(error, ValueError) else 1, said=True)

    def check_finite(self, step: int | None) -> None:
        """Raise NotFinite when there is such a step."""
        if step is None:
            return
        saved = load_checkpoint(self.folder)
        good = f"the checkpoint of step {saved['step']} in {self.folder} is good" if saved else "nothing was saved yet"
        own = self.run.config.widths_per_rank == "own" and self.run.ranks.count > 1
        draws = [self.run.widths_of(step, draw) for draw in range(self.run.config.width_draws)]
        widths = "each process its own" if own else "; ".join(", ".join(map(str, widths)) for widths in draws)
        error = NotFinite(
            f"the loss of step {step} (widths {widths}) is not finite; {good}. "
            "Start again in another folder with a lower --lr or with --clip-grad 1"
        )
        raise shared(error)


def _other_versions(state: dict[str, Any]) -> str:
    """The versions that a checkpoint was written with, where they are not those installed."""
    then, now = state.get("versions", {}), versions()
    return ", ".join(f"{name} {then[name]}" for name in then if then[name] != now.get(name))
