"""The backbone that a segmenter or detector begins with, and what its folder says of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from slicevit.checkpoint import KINDS, from_pretrained, read_config
from slicevit.costs import model_input_size, width_costs
from slicevit.elastic import ElasticModel
from slicevit.families import Layout
from slicevit.files import write_text
from slicevit.reasons import one_line
from slicevit.training import setup
from slicevit.training.config import TrainConfig
from slicevit.training.methods import SEPARATE, is_separate, part_folder
from slicevit.training.runs import read_train_config
from slicevit.widths import FULL, Isolation, parse_fraction

_SCRATCH, _PRETRAINED = "scratch", "pretrained"


class Config(Protocol):
    """What a run's configuration says of its backbone; `SegmentConfig` describes each field."""

    @property
    def init(self) -> str: ...
    @property
    def model_args(self) -> dict[str, Any]: ...
    @property
    def grid(self) -> str | None: ...
    @property
    def layout(self) -> Layout | None: ...
    @property
    def isolation(self) -> Isolation | None: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def drop_path(self) -> float: ...

    def training(self) -> TrainConfig: ...


def grid_of(config: Config) -> str:
    """--grid, or that of --init. Raises ValueError when --init cannot be had, or does not go with --model-args."""
    if config.model_args and config.init not in (_SCRATCH, _PRETRAINED):
        raise ValueError(f"--model-args are for --init scratch or pretrained: {config.init} has its own")
    if config.grid is not None:
        return config.grid
    if config.init in (_SCRATCH, _PRETRAINED):
        return "1/4:1:1/16"
    folder = Path(config.init)
    if is_separate(folder):
        return read_train_config(folder).grid
    saved, _ = read_config(config.init)
    grid: str | None = saved.get("slicevit", {}).get("grid")
    if grid is None:
        raise ValueError(f"--init {config.init} is not a slicevit model: give --grid, or a run of slicevit train")
    return grid


def source_of(config: Config, width: str | None = None) -> ElasticModel:
    """The backbone to begin with, without its head, on a grid that has the widths asked for.

    `width` is the one to be trained alone. Raises ValueError when --init cannot be had.
    """
    if config.init in (_SCRATCH, _PRETRAINED):
        return setup.build_model(config.training(), 0)
    folder = Path(config.init)
    if is_separate(folder):
        if width is None:
            raise ValueError(
                f"--init {folder} trained each width alone, so there is no network to slice: give --method {SEPARATE}"
            )
        model = from_pretrained(part_folder(folder, parse_fraction(width)))
    else:
        given = {name: getattr(config, name) for name in ("layout", "isolation") if getattr(config, name) is not None}
        model = from_pretrained(config.init, grid=config.grid, **given)
    model.reset_classifier(0)
    return model


def fitted_arguments(config: Config, source: ElasticModel) -> dict[str, Any]:
    """timm's arguments of the backbone for images of --size, which `source` is set to.

    Raises ValueError when it cannot be.
    """
    arguments = {name: value for name, value in source.model_args.items() if name != "num_classes"}
    if hasattr(source._full, "set_input_size"):
        try:
            source.set_input_size(img_size=config.size)
        except (AssertionError, ValueError) as error:
            size = " ".join(map(str, config.size))
            raise ValueError(f"--size {size} does not go with {type(source._full).__name__}: {error}") from None
        arguments["img_size"] = tuple(config.size)
    return arguments | ({"drop_path_rate": config.drop_path} if config.drop_path else {})


def load(backbone: nn.Module, source: ElasticModel, width: Fraction, config: Config) -> None:
    """Give `backbone` the weights of `source` at `width`. Raises ValueError when they do not fit."""
    try:
        backbone.load_state_dict(source.to_timm(width).state_dict())
    except RuntimeError as error:
        reason = one_line(error, 160)
        raise ValueError(f"--init {config.init}: its weights do not fit images of --size ({reason})") from None


def try_size(model: ElasticModel, source: ElasticModel, config: Config) -> None:
    """Count what an image of --size costs `model`, whose backbone is that of `source`, as its results will say.

    Raises ValueError when it takes no such image, because the backbone is tied to another size.
    """
    try:
        width_costs(model, FULL)
    except Exception as error:  # timm's models assert, or fail in their middle
        reason = " ".join((str(error) or type(error).__name__).split())[:120]
        built = " ".join(map(str, model_input_size(source)[1:]))
        advice = f"give the size that it was built for, --size {built}"
        if config.init in (_SCRATCH, _PRETRAINED):
            advice += ", or build it for this one with --model-args img_size"
        size = " ".join(map(str, config.size))
        raise ValueError(
            f"--size {size} does not go with {type(source._full).__name__} ({reason})"
            + (f": {advice}" if size != built else "")
        ) from None


def describe(folder: Path, task: str, recipe: Any, config: Any) -> None:
    """Write config.json of a model of `task` from two dataclasses: what rebuilds it, and its run's configuration."""
    entries = {"task": task, "grid": recipe.grid, KINDS[task]: asdict(recipe), "training": asdict(config)}
    try:
        text = json.dumps({"slicevit": entries}, indent=2)
    except TypeError as error:
        raise ValueError(f"--model-args: an argument of {recipe.backbone} has no place in JSON ({error})") from None
    write_text(folder / "config.json", text + "\n")
