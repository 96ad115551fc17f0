"""One detection run: the training loop of `slicevit train`, on images with boxes.

Legend of axis names: B images, C channels, H height, W width, N boxes of an image at most.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from slicevit import checkpoint
from slicevit.checkpoint import DETECTION
from slicevit.data.boxes import BoxSet, BoxTransformConfig, targets_of, train_box_transform
from slicevit.data.transforms import PairTransform
from slicevit.dense.detector import DetectorRecipe, build_detector
from slicevit.dense.semantic_fpn import check_groups
from slicevit.elastic import ElasticModel
from slicevit.evaluation.detection import DetectionScore, require_coco
from slicevit.evaluation.widths import measure_widths_latency
from slicevit.tasks import backbones
from slicevit.tasks.detect.config import DetectConfig
from slicevit.tasks.detect.evaluate import measure_boxes
from slicevit.tasks.detect.results import DetectResult
from slicevit.tasks.rows import width_rows
from slicevit.training import loop, setup
from slicevit.training.keeper import Keeper
from slicevit.training.trackers import check_installed
from slicevit.widths import FULL, WidthGrid


def statistics_transform(size: tuple[int, int]) -> PairTransform:
    """How images reach a detector that its BatchNorm statistics are taken of: at its `size`, nothing else."""
    return train_box_transform(BoxTransformConfig(size))


class DetectKeeper(Keeper):
    """Keeps a detection run in its folder."""

    run: DetectRun

    def describe(self) -> None:
        """Write config.json and the weights as they are."""
        checkpoint.save_weights(self.run.evaluated, self.folder)
        backbones.describe(self.folder, DETECTION, self.run.recipe, self.run.detect)


class DetectRun(loop.Run):
    """One detection run in `folder`; `train` starts it, or goes on from its checkpoint.

    Raises ValueError for whatever in `config` cannot be had, naming the flag.
    """

    command = "detect"
    figures = ("map", "map50")

    def __init__(self, config: DetectConfig, folder: Path, console: Console | None = None):
        self.detect = config
        super().__init__(config.training(), folder, console)
        self.keeper = DetectKeeper(self, folder)

    def _open_data(self) -> None:
        config = self.detect
        check_installed(config.log_with)
        require_coco()
        self.model, self.recipe, train_set, self.val_set = begin(config)
        self.model.to(self.device)
        self.num_classes, self.class_names, self.teacher, self.distiller = train_set.num_classes, None, None, None
        self.mixer = setup.Mixer(self.config, train_set.num_classes)
        self.loader = setup.pair_loader(self.config, train_set, train_box_transform(config.augmentation), self.ranks)

    def _image_shape(self) -> tuple[int, int, int]:
        return (self.recipe.in_chans, *self.recipe.size)

    def _gradients(
        self, images_BCHW: Tensor, goal: Tensor, widths: tuple[Fraction, ...], share: float
    ) -> dict[Fraction, Tensor]:
        """FCOS's own losses, added up, of every width; `goal` are targets (B, N, 6)."""
        losses: dict[Fraction, Tensor] = {}
        targets = targets_of(goal)
        for width in widths:
            with self.model.backward_at(width) as net:
                with self._autocast():
                    loss = torch.stack(list(net(images_BCHW, targets).values())).sum()
                (loss * share).backward()
            losses[width] = loss.detach()
        return losses

    @torch.inference_mode()
    def _answers_are_finite(self) -> bool:
        """As the classifier's; what it asks is what the heads say, from which boxes are picked."""
        if self._last_images is None:
            return True
        with self._autocast():
            answers = [self.model._run("raw", width, self._last_images) for width in (self.model.widths[0], FULL)]
        return all(bool(maps.isfinite().all()) for answer in answers for maps in answer.values())

    def _statistics_transform(self) -> PairTransform:
        return statistics_transform(self.recipe.size)

    def _evaluate(self) -> dict[str, DetectionScore]:
        model, config = self.evaluated, self.config
        return measure_boxes(model, model.widths, self.val_set, config.workers, config.max_bad_share, self.ranks)

    def _finish(self) -> list[DetectResult]:
        model = self.evaluated.eval()
        scores = self._scores or self._scored()
        latency = self.ranks.from_main(lambda: measure_widths_latency(model, model.widths, loop.LATENCY_SECONDS))
        return width_rows(DetectResult, model, self.recipe, scores, latency, self.detect.method)


def begin(config: DetectConfig) -> tuple[ElasticModel, DetectorRecipe, BoxSet, BoxSet]:
    """A new detector on the backbone that `config` names, in train mode, what rebuilds it, and its two splits.

    Raises ValueError for a backbone, grid or data that cannot be had.
    """
    torch.manual_seed(config.seed)
    source = backbones.source_of(config)
    assert config.grid is not None
    check_groups("--channels", config.channels, WidthGrid.parse(config.grid), 1)
    arguments = backbones.fitted_arguments(config, source)
    images = setup.transform_config(config.training(), source)
    train_set, val_set = (
        BoxSet(config.data, split, config.folders, images.in_chans) for split in ("train", config.eval_split)
    )
    if train_set.classes != val_set.classes:
        raise ValueError(f"--data {config.data}: train and {config.eval_split} have other categories")
    assert train_set.classes is not None
    recipe = DetectorRecipe(
        backbone=source.pretrained_cfg["architecture"],
        backbone_args=arguments,
        size=config.size,
        channels=config.channels,
        convolutions=config.convolutions,
        num_classes=train_set.num_classes,
        grid=config.grid,
        settings=asdict(source.settings),
        in_chans=images.in_chans,
        mean=images.mean,
        std=images.std,
        class_names=tuple(train_set.classes),
    )
    model = build_detector(recipe)
    backbones.load(model.backbone.body, source, FULL, config)
    backbones.try_size(model, source, config)
    return model.train(), recipe, train_set, val_set


def resolved(config: DetectConfig) -> DetectConfig:
    """The same with the grid filled in. Raises ValueError for what is missing, or --init cannot be had."""
    if not config.data:
        raise ValueError("--data: name a folder of images and COCO's annotations")
    return replace(config, grid=backbones.grid_of(config))
