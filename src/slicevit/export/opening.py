"""Opening a saved model by what it is for."""

from __future__ import annotations

from pathlib import Path

from slicevit.checkpoint import COMMANDS, SEGMENTATION, task_of
from slicevit.export.classifier import open_classifier
from slicevit.export.opened import Opened
from slicevit.export.segmenter import open_segmenter


def open_model(run: str | Path) -> Opened:
    """The model in a run's folder, or of a Hub repository such as "owner/name".

    Raises ValueError when there is none, or it is of a task that is neither exported nor served.
    """
    task = task_of(run)
    if (parts := Path(run, "separate")).is_dir():
        such = min(parts.iterdir(), default=parts / "1-2")
        raise ValueError(
            f"{run} trained each width alone, so no model in it has every width: name the folder of one, such as {such}"
        )
    if task not in (None, SEGMENTATION):
        raise ValueError(f"{run} is a run of slicevit {COMMANDS.get(task, task)}, which is neither exported nor served")
    return open_classifier(run) if task is None else open_segmenter(run)
