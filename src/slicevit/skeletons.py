"""Skeletons: stock timm modules of a narrow width that hold no weights of their own.

A skeleton's parameters live on the `meta` device, its buffers are real (Swin's and EVA-02's tables are built, not
saved). By its shapes alone it says which axes shrink, and to what.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from slicevit.families import AttnScale, Family, Layout, slicing_rules
from slicevit.slicing import Cut, Plan, make_plan, same_names, uncut
from slicevit.widths import End

Buffers = dict[str, Tensor | None]
Statistics = dict[str, Buffers]  # the running statistics of every BatchNorm, by its name in the model


@dataclass
class Skeleton:
    """A narrow module on `meta` with the plan that fills it; `lock` guards its parameters while they are swapped.

    `costs` is the memory of `costs.width_costs`, by the size of the image.
    """

    module: nn.Module
    plan: Plan
    lock: Any = field(default_factory=threading.Lock)
    links: Links | None = None
    costs: dict[tuple[int, int, int], Any] = field(default_factory=dict)

    def linked(self, full: nn.Module, statistics: Statistics | None) -> Links:
        """The links to `full` and `statistics`, made again when its submodules were changed, or these are others."""
        if self.links is None or self.links.statistics is not statistics or not self.links.current():
            self.links = Links(self.module, full, self.plan, statistics)
        return self.links


class Links:
    """The submodules of a narrow module beside their namesakes in the full one, walked once and kept.

    `statistics` are those of the width, which its BatchNorms read and, in train mode, write. Without them they read
    the full model's and write nowhere.

    Raises ValueError when the two have other submodules, and KeyError when a parameter is gone.
    """

    def __init__(self, module: nn.Module, full: nn.Module, plan: Plan, statistics: Statistics | None = None):
        self.statistics = statistics
        self.modules = list(zip(module.modules(), full.modules(), strict=True))
        self._children = [(theirs._modules, dict(theirs._modules)) for _, theirs in self.modules if theirs._modules]
        own = {id(buffers) for buffers in (statistics or {}).values()}
        borrowing = {id(norm._buffers): norm for _, norm in batch_norms(module)}
        self._slots = [
            (store, source, key, cut, store[key], None if id(source) in own else borrowing.get(id(store)))
            for store, source, key, cut in slots(module, full, plan, statistics)
        ]
        self._keepers = keepers(module)

    def current(self) -> bool:
        """Whether the full model still has the submodules that it had."""
        return all(now == then for now, then in self._children)

    def match_modes(self) -> None:
        """Give every submodule the train/eval mode of its namesake, frozen parts included."""
        for mine, theirs in self.modules:
            if mine.training is not theirs.training:
                mine.training = theirs.training

    def fill(self, leaves: bool = False) -> None:
        """Put views of the full parameters in place of the narrow module's own.

        With `leaves` they end autograd: their gradients stay narrow, for `add_gradients` to take. They are made
        contiguous, because a step multiplies with each three times.
        """
        for store, source, key, cut, _, borrower in self._slots:
            full = source[key]
            if leaves and isinstance(full, nn.Parameter):
                store[key] = cut(full.detach()).contiguous().requires_grad_(full.requires_grad)
            elif borrower is not None and borrower.training:
                store[key] = cut(full).clone()
            else:
                store[key] = cut(full)
        renew(self._keepers)

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the gradients of the leaves to those of the full parameters."""
        pairs = [
            pair
            for store, source, key, cut, _, _ in self._slots
            if store[key].grad is not None
            for pair in cut.gradients(source[key], store[key].grad)
        ]
        if pairs:
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))

    def empty(self) -> None:
        """Put the narrow module's own parameters back, so that it holds on to nothing."""
        for store, _, key, _, own, _ in self._slots:
            store[key] = own


class _NoInitialisation(TorchFunctionMode):
    """Parameters are made but not filled, and no random number is drawn. Holds for the current thread alone.

    Parameters say that they are on `meta`, where they will be: `trunc_normal_` of torch lets those alone, but redraws
    others until all lie within its bounds, which what uninitialised memory holds may never do.
    """

    IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]
    RANDOM = frozenset({"uniform_", "normal_", "erfinv_", "bernoulli_", "exponential_"})
    CONSTANT = frozenset({"constant_", "ones_", "zeros_", "eye_", "dirac_"})
    FILLING = RANDOM | {"zero_", "fill_", "mul_", "add_", "sub_", "div_", "clamp_", "copy_"}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "__get__" and func == self.IS_META and isinstance(args[0], nn.Parameter):
            return True
        if name in self.FILLING or getattr(func, "__module__", "") == "torch.nn.init":
            target = args[0] if args else kwargs["tensor"]
            if isinstance(target, nn.Parameter):
                return target
            if name not in self.FILLING - self.RANDOM and name not in self.CONSTANT:
                with torch.no_grad():
                    return target.zero_()
        if name in ("randn", "rand"):
            return torch.zeros(*args, **kwargs)
        return func(*args, **kwargs)


@torch.inference_mode(False)  # buffers made in inference mode could never be trained with
def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module whose parameters are on `meta` and whose buffers are real."""
    with _NoInitialisation():
        module = build()
    for owner, name, parameter in own_parameters(module):
        owner._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    return module


def materialise(module: nn.Module) -> nn.Module:
    """Give `module`, built on `meta`, parameters of zero on the CPU; it is returned."""
    for owner, name, parameter in own_parameters(module):
        owner._parameters[name] = nn.Parameter(torch.zeros_like(parameter, device="cpu"), parameter.requires_grad)
    renew(keepers(module))
    return module


def slots(
    module: nn.Module, full: nn.Module, plan: Plan, statistics: Statistics | None = None
) -> Iterator[tuple[dict[str, Any], dict[str, Any], str, Cut]]:
    """Where each tensor of `plan` lies: (dictionary in `module`, dictionary in `full`, key in both, cut).

    What `statistics` hold is taken from there, whole.
    """
    for name, cut in plan.items():
        prefix, _, key = name.rpartition(".")
        mine, theirs, own = module.get_submodule(prefix), full.get_submodule(prefix), (statistics or {}).get(prefix, {})
        if key in own:
            yield mine._buffers, own, key, uncut(cut.shape)
            continue
        kind = "_parameters" if key in mine._parameters else "_buffers"
        yield getattr(mine, kind), getattr(theirs, kind), key, cut


def batch_norms(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """(name, layer) of every BatchNorm with running statistics."""
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            yield name, layer


def statistics_of(module: nn.Module) -> Statistics:
    """A copy of the statistics of every BatchNorm in `module`."""
    keys = ("running_mean", "running_var", "num_batches_tracked")
    return {
        name: {
            key: buffer.detach().clone() for key, buffer in norm._buffers.items() if key in keys and buffer is not None
        }
        for name, norm in batch_norms(module)
    }


def keepers(module: nn.Module) -> list[nn.Module]:
    """The modules that keep what they made of their parameters: LeViT's attention biases, an LSTM's list of weights."""
    return [part for part in module.modules() if hasattr(part, "attention_bias_cache") or isinstance(part, nn.RNNBase)]


def renew(kept: Iterable[nn.Module]) -> None:
    """Let `keepers` follow their parameters, which were exchanged."""
    for part in kept:
        if isinstance(part, nn.RNNBase):
            part._flat_weights = [part._parameters[name] for name in part._flat_weights_names]
        else:
            part.attention_bias_cache.clear()  # type: ignore[union-attr, operator]


def own_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(owner, name, parameter) of every parameter below `module`."""
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                yield owner, name, parameter


def persistent(module: nn.Module) -> dict[str, Tensor]:
    """What `module.state_dict()` would hold, undetached: parameters and the buffers that are saved, by name."""
    saved: dict[str, Tensor] = dict(module.named_parameters())
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                saved[f"{prefix}.{name}" if prefix else name] = buffer
    return saved


def plan_for(
    family: Family,
    full: nn.Module,
    narrow: nn.Module,
    width: Fraction,
    end: End,
    layout: Layout,
    attn_scale: AttnScale,
) -> Plan:
    """The plan from `full` to `narrow`. Raises ValueError naming the parameter that cannot be sliced."""
    if family.check is not None and (problem := family.check(narrow)):
        raise ValueError(problem)
    big, small = (
        {name: tuple(tensor.shape) for name, tensor in persistent(module).items()} for module in (full, narrow)
    )
    same_names(big, small)
    rules = slicing_rules(family, full, narrow, small, layout, attn_scale)
    return make_plan(big, small, rules, width, end)


def paired_buffers(module: nn.Module, full: nn.Module) -> Iterator[tuple[str, Buffers, Buffers]]:
    """(name, dictionary in `module`, dictionary in `full`) of every buffer that both have."""
    owners = dict(full.named_modules())
    for prefix, owner in module.named_modules():
        if prefix in owners:
            for name in owner._buffers.keys() & owners[prefix]._buffers.keys():
                yield name, owner._buffers, owners[prefix]._buffers


def match_buffers(pairs: Iterable[tuple[str, Buffers, Buffers]]) -> None:
    """Move the first buffer of each of `paired_buffers` to the device and type of the second."""
    for name, mine, theirs in pairs:
        buffer, other = mine[name], theirs[name]
        if buffer is not None and other is not None:
            mine[name] = buffer.to(device=other.device, dtype=other.dtype)


def match_modes(module: nn.Module, full: nn.Module) -> None:
    """Give every submodule the train/eval mode of its namesake in `full`, frozen parts included."""
    for mine, theirs in zip(module.modules(), full.modules(), strict=True):
        mine.training = theirs.training
