"""`slicevit calibrate` of segmenters and detectors: the model in a run, and the images for its statistics."""

from __future__ import annotations

from pathlib import Path

from slicevit.checkpoint import DETECTION, SEGMENTATION
from slicevit.data.boxes import BoxSet
from slicevit.data.masks import MaskSet
from slicevit.dense.detector import load_detector
from slicevit.dense.saved import load_segmenter, read_entries
from slicevit.evaluation.calibrating import Source, require_batch_norm
from slicevit.tasks.detect import config as detect_config
from slicevit.tasks.detect.run import statistics_transform as of_boxes
from slicevit.tasks.segment import config as segment_config
from slicevit.tasks.segment.run import statistics_transform as of_masks


def open_segmenter(run: Path, data: str | None) -> Source:
    """The segmenter in `run`, and its training images, or those of `data`, laid out alike; masks are not looked at.

    Raises ValueError for what cannot be had.
    """
    config = segment_config.from_dict(read_entries(run, SEGMENTATION)["training"])
    model, recipe = load_segmenter(run)
    require_batch_norm(model, run)
    images = MaskSet(data or config.data, "train", config.num_classes, config.folders, recipe.in_chans)
    return Source(model, images, of_masks(recipe.transform(**config.augmentation)))


def open_detector(run: Path, data: str | None) -> Source:
    """The detector in `run`, and its training images or those of `data`, laid out alike. Raises as `open_segmenter`."""
    config = detect_config.from_dict(read_entries(run, DETECTION)["training"])
    model, recipe = load_detector(run)
    require_batch_norm(model, run)
    return Source(model, BoxSet(data or config.data, "train", config.folders, recipe.in_chans), of_boxes(recipe.size))
