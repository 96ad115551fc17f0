"""An offline job from its settings: the model, the images, the table and the widths, put together and run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from slicevit.checkpoint import COMMANDS, read_config, task_of
from slicevit.data import ImageSet, StreamSet, eval_config
from slicevit.evaluation.results import WidthResult, read_results
from slicevit.runtime.engine import Engine
from slicevit.runtime.predict.cascade import FittedCascade, mean_macs
from slicevit.runtime.predict.choice import choice_of, macs_shares, widths_of
from slicevit.runtime.predict.cluster import connected
from slicevit.runtime.predict.images import describe, open_images
from slicevit.runtime.predict.loop import model_digest, predict
from slicevit.runtime.predict.output import columns, format_of
from slicevit.runtime.predict.parts import Parts, Tally
from slicevit.runtime.predict.pool import Pool
from slicevit.runtime.predict.settings import Job
from slicevit.runtime.predict.table import Table
from slicevit.runtime.predict.widths import Watch
from slicevit.runtime.predict.workforce import Alone, Task, Workforce


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        finished: whether the table is there; if not, it was stopped.
        tally: of all images that are done.
        total: images of the job.
        images: done by this process.
        seconds: of this process.
        labelled: whether the images have classes.
        estimate: accuracy to expect of the answers, in per cent: of the widths used in the run's results, or of the
            cascade on validation images; None without results.
        cascade: the cascade that answered, if one did.
        macs: its average of an image, as a share of the full width's multiply-accumulates.
    """

    finished: bool
    tally: Tally
    total: int
    images: int
    seconds: float
    labelled: bool
    estimate: float | None
    cascade: FittedCascade | None = None
    macs: float | None = None


def run_job(
    job: Job,
    watch: Watch,
    *,
    progress: Callable[[Tally, int], None] = lambda tally, total: None,
    stopping: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Do `job`, or what is left of it.

    Args:
        watch: started when the job was; its seconds are those of the budget.
        progress: called with what is done and the number of all images, at first and after every batch.
        stopping: asked after every batch whether to save and stop.
        say: takes one sentence where there is something to say on the way.

    Raises ValueError for settings that do not go together, files that cannot be had, images, a model or settings other
    than those of the unfinished table, and all that `predict` refuses.
    """
    job.check()
    if task := task_of(job.run):
        raise ValueError(
            f"{job.run} is a run of slicevit {COMMANDS.get(task, task)}, whose answers are no table: `slicevit serve` "
            "gives the masks of a segmenter over HTTP, slicevit.dense.saved.load_segmenter in Python"
        )
    form = format_of(job.out, job.logits)
    with _describing(job) as engine:
        config, weights = read_config(job.run)
        transform = replace(eval_config(config), img_size=engine.input_size[1:])
        images = open_images(job.images, job.split, job.data_root, transform.in_chans)
        table = Table(images, engine.label_names, job.top_k, job.logits)
        _check_classes(job, table, engine)
        results = _results(weights.parent, engine.widths)
        widths = widths_of(job, engine.widths, results)
        names = columns(table.key, table.labelled, job.top_k, job.logits)
        with (
            Parts(job.out, form, names, _identity(job, images, widths), job.overwrite) as parts,
            _workforce(job, engine, say) as workforce,
        ):
            before, watch.before = parts.tally.done, parts.tally.seconds
            choice = choice_of(job, widths, results, workforce.engine, transform, config, parts.tally.memory, say)
            progress(parts.tally, len(images))
            finished = predict(
                workforce,
                Task(table, transform, job.batch_size, choice),
                parts,
                watch,
                max_bad_share=job.max_bad_share,
                progress=lambda tally: progress(tally, len(images)),
                stopping=stopping,
                say=say,
            )
    outcome = Outcome(
        finished,
        parts.tally,
        len(images),
        parts.tally.done - before,
        watch.seconds() - watch.before,
        table.labelled,
        _estimate(parts.tally, results),
    )
    if choice.fitted is None:
        return outcome
    macs = mean_macs(choice.fitted.cascade, parts.tally.widths, macs_shares(results))
    return replace(outcome, estimate=choice.fitted.score.top1, cascade=choice.fitted, macs=macs)


def _describing(job: Job) -> Engine:
    """The engine of a job in this process; over a cluster, one that only says what the model is."""
    if job.ray is not None:
        return Engine(job.run, device="cpu")
    return Engine(job.run, job.engine, job.device, job.precision, job.threads)  # type: ignore[arg-type]


@contextmanager
def _workforce(job: Job, engine: Engine, say: Callable[[str], None]) -> Iterator[Workforce]:
    if job.ray is None:
        yield Alone(engine, job.workers)
        return
    with connected(job.ray) as ray, closing(Pool(ray, job, say)) as pool:
        yield pool


def _check_classes(job: Job, table: Table, engine: Engine) -> None:
    if job.top_k > engine.num_classes:
        raise ValueError(f"--top-k {job.top_k}: the model has {engine.num_classes} classes")
    classes = table.images.num_classes
    if table.labelled and classes and classes != engine.num_classes:
        raise ValueError(f"{job.images} has {classes} classes and the model in {job.run} {engine.num_classes}")


def _results(folder: Path, widths: Sequence[Fraction]) -> dict[Fraction, WidthResult]:
    """The measured row of every width that has one; none where the run was not evaluated."""
    if not (folder / "results.json").exists():
        return {}
    rows = {Fraction(row.width): row for row in read_results(folder)}
    return {width: rows[width] for width in widths if width in rows}


def _identity(job: Job, images: ImageSet | StreamSet, widths: Sequence[Fraction]) -> dict[str, Any]:
    """What must be the same for rows of two processes to belong into one table."""
    names = ("budget", "max_macs", "top_k", "logits", "engine", "device", "precision", "batch_size")
    return {
        "model": model_digest(job.run),
        **describe(images, job.data_root),
        "width": None if job.cascade or job.budget is not None else str(widths[0]),
        "cascade": list(map(str, widths)) if job.cascade else None,
        **{name: getattr(job, name) for name in names},
    }


def _estimate(tally: Tally, results: Mapping[Fraction, WidthResult]) -> float | None:
    """Mean of the widths' measured accuracies over the images that they answered."""
    answered = {Fraction(width): images for width, images in tally.widths.items()}
    if not answered or not set(answered) <= set(results):
        return None
    return sum(results[width].top1 * images for width, images in answered.items()) / sum(answered.values())
