"""Another basis: the residual stream of a plain ViT, and each head's channels, rotated.

A product of q and k, and one of v and the output projection, stays the same when both sides turn. The residual stream
is read through LayerNorms, which take every channel for itself: their gains go into the layers that read them, and
LayerScale into those that it scales (SliceGPT, https://arxiv.org/abs/2401.15024, does the former). What is left of a
LayerNorm, subtracting the mean and dividing by the deviation, turns with the stream only if the rotation keeps the
direction of all ones, for along that the mean is taken. So a principal direction cannot become one channel. It becomes
a Helmert contrast: (1, …, 1, -k, 0, …, 0), scaled, has no mean and lies in the first k + 1 channels. The first m
channels then hold the first m - 1 directions, and of all others only what is equal in the m, which the narrow
LayerNorm subtracts.

Legend of axis names: N channels, S blocks (heads), M channels of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slicevit.elastic import ElasticModel
from slicevit.rewiring.arrange import arrange, trailing_places
from slicevit.rewiring.groups import Group


def rotatable(model: ElasticModel, name: str, group: Group) -> bool:
    """Whether this group of a model that `check_rotation` lets pass may take another basis."""
    if group.kind == "hidden":
        return False
    if group.kind == "stream":
        return True
    attention: Any = model._full.get_submodule(name.rpartition(".")[0])
    if group.kind == "match":
        return isinstance(attention.q_norm, nn.Identity) and isinstance(attention.k_norm, nn.Identity)
    return isinstance(attention.norm, nn.Identity) and attention.gate is None


def check_rotation(model: ElasticModel) -> None:
    """Raises ValueError when the stream of `model` is not read through LayerNorms alone, and say what to do."""
    full: Any = model._full
    problem = None
    if type(full).__name__ not in ("VisionTransformer", "VisionTransformerDistilled"):
        problem = f"it covers plain ViTs, and this is a {type(full).__name__}"
    elif any(type(block).__name__ != "Block" or type(block.attn).__name__ != "Attention" for block in full.blocks):
        problem = f"its blocks are of {type(full.blocks[0]).__name__} with {type(full.blocks[0].attn).__name__}"
    elif not isinstance(full.norm_pre, nn.Identity):
        problem = "it has a norm before its blocks, whose gain nothing behind it can take"
    elif getattr(full, "attn_pool", None) is not None:
        problem = "it pools by attention"
    elif full.num_classes == 0:
        problem = "without a head its features would come in another basis"
    elif model.settings.isolation not in ("smallest", "off") or model.settings.scope != "all":
        problem = f"isolation={model.settings.isolation!r}, scope={model.settings.scope!r}"
    else:
        for norm, readers in _readers(full):
            if not isinstance(norm, nn.LayerNorm):
                problem = f"it is normalised by {type(norm).__name__}, not LayerNorm"
            elif any(reader.bias is None for reader in readers) and bool((norm.bias != 0).any()):
                problem = "a layer behind a norm has no bias to take the norm's"
    if problem:
        raise ValueError(f"rewiring by rotation does not go with this model: {problem}; permute its channels instead")


def _readers(full: Any) -> Iterator[tuple[Any, list[nn.Linear]]]:
    """Every norm of the stream, with the layers that read it."""
    for block in full.blocks:
        gate = [block.attn.gate] if block.attn.gate is not None else []
        yield block.norm1, [block.attn.qkv, *gate]
        yield block.norm2, [layer for name, layer in block.mlp.named_children() if name.startswith("fc1")]
    last = full.norm if not isinstance(full.norm, nn.Identity) else full.fc_norm
    yield last, [head for head in (full.head, getattr(full, "head_dist", None)) if isinstance(head, nn.Linear)]


@torch.no_grad()
def fold_norms(model: ElasticModel) -> None:
    """Put the gains and biases of the norms, and LayerScale, into the layers beside them; the function stays.

    Raises ValueError where `check_rotation` does.
    """
    check_rotation(model)
    full: Any = model._full
    for norm, readers in _readers(full):
        for reader in readers:
            weight = reader.weight.double()
            if reader.bias is not None:
                reader.bias.copy_(reader.bias.double() + weight @ norm.bias.double())
            reader.weight.copy_(weight * norm.weight.double())
        norm.weight.fill_(1)
        norm.bias.zero_()
    for block in full.blocks:
        for scale, writer in ((block.ls1, block.attn.proj), (block.ls2, block.mlp.fc2)):
            if not isinstance(scale, nn.Identity):
                for parameter in (writer.weight, writer.bias):
                    if parameter is not None:
                        gain = scale.gamma.double().view(-1, *(1,) * (parameter.ndim - 1))
                        parameter.copy_(parameter.double() * gain)
                scale.gamma.fill_(1)


def rotation(model: ElasticModel, group: Group, scores_SMM: Tensor) -> Tensor:
    """The orthogonal matrices (S, M, M), new channels last, for the importance that was measured of a group."""
    grid, isolation = model.grid, model.settings.isolation
    if group.kind != "stream":
        values_SM, vectors_SMM = torch.linalg.eigh(scores_SMM.double())
        order_SM = arrange(values_SM.clamp(min=0), grid, isolation)
        return vectors_SMM.gather(2, order_SM[:, None, :].expand_as(vectors_SMM))
    size = group.size
    plane_NP = _helmert(size)  # an orthonormal basis of what has no mean
    values_P, vectors_PP = torch.linalg.eigh(plane_NP.T @ scores_SMM[0].double() @ plane_NP)
    directions_NP = plane_NP @ vectors_PP
    ones_N1 = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    scores_N = torch.cat((values_P.clamp(min=0), torch.zeros(1, dtype=torch.float64)))
    order = arrange(scores_N[None], grid, isolation)[0].tolist()
    front = size - trailing_places(size, grid, isolation)
    contrasts_NP, slots = _contrasts(size, front)
    held = [[index for index in part if index != size - 1] for part in (order[:front], order[front:])]
    between = [part.pop() for part, count in zip(held, slots, strict=True) if len(part) > count]
    chosen = directions_NP[:, [*held[0], *held[1], *between]]
    return (ones_N1 @ ones_N1.T + chosen @ contrasts_NP.T)[None]


def _helmert(size: int) -> Tensor:
    """The Helmert contrasts (N, N - 1), orthonormal; the k-th lies in the first k + 1 channels and has no mean."""
    contrasts = torch.zeros(size, size - 1, dtype=torch.float64)
    for k in range(1, size):
        contrasts[:k, k - 1], contrasts[k, k - 1] = 1, -k
        contrasts[:, k - 1] /= (k * (k + 1)) ** 0.5
    return contrasts


def _contrasts(size: int, front: int) -> tuple[Tensor, tuple[int, int]]:
    """(contrasts (N, N - 1), how many of them lie in the front and in the back), the one between the two last."""
    back = size - front
    if not back:
        return _helmert(size), (size - 1, 0)
    contrasts = torch.zeros(size, size - 1, dtype=torch.float64)
    contrasts[:front, : front - 1] = _helmert(front)
    contrasts[front:, front - 1 : -1] = _helmert(back)
    contrasts[:front, -1], contrasts[front:, -1] = back, -front
    contrasts[:, -1] /= (size * front * back) ** 0.5
    return contrasts, (front - 1, back - 1)
