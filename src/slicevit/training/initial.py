"""What a run begins with, where `init` names a saved model or a file of weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from timm.models import load_state_dict
from torch import Tensor

from slicevit.checkpoint import read_config
from slicevit.elastic import ElasticModel
from slicevit.reasons import one_line
from slicevit.training.config import TrainConfig
from slicevit.widths import WidthGrid

C = TypeVar("C")

_SLICING = ("layout", "attn_scale", "norm_eps", "heads")
_OF_THE_MODEL = ("norm_eps",)
_OF_THE_METHOD = ("isolation", "scope")


def with_slicing_of(config: TrainConfig, init: str, own_method: bool) -> TrainConfig:
    """`config` with the architecture of a saved model, and the grid and slicing that it was trained with.

    A model of several widths is trained by `scala` instead of `rotated`, which would undo what its narrow widths
    learned. With `own_method` what follows the method is not taken, nor of a model of one width how it was sliced.

    Raises ValueError when `init` names no saved model.
    """
    saved, _ = read_config(init)
    sliced = saved.get("slicevit", {})
    grid = sliced.get("grid")
    widths = 1 if grid is None else len(WidthGrid.parse(grid))
    names = (*(_SLICING if widths > 1 else _OF_THE_MODEL), *(() if own_method or widths == 1 else _OF_THE_METHOD))
    taken = {name: sliced[name] for name in names if name in sliced}
    if widths > 1:
        taken["grid"] = grid
    if widths > 1 and not own_method and config.method == "rotated":
        taken["method"] = "scala"
    return replace(config, model=saved.get("architecture", config.model), model_args={}, **taken)


def require_same_model(init: str, model: str | None, model_args: dict[str, Any]) -> None:
    """Raises ValueError when `model` or `model_args` say otherwise than the saved model that `init` names is built."""
    saved, _ = read_config(init)
    own, name = saved.get("model_args") or {}, saved.get("architecture")
    channels, *size = (saved.get("pretrained_cfg") or {}).get("input_size", (3, 224, 224))
    own = own | {"in_chans": channels, "img_size": size[0] if size[0] == size[1] else size}
    if model not in (None, name):
        raise ValueError(f"--model {model}: what --init {init} holds is a {name}; leave one of them out")
    for key, value in model_args.items():
        if key not in own or own[key] != json.loads(json.dumps(value)):
            has = f"{key}={own[key]}" if key in own else f"no {key} of its own"
            raise ValueError(f"--model-args {key}={value}: what --init {init} holds has {has}; leave one of them out")


def located(config: C) -> C:
    """`config` with whole paths of `init` and `teacher` where they lie on this disk: it may be resumed elsewhere."""
    whole = {name: str(path.resolve()) for name, path in _on_disk(config) if path.exists()}
    return replace(config, **whole)  # type: ignore[type-var]  # of any task's configuration, all dataclasses


def require_sources(config: Any, folder: Path) -> None:
    """Raises ValueError when what the run in `folder` began with, `init` or `teacher`, is not there any more."""
    for name, path in _on_disk(config):
        if path.is_absolute() and not path.exists():
            raise ValueError(
                f"{folder} was begun with --{name} {path}, which is not there any more: put it back, and resume again"
            )


def _on_disk(config: Any) -> list[tuple[str, Path]]:
    named = {name: getattr(config, name, None) for name in ("init", "teacher")}
    return [(name, Path(value)) for name, value in named.items() if value not in (None, "scratch", "pretrained")]


def image_channels(config: TrainConfig) -> int:
    """Channels of the images that the model takes: those of the saved model that `init` names, or of `model_args`.

    Raises ValueError when `init` names no saved model.
    """
    if config.init in ("scratch", "pretrained") or Path(config.init).is_file():
        return int(config.model_args.get("in_chans", 3))
    saved, _ = read_config(config.init)
    return int(saved.get("pretrained_cfg", {}).get("input_size", (3,))[0])


def load_weights(model: ElasticModel, file: Path) -> None:
    """Fill `model` from a file of timm's weights (safetensors, or a torch file with the weights under `state_dict`,
    `model` or alone); a head of another number of classes stays new.

    Raises ValueError naming --init when the file is no such thing or holds another model's weights.
    """
    weights, own = _read(file), model.state_dict()
    for name in _head_names(model) & weights.keys():
        if weights[name].shape != own[name].shape:
            weights[name] = own[name]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = one_line(error, 200)
        raise ValueError(f"--init {file} holds the weights of another model than --model ({reason})") from None


def brings_head(config: TrainConfig, model: ElasticModel) -> bool:
    """Whether what `init` names had a classifier for as many classes as `model` has."""
    if config.init == "scratch":
        return False
    if config.init == "pretrained":
        return bool(model.pretrained_cfg.get("num_classes") == model.num_classes)
    if Path(config.init).is_file():
        weights, own = _read(Path(config.init)), model.state_dict()
        return all(name in weights and weights[name].shape == own[name].shape for name in _head_names(model))
    return bool(read_config(config.init)[0].get("num_classes") == model.num_classes)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_state_dict(str(file), use_ema=False, weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise many kinds for a broken or unsafe file
        reason = one_line(error, 200)
        raise ValueError(f"--init {file} is no file of weights ({reason})") from None


def _head_names(model: ElasticModel) -> set[str]:
    """The parameters of the classifier, of which a distilled model has two."""
    names = model.pretrained_cfg.get("classifier") or ()
    heads = (names,) if isinstance(names, str) else names
    return {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")} & model.state_dict().keys()
