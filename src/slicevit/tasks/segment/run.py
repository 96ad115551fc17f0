"""One segmentation run: the training loop of `slicevit train`, on images with masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from slicevit import checkpoint
from slicevit.data.masks import MaskSet, MaskTransformConfig, train_pair_transform
from slicevit.data.transforms import PairTransform
from slicevit.evaluation.segmentation import SegmentationScore
from slicevit.evaluation.widths import measure_widths_latency
from slicevit.tasks.rows import width_rows
from slicevit.tasks.segment import initial
from slicevit.tasks.segment.config import SegmentConfig
from slicevit.tasks.segment.evaluate import measure_masks
from slicevit.tasks.segment.results import SegmentResult
from slicevit.training import loop, setup
from slicevit.training.keeper import Keeper
from slicevit.training.objectives import Objective
from slicevit.training.pixels import PixelObjective
from slicevit.training.trackers import check_installed


def statistics_transform(pairs: MaskTransformConfig) -> PairTransform:
    """How images reach a segmenter that its BatchNorm statistics are taken of: crops of chance place, nothing else."""
    return train_pair_transform(replace(pairs, scale=(1.0, 1.0), hflip=0.0, color_jitter=0.0))


class SegmentKeeper(Keeper):
    """Keeps a segmentation run in its folder."""

    run: SegmentRun

    def describe(self) -> None:
        """Write config.json and the weights as they are."""
        checkpoint.save_weights(self.run.evaluated, self.folder)
        initial.describe(self.folder, self.run.recipe, self.run.segment)


class SegmentRun(loop.Run):
    """One segmentation run in `folder`; `train` starts it, or goes on from its checkpoint.

    Raises ValueError for whatever in `config` cannot be had, naming the flag.
    """

    command = "segment"
    figures = ("miou", "pixel_accuracy", "loss")

    def __init__(self, config: SegmentConfig, folder: Path, console: Console | None = None):
        self.segment = config
        super().__init__(config.training(), folder, console)
        self.keeper = SegmentKeeper(self, folder)

    def _objective(self) -> Objective:
        config = self.config
        assert config.transfer is not None
        assert config.calibration is not None
        return PixelObjective(config.transfer, config.calibration, config.smoothing)

    def _open_data(self) -> None:
        config = self.segment
        check_installed(config.log_with)
        self.model, self.recipe = initial.begin(config)
        self.model.to(self.device)
        self.pairs = self.recipe.transform(**config.augmentation)
        train_set, self.val_set = (
            MaskSet(config.data, split, config.num_classes, config.folders, self.recipe.in_chans)
            for split in ("train", config.eval_split)
        )
        self.num_classes, self.class_names, self.teacher, self.distiller = config.num_classes, None, None, None
        self.mixer = setup.Mixer(self.config, config.num_classes)
        self.loader = setup.pair_loader(self.config, train_set, train_pair_transform(self.pairs), self.ranks)

    def _image_shape(self) -> tuple[int, int, int]:
        return (self.recipe.in_chans, *self.recipe.size)

    def _statistics_transform(self) -> PairTransform:
        return statistics_transform(self.pairs)

    def _evaluate(self) -> dict[str, SegmentationScore]:
        model, config = self.evaluated, self.config
        return measure_masks(
            model, self._trained_widths(), self.recipe, self.val_set, config.workers, config.max_bad_share, self.ranks
        )

    def _finish(self) -> list[SegmentResult]:
        model = self.evaluated
        scores = self._scores or self._scored()
        latency = self.ranks.from_main(lambda: measure_widths_latency(model, model.widths, loop.LATENCY_SECONDS))
        return width_rows(SegmentResult, model, self.recipe, scores, latency, self.config.method)
