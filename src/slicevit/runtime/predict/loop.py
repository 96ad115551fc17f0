"""The batches of an offline job into one table, in order; it stops and goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

from slicevit.checkpoint import read_config
from slicevit.files import files_digest
from slicevit.runtime.predict.parts import Parts, Tally
from slicevit.runtime.predict.table import Done
from slicevit.runtime.predict.widths import Watch
from slicevit.runtime.predict.workforce import Task, Workforce

_SAVE_SECONDS, _SAVE_ROWS = 10.0, 20_000  # rows are saved after so long, or so many


def model_digest(run: str | Path) -> str:
    """Of the weights and config.json of a run; two runs with the same one answer alike.

    Raises ValueError when the run cannot be read.
    """
    _, weights = read_config(run)
    return files_digest(weights.with_name("config.json"), weights)


def predict(
    workforce: Workforce,
    task: Task,
    parts: Parts,
    watch: Watch,
    *,
    max_bad_share: float = 0.01,
    progress: Callable[[Tally], None] = lambda tally: None,
    stopping: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> bool:
    """Answer all images that `parts` has not, and put the table in its place; False when it was stopped before.

    Whatever ends it, an error too, what is done by then is saved.

    Args:
        workforce: does the batches.
        task: what is to be done with each.
        parts: an open `Parts`, made for the same images.
        watch: the job's seconds.
        max_bad_share: share of the images that may have no answer.
        progress: called after every batch.
        stopping: asked after every batch, and while none comes, whether to save and stop.
        say: takes one sentence where there is something to say on the way.

    Raises ValueError when more images have no answer, or the disk does not take the rows, and what `workforce` raises.
    """
    images = task.table.images
    total = len(images)
    limit = int(max_bad_share * total)
    if parts.tally.bad > limit:
        raise ValueError(_too_many_bad(parts, total, max_bad_share, images.spec))
    saved = watch.now()
    examples: list[str] = []
    stopped = stopping()
    coming = workforce.do(task, parts.tally, watch, say)
    try:
        with closing(coming):
            for done in () if stopped else coming:
                if done is not None:
                    examples += _add(parts, done)[: 3 - len(examples)]
                    if parts.tally.bad > limit:
                        raise ValueError(_too_many_bad(parts, total, max_bad_share, images.spec, examples))
                    progress(parts.tally)
                if stopped := stopping():
                    break
                if watch.now() - saved > _SAVE_SECONDS or parts.waiting >= _SAVE_ROWS:
                    parts.save(watch.seconds(), workforce.memory())
                    saved = watch.now()
    except BaseException:
        with suppress(ValueError):  # the first error is the one to hear of
            parts.save(watch.seconds(), workforce.memory())
        raise
    parts.save(watch.seconds(), workforce.memory())
    if not stopped:
        parts.finish()
    return not stopped


def _add(parts: Parts, done: Done) -> list[str]:
    """Hand the rows of a batch to `parts`; which of the images have no answer, and why."""
    loaded, rows = done
    bad = [f"{next(iter(row.values()))} ({row['error']})" for row in rows if row.get("error") is not None]
    widths = Counter(row["width"] for row in rows if row.get("error") is None)
    targets = zip(loaded.places, loaded.targets, strict=True)
    correct = sum(rows[number - loaded.first].get("class") == target for number, target in targets)
    parts.add(rows, loaded.count, widths, len(bad), correct)
    return bad


def _too_many_bad(parts: Parts, total: int, max_share: float, source: str, examples: Sequence[str] = ()) -> str:
    bad = parts.tally.bad
    such_as = f", such as {'; '.join(examples)}" if examples else ""
    return (
        f"{source}: {bad} or more of its {total} images have no answer ({bad / total:.2%}, above the {max_share:.2%} "
        f"allowed){such_as}. What is done is kept: go on with a higher --max-bad-share; or restore or remove these "
        f"files, delete {parts.folder} and start again"
    )
