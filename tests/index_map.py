"""Which element of the full network each element of a narrow one is: the tests' own statement of it.

Written from METHOD.md, DESIGN.md and timm's sources alone. Nothing here imports slicevit, and nothing in
slicevit may import this: a wrong slice still runs and still trains, so the two must be independent.

A family's table maps a regular expression over parameter names to one word an axis:

    word    what lies along the axis, outermost first            follows the layout?
    -       not a channel axis: it does not scale
    c       channels
    qkv     (q, k, v) x heads x head width                       yes
    kv      (k, v) x heads x head width                          yes
    heads   heads x head width                                   yes
    glu     (gate, value) x hidden channels                      no
    x4      four neighbouring patches x channels                 no

A scaled axis is a stack of equal blocks, and a narrow width takes the leading or the trailing channels of
every block. The layout says what the blocks of an attention axis are (DESIGN.md's table).
"""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np

LAYOUTS = ("per_head", "per_projection", "flat")
ISOLATIONS = ("smallest", "b", "c", "off", "mirror")

# --- which end -------------------------------------------------------------------------------------------


def trails(width: Fraction, widths: list[Fraction], isolation: str) -> bool:
    """Whether `width` takes the trailing channels (`widths` narrowest first, the last one is the full)."""
    smallest, full = widths[0], widths[-1]
    middle = (smallest + full) / 2
    if width == full:
        return False  # takes everything
    return {
        "smallest": width == smallest,
        "b": width <= middle,
        "c": width == smallest or width > middle,
        "off": False,
        "mirror": width != smallest,
    }[isolation]


# --- the blocks of an axis -------------------------------------------------------------------------------


def blocks_of(word: str, size: int, heads: int, layout: str) -> tuple[int, ...]:
    """The shape of a scaled axis: blocks first, the channels that are sliced last."""
    outer: tuple[int, ...] = {
        "c": (),
        "glu": (2,),
        "x4": (4,),
        "heads": {"per_head": (heads,), "per_projection": (), "flat": ()}[layout],
        "qkv": {"per_head": (3, heads), "per_projection": (3,), "flat": ()}[layout],
        "kv": {"per_head": (2, heads), "per_projection": (2,), "flat": ()}[layout],
    }[word]
    channels, rest = divmod(size, int(np.prod(outer, dtype=int)))
    assert rest == 0, (word, size, heads)
    return (*outer, channels)


def axis_index(blocks: tuple[int, ...], width: Fraction, trailing: bool) -> np.ndarray:
    """Positions along the full axis, in the narrow axis's order."""
    channels = blocks[-1]
    kept = channels * width
    assert kept.denominator == 1, f"{channels} channels at {width} are not whole"
    first = channels - int(kept) if trailing else 0
    positions = np.arange(int(np.prod(blocks))).reshape(blocks)
    return positions[..., first : first + int(kept)].reshape(-1)


# --- the families ----------------------------------------------------------------------------------------

_LINEAR = {  # of the residual stream's and the MLP's channels, in every family
    r".*\bmlp\.(fc1|fc2)\.weight": "c c",
    r".*\bmlp\.(fc1|fc2)\.bias": "c",
}
_VIT = {
    r"(cls_token|dist_token|reg_token|pos_embed)": "- - c",
    r"patch_embed\.proj\.weight": "c - - -",
    r"patch_embed\.proj\.bias": "c",
    r"(norm_pre|norm|fc_norm)\.(weight|bias)": "c",
    r"(head|head_dist)\.weight": "- c",
    r"(head|head_dist)\.bias": "-",
    r"blocks\.\d+\.norm[12]\.(weight|bias)": "c",
    r"blocks\.\d+\.ls[12]\.gamma": "c",
    r"blocks\.\d+\.attn\.proj\.weight": "c heads",
    r"blocks\.\d+\.attn\.proj\.bias": "c",
}
_FUSED_QKV = {
    r"blocks\.\d+\.attn\.qkv\.weight": "qkv c",
    r"blocks\.\d+\.attn\.qkv\.bias": "qkv",
}
_FUSED_QKV_BIASES_APART = {
    r"blocks\.\d+\.attn\.qkv\.weight": "qkv c",
    r"blocks\.\d+\.attn\.[qv]_bias": "heads",
}
_PACKED_GLU = {
    r"blocks\.\d+\.mlp\.fc1\.weight": "glu c",
    r"blocks\.\d+\.mlp\.fc1\.bias": "glu",
    r"blocks\.\d+\.mlp\.fc2\.weight": "c c",
    r"blocks\.\d+\.mlp\.fc2\.bias": "c",
}
_ATTENTION_POOL = {
    r"attn_pool\.latent": "- - c",
    r"attn_pool\.q\.weight": "heads c",
    r"attn_pool\.q\.bias": "heads",
    r"attn_pool\.kv\.weight": "kv c",
    r"attn_pool\.kv\.bias": "kv",
    r"attn_pool\.proj\.weight": "c heads",
    r"attn_pool\.proj\.bias": "c",
    r"attn_pool\.norm\.(weight|bias)": "c",
}
_EVA_APART = {
    **_VIT,
    r"blocks\.\d+\.attn\.[qkv]_proj\.weight": "heads c",
    r"blocks\.\d+\.attn\.[qkv]_proj\.bias": "heads",
    r"blocks\.\d+\.attn\.norm\.(weight|bias)": "heads",  # over all heads, concatenated
    r"blocks\.\d+\.mlp\.(fc1_g|fc1_x|fc2)\.weight": "c c",
    r"blocks\.\d+\.mlp\.(fc1_g|fc1_x|fc2|norm)\.bias": "c",
    r"blocks\.\d+\.mlp\.norm\.weight": "c",
}
_SWIN = {
    **_LINEAR,
    r"patch_embed\.proj\.weight": "c - - -",
    r"patch_embed\.proj\.bias": "c",
    r"patch_embed\.norm\.(weight|bias)": "c",
    r"norm\.(weight|bias)": "c",
    r"head\.fc\.weight": "- c",
    r"head\.fc\.bias": "-",
    r"layers\.\d+\.blocks\.\d+\.norm[12]\.(weight|bias)": "c",
    r"layers\.\d+\.blocks\.\d+\.attn\.qkv\.weight": "qkv c",
    r"layers\.\d+\.blocks\.\d+\.attn\.proj\.weight": "c heads",
    r"layers\.\d+\.blocks\.\d+\.attn\.proj\.bias": "c",
    r"layers\.\d+\.downsample\.reduction\.weight": "c x4",
}

TABLES: dict[str, dict[str, str]] = {
    "vit": {**_LINEAR, **_VIT, **_FUSED_QKV},
    "vit_all_norms": {
        **_LINEAR,
        **_VIT,
        **_FUSED_QKV,
        r"blocks\.\d+\.attn\.[qk]_norm\.(weight|bias)": "c",  # one head's channels, shared by all heads
        r"blocks\.\d+\.attn\.norm\.(weight|bias)": "heads",
        r"blocks\.\d+\.mlp\.norm\.(weight|bias)": "c",
    },
    "giant": {**_VIT, **_FUSED_QKV, **_PACKED_GLU},
    "siglip": {**_LINEAR, **_VIT, **_FUSED_QKV, **_ATTENTION_POOL},
    "eva_fused": {**_VIT, **_FUSED_QKV_BIASES_APART, **_PACKED_GLU},
    "eva_apart": _EVA_APART,
    "beit": {
        **_LINEAR,
        **_VIT,
        **_FUSED_QKV_BIASES_APART,
        r"blocks\.\d+\.gamma_[12]": "c",
        r"blocks\.\d+\.attn\.relative_position_bias_table": "- -",  # one column a head; heads are not dropped
    },
    "swin": {
        **_SWIN,
        r"layers\.\d+\.blocks\.\d+\.attn\.qkv\.bias": "qkv",
        r"layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table": "- -",
        r"layers\.\d+\.downsample\.norm\.(weight|bias)": "x4",  # before the reduction
    },
    "swin_v2": {
        **_SWIN,
        r"layers\.\d+\.blocks\.\d+\.attn\.[qv]_bias": "heads",
        r"layers\.\d+\.blocks\.\d+\.attn\.logit_scale": "- - -",
        r"layers\.\d+\.blocks\.\d+\.attn\.cpb_mlp\.[02]\.weight": "- -",  # 512 hidden units at every width
        r"layers\.\d+\.blocks\.\d+\.attn\.cpb_mlp\.0\.bias": "-",
        r"layers\.\d+\.downsample\.norm\.(weight|bias)": "c",  # after the reduction
    },
    "pvt_v2": {
        **_LINEAR,
        r"patch_embed\.proj\.weight": "c - - -",
        r"(patch_embed|stages\.\d+\.downsample)\.(proj\.bias|norm\.weight|norm\.bias)": "c",
        r"stages\.\d+\.downsample\.proj\.weight": "c c - -",
        r"stages\.\d+\.norm\.(weight|bias)": "c",
        r"stages\.\d+\.blocks\.\d+\.norm[12]\.(weight|bias)": "c",
        r"stages\.\d+\.blocks\.\d+\.attn\.q\.weight": "heads c",
        r"stages\.\d+\.blocks\.\d+\.attn\.q\.bias": "heads",
        r"stages\.\d+\.blocks\.\d+\.attn\.kv\.weight": "kv c",
        r"stages\.\d+\.blocks\.\d+\.attn\.kv\.bias": "kv",
        r"stages\.\d+\.blocks\.\d+\.attn\.proj\.weight": "c heads",
        r"stages\.\d+\.blocks\.\d+\.attn\.proj\.bias": "c",
        r"stages\.\d+\.blocks\.\d+\.attn\.sr\.weight": "c c - -",
        # the reduction of k and v's input and its norm come before the heads
        r"stages\.\d+\.blocks\.\d+\.attn\.(sr\.bias|norm\.weight|norm\.bias)": "c",
        r"stages\.\d+\.blocks\.\d+\.mlp\.dwconv\.weight": "c - - -",
        r"stages\.\d+\.blocks\.\d+\.mlp\.dwconv\.bias": "c",
        r"head\.weight": "- c",
        r"head\.bias": "-",
    },
}

_BATCH_NORM = {  # of every BatchNorm; the running statistics of a narrow width are its own, this is their shape
    r"(norm|stages\.\d+\.downsample\.norm[12]|stages\.[01]\.blocks\.\d+\.norm[12])"
    r"\.(weight|bias|running_mean|running_var)": "c",
    r".*\.num_batches_tracked": "",
}
_UNIFORMER = {
    **_BATCH_NORM,
    r"stages\.[1-3]\.downsample\.proj\.weight": "c c - -",
    r"stages\.\d+\.downsample\.(proj\.bias|norm\.weight|norm\.bias)": "c",
    r"stages\.\d+\.blocks\.\d+\.pos_conv\.weight": "c - - -",
    r"stages\.\d+\.blocks\.\d+\.pos_conv\.bias": "c",
    r"stages\.[01]\.blocks\.\d+\.attn\.affinity\.weight": "c - - -",
    r"stages\.[01]\.blocks\.\d+\.(attn\.value|attn\.proj|mlp\.fc1|mlp\.fc2)\.weight": "c c - -",
    r"stages\.[01]\.blocks\.\d+\.(attn\.(value|affinity|proj)|mlp\.fc[12])\.bias": "c",
    r"stages\.[23]\.blocks\.\d+\.norm[12]\.(weight|bias)": "c",
    r"stages\.[23]\.blocks\.\d+\.attn\.qkv\.weight": "qkv c",
    r"stages\.[23]\.blocks\.\d+\.attn\.qkv\.bias": "qkv",
    r"stages\.[23]\.blocks\.\d+\.attn\.proj\.weight": "c heads",
    r"stages\.[23]\.blocks\.\d+\.mlp\.fc[12]\.weight": "c c",
    r"stages\.[23]\.blocks\.\d+\.(attn\.proj|mlp\.fc[12])\.bias": "c",
    r"head\.fc\.weight": "- c",
    r"head\.fc\.bias": "-",
}
UNIFORMER_TABLES = {
    "uniformer_small": {**_UNIFORMER, r"stages\.0\.downsample\.proj\.weight": "c - - -"},
    "uniformer_xs": {
        **_UNIFORMER,
        r"stages\.0\.downsample\.conv1\.weight": "c - - -",
        r"stages\.0\.downsample\.conv2\.weight": "c c - -",
        r"stages\.0\.downsample\.conv[12]\.bias": "c",
        r"stages\.2\.cls_token": "- - c",
        r"stages\.3\.cls_proj\.weight": "c c",
        r"stages\.3\.cls_proj\.bias": "c",
        r"norm_cls\.(weight|bias)": "c",
        r"head_cls\.weight": "- c",
        r"head_cls\.bias": "-",
    },
}


def words_of(table: str, name: str) -> list[str]:
    """The words of a parameter's axes; exactly one entry of the table must know the name."""
    found = [words for pattern, words in (TABLES | UNIFORMER_TABLES)[table].items() if re.fullmatch(pattern, name)]
    assert len(found) == 1, f"{table}: {name} is described {len(found)} times"
    return found[0].split()


def heads_of(name: str, heads: int | tuple[int, ...]) -> int:
    """The head count where this parameter lives: one number, or one a stage."""
    if isinstance(heads, int):
        return heads
    stage = re.match(r"(?:layers|stages)\.(\d+)\.", name)
    return heads[int(stage.group(1))] if stage else 1


def index_of(
    table: str,
    name: str,
    shape: tuple[int, ...],
    heads: int | tuple[int, ...],
    width: Fraction,
    trailing: bool,
    layout: str = "per_head",
) -> list[np.ndarray]:
    """One index array an axis: `full[np.ix_(*index)]` is the narrow parameter."""
    words = words_of(table, name)
    assert len(words) == len(shape), f"{name}: {words} against {shape}"
    index = []
    for word, size in zip(words, shape, strict=True):
        if word == "-":
            index.append(np.arange(size))
        else:
            index.append(axis_index(blocks_of(word, size, heads_of(name, heads), layout), width, trailing))
    return index
