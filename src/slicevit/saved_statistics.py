"""BatchNorm statistics of the narrow widths of a saved model: statistics.safetensors, beside its weights.

They are kept apart from the weights, so that timm's own loader finds in these its own names alone. The file says which
weights and which slicing they are of; beside others they count as not there.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import get_args

from safetensors import safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from slicevit.elastic import ElasticModel
from slicevit.files import files_digest, replacing
from slicevit.reasons import one_line
from slicevit.widths import End

STATISTICS = "statistics.safetensors"


def write_statistics(model: ElasticModel, weights: Path) -> None:
    """Write those of `model` beside its file of `weights`, whole or not at all; remove the file when it has none.

    Raises ValueError when the disk does not take it.
    """
    path = weights.with_name(STATISTICS)
    if not model._statistics:
        path.unlink(missing_ok=True)
        return
    tensors = {
        f"{width}:{end}:{name}:{key}": buffer.contiguous()
        for (width, end), statistics in model._statistics.items()
        for name, buffers in statistics.items()
        for key, buffer in buffers.items()
        if buffer is not None
    }
    metadata = {"weights": files_digest(weights), "slicing": _slicing(model)}
    with replacing(path) as temporary:
        temporary.write_bytes(serialised(tensors, metadata))


def read_statistics(model: ElasticModel, path: Path, weights: Path) -> None:
    """Give `model` those in `path`, if they belong to its file of `weights` and to its slicing.

    Raises ValueError when the file is broken, or is of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own SafetensorError
        raise ValueError(f"{path} does not hold a model's statistics ({one_line(error, 160)})") from None
    if metadata.get("slicing") != _slicing(model) or metadata.get("weights") != files_digest(weights):
        return
    shapes = {name: buffer.shape for name, buffer in model.named_buffers()}
    for name, tensor in tensors.items():
        width, end, layer, key = _parsed(name, path)
        full = shapes.get(f"{layer}.{key}")
        if full is None or len(full) != tensor.ndim or any(map(int.__gt__, tensor.shape, full)):
            raise ValueError(f"{path} does not hold this model's statistics ({name} is none of its BatchNorms)")
        model._statistics.setdefault((width, end), {}).setdefault(layer, {})[key] = tensor


def _parsed(name: str, path: Path) -> tuple[Fraction, End, str, str]:
    width, end, layer, key = (name.split(":") + [""] * 4)[:4]
    for known in get_args(End):
        if known == end:
            return Fraction(width), known, layer, key
    raise ValueError(f"{path} does not hold a model's statistics ({name} names no width)")


def _slicing(model: ElasticModel) -> str:
    """What besides a width and its end decides which channels it has, and what it computes with them."""
    settings: dict[str, Tensor | str | float | None] = asdict(model.settings)
    return json.dumps({name: value for name, value in settings.items() if name != "isolation"})
