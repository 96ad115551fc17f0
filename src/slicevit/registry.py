"""Every architecture that timm knows: what it is, and the finest grid of widths that slices it, or why none does.

Models are built with their parameters on `meta`; nothing is computed.
"""

from __future__ import annotations

import csv
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from importlib import resources
from math import ceil
from typing import Literal, TypeAlias, get_args

import timm
from torch import nn

from slicevit import constructors, skeletons
from slicevit.architectures import ATTENTION_LAYERS
from slicevit.elastic import UNBUILDABLE
from slicevit.families import Family, family_of
from slicevit.skeletons import build_on_meta
from slicevit.widths import WidthGrid

Kind: TypeAlias = Literal["transformer", "mixer", "hybrid", "convnext", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)
COUNTED = KINDS[:-1]  # of which the share that is sliceable is counted
TABLE = "architectures.csv"

_CLASSES: dict[Kind, str] = {
    "transformer": """
        Beit Cait ConVit CrossVit DaVit DeepseekVitClassifier DeepseekVitEncoder Eva FocalNet Gemma4VitClassifier
        Gemma4VitEncoder GlobalContextVit Hiera HieraDet MultiScaleVit NaFlexVit Nest PoolingVisionTransformer
        PyramidVisionTransformerV2 Qwen3VitClassifier Qwen3VitEncoder SwinTransformer SwinTransformerV2
        SwinTransformerV2Cr TNT Twins VOLO VisionTransformer VisionTransformerDistilled VisionTransformerRelPos
        VisionTransformerSAM Xcit""",
    "mixer": "MlpMixer Sequencer2d",
    "hybrid": """
        CPUBone CSATv2 CoaT EdgeNeXt EfficientFormer EfficientFormerV2 EfficientViM EfficientViMDistilled EfficientVit
        EfficientVitLarge EfficientVitMsra FastVit HourglassUniFormer IFormer Levit LevitDistilled LowFormer MambaOut
        MaxxVit MetaFormer MobileNetV5 MobileNetV5Encoder NextViT SHViT SwiftFormer TinyVit UniFormer Visformer""",
    "convnext": "ConvNeXt",
}
_KIND_OF: dict[str, Kind] = {name: kind for kind, names in _CLASSES.items() for name in names.split()}
_FINEST = 32


@dataclass(frozen=True)
class Architecture:
    """One name of timm's registry, in which slicevit's own models are too.

    model: the class. kind: what it is; "other" is not counted. grid: the finest of those looked at on which it is
    sliceable, or "". reason: why on none, or "".
    """

    name: str
    model: str
    kind: str
    grid: str = ""
    reason: str = ""


def examine(name: str) -> Architecture:
    """What timm's architecture `name` is, and whether and on what grid it is sliceable."""
    make = partial(timm.create_model, name)
    try:
        full = build_on_meta(make)
    except (*UNBUILDABLE, ImportError, TypeError) as error:
        return Architecture(name, "", "other", reason=f"timm does not build it without its weights: {_sentence(error)}")
    model, kind = type(full).__name__, kind_of(full)
    try:
        family = family_of(full)
    except ValueError:
        return Architecture(name, model, kind, reason=REFUSED.get(model, "it belongs to no family"))
    try:
        grid = finest_grid(full, family, make)
    except ValueError as error:
        return Architecture(name, model, kind, reason=str(error))
    return Architecture(name, model, kind, grid=str(grid))


def kind_of(model: nn.Module) -> Kind:
    """What a timm model is, by its class; a convolutional one is a hybrid if it has layers of attention."""
    if type(model).__name__ in _KIND_OF:
        return _KIND_OF[type(model).__name__]
    return "hybrid" if any(type(layer).__name__ in ATTENTION_LAYERS for layer in model.modules()) else "other"


def finest_grid(full: nn.Module, family: Family, make: Callable[[], nn.Module]) -> WidthGrid:
    """The finest grid from about 1/4 to 1 on which the model that `make` makes is sliceable.

    Steps of 1/32, 1/16, 1/8, 1/4 and 1/2 are looked at first, then all of 1/31 to 1/3. Of each grid one width is built,
    a narrow one that no coarser grid holds. Raises ValueError with the reason that the coarsest gives.
    """
    if family.check is not None and (problem := family.check(full)):
        raise ValueError(problem)
    _, given = constructors.construct(partial(build_on_meta, make), type(full), {})
    reason = "its channels have no common divisor"
    halves = [32, 16, 8, 4, 2]
    for steps in (*halves, *(n for n in range(_FINEST - 1, 2, -1) if n not in halves)):
        smallest = Fraction(ceil(steps / 4), steps)
        grid = WidthGrid(smallest, Fraction(1), Fraction(1, steps))
        width = next(width for width in grid if width.denominator == steps)
        try:
            _plan(full, family, given, width, make)
        except UNBUILDABLE as error:
            reason = reason if steps not in halves else f"at width {width}, {_sentence(error)}"
        else:
            return grid
    raise ValueError(reason)


def _plan(
    full: nn.Module, family: Family, given: constructors.Arguments, width: Fraction, make: Callable[[], nn.Module]
) -> None:
    arguments = family.arguments(full, partial(constructors.value_of, given), width, "fixed", "all")
    narrow, _ = constructors.construct(partial(build_on_meta, make), type(full), arguments)
    skeletons.plan_for(family, full, narrow, width, "leading", "per_head", "narrow")


def _sentence(error: BaseException) -> str:
    said = " ".join(str(error).split())[:200]
    return said or f"timm's own check fails: {traceback.extract_tb(error.__traceback__)[-1].line}"


def walk(pattern: str = "") -> Iterator[Architecture]:
    """`examine` of every architecture of timm whose name fits `pattern` (with * and ?)."""
    return map(examine, timm.list_models(pattern))


def read_table() -> list[Architecture]:
    """The committed list: every name of timm's registry, as `slicevit families --out` wrote it."""
    text = resources.files("slicevit").joinpath(TABLE).read_text(encoding="utf-8")
    return [Architecture(**row) for row in csv.DictReader(text.splitlines())]


def table_text(architectures: list[Architecture]) -> str:
    """The CSV that `read_table` reads."""
    lines = [",".join(Architecture.__dataclass_fields__)]
    for entry in architectures:
        lines.append(",".join(f'"{value}"' if "," in value else value for value in asdict(entry).values()))
    return "\n".join(lines) + "\n"


def representatives(architectures: list[Architecture]) -> dict[str, str]:
    """The shortest sliceable name of each class, if there is one of those on a grid of halves."""
    names: dict[str, str] = {}
    for entry in sorted(architectures, key=lambda entry: (Fraction(1, 2) not in _widths(entry), len(entry.name))):
        if entry.grid:
            names.setdefault(entry.model, entry.name)
    return names


def is_timms(name: str) -> bool:
    """Whether timm itself has the architecture `name`, and not a package that registers it, as slicevit does."""
    return timm.model_entrypoint(name).__module__.startswith("timm.")


def _widths(entry: Architecture) -> list[Fraction]:
    return list(WidthGrid.parse(entry.grid)) if entry.grid else []


def share(architectures: list[Architecture]) -> tuple[int, int]:
    """(sliceable, all) of the architectures that are counted, which are timm's alone."""
    counted = [entry for entry in architectures if entry.kind in COUNTED and is_timms(entry.name)]
    return sum(bool(entry.grid) for entry in counted), len(counted)


_STREAM = "it splits its residual channels at fixed places, so that a narrower one's parts are not parts of its parts"
_TABLE = "its widths are in a table of blocks of dictionaries, not in arguments of its constructor"
_LAYERS = "it has other layers at other widths: what is narrower than 256 channels is fused"
REFUSED: dict[str, str] = {  # tests/test_registry.py tries those whose constructors take widths
    "CPUBone": _LAYERS,
    "CSATv2": "its attention over the image is a function of the mean and the maximum of its channels",
    "EdgeNeXt": _STREAM,
    "EfficientVitMsra": _STREAM,
    "GlobalContextVit": "its global queries are residual channels read as heads, which narrower ones divide otherwise",
    "LowFormer": _LAYERS,
    "MobileNetV3": _TABLE,
    "MobileNetV5": _TABLE,
    "MobileNetV5Encoder": _TABLE,
    "NextViT": "its widths are fixed in its class",
    "SHViT": _STREAM,
}
