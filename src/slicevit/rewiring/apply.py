"""Rewiring a model in place, and the proof that its full width still answers as before.

Legend of axis names: B images, C image channels, K outputs, N channels, S blocks, M channels of a block.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from slicevit.costs import model_input_size
from slicevit.elastic import ElasticModel
from slicevit.rewiring.arrange import arrange
from slicevit.rewiring.groups import Group, channel_groups
from slicevit.rewiring.importance import Importance
from slicevit.rewiring.rotation import fold_norms, rotatable, rotation
from slicevit.skeletons import persistent

How: TypeAlias = Literal["permute", "rotate"]
TOLERANCE = 1e-3  # of the largest answer, in float32: reordered sums differ by 1e-6, a wrong tie by about 1


def rewire(model: ElasticModel, importance: Importance, how: How = "permute", images: Tensor | None = None) -> None:
    """Put what matters first in every group of tied channels; the full width's answers stay, but for rounding.

    Args:
        model: is changed in place. Its grid and isolation say which places each width takes, the trailing ones of an
            isolated width too (`slicevit.rewiring.arrange`).
        importance: what `measure_importance` gave for this model; groups that it leaves out stay as they are.
        how: `permute` gives channels another order. `rotate` gives the residual stream and the channels of the heads
            another basis, and hidden units another order; `fold_norms` must have been called before importance was
            measured, and is called again here. It covers plain ViTs with LayerNorms.
        images: (B, C, H, W), to compare the answers before and after; two random ones of the model's size by default.

    BatchNorm statistics of narrow widths are dropped, for they are of other channels; `slicevit.calibrate` makes new
    ones.

    Raises ValueError, and leaves the model as it was, when its full width answers otherwise afterwards, which is so
    for a family whose channels are tied in a way that is not covered, or when `importance` is of another model.
    """
    groups = channel_groups(model)
    if odd := sorted(importance.keys() - groups.keys()):
        raise ValueError(f"importance has {odd[0]}, which this model has not: measure it on this model")
    for name, scores in importance.items():
        if scores.shape[-1] * (groups[name].blocks if scores.ndim == 3 else 1) != groups[name].size:
            raise ValueError(f"importance of {name} is for another number of channels than its {groups[name].size}")
    probe = _Probe(model, images)
    kept = {name: tensor.detach().clone() for name, tensor in persistent(model._full).items()}
    try:
        if how == "rotate":
            fold_norms(model)
        orders = {name: _change(model, name, groups[name], scores, how) for name, scores in importance.items()}
        problem = probe.difference(orders if how == "permute" else None)
        if problem is not None:
            raise ValueError(
                f"rewiring does not cover {type(model._full).__name__}: its full width would answer otherwise "
                f"({problem}); its channels are tied in another way"
            )
    except Exception:
        _restore(model, kept)
        raise
    model.forget_statistics()


@torch.no_grad()
def _restore(model: ElasticModel, kept: dict[str, Tensor]) -> None:
    for name, tensor in persistent(model._full).items():
        tensor.copy_(kept[name])


@torch.no_grad()
def _change(model: ElasticModel, name: str, group: Group, scores: Tensor, how: How) -> Tensor:
    """Change the group at all its sites; returns the order (N,) of its old channels, or the rotation (S, M, M)."""
    tensors = persistent(model._full)
    if how == "rotate" and scores.ndim == 3 and rotatable(model, name, group):
        turn_SMM = rotation(model, group, scores.cpu())
        for site in group.sites:
            part = group.part(tensors[site.name], site)
            blocks = part.double().unflatten(-1, (group.blocks, -1))
            turned = torch.einsum("...sm,smn->...sn", blocks, turn_SMM.to(part.device))
            part.copy_(turned.flatten(-2))
        return turn_SMM
    if scores.ndim != 1:
        raise ValueError(f"importance of {name} was measured for a rotation: rewire with how='rotate'")
    order_SM = arrange(scores.view(group.blocks, -1), model.grid, model.settings.isolation)
    first_S1 = torch.arange(group.blocks)[:, None] * (group.size // group.blocks)
    order_N = (order_SM + first_S1).flatten()
    for site in group.sites:
        part = group.part(tensors[site.name], site)
        part.copy_(part[..., order_N.to(part.device)])
    return order_N


class _Probe:
    """The answers of a model's full width on some images, logits and pooled features, to compare with later."""

    def __init__(self, model: ElasticModel, images: Tensor | None):
        self.model = model
        first = next(model.parameters())
        if images is None:
            if not hasattr(model, "pretrained_cfg"):
                raise ValueError("a model that was built from its class does not say its image size: give images")
            images = torch.randn((2, *model_input_size(model)), generator=torch.Generator().manual_seed(0))
        self.images_BCHW = images.to(device=first.device, dtype=first.dtype)
        self.logits_BK, self.features_BN = self._answers()

    @torch.no_grad()
    def _answers(self) -> tuple[Tensor, Tensor]:
        full: Any = self.model._full
        modes = {module: module.training for module in full.modules()}
        full.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                features = full.forward_features(self.images_BCHW)
                return full(self.images_BCHW), full.forward_head(features, pre_logits=True)
        finally:
            for module, training in modes.items():
                module.training = training

    def difference(self, orders: dict[str, Tensor] | None) -> str | None:
        """How the answers differ now; the features in their new order, or not compared without `orders`."""
        logits_BK, features_BN = self._answers()
        pairs = [(self.logits_BK, logits_BK)] if self.model._full.num_classes else []
        if orders is not None:
            order = orders.get(f"stream.{features_BN.shape[-1]}")
            before = self.features_BN if order is None else self.features_BN[..., order.to(features_BN.device)]
            pairs.append((before, features_BN))
        for before, after in pairs:
            largest, error = float(before.abs().max()), float((after - before).abs().max())
            limit = TOLERANCE if before.dtype in (torch.float32, torch.float64) else 0.05
            if not error <= limit * max(largest, 1e-12):
                return f"by {error:.2g}, where the largest is {largest:.2g}"
        return None
