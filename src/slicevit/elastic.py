"""`ElasticModel`: one timm model that runs at every width of a grid.

Training puts views of the full parameters into a skeleton for the length of a call; inference binds the views to a
stock module (`subnet`); extraction copies them (`to_timm`). The forward code is always timm's, but for heads that
`compile_blocks` pads.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from timm.models._input import get_model_args
from torch import Tensor, nn

from slicevit import aligned, compiling, constructors, skeletons, subnet
from slicevit.families import AttnScale, Family, Heads, Layout, Scope, family_of
from slicevit.skeletons import Links, Skeleton, Statistics
from slicevit.slicing import Plan
from slicevit.widths import FULL, End, Isolation, Width, WidthGrid

UNBUILDABLE = (ValueError, AssertionError, RuntimeError, ArithmeticError)  # of timm's classes at a width


@dataclass(frozen=True)
class SliceSettings:
    """What a slice is, apart from its width. Each setting is ablated alone.

    layout: which channels of a structured axis a narrow width takes (DESIGN.md): per_head, per_projection, flat.
    isolation: which widths take trailing channels (paper section 3.1): smallest, b, c, off, mirror.
    attn_scale: 1/sqrt of the narrow head width (timm's), or of the full one (the published code's).
    norm_eps: the epsilon of every LayerNorm, or None for the model's own.
    heads: fixed head count with narrower heads, or whole heads dropped (scaled).
    scope: all axes scale with the width, or the hidden width of the MLPs alone (MatFormer).
    """

    layout: Layout = "per_head"
    isolation: Isolation = "smallest"
    attn_scale: AttnScale = "narrow"
    norm_eps: float | None = None
    heads: Heads = "fixed"
    scope: Scope = "all"

    def __post_init__(self) -> None:
        choices = {
            "layout": Layout,
            "isolation": Isolation,
            "attn_scale": AttnScale,
            "heads": Heads,
            "scope": Scope,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(allowed))}")


class ElasticModel(nn.Module):
    """A timm model and every narrower one in it.

    It behaves as the timm model that it was given: same parameter names, state dict, attributes and methods, and
    `forward`, `forward_features`, `forward_head` and `forward_intermediates` take a further `width`.

    Args:
        model: a timm model of a registered family.
        grid: the legal widths, a `WidthGrid` or "smallest:largest:step".
        model_args: what rebuilds the model at other widths, beyond what timm recorded: the keyword arguments of
            `timm.create_model`, or of the class for a model that was built from its class.
        family: how it is sliced, where that is not what is registered for its class.
        settings: the fields of `SliceSettings`.

    Attributes:
        label_names: the classes in the order of the logits, as a saved model has them; None where they are not known.

    Raises ValueError when the model cannot be sliced on this grid, with the reason and the nearest grid that works.
    """

    _full: nn.Module
    _given: dict[str, Any]  # what the constructor of the full model got, by name
    _statistics: dict[tuple[Fraction, End], Statistics]  # of narrow widths, by which channels they take

    def __init__(
        self,
        model: nn.Module,
        grid: WidthGrid | str,
        model_args: dict[str, Any] | None = None,
        family: Family | None = None,
        **settings: Any,
    ):
        super().__init__()
        self.__dict__.update(
            _full=model, _parameters=model._parameters, _buffers=model._buffers, _modules=model._modules
        )
        self.grid = WidthGrid.parse(grid)
        self.settings = SliceSettings(**settings)
        self.model_args = _recorded_args(model) | (model_args or {})
        self.label_names: list[str] | None = None
        self._family = family or family_of(model)
        self._replayed: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._checkpointing = False
        self._statistics = {}
        self._warned = False
        self._has_batch_norm = any(True for _ in skeletons.batch_norms(model))
        self._reset_caches()
        self.training = model.training
        self._set_eps(model)
        self._check_rebuild()
        self._check_grid()

    def _reset_caches(self) -> None:
        self.__dict__.update(_skeletons={}, _subnets={}, _lock=threading.RLock(), _compile_options=None)

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_skeletons", "_subnets", "_lock", "_compile_options", "_given")
        return {key: value for key, value in self.__dict__.items() if key not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_caches()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_full" not in self.__dict__ or name.startswith("__"):
                raise
            return getattr(self._full, name)

    # Widths

    def set_grid(self, grid: WidthGrid | str) -> None:
        """Run on another grid from now on (paper section 4.3, fast interpolation).

        Raises ValueError when the model cannot be sliced on it, and keeps the old grid.
        """
        old, self.grid = self.grid, WidthGrid.parse(grid)
        with self._lock:
            self._forget()
        try:
            self._check_grid()
        except ValueError:
            self.grid = old
            with self._lock:
                self._forget()
            raise

    @property
    def widths(self) -> tuple[Fraction, ...]:
        """The legal widths, narrowest first."""
        return tuple(self.grid)

    def width(self, value: Width | None) -> Fraction:
        """The legal width that `value` names; None is the full width. Raises ValueError for any other."""
        return FULL if value is None else self.grid.width(value, embed_dim=getattr(self._full, "embed_dim", None))

    # Running

    def forward(self, images: Tensor, width: Width | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) at `width` (default: full)."""
        return self._run("forward", width, images, *args, **kwargs)

    def forward_features(self, images: Tensor, width: Width | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """timm's unpooled features of images (B, C, H, W) at `width`; a ViT's are (B, N, width * embed_dim)."""
        return self._run("forward_features", width, images, *args, **kwargs)

    def forward_head(self, features: Tensor, *args: Any, width: Width | None = None, **kwargs: Any) -> Tensor:
        """Logits (B, K) of the features that `forward_features` gave at the same `width`."""
        return self._run("forward_head", width, features, *args, **kwargs)

    def forward_intermediates(self, images: Tensor, *args: Any, width: Width | None = None, **kwargs: Any) -> Any:
        """timm's intermediate feature maps of images (B, C, H, W) at `width`."""
        return self._run("forward_intermediates", width, images, *args, **kwargs)

    def _run(self, method: str, width: Width | None, *args: Any, **kwargs: Any) -> Any:
        legal = self.width(width)
        self._forget_if_trained()
        if legal == FULL:
            call = self._full if method == "forward" else getattr(self._full, method)
            return call(*args, **kwargs)
        skeleton = self.skeleton(legal)
        with skeleton.lock:
            links = self._fill(skeleton, legal)
            try:
                return (skeleton.module if method == "forward" else getattr(skeleton.module, method))(*args, **kwargs)
            finally:
                if not self._checkpointing:  # which runs the blocks again in the backward pass
                    links.empty()

    def _fill(self, skeleton: Skeleton, width: Fraction, leaves: bool = False) -> Links:
        self._warn_if_uncalibrated(width)
        try:
            links = skeleton.linked(self._full, self.statistics(width))
            links.match_modes()
            links.fill(leaves)
        except (AttributeError, KeyError, ValueError) as error:
            raise RuntimeError(
                f"the model was changed since it became elastic ({error}): change its head or input size through "
                "reset_classifier and set_input_size of the ElasticModel"
            ) from None
        return links

    @contextmanager
    def backward_at(self, width: Width) -> Iterator[nn.Module]:
        """The stock module at `width` for one forward and backward pass of a training step.

        Within the block call the module on images (B, C, H, W) and run backward; at its end the gradients are added
        to those of the full parameters. They are what autograd through `forward` gives, without a full-size
        gradient for every width. Hooks on parameters do not see them. Raises ValueError for an illegal width.
        """
        legal = self.width(width)
        self._forget_if_trained()
        if legal == FULL:
            yield self._full
            return
        skeleton = self.skeleton(legal)
        with skeleton.lock:
            links = self._fill(skeleton, legal, leaves=True)
            try:
                yield skeleton.module
                links.add_gradients()
            finally:
                links.empty()

    # BatchNorm statistics

    @property
    def has_batch_norm(self) -> bool:
        """Whether the model has BatchNorms with running statistics, so that every width needs its own."""
        return self._has_batch_norm

    def statistics(self, width: Width) -> Statistics | None:
        """The BatchNorm statistics that a narrow `width` has of its own, or None; `slicevit.calibrate` makes them."""
        legal = self.width(width)
        return self._statistics.get((legal, self.grid.end(legal, self.settings.isolation)))

    def set_statistics(self, width: Width, statistics: Statistics) -> None:
        """Let `width` use `statistics` from now on. Raises ValueError at full width, whose are the model's buffers."""
        legal = self.width(width)
        if legal == FULL:
            raise ValueError("the statistics of the full width are the model's own buffers")
        self._statistics[legal, self.grid.end(legal, self.settings.isolation)] = statistics

    def forget_statistics(self) -> None:
        """Drop those of every narrow width, because the weights have changed; a pass in train mode does."""
        self._statistics.clear()

    def is_calibrated(self, width: Width) -> bool:
        """Whether the BatchNorm statistics that `width` runs on are its own, or it needs none."""
        return self.statistics(width) is not None or self.width(width) == FULL or not self.has_batch_norm

    def _forget_if_trained(self) -> None:
        if self._statistics and self.training and any(norm.training for _, norm in skeletons.batch_norms(self._full)):
            self.forget_statistics()

    def _warn_if_uncalibrated(self, width: Fraction) -> None:
        if not self._warned and not self.training and not self.is_calibrated(width):
            self._warned = True
            warnings.warn(
                f"width {width} has no BatchNorm statistics of its own and runs on a part of the full width's, which "
                "do not fit it: slicevit.calibrate(model, batches) gives every width its own",
                stacklevel=3,
            )

    def compile_blocks(self, **options: Any) -> None:
        """Compile every repeated block, once a width, at the first call or training step at that width.

        Calls and `backward_at` are compiled, on a CUDA device with the heads of narrower widths padded to a multiple
        of 8 channels (`slicevit.aligned`); `subnet` and `to_timm` give plain modules. `options` are those of
        torch.compile; a block that does not compile as a whole is an error unless `fullgraph=False` is given.
        """
        self._compile_options = {"fullgraph": True, "dynamic": False} | options
        self._compile(self._full)
        with self._lock:
            self._forget()

    def _compile(self, module: nn.Module) -> None:
        if self._compile_options is not None:
            compiling.allow_variants(len(self.widths))
            compiling.compile_blocks(module, **self._compile_options)

    # Narrow models

    def skeleton(self, width: Width) -> Skeleton:
        """The narrow stock module on `meta` at `width`, and the plan that fills it; built once."""
        legal = self.width(width)
        with self._lock:
            if legal not in self._skeletons:
                self._skeletons[legal] = self._build_skeleton(legal)
                if self._compile_options is not None:
                    aligned.align_heads(self._skeletons[legal].module)
                self._compile(self._skeletons[legal].module)
                skeletons.match_buffers(skeletons.paired_buffers(self._skeletons[legal].module, self._full))
            return self._skeletons[legal]

    def subnet(self, width: Width) -> nn.Module:
        """A stock timm module at `width` that shares this model's storage, for inference.

        Its parameters take no gradient. Structured axes are copied while bound. It follows changes of the weights,
        and refuses to answer after the head or input size changed or `release` was called. The same module is
        returned for the same width.
        """
        legal = self.width(width)
        self._warn_if_uncalibrated(legal)
        with self._lock:
            if legal not in self._subnets or not self._subnets[legal].fits:
                self._subnets[legal] = subnet.make_subnet(self, legal)
            return self._subnets[legal].bind()

    def release(self, width: Width | None = None) -> None:
        """Give back the memory of the subnet at `width`, or of all; `subnet` binds again."""
        with self._lock:
            for legal in list(self._subnets) if width is None else [self.width(width)]:
                if legal in self._subnets:
                    self._subnets[legal].release()

    def to_timm(self, width: Width) -> nn.Module:
        """A stock timm module at `width` with a copy of its weights, trainable, in this model's train/eval mode."""
        legal = self.width(width)
        self._warn_if_uncalibrated(legal)
        skeleton = self._build_skeleton(legal)
        module = skeleton.module
        for mine, source, key, cut in skeletons.slots(module, self._full, skeleton.plan, self.statistics(legal)):
            copy = cut(source[key].detach()).clone(memory_format=torch.contiguous_format)
            mine[key] = nn.Parameter(copy) if isinstance(source[key], nn.Parameter) else copy
        skeletons.match_modes(module, self._full)
        skeletons.renew(skeletons.keepers(module))
        return module

    def arguments(self, width: Width) -> dict[str, Any]:
        """The keyword arguments by which the stock model at `width` differs from the full one.

        Raises ValueError where a count of channels or heads is not whole.
        """
        legal = self.width(width)
        return {} if legal == FULL else self._narrow_arguments(legal)

    def factory_arguments(self, width: Width) -> dict[str, Any]:
        """`arguments`, for `timm.create_model`. Raises ValueError when its entry point does not take them."""
        arguments = self.arguments(width)
        try:
            skeletons.build_on_meta(partial(_constructor(self._full), **(self.model_args | arguments)))
        except TypeError:
            name = getattr(self._full, "pretrained_cfg", {}).get("architecture") or type(self._full).__name__
            raise ValueError(
                f"timm.create_model makes no {name} of another width (it takes no {', '.join(arguments)}), so that a "
                "configuration of timm cannot describe width "
                f"{self.width(width)}: use to_timm, or export to another format such as onnx"
            ) from None
        return arguments

    def _narrow_arguments(self, width: Fraction) -> dict[str, Any]:
        if "_given" not in self.__dict__:  # a copy, or unpickled: what holds classes and functions did not travel
            skeletons.build_on_meta(partial(self._build, {}))
        given = partial(constructors.value_of, self._given)
        return self._family.arguments(self._full, given, width, self.settings.heads, self.settings.scope)

    def _build_skeleton(self, width: Fraction) -> Skeleton:
        module = skeletons.build_on_meta(partial(self._build, self.arguments(width)))
        known = self._skeletons.get(width)
        plan = known.plan if known else self._plan(module, width)
        skeletons.match_buffers(skeletons.paired_buffers(module, self._full))
        return Skeleton(module, plan)

    def _plan(self, narrow: nn.Module, width: Fraction) -> Plan:
        end = self.grid.end(width, self.settings.isolation)
        scale = "narrow" if width == FULL else self.settings.attn_scale
        return skeletons.plan_for(self._family, self._full, narrow, width, end, self.settings.layout, scale)

    def _build(self, arguments: dict[str, Any]) -> nn.Module:
        make = partial(_constructor(self._full), **self.model_args)
        module, given = constructors.construct(make, type(self._full), arguments)
        self.__dict__.setdefault("_given", given)
        for method, args, kwargs in self._replayed:
            getattr(module, method)(*args, **kwargs)
        self._set_eps(module)
        if hasattr(self._full, "pretrained_cfg"):
            module.pretrained_cfg = module.default_cfg = self._full.pretrained_cfg
        return module

    def _set_eps(self, module: nn.Module) -> None:
        if self.settings.norm_eps is not None:
            for layer in module.modules():
                if isinstance(layer, nn.LayerNorm):
                    layer.eps = self.settings.norm_eps

    # What a timm model does

    def _replay(self, method: str, *args: Any, **kwargs: Any) -> None:
        getattr(self._full, method)(*args, **kwargs)
        self._replayed.append((method, args, kwargs))
        self._set_eps(self._full)
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        for bound in self._subnets.values():
            bound.release()
        self._skeletons.clear()
        self._subnets.clear()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass, at every width."""
        self._replay("set_grad_checkpointing", enable)
        self._checkpointing = enable

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """A new head for `num_classes`, at every width. Subnets made before refuse to answer."""
        self._replay("reset_classifier", num_classes, *args, **kwargs)
        self.label_names = None

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """timm's change of image or patch size, at every width. Subnets made before refuse to answer."""
        self._replay("set_input_size", *args, **kwargs)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether a distilled model in train mode gives both heads' logits, at every width."""
        self._replay("set_distilled_training", enable)

    def train(self, mode: bool = True) -> ElasticModel:
        """Train or eval mode of the model at every width."""
        super().train(mode)
        self._full.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ElasticModel:
        super()._apply(fn, recurse)
        for buffers in (buffers for statistics in self._statistics.values() for buffers in statistics.values()):
            buffers.update({key: None if buffer is None else fn(buffer) for key, buffer in buffers.items()})
        for skeleton in self._skeletons.values():
            skeletons.match_buffers(skeletons.paired_buffers(skeleton.module, self._full))
        return self

    # Checks at construction

    def _check_rebuild(self) -> None:
        def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
            return {name: tuple(tensor.shape) for name, tensor in skeletons.persistent(module).items()}

        try:
            rebuilt = skeletons.build_on_meta(partial(self._build, {}))
        except TypeError as error:
            raise ValueError(f"model_args do not build a {type(self._full).__name__}: {error}") from None
        mine, theirs = shapes(self._full), shapes(rebuilt)
        if mine != theirs:
            odd = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            raise ValueError(
                f"model_args={self.model_args} do not rebuild this model: {', '.join(odd[:3])} come out otherwise; "
                "give the keyword arguments that the model was created with"
            )

    def _check_grid(self) -> None:
        for width in self.grid:
            try:
                self.skeleton(width)
            except UNBUILDABLE as error:
                name = getattr(self._full, "pretrained_cfg", {}).get("architecture") or type(self._full).__name__
                works = self._nearest_grid()
                advice = f"the nearest grid that works is {works}" if works else "no grid works for this model"
                raise ValueError(
                    f"{name} cannot be sliced on the grid {self.grid}: at width {width}, {error}; {advice}"
                ) from None

    def _nearest_grid(self) -> WidthGrid | None:
        known: dict[Fraction, bool] = {FULL: True}

        def works(width: Fraction) -> bool:
            if width not in known:
                try:
                    self._build_skeleton(width)
                    known[width] = True
                except UNBUILDABLE:
                    known[width] = False
            return known[width]

        asked = self.grid
        try:
            for grid in asked.neighbours():
                self.grid = grid
                if all(works(width) for width in grid):
                    return grid
        finally:
            self.grid = asked
        return None

    # Saving and loading, in checkpoint.py

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and a model card; see `slicevit.checkpoint.save_pretrained`."""
        from slicevit import checkpoint

        checkpoint.save_pretrained(self, folder)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub; returns the commit's address."""
        from slicevit import checkpoint

        return checkpoint.push_to_hub(self, repo_id, **kwargs)


def _recorded_args(model: nn.Module) -> dict[str, Any]:
    """The keyword arguments that timm's factory recorded, with later changes of head and input size."""
    return dict(model._model_args) | get_model_args(model) if hasattr(model, "_model_args") else {}  # type: ignore[arg-type]


def _constructor(model: nn.Module) -> Callable[..., nn.Module]:
    architecture = getattr(model, "pretrained_cfg", None) and model.pretrained_cfg.get("architecture")  # type: ignore[union-attr, operator]
    if architecture and timm.is_model(architecture):
        return partial(timm.create_model, architecture, pretrained=False)
    return type(model)


def create_model(
    name: str, grid: WidthGrid | str = "1/4:1:1/16", pretrained: bool = False, **kwargs: Any
) -> ElasticModel:
    """`timm.create_model` with a grid of widths.

    Args:
        name: any timm model name of a registered family; `local-dir:` and `hf-hub:` work as in timm.
        grid: "smallest:largest:step"; the default is the paper's, X = 13 widths.
        pretrained: load timm's weights into the full width.
        kwargs: the fields of `SliceSettings`, and timm's own keyword arguments.

    Raises ValueError for an unknown model, and when the model cannot be sliced on this grid.
    """
    grid = WidthGrid.parse(grid)
    settings = {field.name: kwargs.pop(field.name) for field in fields(SliceSettings) if field.name in kwargs}
    SliceSettings(**settings)
    if kwargs.get("features_only"):
        raise ValueError("features_only has no width: call forward_intermediates(images, width=...) of the model")
    try:
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:4])
        raise ValueError(
            f"unknown model {name!r}: timm has no such model" + (f"; near it: {close}" if close else "")
        ) from None
    return ElasticModel(model, grid, **settings)
