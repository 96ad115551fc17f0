"""Pure slicing: shapes and rules in, a plan out; a plan and tensors in, narrow views out.

A narrow model takes the same fraction of every axis that scales. A plain axis gives its leading or trailing
channels. A structured axis is a product of blocks that a flat cut would tear apart: the rows of a fused `qkv`
are (3, heads, head width), the inputs of the attention's output projection (heads, head width), a packed GLU
(2, hidden). There every block is cut on its own, so that a narrow q comes from the full q.

Knows tensors and names; no modules and no timm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor

from slicevit.widths import End


@dataclass(frozen=True)
class Blocks:
    """How one axis is built, at the full and at the narrow size; the last block is the rest of the axis.

    `full` and `narrow` are the leading block counts, such as (3, 6) for q, k, v and six heads.
    """

    full: tuple[int, ...] = ()
    narrow: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cut:
    """How one narrow tensor is taken from its full one.

    `expanded` is the full shape with structured axes split into blocks; `takes` are (axis, start, length) in
    it; `shape` is the narrow shape. The first `gain_rows` rows are multiplied by `gain`. With `copied` the narrow
    tensor is contiguous.
    """

    full_shape: tuple[int, ...]
    expanded: tuple[int, ...]
    takes: tuple[tuple[int, int, int], ...]
    shape: tuple[int, ...]
    gain: float = 1.0
    gain_rows: int = 0
    copied: bool = False

    def window(self, full: Tensor) -> Tensor:
        """The elements of `full` that the narrow tensor takes, as a view with structured axes split into blocks.

        Raises ValueError when `full` has another shape than the plan was made for.
        """
        if full.shape != self.full_shape:
            raise ValueError(f"planned for the shape {self.full_shape}, got {tuple(full.shape)}")
        window = full if self.expanded == self.full_shape else full.view(self.expanded)
        if len(self.takes) < 2:
            return window.narrow(*self.takes[0]) if self.takes else window
        size, strides, offset = list(self.expanded), window.stride(), window.storage_offset()
        for axis, start, length in self.takes:
            size[axis], offset = length, offset + start * strides[axis]
        return window.as_strided(size, strides, offset)  # one node of autograd, not one an axis

    def gradient(self, full: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor]:
        """(where in the gradient of `full` it belongs, what to add there), of equal shape, for a narrow gradient.

        `full` gets a gradient of zeros if it has none.
        """
        if full.grad is None:
            full.grad = torch.zeros_like(full)
        if self.gain != 1.0:
            narrow = torch.cat((narrow[: self.gain_rows] * self.gain, narrow[self.gain_rows :]))
        window = self.window(full.grad)
        return window, narrow if narrow.shape == window.shape else narrow.reshape(window.shape)

    def __call__(self, full: Tensor) -> Tensor:
        """The narrow tensor: a view of `full` where strides allow, else a copy; autograd goes through.

        Raises ValueError when `full` has another shape than the plan was made for.
        """
        narrow = self.window(full)
        if self.expanded != self.full_shape:
            narrow = narrow.reshape(self.shape)
            if narrow.stride(-1) != 1:  # heads one channel wide: still a view, but one that slows every product
                narrow = narrow.contiguous()
        if self.copied:
            narrow = narrow.contiguous()
        if self.gain != 1.0:
            narrow = torch.cat((narrow[: self.gain_rows] * self.gain, narrow[self.gain_rows :]))
        return narrow

    def windows(self, full: Tensor) -> list[Tensor]:
        """`window`, of each part."""
        return [self.window(full)]

    def parts_of(self, narrow: Tensor) -> tuple[Tensor, ...]:
        """The parts of the narrow tensor, of which each of `windows` holds one."""
        return (narrow,)

    def gradients(self, full: Tensor, narrow: Tensor) -> list[tuple[Tensor, Tensor]]:
        """`gradient`, of each part."""
        return [self.gradient(full, narrow)]


def uncut(shape: tuple[int, ...]) -> Cut:
    """The cut that takes all of a tensor of this shape."""
    return Cut(shape, shape, (), shape)


@dataclass(frozen=True)
class Joined(Cut):
    """A narrow tensor joined along `axis` from cuts of unequal parts of the full one, one behind the other.

    `lengths` are the full parts' sizes along the axis. It is always a copy.
    """

    axis: int = 0
    lengths: tuple[int, ...] = ()
    cuts: tuple[Cut, ...] = ()

    def __call__(self, full: Tensor) -> Tensor:
        """The narrow tensor; autograd goes through."""
        parts = full.split(self.lengths, self.axis)
        return torch.cat([cut(part) for cut, part in zip(self.cuts, parts, strict=True)], self.axis)

    def window(self, full: Tensor) -> Tensor:
        """Never: raises ValueError, for there are several."""
        raise ValueError("a tensor joined from unequal parts is no single view")

    def windows(self, full: Tensor) -> list[Tensor]:
        """What each cut takes of its part, as views."""
        parts = full.split(self.lengths, self.axis)
        return [cut.window(part) for cut, part in zip(self.cuts, parts, strict=True)]

    def parts_of(self, narrow: Tensor) -> tuple[Tensor, ...]:
        """The narrow tensor, split where it was joined."""
        return narrow.split([cut.shape[self.axis] for cut in self.cuts], self.axis)

    def gradients(self, full: Tensor, narrow: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(where in the gradient of `full` a part belongs, what to add there) of every part."""
        if full.grad is None:
            full.grad = torch.zeros_like(full)
        windows = self.windows(full.grad)
        parts = self.parts_of(narrow)
        return [(window, part.reshape(window.shape)) for window, part in zip(windows, parts, strict=True)]


@dataclass(frozen=True)
class Rule:
    """What is special about one parameter.

    axes: its structured axes. gain, gain_share: of the rows that hold queries. rounded: whether a scaled axis may come
    out as another number of channels. parts: (axis, sizes of its unequal parts at the full and the narrow size).
    """

    axes: Mapping[int, Blocks] = field(default_factory=dict)
    gain: float = 1.0
    gain_share: Fraction = Fraction(0)
    rounded: bool = False
    parts: tuple[int, tuple[int, ...], tuple[int, ...]] | None = None
    copied: bool = False


Plan = dict[str, Cut]
Shapes = Mapping[str, tuple[int, ...]]


def same_names(full: Shapes, narrow: Shapes) -> None:
    """Raises ValueError naming the first parameters that one of the two lacks."""
    if full.keys() != narrow.keys():
        odd = sorted(full.keys() ^ narrow.keys())
        raise ValueError(f"the narrow model's parameters differ from the full model's: {', '.join(odd[:4])}")


def make_plan(full: Shapes, narrow: Shapes, rules: Mapping[str, Rule], width: Fraction, end: End) -> Plan:
    """One `Cut` for every name in `narrow`.

    Args:
        full, narrow: parameter (and scaling buffer) shapes by name; equal names and ranks.
        rules: what is structured, by name. Every other axis is plain.
        width: the exact width; an axis must stay as it is or shrink to exactly this fraction, if it is not rounded.
        end: whether each block gives its leading or trailing channels.

    Raises ValueError naming the parameter when names or ranks differ, an axis shrinks to another fraction,
    or a block does not come out whole.
    """
    same_names(full, narrow)
    return {name: _cut(name, tuple(full[name]), tuple(shape), rules.get(name, Rule()), width, end)
            for name, shape in narrow.items()}  # fmt: skip


def _cut(name: str, full: tuple[int, ...], narrow: tuple[int, ...], rule: Rule, width: Fraction, end: End) -> Cut:
    if rule.parts is not None:
        return _joined(name, full, narrow, rule, width, end)
    if len(full) != len(narrow):
        raise ValueError(f"{name}: the narrow model has {len(narrow)} axes and the full one {len(full)}")
    expanded: list[int] = []
    takes: list[tuple[int, int, int]] = []
    for axis, (size, small) in enumerate(zip(full, narrow, strict=True)):
        if small != size and small != width * size and not rule.rounded:
            raise ValueError(f"{name}: axis {axis} of {size} becomes {small}, which is not {width} of it")
        blocks = rule.axes.get(axis, Blocks())
        big = _factors(name, size, blocks.full)
        for large, little in zip(big, _factors(name, small, blocks.narrow), strict=True):
            if little > large:
                raise ValueError(f"{name}: a block of {large} cannot become {little}")
            if little != large:
                takes.append((len(expanded), large - little if end == "trailing" else 0, little))
            expanded.append(large)
    gain_rows = int(rule.gain_share * narrow[0]) if rule.gain != 1.0 else 0
    return Cut(full, tuple(expanded), tuple(takes), narrow, rule.gain, gain_rows, rule.copied)


def _joined(name: str, full: tuple[int, ...], narrow: tuple[int, ...], rule: Rule, width: Fraction, end: End) -> Joined:
    assert rule.parts is not None
    axis, lengths, small_lengths = rule.parts
    if sum(lengths) != full[axis] or sum(small_lengths) != narrow[axis]:
        raise ValueError(f"{name}: its axis {axis} is not made of parts of {', '.join(map(str, lengths))}")
    part_rule = replace(rule, parts=None)

    def resized(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        return (*shape[:axis], size, *shape[axis + 1 :])

    cuts = tuple(
        _cut(name, resized(full, big), resized(narrow, small), part_rule, width, end)
        for big, small in zip(lengths, small_lengths, strict=True)
    )
    return Joined(full, full, (), narrow, axis=axis, lengths=lengths, cuts=cuts)


def _factors(name: str, size: int, blocks: tuple[int, ...]) -> tuple[int, ...]:
    count = 1
    for block in blocks:
        count *= block
    if size % count:
        raise ValueError(f"{name}: {size} channels do not divide into {' x '.join(map(str, blocks))} equal blocks")
    return (*blocks, size // count)
