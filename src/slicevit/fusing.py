"""How a family of architectures is described: which arguments of its constructor are channels, and which parameters
have structure inside an axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, TypeAlias

from torch import nn

from slicevit.slicing import Blocks
from slicevit.widths import channels

Layout: TypeAlias = Literal["per_head", "per_projection", "flat"]
AttnScale: TypeAlias = Literal["narrow", "full"]
Heads: TypeAlias = Literal["fixed", "scaled"]
Scope: TypeAlias = Literal["all", "mlp"]


@dataclass(frozen=True)
class Fused:
    """One structured axis of a module's parameter: blocks, outermost first.

    `copies` blocks always stay apart (a packed GLU, Swin's four concatenated neighbours). `projections` (q, k, v)
    and heads are about attention and follow the layout. `heads` is true, or names the attribute of the module that
    holds the number of heads. `query` marks parameters whose first projection is q. `inner` blocks inside each head
    (LeViT's q, k and v of one head) always stay apart, and their heads with them. `parts` gives the sizes of unequal
    parts of the axis, one behind the other, from the module; each is cut by itself. `copied` parameters are never
    views: an elementwise function of a view, such as a sigmoid, rounds otherwise than of a contiguous tensor.
    """

    axis: int
    copies: int = 1
    projections: int = 1
    heads: bool | str = False
    query: bool = False
    inner: int = 1
    parts: Callable[[Any], tuple[int, ...]] | None = None
    copied: bool = False

    def blocks(self, layout: Layout, heads: tuple[int, int]) -> Blocks:
        """The axis as blocks under `layout`, with (full, narrow) head counts."""

        def counts(num_heads: int) -> tuple[int, ...]:
            blocks = [self.copies] if self.copies > 1 else []
            if self.projections > 1 and layout != "flat":
                blocks.append(self.projections)
            if self.heads and (layout == "per_head" or self.inner > 1):
                blocks.append(num_heads)
            if self.inner > 1:
                blocks.append(self.inner)
            return tuple(blocks)

        return Blocks(counts(heads[0]), counts(heads[1]))

    def heads_of(self, owner: Any) -> int:
        """The number of heads of the module that owns the parameter."""
        return int(getattr(owner, "num_heads" if self.heads is True else str(self.heads))) if self.heads else 1


ATTENTION = "attention"
Structure = Mapping[str, Mapping[str, Fused | Callable[[Any], Fused | None]]]
ScaleArguments: TypeAlias = Callable[[nn.Module, Fraction], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """How the models of some timm classes are sliced.

    classes: names of the timm model classes.
    scale: (model, width) -> the constructor's arguments at that width; raises ValueError where it is not whole.
    structure: class name of an owning module -> its parameter -> the structured axis, or a function that reads it
        off the owner. `ATTENTION` stands for every other class whose modules have `num_heads`.
    scale_heads, scale_mlp: the same as `scale` for whole heads dropped, and for the MLP alone.
    check: narrow model -> why it cannot run, or None.
    channels: names of the constructor's arguments, or of fields of its `cfg`, that are channels: numbers, or nested
        tuples of them. They scale besides what `scale` gives.
    config: (the constructor's argument `cfg`, width) -> the narrow one, for a table of blocks.
    table: (the constructor's arguments by name, width) -> those at that width, for a table of blocks in them.
    rounded: class names of modules inside which timm rounds a scaled axis (squeeze-excite): any smaller size goes.
    """

    classes: frozenset[str]
    scale: ScaleArguments | None = None
    structure: Structure = field(default_factory=dict)
    scale_heads: ScaleArguments | None = None
    scale_mlp: ScaleArguments | None = None
    check: Callable[[nn.Module], str | None] | None = None
    channels: tuple[str, ...] = ()
    config: Callable[[Any, Fraction], Any] | None = None
    table: Callable[[Callable[[str], Any], Fraction], dict[str, Any]] | None = None
    rounded: frozenset[str] = frozenset()

    def arguments(
        self, model: nn.Module, given: Callable[[str], Any], width: Fraction, heads: Heads, scope: Scope
    ) -> dict[str, Any]:
        """The constructor's arguments at `width`, `given` being those of the full model by name.

        Raises ValueError where they are not whole or not known.
        """
        if scope == "mlp":
            if self.scale_mlp is None:
                raise ValueError(f"the family of {type(model).__name__} cannot slice its MLPs alone (scope='mlp')")
            return self.scale_mlp(model, width)
        arguments = {name: scaled(width, given(name)) for name in self.channels}
        if self.config is not None:
            arguments["cfg"] = self.config(given("cfg"), width)
        if self.table is not None:
            arguments |= self.table(given, width)
        if self.scale is not None:
            arguments |= self.scale(model, width)
        if heads == "scaled":
            if self.scale_heads is None:
                raise ValueError(f"the family of {type(model).__name__} cannot drop whole heads (heads='scaled')")
            arguments |= self.scale_heads(model, width)
        return arguments


def scaled(width: Fraction, value: Any) -> Any:
    """Channels, or nested tuples of them, at `width`; None stays. Raises ValueError when that is not whole."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return tuple(scaled(width, part) for part in value)
    return channels(width, value)
