"""Segmenters, and other models of a decoder over a backbone, in folders: what rebuilds one, and its weights.

Such a folder has a config.json of its own kind, which timm does not read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file

from slicevit.checkpoint import COMMANDS, KINDS, SEGMENTATION, WEIGHTS
from slicevit.data.masks import MaskTransformConfig
from slicevit.dense.mask_transformer import HEAD_WIDTH
from slicevit.dense.segmenter import Arguments, Decoder, Segmenter, segmenter_family
from slicevit.elastic import ElasticModel, create_model
from slicevit.reasons import one_line
from slicevit.saved_statistics import STATISTICS, read_statistics
from slicevit.widths import FULL, Width, WidthGrid, parse_fraction


@dataclass(frozen=True)
class Recipe:
    """What rebuilds a segmenter: the arguments of `Segmenter`, the grid, the fields of `SliceSettings`, and how images
    reach it (the channels' means and deviations).

    `cut` is the width that the backbone was cut out at, or None where all of it is there. `class_names` are in the
    order of the logits, and empty where nobody gave them.
    """

    backbone: str
    backbone_args: Arguments
    cut: str | None
    size: tuple[int, int]
    channels: int
    num_classes: int
    grid: str
    settings: dict[str, Any]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    decoder: Decoder = "fpn"
    class_names: tuple[str, ...] = ()

    def transform(self, **augmentation: Any) -> MaskTransformConfig:
        """How images reach the segmenter; `augmentation` are the fields of `MaskTransformConfig` that training has."""
        return MaskTransformConfig(self.size, self.in_chans, self.mean, self.std, **augmentation)


def build(recipe: Recipe) -> ElasticModel:
    """The segmenter that `recipe` describes, with fresh weights. Raises ValueError when it cannot be sliced so."""
    backbone_args = {key: as_tuple(value) for key, value in recipe.backbone_args.items()}
    changes: Arguments = {}
    if recipe.cut is not None:
        changes = _cut_arguments(recipe, backbone_args, recipe.cut)
    arguments: Arguments = {
        "backbone": recipe.backbone,
        "backbone_args": backbone_args,
        "changes": changes,
        "size": tuple(recipe.size),
        "channels": recipe.channels,
        "num_classes": recipe.num_classes,
        "decoder": recipe.decoder,
        "heads": max(1, recipe.channels // HEAD_WIDTH),
    }
    module = Segmenter(**arguments)
    family = segmenter_family(module.backbone)
    return ElasticModel(module, recipe.grid, arguments, family, **recipe.settings)


def _cut_arguments(recipe: Recipe, backbone_args: Arguments, cut: Width) -> Arguments:
    """What the class of the backbone gets at the width that it was cut out at."""
    width = parse_fraction(cut)
    grid = WidthGrid(width, FULL, FULL - width)
    settings = {name: recipe.settings[name] for name in ("layout", "heads", "scope")}
    return create_model(recipe.backbone, grid, num_classes=0, **settings, **backbone_args).arguments(width)


def as_tuple(value: Any) -> Any:
    """JSON's list as the tuple that it was."""
    return tuple(value) if isinstance(value, list) else value


def read_segmenter(folder: Path) -> dict[str, Any]:
    """The "slicevit" part of a segmenter's config.json. Raises ValueError when it is none."""
    return read_entries(folder, SEGMENTATION)


def read_entries(folder: Path, task: str) -> dict[str, Any]:
    """The "slicevit" part of config.json of a model of `task`. Raises ValueError when it is none."""
    path = folder / "config.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["slicevit"]
    except FileNotFoundError:
        raise ValueError(f"{folder} is no run's folder: it has no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} describes no run ({error!r})") from None
    if not isinstance(entries, dict) or entries.get("task") != task:
        raise ValueError(f"{folder} is no {KINDS[task]}'s folder: slicevit {COMMANDS[task]} makes one")
    return entries


def load_segmenter(folder: str | Path) -> tuple[ElasticModel, Recipe]:
    """The segmenter that a run saved, in eval mode, and what rebuilds it.

    Raises ValueError when it is none, or its files are missing, broken or do not fit together.
    """
    return load(Path(folder), SEGMENTATION, Recipe, build)


R = TypeVar("R")


def load(folder: Path, task: str, kind: type[R], build: Callable[[R], ElasticModel]) -> tuple[ElasticModel, R]:
    """The model of `task` in a folder, in eval mode, as `build` makes it of its recipe. Raises as `load_segmenter`."""
    entries = read_entries(folder, task)
    try:
        recipe = kind(**{key: as_tuple(value) for key, value in entries[KINDS[task]].items()})
        model = build(recipe)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} does not describe a {KINDS[task]} ({error!r})") from None
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except Exception as error:  # safetensors raises its own SafetensorError, torch a RuntimeError
        reason = one_line(error, 200)
        raise ValueError(f"{folder / WEIGHTS} does not hold this {KINDS[task]}'s weights ({reason})") from None
    if model.has_batch_norm and (folder / STATISTICS).exists():
        read_statistics(model, folder / STATISTICS, folder / WEIGHTS)
    return model.eval(), recipe
