"""The table of architectures: how a family's keyword arguments scale, and which parameters are fused.

An entry names the timm classes it covers, says how the constructor's arguments shrink with the width, and lists
the structured axes by the class of the module that owns them. `register_family` adds one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, TypeAlias

from torch import nn

from slicevit.slicing import Blocks, Rule
from slicevit.widths import channels

Layout: TypeAlias = Literal["per_head", "per_projection", "flat"]
AttnScale: TypeAlias = Literal["narrow", "full"]
Heads: TypeAlias = Literal["fixed", "scaled"]
Scope: TypeAlias = Literal["all", "mlp"]


@dataclass(frozen=True)
class Fused:
    """One structured axis of a module's parameter.

    `copies` blocks always stay apart (a packed GLU, Swin's four concatenated neighbours). `projections` (q, k, v)
    and heads are about attention and follow the layout. `query` marks parameters whose first projection is q.
    """

    axis: int
    copies: int = 1
    projections: int = 1
    heads: bool = False
    query: bool = False

    def blocks(self, layout: Layout, heads: tuple[int, int]) -> Blocks:
        """The axis as blocks under `layout`, with (full, narrow) head counts."""

        def counts(num_heads: int) -> tuple[int, ...]:
            blocks = [self.copies] if self.copies > 1 else []
            if self.projections > 1 and layout != "flat":
                blocks.append(self.projections)
            if self.heads and layout == "per_head":
                blocks.append(num_heads)
            return tuple(blocks)

        return Blocks(counts(heads[0]), counts(heads[1]))


Structure = Mapping[str, Mapping[str, Fused]]
QKV = Fused(0, projections=3, heads=True, query=True)
KV = Fused(0, projections=2, heads=True)
QUERY = Fused(0, heads=True, query=True)
PER_HEAD = Fused(0, heads=True)
HEAD_INPUTS = Fused(1, heads=True)
PACKED_GLU = Fused(0, copies=2)


@dataclass(frozen=True)
class Family:
    """How the models of some timm classes are sliced.

    classes: names of the timm model classes.
    scale: (model, width) -> the constructor's arguments at that width; raises ValueError where it is not whole.
    structure: class name of an owning module -> its parameter -> the structured axis. A name may hold one dot.
    scale_heads, scale_mlp: the same as `scale` for whole heads dropped, and for the MLP alone.
    check: narrow model -> why it cannot run, or None.
    """

    classes: frozenset[str]
    scale: Callable[[nn.Module, Fraction], dict[str, Any]]
    structure: Structure = field(default_factory=dict)
    scale_heads: Callable[[nn.Module, Fraction], dict[str, Any]] | None = None
    scale_mlp: Callable[[nn.Module, Fraction], dict[str, Any]] | None = None
    check: Callable[[nn.Module], str | None] | None = None

    def arguments(self, model: nn.Module, width: Fraction, heads: Heads, scope: Scope) -> dict[str, Any]:
        """The constructor's arguments at `width`. Raises ValueError where they are not whole or not known."""
        if scope == "mlp":
            if self.scale_mlp is None:
                raise ValueError(f"the family of {type(model).__name__} cannot slice its MLPs alone (scope='mlp')")
            return self.scale_mlp(model, width)
        arguments = self.scale(model, width)
        if heads == "scaled":
            if self.scale_heads is None:
                raise ValueError(f"the family of {type(model).__name__} cannot drop whole heads (heads='scaled')")
            arguments |= self.scale_heads(model, width)
        return arguments


def _embed_dim(model: Any, width: Fraction) -> dict[str, Any]:
    return {"embed_dim": channels(width, model.embed_dim)}


def _vit_heads(model: Any, width: Fraction) -> dict[str, Any]:
    try:
        return {"num_heads": channels(width, model.blocks[0].attn.num_heads)}
    except ValueError:
        heads = model.blocks[0].attn.num_heads
        raise ValueError(f"{width} of {heads} heads is no whole number") from None


def _vit_mlp(model: Any, width: Fraction) -> dict[str, Any]:
    fc1 = model.blocks[0].mlp.fc1
    hidden = channels(width, fc1.out_features)
    return {"mlp_ratio": (hidden + 0.5) / fc1.in_features}  # timm truncates: half a channel keeps it whole


def _pvt_dims(model: Any, width: Fraction) -> dict[str, Any]:
    return {"embed_dims": tuple(channels(width, stage["num_chs"]) for stage in model.feature_info)}


def _rotary_check(model: Any) -> str | None:
    if getattr(model, "rope", None) is None:
        return None
    head_width = model.embed_dim // model.blocks[0].attn.num_heads
    return f"a rotary head width of {head_width} is no multiple of 4" if head_width % 4 else None


_GLU = {"fc1.weight": PACKED_GLU, "fc1.bias": PACKED_GLU}
_ATTENTION = {
    "qkv.weight": QKV,
    "qkv.bias": QKV,
    "gate.weight": PER_HEAD,
    "gate.bias": PER_HEAD,
    "norm.weight": PER_HEAD,
    "norm.bias": PER_HEAD,
    "proj.weight": HEAD_INPUTS,
}
_SEPARATE_BIASES = {"q_bias": QUERY, "k_bias": PER_HEAD, "v_bias": PER_HEAD}
_ATTENTION_POOL = {
    "q.weight": QUERY,
    "q.bias": QUERY,
    "kv.weight": KV,
    "kv.bias": KV,
    "proj.weight": HEAD_INPUTS,
}
_EVA_ATTENTION = _ATTENTION | _SEPARATE_BIASES | {
    "q_proj.weight": QUERY,
    "q_proj.bias": QUERY,
    "k_proj.weight": PER_HEAD,
    "v_proj.weight": PER_HEAD,
    "v_proj.bias": PER_HEAD,
}  # fmt: skip

VIT = Family(
    frozenset({"VisionTransformer", "VisionTransformerDistilled"}),
    _embed_dim,
    {"Attention": _ATTENTION, "AttentionPoolLatent": _ATTENTION_POOL, "GluMlp": _GLU},
    scale_heads=_vit_heads,
    scale_mlp=_vit_mlp,
)
EVA = Family(
    frozenset({"Eva"}),
    _embed_dim,
    {
        "EvaAttention": _EVA_ATTENTION,
        "AttentionRope": _EVA_ATTENTION,
        "AttentionPoolLatent": _ATTENTION_POOL,
        "GluMlp": _GLU,
    },
    check=_rotary_check,
)
BEIT = Family(
    frozenset({"Beit"}),
    _embed_dim,
    {"Attention": _ATTENTION | _SEPARATE_BIASES, "GluMlp": _GLU},
)
SWIN = Family(
    frozenset({"SwinTransformer"}),
    _embed_dim,
    {
        "WindowAttention": _ATTENTION,
        "PatchMerging": {
            "norm.weight": Fused(0, copies=4),
            "norm.bias": Fused(0, copies=4),
            "reduction.weight": Fused(1, copies=4),
        },
    },
)
SWIN_V2 = Family(
    frozenset({"SwinTransformerV2"}),
    _embed_dim,
    {
        "WindowAttention": _ATTENTION | _SEPARATE_BIASES,
        "PatchMerging": {"reduction.weight": Fused(1, copies=4)},
    },
)
PVT_V2 = Family(
    frozenset({"PyramidVisionTransformerV2"}),
    _pvt_dims,
    {"Attention": dict(_ATTENTION_POOL.items())},
)

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Add `family`, or replace what was registered for its classes."""
    _FAMILIES.update(dict.fromkeys(family.classes, family))
    return family


for _family in (VIT, EVA, BEIT, SWIN, SWIN_V2, PVT_V2):
    register_family(_family)


def family_of(model: nn.Module) -> Family:
    """The family of a timm model. Raises ValueError naming the known classes when there is none."""
    for cls in type(model).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
    known = ", ".join(sorted(_FAMILIES))
    raise ValueError(
        f"no family is registered for {type(model).__name__}, so its structured axes are not known; "
        f"known classes are {known}; add one with slicevit.register_family"
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
        for owner_name, key in _owners(name):
            owner = full.get_submodule(owner_name)
            fused = family.structure.get(type(owner).__name__, {}).get(key)
            if fused is None:
                continue
            rules[name] = _rule(fused, owner, narrow.get_submodule(owner_name), layout, attn_scale)
            break
    if attn_scale == "full" and not any(rule.gain_share for rule in rules.values()):
        raise ValueError(f"attn_scale='full' is not known for {type(full).__name__}: it has no query rows to scale")
    return rules


def _owners(name: str) -> Iterable[tuple[str, str]]:
    parts = name.split(".")
    for depth in (1, 2):
        if len(parts) >= depth:
            yield ".".join(parts[:-depth]), ".".join(parts[-depth:])


def _rule(fused: Fused, full: Any, narrow: Any, layout: Layout, attn_scale: AttnScale) -> Rule:
    heads = (full.num_heads, narrow.num_heads) if fused.heads else (1, 1)
    axes = {fused.axis: fused.blocks(layout, heads)}
    if attn_scale == "narrow" or not fused.query:
        return Rule(axes)
    for norm in ("q_norm", "k_norm"):
        if any(True for _ in getattr(full, norm, nn.Identity()).parameters()):
            raise ValueError("attn_scale='full' does not go with normalised queries and keys: use 'narrow'")
    return Rule(axes, gain=(full.scale / narrow.scale), gain_share=Fraction(1, fused.projections))
