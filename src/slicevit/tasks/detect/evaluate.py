"""`slicevit eval` of a detector: mAP at every width."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from slicevit.calibration import require_statistics
from slicevit.checkpoint import DETECTION
from slicevit.data import ImageSet, StreamSet, eval_batches
from slicevit.data.boxes import BoxSet, eval_box_transform
from slicevit.dense.detector import load_detector
from slicevit.dense.saved import read_entries
from slicevit.elastic import ElasticModel
from slicevit.evaluation.detection import DetectionScore, evaluate_boxes
from slicevit.evaluation.results import write_rows
from slicevit.evaluation.widths import asked_width, measure_widths_latency, predictors
from slicevit.tasks.detect.config import from_dict
from slicevit.tasks.detect.results import DetectResult
from slicevit.tasks.rows import width_rows
from slicevit.training import loop
from slicevit.training.ranks import Ranks, pick_device


def evaluate_detector(
    run: Path,
    data: str | None = None,
    width: str | None = None,
    workers: int = 0,
    max_bad_share: float = 0.01,
    device: str = "auto",
) -> tuple[list[DetectResult], bool]:
    """Rows for every legal width of a detector, or for one, and whether they were written into its results.

    As `slicevit.tasks.segment.evaluate.evaluate_segmenter`. Raises ValueError for a folder, data or width that cannot
    be had, data of other classes, and when pycocotools is missing.
    """
    config = from_dict(read_entries(run, DETECTION)["training"])
    model, recipe = load_detector(run)
    widths = list(model.widths) if width is None else [asked_width(model, width)]
    require_statistics(model, run, None if width is None else widths)
    images = BoxSet(data or config.data, config.eval_split, config.folders, recipe.in_chans)
    if tuple(images.classes or ()) != recipe.class_names:
        raise ValueError(f"--data {images.spec} has other categories than the detector in {run}")
    model.to(pick_device(device))
    scores = measure_boxes(model, widths, images, workers, max_bad_share)
    latency = measure_widths_latency(model, widths, loop.LATENCY_SECONDS)
    rows = width_rows(DetectResult, model, recipe, scores, latency, config.method)
    own = data is None and width is None
    if own:
        write_rows(run, rows)
    return rows, own


def measure_boxes(
    model: ElasticModel,
    widths: Sequence[Fraction],
    images: ImageSet | StreamSet,
    workers: int = 0,
    max_bad_share: float = 0.01,
    ranks: Ranks | None = None,
) -> dict[str, DetectionScore]:
    """What every width scores on `images`, in one pass over them; of several `ranks` each takes its share.

    Raises ValueError as `evaluate_boxes`, and when more than `max_bad_share` of the images cannot be read.
    """
    share = {} if ranks is None else {"rank": ranks.index, "world_size": ranks.count}
    batches = eval_batches(images, eval_box_transform(), 1, workers, max_bad_share, **share)  # of many sizes
    try:
        return evaluate_boxes(predictors(model, widths), batches, next(model.parameters()).device)  # type: ignore[arg-type]
    finally:
        model.release()
