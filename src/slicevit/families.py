"""The register of families, and what a family's structure means for the parameters of a model.

`register_family` adds a family to those of `architectures`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from typing import Any

from torch import nn

from slicevit.architectures import FAMILIES
from slicevit.fusing import ATTENTION, AttnScale, Family, Fused, Heads, Layout, Scope
from slicevit.slicing import Rule

__all__ = [
    "AttnScale",
    "Family",
    "Fused",
    "Heads",
    "Layout",
    "Scope",
    "family_of",
    "owners_of",
    "register_family",
    "slicing_rules",
    "structured_axis",
]

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Add `family`, or replace what was registered for its classes."""
    _FAMILIES.update(dict.fromkeys(family.classes, family))
    return family


for _family in FAMILIES:
    register_family(_family)


def family_of(model: nn.Module) -> Family:
    """The family of a timm model. Raises ValueError when there is none."""
    for cls in type(model).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
    raise ValueError(
        f"no family is registered for {type(model).__name__}, so its structured axes are not known; slicevit families "
        "lists what is sliceable; add one with slicevit.register_family"
    )


def slicing_rules(
    family: Family,
    full: nn.Module,
    narrow: nn.Module,
    names: Iterable[str],
    layout: Layout,
    attn_scale: AttnScale,
) -> dict[str, Rule]:
    """The rule of every structured parameter in `names`, read off the modules that own them.

    With `attn_scale="full"` the query rows are multiplied so that the narrow model's own scale
    1/sqrt(narrow head width) acts as 1/sqrt(full head width), as in the published code.
    """
    rules: dict[str, Rule] = {}
    for name in names:
        owners = list(owners_of(full, name))
        rounded = any(type(owner).__name__ in family.rounded for owner, _, _ in owners)
        copied = _is_pointwise(owners[0][0])
        if rounded or copied:
            rules[name] = Rule(rounded=rounded, copied=copied)
        if (found := _structured(family, owners)) is not None:
            fused, owner, owner_name, _ = found
            rule = _rule(fused, owner, narrow.get_submodule(owner_name), layout, attn_scale)
            rules[name] = replace(rule, rounded=rounded, copied=copied or fused.copied)
    if attn_scale == "full" and not any(rule.gain_share for rule in rules.values()):
        raise ValueError(f"attn_scale='full' is not known for {type(full).__name__}: it has no query rows to scale")
    return rules


def structured_axis(family: Family, model: nn.Module, name: str) -> tuple[Fused, nn.Module, str, str] | None:
    """The structured axis of the parameter `name`, the module that says its blocks, its name, the rest of `name`."""
    return _structured(family, owners_of(model, name))


def _structured(
    family: Family, owners: Iterable[tuple[nn.Module, str, str]]
) -> tuple[Fused, nn.Module, str, str] | None:
    for owner, owner_name, key in owners:
        fused = _structure(family, owner, key)
        if fused is not None:
            return fused, owner, owner_name, key
    return None


def owners_of(model: nn.Module, name: str) -> Iterable[tuple[nn.Module, str, str]]:
    """(module, its name, the rest of `name`) of every module that `name` lies in, innermost first."""
    parts = name.split(".")
    chain = list(accumulate(parts[:-1], getattr, initial=model))
    for depth in range(len(parts) - 1, -1, -1):
        yield chain[depth], ".".join(parts[:depth]), ".".join(parts[depth:])


def _structure(family: Family, owner: Any, key: str) -> Fused | None:
    """The structured axis of `key` by the owner's class, or by `ATTENTION` where the owner has heads."""
    entry = family.structure.get(type(owner).__name__)
    if entry is None and isinstance(getattr(owner, "num_heads", None), int):
        entry = family.structure.get(ATTENTION)
    fused = (entry or {}).get(key)
    return fused(owner) if callable(fused) else fused


def _is_pointwise(layer: nn.Module) -> bool:
    """Whether it is a convolution of one pixel: torch takes a view of its weight for one in channels-last order."""
    return isinstance(layer, (nn.Conv1d, nn.Conv2d)) and set(layer.kernel_size) == {1}


def _rule(fused: Fused, full: Any, narrow: Any, layout: Layout, attn_scale: AttnScale) -> Rule:
    if fused.parts is not None:
        return Rule(parts=(fused.axis, tuple(fused.parts(full)), tuple(fused.parts(narrow))))
    axes = {fused.axis: fused.blocks(layout, (fused.heads_of(full), fused.heads_of(narrow)))}
    if attn_scale == "narrow" or not fused.query:
        return Rule(axes)
    for norm in ("q_norm", "k_norm"):
        if any(True for _ in getattr(full, norm, nn.Identity()).parameters()):
            raise ValueError("attn_scale='full' does not go with normalised queries and keys: use 'narrow'")
    return Rule(axes, gain=(full.scale / narrow.scale), gain_share=Fraction(1, fused.projections))
