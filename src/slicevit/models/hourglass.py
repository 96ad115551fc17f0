"""The Hourglass block of the light UniFormers: half of the tokens go through it, and all come out.

Written from the journal version of the paper (Li et al., TPAMI 2023, arXiv 2201.09450, token shrinking and recovering),
which takes the scheme from Evo-ViT (Xu et al., AAAI 2022). What a class token attends to scores the tokens; those with
the highest scores are kept, the others are fused into one, which goes through the block beside them. Then the others
are recovered: each is changed as the fused one was. Every width scores with its own attention.

Legend of axis names: B images, C channels, H height, W width, N tokens of a map, M tokens in a block, h heads.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from slicevit.models.uniformer_blocks import GlobalBlock, Stage

Scored: TypeAlias = tuple[Tensor, Tensor, Tensor | None]  # map (B, C, H, W), class token (B, 1, C), scores (B, N)


class ScoringAttention(nn.Module):
    """Self-attention (B, M, C) to itself that also gives what its first token attends to, as the mean over heads."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x_BMC: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens (B, M, C), attention of the first one to the others (B, M - 1))."""
        q_BhMc, k_BhMc, v_BhMc = self.qkv(x_BMC).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attention_BhMM = ((q_BhMc * self.scale) @ k_BhMc.transpose(-2, -1)).softmax(dim=-1)
        mixed_BMC = (self.attn_drop(attention_BhMM) @ v_BhMc).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(mixed_BMC)), attention_BhMM[:, :, 0, 1:].mean(dim=1)


class HourglassBlock(GlobalBlock):
    """A global block that most tokens pass by; arguments beyond those of `GlobalBlock`:

    keep_rate: share of the tokens that go through, rounded down, but at least one.
    score_rate: how much of a token's score is its last attention, and not the score before.
    """

    def __init__(self, dim: int, num_heads: int, keep_rate: float = 0.5, score_rate: float = 0.5, **kwargs: Any):
        super().__init__(dim, num_heads, attn_layer=ScoringAttention, **kwargs)
        self.keep_rate, self.score_rate = keep_rate, score_rate

    def forward(self, state: Scored) -> Scored:
        """All tokens, the class token and new scores. Where there are no scores yet every token goes through."""
        x_BCHW, class_B1C, scores_BN = state
        x_BCHW = x_BCHW + self.pos_conv(x_BCHW)
        x_BNC = x_BCHW.flatten(2).transpose(1, 2)
        count = x_BNC.shape[1]
        kept = count if scores_BN is None else max(1, int(self.keep_rate * count))
        if kept == count:
            tokens_BMC, _, attention_BN = self._mix(torch.cat((class_B1C, x_BNC), dim=1))
            class_B1C, x_BNC = tokens_BMC[:, :1], tokens_BMC[:, 1:]
            scores_BN = attention_BN if scores_BN is None else self._blend(scores_BN, attention_BN)
        else:
            assert scores_BN is not None
            class_B1C, x_BNC, scores_BN = self._shrink_and_recover(class_B1C, x_BNC, scores_BN, kept)
        return x_BNC.transpose(1, 2).reshape(x_BCHW.shape), class_B1C, scores_BN

    def _shrink_and_recover(self, class_B1C: Tensor, x_BNC: Tensor, scores_BN: Tensor, kept: int) -> Scored:
        order_BN = scores_BN.topk(x_BNC.shape[1], dim=1).indices  # a sort, as ExecuTorch has one
        order_BNC = order_BN.unsqueeze(-1).expand_as(x_BNC)
        high, low = slice(None, kept), slice(kept, None)
        x_BNC, scores_BN = x_BNC.gather(1, order_BNC), scores_BN.gather(1, order_BN)
        shares_BN = scores_BN[:, low] / scores_BN[:, low].sum(dim=1, keepdim=True)
        fused_B1C = shares_BN.unsqueeze(1) @ x_BNC[:, low]
        tokens_BMC, change_B1C, attention_BN = self._mix(torch.cat((class_B1C, x_BNC[:, high], fused_B1C), dim=1))
        x_BNC = torch.cat((tokens_BMC[:, 1:-1], x_BNC[:, low] + change_B1C), dim=1)
        scores_BN = torch.cat((self._blend(scores_BN[:, high], attention_BN[:, :-1]), scores_BN[:, low]), dim=1)
        return tokens_BMC[:, :1], x_BNC.scatter(1, order_BNC, x_BNC), scores_BN.scatter(1, order_BN, scores_BN)

    def _mix(self, tokens_BMC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens after attention and FFN, what both added to the last one, attention of the first to the others)."""
        related_BMC, attention_BN = self.attn(self.norm1(tokens_BMC))
        related_BMC = self.drop_path1(related_BMC)
        tokens_BMC = tokens_BMC + related_BMC
        fed_BMC = self.drop_path2(self.mlp(self.norm2(tokens_BMC)))
        return tokens_BMC + fed_BMC, related_BMC[:, -1:] + fed_BMC[:, -1:], attention_BN

    def _blend(self, scores_BN: Tensor, attention_BN: Tensor) -> Tensor:
        return (1 - self.score_rate) * scores_BN + self.score_rate * attention_BN


class HourglassStage(Stage):
    """A stage of Hourglass blocks. The first has a class token; the next ones project that of the stage before.

    Args:
        downsample, blocks: as of `Stage`.
        dim: C.
        class_dim: channels of the class token that comes in; None where it begins.
    """

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module], dim: int, class_dim: int | None):
        super().__init__(downsample, blocks)
        if class_dim is None:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            trunc_normal_(self.cls_token, std=0.02)  # of zeros the first attention would be uniform, and rank no token
        else:
            self.cls_proj = nn.Linear(class_dim, dim)

    def forward(self, x: Tensor | Scored) -> Scored:
        """The map, class token and scores of this stage, of those (or the map alone) of the stage before."""
        if isinstance(x, Tensor):
            return self.run_blocks((self.downsample(x), self.cls_token.repeat(x.shape[0], 1, 1), None))
        x_BCHW, class_B1C, scores_BN = x
        assert scores_BN is not None
        coarse_BN = F.avg_pool2d(scores_BN.unflatten(1, (1, *x_BCHW.shape[-2:])), 2).flatten(1)
        coarse_BN = coarse_BN * (scores_BN.sum(dim=1, keepdim=True) / coarse_BN.sum(dim=1, keepdim=True))
        return self.run_blocks((self.downsample(x_BCHW), self.cls_proj(class_B1C), coarse_BN))
