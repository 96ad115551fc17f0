"""Where a run's figures go besides its folder: TensorBoard, Weights & Biases, MLflow, over accelerate's trackers."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeAlias

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from slicevit.reasons import one_line

TrackerName: TypeAlias = Literal["tensorboard", "wandb", "mlflow"]


def check_installed(names: tuple[TrackerName, ...]) -> None:
    """Raises ValueError when a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--log-with {name} needs a package that is not installed: pip install {name}")


class Trackers:
    """The trackers called `names` of the run in `folder`; with no names it does nothing.

    TensorBoard's files lie in `folder`/tensorboard; a resumed run drops there what the unbroken one would not have.
    """

    def __init__(self, names: tuple[TrackerName, ...], folder: Path, settings: Mapping[str, Any], step: int):
        self._trackers = [_start(name, folder, step) for name in names]
        if step == 0:
            scalars = (int, float, str)
            plain = {key: value if isinstance(value, scalars) else str(value) for key, value in settings.items()}
            for tracker in self._trackers:
                tracker.store_init_configuration(plain)
        self._losses: Mapping[Fraction, float] = {}

    def losses(self, losses: Mapping[Fraction, float], step: int) -> None:
        """The last known loss of each width, once."""
        if losses is not self._losses:
            self._losses = losses
            self.log({f"train_loss/{width}": loss for width, loss in losses.items()}, step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Named figures of `step`."""
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def finish(self) -> None:
        """Write what is left and close the trackers."""
        for tracker in self._trackers:
            tracker.finish()


def _start(name: TrackerName, folder: Path, step: int) -> GeneralTracker:
    identity = hashlib.sha1(str(folder.resolve()).encode()).hexdigest()[:12]  # a resumed run goes on with its own
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"run_name": "tensorboard", "logging_dir": folder, "purge_step": step + 1},
        "wandb": {"run_name": "slicevit", "name": folder.name, "id": identity, "resume": "allow", "dir": folder},
        "mlflow": {"experiment_name": "slicevit", "run_name": folder.name},
    }
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](**options[name])
        tracker.start()
    except Exception as error:  # each service has errors of its own
        raise ValueError(f"--log-with {name} does not start: {one_line(error)}; mend that or leave it out") from error
    return tracker
