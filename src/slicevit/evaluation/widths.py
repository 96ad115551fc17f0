"""Every width of an elastic model as one row: accuracy, costs and latency."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from slicevit.costs import model_input_size, width_costs
from slicevit.data import TransformConfig
from slicevit.elastic import ElasticModel
from slicevit.evaluation.accuracy import Accuracy, Predictor, evaluate
from slicevit.evaluation.latency import measure_latency
from slicevit.evaluation.results import WidthResult
from slicevit.merging import MergedTokens
from slicevit.widths import FULL, WidthGrid, parse_fraction


def predictors(model: ElasticModel, widths: Iterable[Fraction], merged: int = 0) -> dict[str, Predictor]:
    """One bound stock module a width, named "1/4" and so on; `model.release()` gives their memory back.

    With `merged` each merges so many pairs of tokens in every block. Raises ValueError for a model that cannot.
    """
    subnets = {str(width): model.subnet(width) for width in widths}
    if not merged:
        return dict(subnets)
    try:
        return {name: MergedTokens(subnet, merged) for name, subnet in subnets.items()}
    except ValueError as error:
        raise ValueError(f"--merged {merged}: {error}") from None


def measure_accuracy(
    model: ElasticModel,
    widths: Sequence[Fraction],
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int], None] | None = None,
    merged: int = 0,
) -> dict[str, Accuracy]:
    """Accuracy of every width, in one pass over `batches` of images (B, C, H, W) and classes (B,)."""
    device = next(model.parameters()).device
    try:
        return evaluate(predictors(model, widths, merged), batches, device, model.num_classes, progress)
    finally:
        model.release()


def measure_widths_latency(
    model: ElasticModel, widths: Sequence[Fraction], seconds: float, merged: int = 0
) -> dict[str, float]:
    """Median milliseconds of one image at every width, the widths taken in turns."""
    device = next(model.parameters()).device
    image_1CHW = torch.zeros(1, *model_input_size(model), device=device)
    try:
        with torch.inference_mode():
            calls = {name: partial(call, image_1CHW) for name, call in predictors(model, widths, merged).items()}
            return measure_latency(calls, seconds=seconds, device=device)
    finally:
        model.release()


def merged_macs(model: ElasticModel, width: str, merged: int) -> int:
    """Multiply-accumulates of one image where so many pairs of tokens are merged in every block."""
    image_1CHW = torch.zeros(1, *model_input_size(model), device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        MergedTokens(model.subnet(width), merged)(image_1CHW)
    return counter.get_total_flops() // 2


def result_rows(
    model: ElasticModel,
    accuracy: Mapping[str, Accuracy],
    latency: Mapping[str, float],
    transform: TransformConfig,
    method: str,
    trained: Iterable[Fraction],
    merged: int = 0,
) -> list[WidthResult]:
    """The rows of results.csv, narrowest first; `trained` are the widths that training visited."""
    visited = set(trained)
    rows = []
    for name, scores in accuracy.items():
        costs = width_costs(model, name)
        rows.append(
            WidthResult(
                model=model.pretrained_cfg.get("architecture", ""),
                method=method,
                width=name,
                trained=Fraction(name) in visited,
                channels=costs.channels,
                top1=scores.top1,
                top1_err=100 - scores.top1,
                top5=scores.top5,
                top5_err=100 - scores.top5,
                loss=scores.loss,
                param_count=costs.params / 1e6,
                gmacs=(merged_macs(model, name, merged) if merged else costs.macs) / 1e9,
                latency_ms=latency.get(name),
                img_size=transform.img_size[1],
                crop_pct=transform.crop_pct,
                interpolation=transform.interpolation,
                images=scores.images,
            )
        )
    return sorted(rows, key=lambda row: Fraction(row.width))


def asked_width(model: ElasticModel, text: str) -> Fraction:
    """The width that `text` names, which the grid need not hold. Raises ValueError when it cannot be cut."""
    grid = model.grid
    try:
        asked = parse_fraction(text)
        if asked in grid or not grid.smallest < asked < FULL:
            return model.width(asked)
    except ValueError as error:
        raise ValueError(f"--width {text}: {error}") from None
    step = _common_step(asked - grid.smallest, FULL - grid.smallest)
    try:
        model.set_grid(WidthGrid(grid.smallest, FULL, step))
    except ValueError:
        legal = ", ".join(map(str, grid))
        raise ValueError(
            f"--width {text} is no width that this model can be cut to; trained widths are {legal}"
        ) from None
    return model.width(asked)


def _common_step(a: Fraction, b: Fraction) -> Fraction:
    """The largest fraction of which both are whole multiples."""
    while b:
        a, b = b, a % b
    return a
