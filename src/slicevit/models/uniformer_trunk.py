"""What the UniFormers have in common, in the manner of timm's models: stages, a BatchNorm, a pooled head.

Legend of axis names: B images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import ClassifierHead, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from slicevit.models.uniformer_blocks import Stage


class UniFormerTrunk(nn.Module):
    """Stages one after the other, a BatchNorm, a pooled head, and the methods of timm's models.

    Args:
        stages: each takes what the one before gives: a map (B, C, H, W), or a tuple that begins with one.
        embed_dims: channels of the stages.
        in_chans: channels of the images, C of the first stage.
        num_classes: K.
        global_pool: as timm's `SelectAdaptivePool2d` names it.
        drop_rate: rate of dropout in front of the head.
    """

    def __init__(
        self,
        stages: list[Stage],
        embed_dims: Sequence[int],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = embed_dims[-1]
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**index, "module": f"stages.{index}"}
            for index, dim in enumerate(embed_dims)
        ]
        self.norm = nn.BatchNorm2d(self.num_features)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = self.head.num_features
        self.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that timm's optimizers are not to decay, besides biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters into layers."""
        blocks = [(r"^stages\.(\d+)\.(?:downsample|cls_)", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stages\.0\.downsample", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module:
        """The layer that gives the logits."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes`; 0 for none."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """(features, maps of stages), as timm's models give them.

        Args:
            x: images (B, C, H, W).
            indices: of stages: the last so many, or these, or all.
            norm: normalise the map of the last stage.
            stop_early: run no stage behind the last index.
            output_fmt: NCHW.
            intermediates_only: give the maps alone.

        Raises ValueError for another format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: a UniFormer's maps are NCHW")
        wanted, last = feature_take_indices(len(self.stages), indices)
        maps: list[Tensor] = []
        state: Any = x
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            state = stage(state)
            if index in wanted:
                final = norm and index == len(self.stages) - 1
                maps.append(self.norm(_map_of(state)) if final else _map_of(state))
        return maps if intermediates_only else (self.norm(_map_of(state)), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps at `indices` do not need; returns the indices as timm counts them."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        ends_early = last < len(self.stages) - 1
        if ends_early:
            self.stages, self.num_features = self.stages[: last + 1], self.feature_info[last]["num_chs"]
        if prune_norm or ends_early:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """Unpooled features (B, C, H / 32, W / 32) of images (B, 3, H, W)."""
        return self.norm(_map_of(self.stages(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of unpooled features, or with `pre_logits` the pooled features (B, C)."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Any:
        """Logits (B, K) of images (B, 3, H, W)."""
        return self.forward_head(self.forward_features(x))


def init_weights(module: nn.Module) -> None:
    """Linear layers as in the paper's training: truncated normal weights, biases of zero."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _map_of(state: Any) -> Tensor:
    return state if isinstance(state, Tensor) else state[0]
