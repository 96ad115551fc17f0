"""Groups of tied channels: the axes that must change order together, so that a network stays what it is.

They are read off the plan of a narrow width, which says what axes scale, and the family's structure, which says what
lies along them. Nothing is listed by model:

- `stream`: every plain axis that scales, by its size: the residual stream, one for each stage. Two independent axes of
  one size become one group, which ties more than it has to but breaks nothing.
- `hidden`: what lies between `fc1` and `fc2` of one MLP, both halves of a packed GLU.
- `match`: the rows of q and k of one attention, which meet in a product. Fixed where positions are rotary.
- `value`: the rows of v and the columns of the output projection of one attention.

What the modules do with their channels is not read; `slicevit.rewiring.apply` tests it by the model's answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from torch import Tensor, nn

from slicevit.elastic import ElasticModel
from slicevit.families import owners_of, structured_axis
from slicevit.fusing import Fused

Kind: TypeAlias = Literal["stream", "hidden", "match", "value"]


@dataclass(frozen=True)
class Site:
    """Where a group lies in one parameter: `size` channels from `start` on along `axis`."""

    name: str
    axis: int
    start: int = 0

    @property
    def reads(self) -> bool:
        """Whether these are the inputs of a layer."""
        return self.axis == 1


@dataclass(frozen=True)
class Group:
    """Channels that are the same ones at every site; each stays in its block of size // blocks, such as a head."""

    kind: Kind
    size: int
    blocks: int
    sites: tuple[Site, ...]

    def part(self, tensor: Tensor, site: Site) -> Tensor:
        """The group's part of the parameter at `site`, a view, its channels last: (..., size)."""
        return tensor.narrow(site.axis, site.start, self.size).movedim(site.axis, -1)


def channel_groups(model: ElasticModel) -> dict[str, Group]:
    """The groups of `model` by name, such as "stream.384" and "blocks.0.mlp.hidden".

    Raises ValueError when the model has no narrower width, its slices are not those of whole channels of each head, or
    an axis of its family has a structure that is not covered.
    """
    settings = model.settings
    if settings.layout != "per_head" or settings.heads != "fixed":
        raise ValueError(
            f"rewiring keeps channels within their heads: with layout={settings.layout!r}, heads={settings.heads!r} a "
            "narrow width takes others; use layout='per_head', heads='fixed'"
        )
    if len(model.widths) < 2:
        raise ValueError(f"the grid {model.grid} has no narrower width to rewire for")
    groups: dict[str, Group] = {}
    tied: dict[str, list[Site]] = {}
    for key, size, heads, site in _sites(model):
        if heads < 0:
            tied.setdefault(key, []).append(site)
            continue
        kind: Kind = key.split(".")[0] if key.startswith("stream") else key.rpartition(".")[2]  # type: ignore[assignment]
        old = groups.get(key, Group(kind, size, heads, ()))
        if (old.size, old.blocks) != (size, heads):
            raise ValueError(f"{_not_covered(model)}: {site.name} holds {size} channels where others hold {old.size}")
        groups[key] = replace(old, sites=(*old.sites, site))
    for key, sites in tied.items():
        groups[key] = _same_in_all_heads(groups[key], sites)
    if any("Rotary" in type(layer).__name__ for layer in model._full.modules()):
        groups = {key: group for key, group in groups.items() if group.kind != "match"}
    return groups


def _not_covered(model: ElasticModel) -> str:
    return f"rewiring does not cover {type(model._full).__name__}"


def _same_in_all_heads(group: Group, norms: list[Site]) -> Group:
    """The group with one order for all heads, because a norm of q or k has one weight for all of them."""
    width = group.size // group.blocks
    sites = [replace(site, start=site.start + k * width) for site in group.sites for k in range(group.blocks)]
    return Group(group.kind, width, 1, (*sites, *norms))


def _sites(model: ElasticModel) -> Iterator[tuple[str, int, int, Site]]:
    """(group, its size, its blocks or -1 for a norm of each head, site) of every axis that scales."""
    full = model._full
    for name, cut in model.skeleton(model.widths[0]).plan.items():
        found = structured_axis(model._family, full, name)
        for axis, (size, small) in enumerate(zip(cut.full_shape, cut.shape, strict=True)):
            if size == small:
                continue
            copies = 1
            if found is not None and found[0].axis == axis:
                fused, owner, owner_name, key = found
                if fused.parts is not None or fused.inner > 1:
                    raise ValueError(f"{_not_covered(model)}: the channels of {name} are mixed in parts")
                if fused.heads:
                    kinds = _kinds(fused, key)
                    block = size // len(kinds)
                    for index, kind in enumerate(kinds):
                        yield f"{owner_name}.{kind}", block, fused.heads_of(owner), Site(name, axis, index * block)
                    continue
                copies = fused.copies
            if attention := _norm_of_heads(name):
                yield f"{attention}.match", size, -1, Site(name, axis)
                continue
            block = size // copies
            hidden = _hidden_of(full, name, axis)
            group = f"stream.{block}" if hidden is None else f"{hidden}.hidden"
            for index in range(copies):
                yield group, block, 1, Site(name, axis, index * block)


def _kinds(fused: Fused, key: str) -> tuple[Kind, ...]:
    """What lies along an axis of heads, projection by projection."""
    if fused.projections == 3:
        return "match", "match", "value"
    if fused.projections == 2:
        return ("match", "match") if fused.query else ("match", "value")
    return ("match",) if re.match(r"w?[qk](_|\.)", key) else ("value",)


def _norm_of_heads(name: str) -> str | None:
    """The attention whose q or k this parameter normalises, within each head."""
    attention, _, norm = name.rpartition(".")[0].rpartition(".")
    return attention if norm in ("q_norm", "k_norm") else None


def _hidden_of(model: nn.Module, name: str, axis: int) -> str | None:
    """The MLP whose hidden units lie along this axis of the parameter."""
    for owner, owner_name, key in owners_of(model, name):
        children = dict(owner.named_children())
        if "fc2" in children and any(child.startswith("fc1") for child in children):
            outside = (key.startswith("fc1") and axis == 1) or (key.startswith("fc2") and axis == 0)
            return None if outside else owner_name
    return None
