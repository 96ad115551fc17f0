"""UniFormer (Li et al., ICLR 2022 and TPAMI 2023, arXiv 2201.09450): UniFormer-S, and the light UniFormer-XS.

Our own code, from the paper; settings are checked against the published ones (github.com/Sense-X/UniFormer), whose
weights `checkpoint_filter_fn` renames.

Legend of axis names: B images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from slicevit.models.hourglass import HourglassBlock, HourglassStage
from slicevit.models.uniformer_blocks import GlobalBlock, LocalBlock, OverlappedStem, PatchEmbed, Stage
from slicevit.models.uniformer_trunk import UniFormerTrunk, init_weights

__all__ = ["HourglassUniFormer", "UniFormer"]


class UniFormer(UniFormerTrunk):
    """Stages of local relations (convolutions with BatchNorm) in front, of global ones (attention) behind.

    Args:
        in_chans: channels of the images.
        num_classes: K.
        global_pool: as timm's `SelectAdaptivePool2d` names it.
        embed_dims: channels of the stages.
        depths: blocks of the stages.
        num_heads: heads of the stages' attention; 0 for a stage of local relations.
        mlp_ratio: hidden channels of an FFN over those of its stage.
        qkv_bias: whether queries, keys and values have a bias.
        drop_rate: rate of dropout in front of the head.
        proj_drop_rate: of dropout behind projections and in FFNs.
        attn_drop_rate: of dropout of attention weights.
        drop_path_rate: rate at which a branch of the last block is left out; it grows from 0 block by block.

    Raises ValueError for stages that do not fit together.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 8, 3),
        num_heads: Sequence[int] = (0, 0, 5, 8),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        local = partial(LocalBlock, mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate)
        attending = partial(
            GlobalBlock, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, proj_drop=proj_drop_rate, attn_drop=attn_drop_rate
        )
        stages = []
        for index, blocks in enumerate(_blocks(embed_dims, depths, num_heads, drop_path_rate, local, attending)):
            before = embed_dims[index - 1] if index else in_chans
            stages.append(Stage(PatchEmbed(before, embed_dims[index], 2 if index else 4), blocks))
        super().__init__(stages, embed_dims, in_chans, num_classes, global_pool, drop_rate)


class HourglassUniFormer(UniFormerTrunk):
    """The light UniFormer: an overlapped stem, and Hourglass blocks, through which the better half of the tokens goes.

    In eval mode the pooled map gives the logits. In train mode, after `set_distilled_training`, the class token gives
    some too, from which it learns what to attend to (the published training: half of the loss from each).

    Args:
        keep_rate: share of the tokens that go through a block, more than 0 and at most 1.
        score_rate: how much of a token's score is its last attention, and not the score before; 0 to 1.

    The other arguments are those of `UniFormer`.

    Raises ValueError for stages that do not fit together, and for rates out of bounds.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 5, 9, 3),
        num_heads: Sequence[int] = (0, 0, 8, 16),
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        keep_rate: float = 0.5,
        score_rate: float = 0.5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if not 0 < keep_rate <= 1 or not 0 <= score_rate <= 1:
            raise ValueError(f"keep_rate={keep_rate} must be in (0, 1], and score_rate={score_rate} in [0, 1]")
        local = partial(LocalBlock, mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate)
        attending = partial(
            HourglassBlock,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop_rate,
            attn_drop=attn_drop_rate,
            keep_rate=keep_rate,
            score_rate=score_rate,
        )
        stages: list[Stage] = []
        class_dim = None
        for index, blocks in enumerate(_blocks(embed_dims, depths, num_heads, drop_path_rate, local, attending)):
            dim = embed_dims[index]
            smaller = PatchEmbed(embed_dims[index - 1], dim, 2) if index else OverlappedStem(in_chans, dim)
            if num_heads[index]:
                stages.append(HourglassStage(smaller, blocks, dim, class_dim))
                class_dim = dim
            else:
                stages.append(Stage(smaller, blocks))
        super().__init__(stages, embed_dims, in_chans, num_classes, global_pool, drop_rate)
        self.norm_cls = nn.LayerNorm(self.num_features)
        self.head_cls = _linear(self.num_features, num_classes)
        self.distilled_training = False

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether train mode gives (class token's logits, the map's logits), (B, K) each."""
        self.distilled_training = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes`; 0 for none."""
        super().reset_classifier(num_classes, global_pool)
        weight = self.norm_cls.weight
        self.head_cls = _linear(self.num_features, num_classes).to(weight.device, weight.dtype)

    def forward(self, x: Tensor) -> Any:
        """Logits (B, K) of images (B, 3, H, W); a pair of them in train mode, if `set_distilled_training` says so."""
        if not (self.training and self.distilled_training):
            return super().forward(x)
        x_BCHW, class_B1C, _ = self.stages(x)
        return self.head_cls(self.norm_cls(class_B1C[:, 0])), self.forward_head(self.norm(x_BCHW))


def _linear(features: int, num_classes: int) -> nn.Module:
    layer = nn.Linear(features, num_classes) if num_classes else nn.Identity()
    return layer.apply(init_weights)


def _blocks(
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    drop_path_rate: float,
    local: Callable[..., nn.Module],
    attending: Callable[..., nn.Module],
) -> list[list[nn.Module]]:
    """The blocks of every stage."""
    if not len(embed_dims) == len(depths) == len(num_heads) > 0:
        raise ValueError(f"embed_dims={embed_dims}, depths={depths} and num_heads={num_heads} name other stages")
    if not num_heads[-1] or list(map(bool, num_heads)) != sorted(map(bool, num_heads)):
        raise ValueError(f"num_heads={num_heads}: stages without attention (0) come first, and the last one has some")
    for dim, heads in zip(embed_dims, num_heads, strict=True):
        if heads and dim % heads:
            raise ValueError(f"{dim} channels do not divide into {heads} heads")
    rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
    return [
        [
            attending(dim, heads, drop_path=rate) if heads else local(dim, drop_path=rate)
            for rate in islice(rates, depth)
        ]
        for dim, depth, heads in zip(embed_dims, depths, num_heads, strict=True)
    ]


_PUBLISHED = {  # names of the published weights, as regular expressions, and ours
    r"^patch_embed1\.proj\.0\.": "stages.0.downsample.conv1.",
    r"^patch_embed1\.proj\.1\.": "stages.0.downsample.norm1.",
    r"^patch_embed1\.proj\.3\.": "stages.0.downsample.conv2.",
    r"^patch_embed1\.proj\.4\.": "stages.0.downsample.norm2.",
    r"^cls_token$": "stages.2.cls_token",
    r"^cls_upsample\.": "stages.3.cls_proj.",
    r"^head\.": "head.fc.",
    r"\.pos_embed\.": ".pos_conv.",
    r"\.attn\.(weight|bias)$": r".attn.affinity.\1",
    r"\.conv1\.(weight|bias)$": r".attn.value.\1",
    r"\.conv2\.(weight|bias)$": r".attn.proj.\1",
}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights by our names, of those of github.com/Sense-X/UniFormer or our own."""
    if any(name.startswith("stages.") for name in state_dict):
        return state_dict
    renamed = {}
    for name, value in state_dict.get("model", state_dict).items():
        for pattern, ours in _PUBLISHED.items():
            name, found = re.subn(pattern, ours, name)
            if found and pattern.startswith("^"):
                break
        name = re.sub(r"^patch_embed(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.", name)
        renamed[re.sub(r"^blocks(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks.", name)] = value
    return renamed


def _cfg(first_conv: str, classifier: str | tuple[str, ...]) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": f"stages.0.downsample.{first_conv}",
        "classifier": classifier,
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "uniformer_small": _cfg("proj", "head.fc"),
        "uniformer_xs": _cfg("conv1", ("head.fc", "head_cls")),
    }
)


def _create(kind: type[UniFormerTrunk], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(
        kind,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def uniformer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-S: 22 M parameters, 3.6 GMACs at 224 x 224 pixels."""
    return _create(UniFormer, "uniformer_small", pretrained, **kwargs)


@register_model
def uniformer_xs(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """UniFormer-XS: 16.5 M parameters, 1.4 GMACs at 192 x 192 pixels and 1.9 at 224 x 224; halves its tokens."""
    return _create(HourglassUniFormer, "uniformer_xs", pretrained, **kwargs)
