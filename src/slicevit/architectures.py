"""The table of architectures: a few lines for each, most of them the constructor's arguments that are channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

from slicevit.fusing import ATTENTION, Family, Fused, ScaleArguments, scaled
from slicevit.widths import channels

ATTENTION_LAYERS = {  # what makes a hybrid of a convolutional class
    *("BottleneckAttn", "HaloAttn", "LambdaLayer"),
    *("MobileAttention", "MobileVitBlock", "MobileVitV2Block", "MultiQueryAttention2d"),
}
QKV = Fused(0, projections=3, heads=True, query=True)
KV = Fused(0, projections=2, heads=True)
QUERY = Fused(0, heads=True, query=True)
PER_HEAD = Fused(0, heads=True)
HEAD_INPUTS = Fused(1, heads=True)
PACKED_GLU = Fused(0, copies=2)


def _linear(name: str, fused: Any) -> dict[str, Any]:
    return {f"{name}.weight": fused, f"{name}.bias": fused}


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


def _maxxvit_stem(model: Any, width: Fraction) -> dict[str, Any]:
    """The stem's channels, if they divide by as many as the heads of the first stage; else it stays as it is."""
    stem = (model.stem.conv1.out_channels, model.stem.conv2.out_channels)
    heads = next((part.num_heads for part in model.stages[0].modules() if hasattr(part, "num_heads")), 1)
    return {} if any(size % heads for size in stem) else {"stem_width": scaled(width, stem)}


def _blocks_config(config: Any, width: Fraction) -> Any:
    """timm's `ByoModelCfg` with every block, the stem and the last convolution at `width`."""

    def narrow(block: Any) -> Any:
        if isinstance(block, (list, tuple)):
            return tuple(map(narrow, block))
        kwargs = dict(block.block_kwargs or {})
        kwargs |= {key: scaled(width, kwargs[key]) for key in kwargs.keys() & {"transformer_dim"}}
        return replace(block, c=channels(width, int(block.c)), block_kwargs=kwargs or None)

    stem, last = scaled(width, config.stem_chs), scaled(width, config.num_features)
    return replace(config, blocks=narrow(config.blocks), stem_chs=stem, num_features=last)


def _block_args(given: Callable[[str], Any], width: Fraction) -> dict[str, Any]:
    """timm's table of convolutional blocks, with the channels of `width` instead of timm's rounded ones."""
    rounded = given("round_chs_fn")

    def narrow(block: dict[str, Any]) -> dict[str, Any]:
        sizes = {key: channels(width, rounded(block[key])) for key in ("out_chs", "force_in_chs") if block.get(key)}
        return block | sizes

    stem = given("stem_size") if given("fix_stem") else rounded(given("stem_size"))
    return {
        "block_args": [list(map(narrow, stage)) for stage in given("block_args")],
        "round_chs_fn": int,
        "stem_size": channels(width, stem),
        "fix_stem": True,
        "num_features": channels(width, given("num_features")),
    }


def _plain_convolutions(model: Any) -> str | None:
    odd = {type(layer).__name__ for layer in model.modules()} & {"CondConv2d", "MixedConv2d"}
    return f"its layers of {min(odd)} are split at fixed places" if odd else None


def _attention_check(model: Any) -> str | None:
    has = any(type(layer).__name__ in ATTENTION_LAYERS for layer in model.modules())
    return None if has else "a convolutional network: of its class only those with layers of attention are sliceable"


def _rotary_check(model: Any) -> str | None:
    model = getattr(model, "encoder", model)
    if getattr(model, "rope", None) is None:
        return None
    head_width = model.embed_dim // model.blocks[0].attn.num_heads
    return f"a rotary head width of {head_width} is no multiple of 4" if head_width % 4 else None


def _key_heads(owner: Any) -> Fused:
    """Rows of keys or values, whose heads may be fewer than those of the queries."""
    return Fused(0, heads="num_kv_heads" if hasattr(owner, "num_kv_heads") else True)


_GLU = _linear("fc1", PACKED_GLU)
_SEPARATE_BIASES = {"q_bias": QUERY, "k_bias": PER_HEAD, "v_bias": PER_HEAD}
_PLAIN_ATTENTION = _linear("qkv", QKV) | {"proj.weight": HEAD_INPUTS}
_ATTENTION = _PLAIN_ATTENTION | _linear("gate", PER_HEAD) | _linear("norm", PER_HEAD)
_ATTENTION_POOL = _linear("q", QUERY) | _linear("kv", KV) | {"proj.weight": HEAD_INPUTS}
_APART = _linear("q", QUERY) | _linear("k", PER_HEAD) | _linear("v", PER_HEAD)
_PROJECTIONS_APART = _linear("q_proj", QUERY) | _linear("k_proj", _key_heads) | _linear("v_proj", _key_heads)
_ANY_ATTENTION = _PLAIN_ATTENTION | _SEPARATE_BIASES | _linear("kv", KV) | _APART | _PROJECTIONS_APART
_EVA_ATTENTION = _ATTENTION | _SEPARATE_BIASES | _PROJECTIONS_APART
_PATCH_MERGING = _linear("norm", Fused(0, copies=4)) | {"reduction.weight": Fused(1, copies=4)}
_NAMED = {"Attention": _ATTENTION, "AttentionPoolLatent": _ATTENTION_POOL, "GluMlp": _GLU}

VIT = Family(
    frozenset({"VisionTransformer", "VisionTransformerDistilled"}),
    channels=("embed_dim",),
    structure=_NAMED,
    scale_heads=_vit_heads,
    scale_mlp=_vit_mlp,
)
EVA = Family(
    frozenset({"Eva"}),
    channels=("embed_dim",),
    structure={
        "EvaAttention": _EVA_ATTENTION,
        "AttentionRope": _EVA_ATTENTION,
        "AttentionPoolLatent": _ATTENTION_POOL,
        "GluMlp": _GLU,
    },
    check=_rotary_check,
)
BEIT = Family(
    frozenset({"Beit"}),
    channels=("embed_dim",),
    structure={"Attention": _ATTENTION | _SEPARATE_BIASES, "GluMlp": _GLU},
)
SWIN = Family(
    frozenset({"SwinTransformer"}),
    channels=("embed_dim",),
    structure={"WindowAttention": _ATTENTION, "PatchMerging": _PATCH_MERGING},
)
SWIN_V2 = Family(
    frozenset({"SwinTransformerV2"}),
    channels=("embed_dim",),
    structure={
        "WindowAttention": _ATTENTION | _SEPARATE_BIASES,
        "PatchMerging": {"reduction.weight": Fused(1, copies=4)},
    },
)
PVT_V2 = Family(
    frozenset({"PyramidVisionTransformerV2"}),
    channels=("embed_dims",),
    structure={"Attention": dict(_ATTENTION_POOL)},
)


def _usual(
    *classes: str,
    channels: tuple[str, ...] = (),
    scale: ScaleArguments | None = None,
    config: Callable[[Any, Fraction], Any] | None = None,
    check: Callable[[Any], str | None] | None = None,
    **structure: Any,
) -> Family:
    """A family whose attention is timm's usual one, with a `structure` of its own by class besides."""
    return Family(
        frozenset(classes),
        scale,
        check=check,
        channels=channels,
        config=config,
        structure={ATTENTION: _ANY_ATTENTION, "GluMlp": _GLU} | structure,
        rounded=_ROUNDED,
    )


_ROUNDED = frozenset({"SEModule", "SqueezeExcite", "GatedConvBlock"})


def _norm_layer(name: str, fused: Any, layer: str = "linear") -> dict[str, Any]:
    """A layer without bias and the BatchNorm behind it."""
    norms = (f"{name}.bn.{part}" for part in ("weight", "bias", "running_mean", "running_var"))
    return dict.fromkeys((f"{name}.{layer}.weight", *norms), fused)


def _by_owner(read: Callable[[Any], int], axis: int) -> Callable[[Any], Fused]:
    """Each head's rows or columns are as many blocks as `read` finds in the module."""
    return lambda owner: Fused(axis, heads=True, inner=read(owner))


_CROSS_ATTENTION = _linear("wq", QUERY) | _linear("wk", PER_HEAD) | _linear("wv", PER_HEAD)
_BY_GROUPS = _linear("qkv", Fused(0, projections=3, heads="groups")) | {"proj.weight": Fused(1, heads="groups")}
_BY_HEADS = _linear("qkv", Fused(0, projections=3, heads="heads")) | {"proj.weight": Fused(1, heads="heads")}
_QK_AND_V = _linear("qk", Fused(0, projections=2, heads=True, query=True)) | _linear("v", PER_HEAD)
_OUTLOOK = _linear("v", PER_HEAD) | {"proj.weight": HEAD_INPUTS}
_HEAD_AFTER_HEAD = _linear("qkv", Fused(0, heads=True, inner=3)) | {"proj.weight": HEAD_INPUTS}
# of whole heads of a fixed width: q, k and v of one lie together where the module says so
_WHOLE_HEADS = _linear("qkv", lambda owner: None if owner.head_first else Fused(0, copies=3))
_LEVIT = (
    _norm_layer("qkv", _by_owner(lambda owner: 2 + owner.val_dim // owner.key_dim, 0))
    | _norm_layer("kv", _by_owner(lambda owner: 1 + owner.val_dim // owner.key_dim, 0))
    | _norm_layer("q.ln", PER_HEAD)
    | {"proj.ln.linear.weight": _by_owner(lambda owner: owner.val_dim // owner.key_dim, 1)}
)
_LSTM = {
    f"{kind}_{side}_l0{end}": Fused(0, copies=4)
    for kind in ("weight", "bias")
    for side in ("ih", "hh")
    for end in ("", "_reverse")
}
_PIXELS = {
    "proj.weight": Fused(1, copies=16),
    **_linear("norm1_proj", lambda owner: None if owner.norm2_proj is None else Fused(0, copies=16)),
}
_RELATIVE_CONVOLUTIONS = {
    name: (lambda owner, index=index: Fused(0, copies=owner.head_splits[index]))
    for index in range(3)
    for name in (f"conv_list.{index}.weight", f"conv_list.{index}.bias")
}
_GATED_CONVOLUTION = _linear("fc1", Fused(0, parts=lambda owner: 2 * owner.split_indices[1:])) | {
    "fc2.weight": Fused(1, parts=lambda owner: owner.split_indices[1:])  # what is convolved, and what is not
}
_FOCAL = _linear("f", Fused(0, parts=lambda owner: owner.input_split))

_BOTTLENECK = _linear(
    "qkv", Fused(0, parts=lambda o: o.num_heads * (2 * (o.dim_head_qk,)) + o.num_heads * (o.dim_head_v,))
)
_HALO = _linear("q", QUERY) | _linear("kv", Fused(0, parts=lambda o: o.num_heads * (o.dim_head_qk, o.dim_head_v)))
_LAMBDA = _linear("qkv", Fused(0, parts=lambda o: (*(o.num_heads + 1) * (o.dim_qk,), o.dim_v))) | {
    f"norm_q.{part}": PER_HEAD for part in ("weight", "bias", "running_mean", "running_var")
}


def _attended(axis: int) -> Callable[[Any], Fused]:
    """What a layer of attention inside gives: its heads' channels."""
    return lambda owner: Fused(axis, copies=owner.self_attn.num_heads)


_ATTENTION_BLOCK = {
    **{f"post_attn.{part}": _attended(0) for part in ("weight", "bias", "running_mean", "running_var")},
    "conv3_1x1.conv.weight": _attended(1),
}

USUAL = (
    _usual("VisionTransformerRelPos", "VisionTransformerSAM", "Xcit", "Cait", channels=("embed_dim",)),
    _usual("MultiScaleVit", "HieraDet", channels=("embed_dim",)),
    _usual("NaFlexVit", channels=("embed_dim",), check=_rotary_check, EvaAttention=_EVA_ATTENTION),
    _usual("Hiera", channels=("embed_dim",), MaskUnitAttention=_BY_HEADS),
    _usual("ConVit", channels=("embed_dim",), GPSA=_QK_AND_V | {"proj.weight": HEAD_INPUTS}),
    _usual("SwinTransformerV2Cr", channels=("embed_dim",), PatchMerging=_PATCH_MERGING),
    _usual("CrossVit", channels=("embed_dim",), CrossAttention=_CROSS_ATTENTION | {"proj.weight": HEAD_INPUTS}),
    _usual("VOLO", channels=("embed_dims", "stem_hidden_dim"), OutlookAttention=_OUTLOOK),
    _usual("Twins", "FastVit", "SwiftFormer", "UniFormer", "HourglassUniFormer", channels=("embed_dims",)),
    _usual("Nest", channels=("embed_dims",), Attention=_linear("qkv", QKV)),  # its heads come out channel by channel
    _usual("EfficientFormer", "EfficientFormerV2", channels=("embed_dims",), Attention={}, Attention2d={}),
    _usual("DaVit", channels=("embed_dims",), ChannelAttentionV2=_BY_GROUPS),
    _usual("PoolingVisionTransformer", channels=("base_dims",)),
    _usual(
        *("Qwen3VitClassifier", "Qwen3VitEncoder", "DeepseekVitClassifier", "DeepseekVitEncoder"),
        channels=("embed_dim",),
        check=_rotary_check,
        EvaAttention=_EVA_ATTENTION,
        Qwen3VitPatchMerger={"fc1.weight": Fused(1, copies=4)},
    ),
    _usual(
        "Gemma4VitClassifier",
        "Gemma4VitEncoder",
        channels=("embed_dim", "head_dim", "intermediate_size"),
        Gemma4Attention={
            "q_proj.linear.weight": QUERY,
            **dict.fromkeys(("k_proj.linear.weight", "v_proj.linear.weight"), _key_heads),
            "o_proj.linear.weight": HEAD_INPUTS,
        },
    ),
    _usual(
        "TNT",
        channels=("embed_dim", "inner_dim"),
        Attention=_QK_AND_V | {"proj.weight": HEAD_INPUTS},
        TNT=_PIXELS,
        Block=_PIXELS,
    ),
    _usual(
        "Visformer",
        channels=("init_channels", "embed_dim"),
        SpatialMlp={
            "conv1.weight": lambda owner: Fused(0, copies=owner.group) if owner.spatial_conv else None,
            "conv2.weight": lambda owner: Fused(0, copies=owner.group),
            "conv3.weight": lambda owner: Fused(1, copies=owner.group) if owner.spatial_conv else None,
        },
    ),
    _usual("FocalNet", channels=("embed_dim",), FocalModulation=_FOCAL),
    _usual("CoaT", channels=("embed_dims",), ConvRelPosEnc=_RELATIVE_CONVOLUTIONS),
    _usual("TinyVit", channels=("embed_dims",), Attention=_HEAD_AFTER_HEAD),
    _usual("MlpMixer", channels=("embed_dim",), GatedMlp=_GLU),
    _usual(
        "Sequencer2d",
        channels=("embed_dims", "hidden_sizes"),
        LSTM=_LSTM,
        LSTM2d={"fc.weight": Fused(1, copies=4)},
    ),
    _usual("MaxxVit", channels=("embed_dim",), scale=_maxxvit_stem, AttentionCl=_WHOLE_HEADS, Attention2d=_WHOLE_HEADS),
    _usual(
        "ByobNet",
        config=_blocks_config,
        check=_attention_check,
        MobileVitBlock={"conv_fusion.conv.weight": Fused(1, copies=2)},
        LinearSelfAttention=_linear("qkv_proj", Fused(0, parts=lambda owner: (1, owner.embed_dim, owner.embed_dim))),
        BottleneckAttn=_BOTTLENECK,
        HaloAttn=_HALO,
        LambdaLayer=_LAMBDA,
        SelfAttnBlock=_ATTENTION_BLOCK,
    ),
    replace(
        _usual("EfficientNet", check=_plain_convolutions),
        table=_block_args,
        rounded=_ROUNDED | {"InvertedResidual", "EdgeResidual"},  # what an expansion gives, timm rounds
    ),
    _usual("MetaFormer", "ConvNeXt", channels=("dims",)),
    _usual("MambaOut", channels=("dims",), GatedConvBlock=_GATED_CONVOLUTION),
    _usual("IFormer", channels=("dims",), SHMA=_norm_layer("v_gate", Fused(0, copies=2), "c")),
    _usual("Levit", "LevitDistilled", channels=("embed_dim", "key_dim"), Attention=_LEVIT, AttentionDownsample=_LEVIT),
    _usual(
        "EfficientVit",
        "EfficientVitLarge",
        channels=("widths", "head_widths"),
        LiteMLA={"proj.conv.weight": Fused(1, copies=2)},
    ),
    _usual(
        "EfficientViM",
        "EfficientViMDistilled",
        channels=("embed_dim",),
        HSMSSD=_linear("hz_proj.conv", Fused(0, copies=2)),
        EfficientViMBlock={"alpha": Fused(1, copied=True)},
    ),
)

FAMILIES = (VIT, EVA, BEIT, SWIN, SWIN_V2, PVT_V2, *USUAL)
