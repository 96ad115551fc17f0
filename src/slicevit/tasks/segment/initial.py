"""The segmenter that a run begins with, and those that it leaves."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from slicevit.checkpoint import SEGMENTATION
from slicevit.dense.saved import Recipe, build, load_segmenter, read_segmenter
from slicevit.dense.semantic_fpn import check_groups
from slicevit.elastic import ElasticModel
from slicevit.tasks import backbones
from slicevit.tasks.segment.config import SegmentConfig
from slicevit.training import setup
from slicevit.training.methods import is_separate, part_folder
from slicevit.widths import FULL, WidthGrid, parse_fraction


def resolved(config: SegmentConfig) -> SegmentConfig:
    """The same with the grid filled in. Raises ValueError for what is missing, or --init cannot be had."""
    if not config.data:
        raise ValueError("--data: name a folder of images and masks")
    if not config.num_classes:
        raise ValueError(f"--num-classes: say how many classes the masks of {config.data} have, or give a --preset")
    return replace(config, grid=backbones.grid_of(config))


def begin(config: SegmentConfig) -> tuple[ElasticModel, Recipe]:
    """A new segmenter on the backbone that `config` names, in train mode, and what rebuilds it.

    Raises ValueError for a backbone, width or grid that cannot be had.
    """
    torch.manual_seed(config.seed)
    source = backbones.source_of(config, config.width)
    cut = None if config.width is None else parse_fraction(config.width)
    if cut is not None and is_separate(Path(config.init)):
        cut = FULL
    try:
        legal = source.width(cut)
    except ValueError as error:
        raise ValueError(f"--width {config.width}: {error}") from None
    assert config.grid is not None
    grid = config.grid if cut is None else "1:1:1"
    if config.decoder == "fpn":
        check_groups("--decoder-channels", config.decoder_channels, WidthGrid.parse(grid), 2)
    arguments = backbones.fitted_arguments(config, source)
    images = setup.transform_config(config.training(), source)
    recipe = Recipe(
        backbone=source.pretrained_cfg["architecture"],
        backbone_args=arguments,
        cut=None if legal == FULL else str(legal),
        size=config.size,
        channels=config.decoder_channels,
        num_classes=config.num_classes,
        grid=grid,
        settings=asdict(source.settings),
        in_chans=images.in_chans,
        mean=images.mean,
        std=images.std,
        decoder=config.decoder,
        class_names=config.class_names,
    )
    model = build(recipe)
    backbones.load(model.backbone, source, legal, config)
    backbones.try_size(model, source, config)
    return model.train(), recipe


def describe(folder: Path, recipe: Recipe, config: SegmentConfig) -> None:
    """Write config.json."""
    backbones.describe(folder, SEGMENTATION, recipe, config)


def modules_of(folder: Path) -> dict[str, tuple[nn.Module, Recipe]]:
    """Width -> (a module for inference, its recipe) of a run, also of one that trained each width alone."""
    if is_separate(folder):
        grid = WidthGrid.parse(read_segmenter(folder)["grid"])
        parts = {str(width): load_segmenter(part_folder(folder, width)) for width in grid}
        return {name: (model.subnet(FULL), recipe) for name, (model, recipe) in parts.items()}
    model, recipe = load_segmenter(folder)
    return {str(width): (model.subnet(width), recipe) for width in model.widths}
