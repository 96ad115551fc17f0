"""Bound subnets: a stock timm module whose parameters are views of an `ElasticModel`'s, for inference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from operator import eq
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slicevit import skeletons
from slicevit.slicing import Cut

if TYPE_CHECKING:
    from slicevit.elastic import ElasticModel

_METHODS = ("forward", "forward_features", "forward_head", "forward_intermediates")


@dataclass
class _Slot:
    """One parameter or saved buffer of a subnet, and where its values come from."""

    cut: Cut
    source: dict[str, Any]
    mine: dict[str, Any]
    key: str
    shares: bool = False

    def fill(self) -> None:
        source = self.source[self.key].detach()
        narrow = self.cut(source)
        self.shares = 0 <= narrow.data_ptr() - source.data_ptr() < source.nbytes
        self.put(narrow)

    def put(self, tensor: Tensor) -> None:
        is_parameter = isinstance(self.source[self.key], nn.Parameter)
        self.mine[self.key] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


class _Seen:
    """The full model's tensors as they were when a subnet took its values from them.

    Identity and address tell of replaced tensors, the version of writes to those that were copied. A write through
    `.data` leaves no trace there; on a CPU the middle element of a copied tensor tells of it.
    """

    def __init__(self, slots: list[_Slot]):
        self._stores = list({id(slot.source): slot.source for slot in slots}.values())
        self._kept = [dict(store) for store in self._stores]
        self._tensors = [slot.source[slot.key] for slot in slots]
        self._copied = [tensor for tensor, slot in zip(self._tensors, slots, strict=True) if not slot.shares]
        self._probes = [_element(tensor.detach()) for tensor in self._copied if tensor.device.type == "cpu"]
        self._pointers, self._state = self._now()

    def _now(self) -> tuple[list[int], list[int]]:
        versions = [tensor._version for tensor in self._copied]
        return list(map(Tensor.data_ptr, self._tensors)), versions + [probe() for probe in self._probes]

    def is_current(self) -> bool:
        """Whether every tensor is the same and holds the same values."""
        try:  # two dictionaries of the same tensors are equal without looking at the tensors
            same = all(map(eq, self._stores, self._kept))
        except RuntimeError:  # other tensors: torch compares their elements, which has no single truth
            return False
        return same and self._now() == (self._pointers, self._state)


def _element(tensor: Tensor) -> Callable[[], int]:
    """Reads the bits of the middle element of a CPU tensor, as it is when called."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    middle = tensor.reshape(-1)[tensor.numel() // 2 :][:1]
    return middle.view(bits).numpy().item


class Binding:
    """Keeps a subnet's parameters equal to its source's."""

    def __init__(self, model: ElasticModel, width: Fraction, module: nn.Module, slots: list[_Slot]):
        self.model, self.width, self.module, self.slots = model, width, module, slots
        self._buffers = list(skeletons.paired_buffers(module, model._full))
        self._keepers = skeletons.keepers(module)
        self._children = [owner._modules for owner in model._full.modules() if owner._modules]
        self._kept = [dict(children) for children in self._children]
        self._statistics = model.statistics(width)
        self._seen: _Seen | None = None

    @property
    def fits(self) -> bool:
        """Whether the full model still has the modules and statistics that this subnet was made from."""
        return self.model.statistics(self.width) is self._statistics and all(map(eq, self._children, self._kept))

    def bind(self) -> nn.Module:
        """Fill the module's parameters if that was not done yet (a call refreshes them), and give the module."""
        if self._seen is None:
            self._fill()
        return self.module

    def refresh(self) -> None:
        """Take over weights that changed since. Raises RuntimeError when the subnet was released."""
        if self._seen is None or not self.fits:
            raise RuntimeError(
                f"this subnet was released, or a part of the model or its statistics were replaced since it was made: "
                f"call subnet('{self.width}') again"
            )
        if not self._seen.is_current():
            self._fill()

    @torch.inference_mode(False)
    def _fill(self) -> None:
        for slot in self.slots:
            slot.fill()
        skeletons.renew(self._keepers)
        self._seen = _Seen(self.slots)
        skeletons.match_buffers(self._buffers)

    def release(self) -> None:
        """Drop every view and copy; the module's parameters are on `meta` again."""
        self._seen = None
        for slot in self.slots:
            slot.put(slot.mine[slot.key].to("meta"))

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

    def train(self, mode: bool = True) -> Any:
        return super().train(False) if not mode else self._refuse()  # type: ignore[misc]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        return self if not requires_grad else self._refuse()

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "a subnet shares its model's storage and is for inference: change, move, cast or train the ElasticModel, "
            "or take a copy with to_timm"
        )

    _apply = load_state_dict = reset_classifier = set_input_size = set_grad_checkpointing = _refuse


@torch.compiler.disable
def _refresh(subnet: Any) -> None:
    subnet._binding.refresh()


def refresh(module: nn.Module) -> None:
    """Before parts of a subnet are called by themselves: take over weights that changed; of other modules, nothing.

    Raises RuntimeError when the subnet was released.
    """
    if isinstance(module, _Bound) and not torch.compiler.is_exporting():
        _refresh(module)


def _refreshing(method: str) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        refresh(self)
        return getattr(super(type(self), self), method)(*args, **kwargs)

    call.__name__ = method
    return call


def make_subnet(model: ElasticModel, width: Fraction) -> Binding:
    """An unbound subnet of `model` at `width`, in eval mode."""
    skeleton = model._build_skeleton(width)
    module, full = skeleton.module, model._full
    places = skeletons.slots(module, full, skeleton.plan, model.statistics(width))
    slots = [_Slot(cut, source, mine, key) for mine, source, key, cut in places]
    stock = type(module)
    methods = {name: _refreshing(name) for name in _METHODS if hasattr(stock, name)}
    module.__class__ = type(stock.__name__, (_Bound, stock), methods)
    binding = Binding(model, width, module, slots)
    module.__dict__["_binding"] = binding
    module.eval()
    return binding
