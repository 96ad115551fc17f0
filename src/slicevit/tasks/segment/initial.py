"""The segmenter that a run begins with, and those that it leaves."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from slicevit.checkpoint import SEGMENTATION, from_pretrained, read_config
from slicevit.dense.saved import Recipe, build, load_segmenter, read_segmenter
from slicevit.elastic import ElasticModel
from slicevit.files import write_text
from slicevit.tasks.segment.config import SegmentConfig
from slicevit.training import setup
from slicevit.training.methods import SEPARATE, is_separate, part_folder
from slicevit.training.runs import read_train_config
from slicevit.widths import FULL, WidthGrid, parse_fraction

_SCRATCH, _PRETRAINED = "scratch", "pretrained"


def resolved(config: SegmentConfig) -> SegmentConfig:
    """The same with the grid filled in. Raises ValueError for what is missing, or --init cannot be had."""
    if not config.data:
        raise ValueError("--data: name a folder of images and masks")
    if not config.num_classes:
        raise ValueError(f"--num-classes: say how many classes the masks of {config.data} have, or give a --preset")
    if config.model_args and config.init not in (_SCRATCH, _PRETRAINED):
        raise ValueError(f"--model-args are for --init scratch or pretrained: {config.init} has its own")
    if config.grid is not None:
        return config
    if config.init in (_SCRATCH, _PRETRAINED):
        return replace(config, grid="1/4:1:1/16")
    folder = Path(config.init)
    if is_separate(folder):
        return replace(config, grid=read_train_config(folder).grid)
    saved, _ = read_config(config.init)
    grid = saved.get("slicevit", {}).get("grid")
    if grid is None:
        raise ValueError(f"--init {config.init} is not a slicevit model: give --grid, or a run of slicevit train")
    return replace(config, grid=grid)


def begin(config: SegmentConfig) -> tuple[ElasticModel, Recipe]:
    """A new segmenter on the backbone that `config` names, in train mode, and what rebuilds it.

    Raises ValueError for a backbone, width or grid that cannot be had.
    """
    torch.manual_seed(config.seed)
    source = _backbone(config)
    cut = None if config.width is None else parse_fraction(config.width)
    if cut is not None and is_separate(Path(config.init)):
        cut = FULL
    try:
        legal = source.width(cut)
    except ValueError as error:
        raise ValueError(f"--width {config.width}: {error}") from None
    arguments = {name: value for name, value in source.model_args.items() if name not in ("num_classes", "img_size")}
    sized = hasattr(source._full, "set_input_size")
    if sized:
        try:
            source.set_input_size(img_size=config.size)
        except (AssertionError, ValueError) as error:
            size = " ".join(map(str, config.size))
            raise ValueError(f"--size {size} does not go with {type(source._full).__name__}: {error}") from None
    images = setup.transform_config(config.training(), source)
    assert config.grid is not None
    recipe = Recipe(
        backbone=source.pretrained_cfg["architecture"],
        backbone_args=arguments
        | ({"img_size": tuple(config.size)} if sized else {})
        | ({"drop_path_rate": config.drop_path} if config.drop_path else {}),
        cut=None if legal == FULL else str(legal),
        size=config.size,
        channels=config.decoder_channels,
        num_classes=config.num_classes,
        grid=config.grid if cut is None else "1:1:1",
        settings=asdict(source.settings),
        in_chans=images.in_chans,
        mean=images.mean,
        std=images.std,
        decoder=config.decoder,
        class_names=config.class_names,
    )
    model = build(recipe)
    weights = source.to_timm(legal).state_dict()
    try:
        model.backbone.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"--init {config.init}: its weights do not fit images of --size ({reason})") from None
    return model.train(), recipe


def _backbone(config: SegmentConfig) -> ElasticModel:
    """The backbone to begin with, without its head, on a grid that has the widths asked for."""
    if config.init in (_SCRATCH, _PRETRAINED):
        return setup.build_model(config.training(), 0)
    folder = Path(config.init)
    if is_separate(folder):
        if config.width is None:
            raise ValueError(
                f"--init {folder} trained each width alone, so there is no network to slice: give --method {SEPARATE}"
            )
        model = from_pretrained(part_folder(folder, parse_fraction(config.width)))
    else:
        given = {name: getattr(config, name) for name in ("layout", "isolation") if getattr(config, name) is not None}
        model = from_pretrained(config.init, grid=config.grid, **given)
    model.reset_classifier(0)
    return model


def describe(folder: Path, recipe: Recipe, config: SegmentConfig) -> None:
    """Write config.json."""
    entries = {"task": SEGMENTATION, "grid": recipe.grid, "segmenter": asdict(recipe), "training": asdict(config)}
    try:
        text = json.dumps({"slicevit": entries}, indent=2)
    except TypeError as error:
        raise ValueError(f"--model-args: an argument of {recipe.backbone} has no place in JSON ({error})") from None
    write_text(folder / "config.json", text + "\n")


def modules_of(folder: Path) -> dict[str, tuple[nn.Module, Recipe]]:
    """Width -> (a module for inference, its recipe) of a run, also of one that trained each width alone."""
    if is_separate(folder):
        grid = WidthGrid.parse(read_segmenter(folder)["grid"])
        parts = {str(width): load_segmenter(part_folder(folder, width)) for width in grid}
        return {name: (model.subnet(FULL), recipe) for name, (model, recipe) in parts.items()}
    model, recipe = load_segmenter(folder)
    return {str(width): (model.subnet(width), recipe) for width in model.widths}
