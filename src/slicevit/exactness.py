"""Proofs of a family on a small model: a slice is a stock model to the bit, and it is the right slice.

The second cannot be seen from a slice by itself: an axis that is cut through its heads still runs and still trains. So
a narrow model is written into a full one that is zero everywhere else. If every axis is cut where timm's code divides
it, the full model then computes what the narrow one does: zeros stay zeros, and add nothing. What counts its channels
(a norm's mean, a softmax over channels, the attention's scale, rotary bands) acts on each channel alone meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from fractions import Fraction
from itertools import product
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slicevit import constructors, skeletons
from slicevit.elastic import UNBUILDABLE, ElasticModel
from slicevit.widths import FULL, WidthGrid

_DEPTHS = (
    *("depth", "depths", "num_blocks", "depth_list", "serial_depths", "parallel_depth", "depth_token_only"),
    "transformer_depths",
    *("stages", "layers"),
)
_DEEPEST = (2, 99)  # blocks of a stage: two, for some alternate; in iFormer they come in groups
_SCALES = (Fraction(1, 16), Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), FULL)
_GRIDS = ("1/4:1:1/4", "1/2:1:1/2")
_CLASSES = 7
_NARROWEST = 24  # channels; with fewer, a matrix product of a view may round otherwise than that of a copy


def small_model(name: str, seed: int = 0, grid: str | None = None) -> tuple[ElasticModel, Tensor]:
    """A model of timm's architecture `name`, shrunken in width, depth and image, and two images (2, C, H, W) for it.

    Its constructor's arguments are those of `name`, with depths of 2 (or its own), the smallest image of 64, 96, 128
    or 224 pixels and its own, and channels by the family's own rule, as narrow as can be on a grid of quarters or else
    of halves. Where neither goes, it keeps its channels, and has the smallest and the full width of `grid`. Its weights
    are random, none of them idle.

    Raises ValueError when the architecture belongs to no family, or cannot be sliced.
    """
    full = ElasticModel(skeletons.build_on_meta(lambda: timm.create_model(name)), "1:1:1")
    given, kind = full._given, type(full._full)
    known = given.keys() | (vars(given["cfg"]).keys() if "cfg" in given else set())
    classes = {"num_classes": _CLASSES} if "num_classes" in known else {}
    own = full.pretrained_cfg["input_size"]
    problem, runs = "no width of it can be halved", False
    tried = list(product(_DEEPEST, map(WidthGrid.parse, _GRIDS), _SCALES))
    if grid is not None:
        smallest = WidthGrid.parse(grid).smallest
        tried.append((_DEEPEST[0], WidthGrid(smallest, FULL, FULL - smallest), FULL))
    for deepest, widths, scale in tried:
        try:
            narrow = full._narrow_arguments(scale)
            full._narrow_arguments(scale * widths.smallest)
        except ValueError as error:
            problem = str(error)
            continue
        if (runs and deepest > _DEEPEST[0]) or (scale < 1 and min(_numbers(narrow), default=_NARROWEST) < _NARROWEST):
            continue
        for pixels in sorted({64, 96, 128, 224, own[-1]}):
            size = {"img_size": pixels} if given.get("img_size") else {}
            depths = {key: _shallow(constructors.value_of(given, key), deepest) for key in _DEPTHS if key in known}
            arguments = constructors.changed(given, depths | classes | size | narrow)
            images = torch.randn(2, own[0], pixels, pixels, generator=torch.Generator().manual_seed(seed))
            try:
                module = skeletons.build_on_meta(lambda arguments=arguments: kind(**constructors.copy_of(arguments)))  # type: ignore[misc]
                deepcopy(module).to("meta").eval()(images.to("meta"))
            except UNBUILDABLE as error:
                problem = str(error)
                continue
            runs = runs or deepest == _DEEPEST[0]
            try:
                model = ElasticModel(skeletons.materialise(module), "1:1:1", model_args=arguments).eval()
                model.grid = widths  # set_grid would look for another one, which takes long
                for width in model.widths:
                    model.skeleton(width)
            except UNBUILDABLE as error:
                problem = str(error)
                break
            fill(model, seed)
            for width in model.widths[:-1]:
                model.set_statistics(width, _random_statistics(model.skeleton(width).module, seed))
            return model, images
    raise ValueError(f"{name} has no small model: {problem}")


def prove(name: str, grid: str | None = None) -> str | None:
    """Both proofs on a small model of timm's architecture `name`, on `grid` if need be: what is wrong, or None."""
    try:
        model, images = small_model(name, grid=grid)
    except ValueError as error:
        return str(error)
    return stock_difference(model, images) or structure_difference(model, images)


def _numbers(value: Any) -> Iterator[int]:
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ():
        yield from _numbers(part)
    if isinstance(value, int):
        yield value


def _shallow(value: Any, deepest: int) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_shallow(part, deepest) for part in value)
    return min(int(value), deepest)


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter and statistic of `module` small random values; none stays zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in skeletons.persistent(module).items():
        if tensor.is_floating_point():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 4
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / max(1, fan_in) ** 0.5)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)


def _random_statistics(narrow: nn.Module, seed: int) -> skeletons.Statistics:
    statistics = skeletons.statistics_of(narrow)
    generator = torch.Generator().manual_seed(seed)
    for buffers in statistics.values():
        for key, size in (("running_mean", 0.5), ("running_var", 0.1)):
            buffers[key] = size * torch.randn(buffers[key].shape, generator=generator)  # type: ignore[union-attr]
        buffers["running_var"] = buffers["running_var"].abs() + 0.5  # type: ignore[union-attr]
    return statistics


def _stock(model: ElasticModel, changes: dict[str, Any]) -> nn.Module:
    """timm's own model, in eval mode and not initialised."""
    arguments = constructors.changed(model._given, changes)
    return skeletons.materialise(
        skeletons.build_on_meta(lambda: type(model._full)(**constructors.copy_of(arguments)))
    ).eval()


def outputs(result: Any) -> list[Tensor]:
    """The tensors of a model's result."""
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in outputs(part)]


@torch.no_grad()
def stock_difference(model: ElasticModel, images: Tensor) -> str | None:
    """Where a slice of `model` (in eval mode) is not timm's model of that width with the same weights, to the bit.

    `model` takes no gradients afterwards: torch has other kernels for weights that do.
    """
    model.requires_grad_(False)
    for width in model.widths:
        alone = model.to_timm(width).eval().requires_grad_(False)
        stock = _stock(model, model.arguments(width)).requires_grad_(False)
        stock.load_state_dict(alone.state_dict(), strict=True)
        expected = outputs(stock(images))
        if not all(torch.isfinite(tensor).all() for tensor in expected):
            return f"at width {width}, timm's model gives no finite numbers"
        ways: dict[str, Callable[[], Any]] = {
            "the call": lambda width=width: model(images, width=width),  # type: ignore[misc]
            "the subnet": lambda width=width: model.subnet(width)(images),  # type: ignore[misc]
            "to_timm": lambda alone=alone: alone(images),  # type: ignore[misc]
        }
        for way, run in ways.items():
            if not all(map(torch.equal, outputs(run()), expected)):
                return f"at width {width}, {way} is not timm's model with the same weights"
    return None


@torch.no_grad()
def structure_difference(model: ElasticModel, images: Tensor, tolerance: float = 1e-3) -> str | None:
    """Where the slices of `model` cut through the structure of an axis, found by zeros around a narrow model.

    tolerance: of the largest difference, relative to the largest output.
    """
    for width in model.widths[:-1]:
        plan = model.skeleton(width).plan
        narrow = model.to_timm(width).eval()
        wide = _stock(model, {})
        fill(narrow, seed=1)
        small, big = skeletons.persistent(narrow), skeletons.persistent(wide)
        for name, cut in plan.items():
            if big[name].is_floating_point():
                for window, part in zip(cut.windows(big[name].zero_()), cut.parts_of(small[name]), strict=True):
                    window.copy_(part.reshape(window.shape))
        separate_channels(narrow)
        separate_channels(wide)
        with _SeparateSoftmax():
            expected, got = outputs(narrow(images)), outputs(wide(images))
        for mine, theirs in zip(expected, got, strict=True):
            trailing = model.grid.end(width, model.settings.isolation) == "trailing"
            missing = theirs.shape[-1] - mine.shape[-1]
            theirs = theirs.narrow(-1, missing if trailing else 0, mine.shape[-1])
            mine, theirs = mine / mine.abs().max(), theirs / theirs.abs().max()  # Gemma multiplies by its width
            if not torch.allclose(mine, theirs, rtol=0, atol=tolerance):
                return f"at width {width}, an axis is cut through its structure: zeros around the slice change it"
    return None


def separate_channels(module: nn.Module) -> None:
    """Let every norm of `module` act on each channel alone, and every attention scale and rotation do nothing."""
    layer: Any
    for layer in module.modules():
        kind = type(layer).__name__
        if isinstance(layer, (nn.LayerNorm, nn.GroupNorm)) or kind.startswith(("RmsNorm", "SimpleNorm")):
            layer.forward = _Affine(layer, isinstance(layer, nn.GroupNorm) or "2d" in kind)
        if kind == "GlobalResponseNorm":
            layer.forward = _Affine(layer, layer.channel_dim == 1)
        if isinstance(getattr(layer, "scale", None), float):
            layer.scale = 1.0
        if hasattr(layer, "get_embed"):
            layer.get_embed = _NoRotation(layer.get_embed)
        elif "Rotary" in kind:
            layer.forward = _NoRotationApart(layer.forward)


class _Affine:
    def __init__(self, norm: Any, in_front: bool):
        self.norm, self.in_front = norm, in_front

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.norm.weight, getattr(self.norm, "bias", None)
        shape = (-1, *(1,) * (x.ndim - 2)) if self.in_front else (-1,)
        x = x.tanh() if weight is None else x.tanh() * weight.view(shape)
        return x if bias is None else x + bias.view(shape)


class _NoRotation:
    """Rotary tables (sine and cosine side by side) of angle zero."""

    def __init__(self, get_embed: Callable[..., Any]):
        self.get_embed = get_embed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        table = self.get_embed(*args, **kwargs)
        if not isinstance(table, Tensor):
            return type(table)(map(self._still, table))
        return self._still(table)

    @staticmethod
    def _still(table: Tensor) -> Tensor:
        sine, cosine = table.chunk(2, -1)
        return torch.cat((torch.zeros_like(sine), torch.ones_like(cosine)), -1)


class _NoRotationApart:
    """A pair of rotary tables, cosine and sine, of angle zero."""

    def __init__(self, forward: Callable[..., tuple[Tensor, Tensor]]):
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cosine, sine = self.forward(*args, **kwargs)
        return torch.ones_like(cosine), torch.zeros_like(sine)


class _SeparateSoftmax(TorchFunctionMode):
    """A softmax is an arctangent of each element, which keeps zeros; so it is within attention.

    A mean is a sum, and so is a maximum.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "softmax":
            return args[0].atan()
        if name in ("mean", "amax"):
            return 0.01 * args[0].sum(*args[1:], **kwargs)
        if name == "scaled_dot_product_attention":
            query, key, value = args
            scores = query @ key.transpose(-2, -1)
            mask = kwargs.get("attn_mask")
            return (scores if mask is None or mask.dtype == torch.bool else scores + mask).atan() @ value
        return func(*args, **kwargs)
