"""`slicevit eval` of a segmenter: mIoU and pixel accuracy at every width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from slicevit.calibration import require_statistics
from slicevit.data import ImageSet, StreamSet, eval_batches
from slicevit.data.masks import MaskSet, eval_pair_transform
from slicevit.dense.saved import Recipe, load_segmenter, read_segmenter
from slicevit.elastic import ElasticModel
from slicevit.evaluation.segmentation import SegmentationScore, evaluate_masks
from slicevit.evaluation.widths import asked_width, measure_widths_latency, predictors
from slicevit.tasks.rows import width_rows
from slicevit.tasks.segment.config import SegmentConfig, from_dict
from slicevit.tasks.segment.results import SegmentResult, write_segment_results
from slicevit.training import loop
from slicevit.training.methods import is_separate, part_folder
from slicevit.training.ranks import Ranks, pick_device
from slicevit.widths import WidthGrid, parse_fraction


def evaluate_segmenter(
    run: Path,
    data: str | None = None,
    width: str | None = None,
    workers: int = 0,
    max_bad_share: float = 0.01,
    device: str = "auto",
) -> tuple[list[SegmentResult], bool]:
    """Rows for every legal width of a segmenter, or for one, and whether they were written into its results.

    The images are those of the run's --eval-split, of its own data or of `data`, which is laid out alike. Only a whole
    evaluation on its own data is written; its figures are those of the end of training. A `width` off the grid is
    evaluated too. Raises ValueError for a folder, data or width that cannot be had.
    """
    entries = read_segmenter(run)
    config = from_dict(entries["training"])
    options = (replace(config, data=data or config.data), workers, max_bad_share, device)
    if is_separate(run):
        names = [str(legal) for legal in WidthGrid.parse(entries["grid"])]
        if width is not None:
            if str(parse_fraction(width)) not in names:
                raise ValueError(f"--width {width}: {run} holds the widths {', '.join(names)}, each trained alone")
            names = [str(parse_fraction(width))]
        rows = [replace(row, width=name) for name in names for row in _rows(part_folder(run, name), None, *options)]
    else:
        rows = _rows(run, width, *options)
        if config.width is not None:
            rows = [replace(row, width=config.width) for row in rows]
    own = data is None and width is None
    if own:
        write_segment_results(run, rows)
    return rows, own


def _rows(
    run: Path, width: str | None, config: SegmentConfig, workers: int, max_bad_share: float, device: str
) -> list[SegmentResult]:
    model, recipe = load_segmenter(run)
    widths = list(model.widths) if width is None else [asked_width(model, width)]
    require_statistics(model, run, None if width is None else widths)
    images = MaskSet(config.data, config.eval_split, recipe.num_classes, config.folders, recipe.in_chans)
    model.to(pick_device(device))
    scores = measure_masks(model, widths, recipe, images, workers, max_bad_share)
    latency = measure_widths_latency(model, widths, loop.LATENCY_SECONDS)
    return width_rows(SegmentResult, model, recipe, scores, latency, config.method)


def measure_masks(
    model: ElasticModel,
    widths: Sequence[Fraction],
    recipe: Recipe,
    images: ImageSet | StreamSet,
    workers: int = 0,
    max_bad_share: float = 0.01,
    ranks: Ranks | None = None,
) -> dict[str, SegmentationScore]:
    """What every width scores on `images`, in one pass over them; of several `ranks` each takes its share.

    Raises ValueError as `evaluate_masks`, and when more than `max_bad_share` of the images cannot be read.
    """
    share = {} if ranks is None else {"rank": ranks.index, "world_size": ranks.count}
    transform = eval_pair_transform(recipe.transform())
    batches = eval_batches(images, transform, 1, workers, max_bad_share, **share)  # images are of many sizes
    device = next(model.parameters()).device
    try:
        return evaluate_masks(predictors(model, widths), batches, recipe.size, device, recipe.num_classes)
    finally:
        model.release()
