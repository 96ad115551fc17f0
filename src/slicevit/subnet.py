"""Bound subnets: a stock timm module whose parameters are views of an `ElasticModel`'s, for inference."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slicevit import skeletons
from slicevit.slicing import Cut

if TYPE_CHECKING:
    from slicevit.elastic import ElasticModel

_METHODS = ("forward", "forward_features", "forward_head", "forward_intermediates")


class _Slot:
    """One parameter or saved buffer of a subnet, and where its values come from."""

    def __init__(self, cut: Cut, source: dict[str, Any], mine: dict[str, Any], key: str):
        self.cut, self.source, self.mine, self.key = cut, source, mine, key
        self.shares = False
        self.seen: tuple[int, int, int, int] | None = None
        self._probe: Callable[[], int] | None = None

    def stamp(self) -> tuple[int, int, int, int]:
        """Changes whenever what is bound no longer holds the source's values.

        A write through `.data` leaves no trace in the version; on a CPU one element of the source tells of it.
        """
        tensor = self.source[self.key]
        version = 0 if self.shares else tensor._version
        return id(tensor), tensor.data_ptr(), version, self._probe() if self._probe is not None else 0

    @torch.inference_mode(False)
    def fill(self) -> None:
        source = self.source[self.key].detach()
        narrow = self.cut(source)
        self.shares = narrow.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        self.mine[self.key] = nn.Parameter(narrow, requires_grad=False) if self.is_parameter else narrow
        self._probe = None if self.shares or source.device.type != "cpu" else _element(source)
        self.seen = self.stamp()

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.source[self.key], nn.Parameter)


def _element(tensor: Tensor) -> Callable[[], int]:
    """Reads the bits of the middle element of a CPU tensor, as it is when called."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    middle = tensor.reshape(-1)[tensor.numel() // 2 :][:1]
    return middle.view(bits).numpy().item


class Binding:
    """Keeps a subnet's parameters equal to its source's."""

    def __init__(self, model: ElasticModel, width: Fraction, module: nn.Module, slots: list[_Slot]):
        self.model, self.width, self.module, self.slots = model, width, module, slots
        self.bound = False
        self._tree = [
            (owner._modules, key, child) for owner in model._full.modules() for key, child in owner._modules.items()
        ]

    @property
    def fits(self) -> bool:
        """Whether the full model still consists of the modules that this subnet was made from."""
        return all(modules.get(key) is child for modules, key, child in self._tree)

    def bind(self) -> nn.Module:
        """Fill every slot that is not current, and give the module."""
        skeletons.match_buffers(self.module, self.model._full)
        self.bound = True
        self.refresh()
        return self.module

    def refresh(self) -> None:
        """Take over weights that changed since. Raises RuntimeError when the subnet was released."""
        if not self.bound or not self.fits:
            raise RuntimeError(
                f"this subnet was released, or a part of the model was replaced since it was made: "
                f"call subnet('{self.width}') again"
            )
        moved = False
        for slot in self.slots:
            if slot.seen != slot.stamp():
                moved = moved or slot.seen is None or slot.seen[1] != slot.source[slot.key].data_ptr()
                slot.fill()
        if moved:
            skeletons.match_buffers(self.module, self.model._full)

    def release(self) -> None:
        """Drop every view and copy; the module's parameters are on `meta` again."""
        self.bound = False
        for slot in self.slots:
            tensor = slot.mine[slot.key].to("meta")
            slot.mine[slot.key] = nn.Parameter(tensor, requires_grad=False) if slot.is_parameter else tensor
            slot.seen = slot._probe = None

    def copy(self) -> nn.Module:
        """A stock module of this width with its own weights, in the subnet's mode."""
        return self.model.to_timm(self.width).train(self.module.training)


def _itself(module: nn.Module) -> nn.Module:
    return module


class _Bound:
    """What a subnet does besides its stock class: never answer with stale weights, save its own size only."""

    _binding: Binding

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self._binding.refresh()
        state = super().state_dict(*args, **kwargs)  # type: ignore[misc]
        for name, tensor in state.items():
            state[name] = tensor.clone(memory_format=torch.contiguous_format)
        return state

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (self._binding.copy(),)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise RuntimeError(
            "a subnet shares its model's storage: move or cast the ElasticModel, or take a copy with to_timm"
        )


def _refreshing(method: str) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self._binding.refresh()
        return getattr(super(type(self), self), method)(*args, **kwargs)

    call.__name__ = method
    return call


def make_subnet(model: ElasticModel, width: Fraction) -> Binding:
    """An unbound subnet of `model` at `width`, in eval mode."""
    skeleton = model._build_skeleton(width)
    module, full = skeleton.module, model._full
    slots = []
    for prefix, owner in module.named_modules():
        theirs = full.get_submodule(prefix)
        for mine, source in ((owner._parameters, theirs._parameters), (owner._buffers, theirs._buffers)):
            for key in mine:
                name = f"{prefix}.{key}" if prefix else key
                if name in skeleton.plan:
                    slots.append(_Slot(skeleton.plan[name], source, mine, key))
    stock = type(module)
    methods = {name: _refreshing(name) for name in _METHODS if hasattr(stock, name)}
    module.__class__ = type(stock.__name__, (_Bound, stock), methods)
    binding = Binding(model, width, module, slots)
    module.__dict__["_binding"] = binding
    module.eval()
    return binding
