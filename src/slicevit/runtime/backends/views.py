"""A stock module of a width that reads the model's storage in place.

As `ElasticModel.subnet`, for weights that never change again: nothing is compared before a call, and a fused q, k, v
projection of the layout `per_projection` is read as three strided views instead of being copied.

Legend of axis names: B images of a batch, N tokens, M = B x N, P = 3 for q, k, v, I channels in, O channels out of
each of them.
"""

from __future__ import annotations

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from slicevit import skeletons
from slicevit.elastic import ElasticModel
from slicevit.widths import Width


class SplitProjection(nn.Module):
    """A fused q, k, v projection whose weight is three strided views, of equal shape and one stride apart."""

    weight_PIO: Tensor
    bias_P1O: Tensor | None

    def __init__(self, weight_POI: Tensor, bias_PO: Tensor | None):
        super().__init__()
        self.register_buffer("weight_PIO", weight_POI.transpose(1, 2), persistent=False)
        self.register_buffer("bias_P1O", None if bias_PO is None else bias_PO.unsqueeze(1), persistent=False)

    def forward(self, x_BNI: Tensor) -> Tensor:
        """(B, N, 3, O), which timm's attention splits into heads without a copy, as it does (B, N, 3 * O)."""
        batch, tokens, channels = x_BNI.shape
        out_PMO = torch.bmm(x_BNI.reshape(1, batch * tokens, channels).expand(3, -1, -1), self.weight_PIO)
        if self.bias_P1O is not None:
            out_PMO.add_(self.bias_P1O)
        return out_PMO.view(3, batch, tokens, -1).permute(1, 2, 0, 3)


def bind(model: ElasticModel, width: Width) -> nn.Module:
    """The stock module of `width`, in eval mode, whose tensors are views of the model's where its layout allows.

    The model must not be called, changed or trained afterwards. Raises ValueError for an illegal width.
    """
    skeleton = model.skeleton(width)
    module = skeleton.module
    for mine, source, key, cut in skeletons.slots(module, model, skeleton.plan, model.statistics(width)):
        narrow = cut(source[key].detach())
        mine[key] = nn.Parameter(narrow, requires_grad=False) if isinstance(source[key], nn.Parameter) else narrow
    for name, attention in module.named_modules():
        if type(attention) is Attention and (split := _split(model, skeleton, f"{name}.qkv")) is not None:
            attention.qkv = split  # type: ignore[assignment]
    skeletons.match_buffers(skeletons.paired_buffers(module, model))
    return module.eval()


def _split(model: ElasticModel, skeleton: skeletons.Skeleton, name: str) -> SplitProjection | None:
    """The projection `name` of the skeleton as views, or None where it is no copy or no three views."""
    cut = skeleton.plan[f"{name}.weight"]
    window_POI = cut.window(model.get_parameter(f"{name}.weight").detach())
    if window_POI.ndim != 3 or not cut.takes or cut.gain != 1.0:
        return None
    bias = skeleton.plan.get(f"{name}.bias")
    bias_PO = None if bias is None else bias.window(model.get_parameter(f"{name}.bias").detach())
    return SplitProjection(window_POI, bias_PO)
