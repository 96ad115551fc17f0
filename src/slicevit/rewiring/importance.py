"""How much each channel matters, from activations and gradients on some images.

Removing a channel that a layer reads changes an answer, to first order, by the sum over tokens of activation ·
gradient (Molchanov et al., 2017, https://arxiv.org/abs/1611.06440). The same sum is weight · gradient of the weights
that read the channel, so that it needs no hooks and is the same code for every family. Its square is averaged over the
images and added up over the layers that read the group.

For a rotated basis the same is a matrix: T = sum over tokens of activation · gradientᵀ, and removing the direction u
changes the answer by uᵀ T u. The eigenvectors of the mean of sym(T)² put the most of it into the fewest directions.

Legend of axis names: B images, C image channels, K outputs, N channels of a group, S blocks of it, M channels of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slicevit.elastic import ElasticModel
from slicevit.rewiring.groups import Group, Site, channel_groups

Importance = dict[str, Tensor]


def measure_importance(
    model: ElasticModel,
    images: Iterable[Tensor],
    *,
    rotate: bool = False,
    outputs: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> Importance:
    """How much the answers of the full width depend on the channels of every group, or on their directions.

    Args:
        images: batches (B, C, H, W); a few hundred images do. They are computed one by one, in eval mode.
        rotate: measure directions where the group may be rotated, for `rewire` of a model whose norms are folded.
        outputs: images (B, C, H, W) -> what is to be kept (B, K); the logits by default. Give the features where the
            head is new.
        seed: of the signs with which outputs are added up, an image's own. So no labels are needed, and what is
            measured is the mean over the outputs.

    Returns scores (N,), or (S, M, M) of a group that may be rotated, by the group's name.
    Raises ValueError where `channel_groups` does, and when there is no image or an answer is not finite.
    """
    from slicevit.rewiring.rotation import rotatable

    groups = channel_groups(model)
    turned = {name for name, group in groups.items() if rotate and rotatable(model, name, group)}
    parameters = dict(model.named_parameters())
    reading = {name: _read_at(group, parameters) for name, group in groups.items()}
    sums: dict[str, Any] = dict.fromkeys(groups, 0.0)
    device = next(iter(parameters.values())).device
    signs = torch.Generator().manual_seed(seed)
    answer = outputs or model
    count = 0
    with _gradients(model), torch.compiler.set_stance("force_eager"):
        for batch in images:
            for image_1CHW in batch.to(device).split(1):
                output_1K = answer(image_1CHW)
                sign_1K = torch.randint(0, 2, output_1K.shape, generator=signs).mul_(2).sub_(1).to(device)
                model.zero_grad()
                (output_1K * sign_1K).sum().backward()
                for name, group in groups.items():
                    measure = _directions if name in turned else _channels
                    sums[name] = sums[name] + measure(group, reading[name], parameters)
                count += 1
    if not count:
        raise ValueError("images holds none: importance needs some")
    if odd := [name for name, value in sums.items() if not bool(value.isfinite().all())]:
        raise ValueError(f"the importance of {odd[0]} is not finite: the model's answers or gradients are not")
    return {name: value / count for name, value in sums.items()}


def _read_at(group: Group, parameters: dict[str, nn.Parameter]) -> list[list[Site]]:
    """The sites that count, those of one layer together: where the group is read, or else written."""
    sites = [site for site in group.sites if site.name in parameters]
    reads = [[site] for site in sites if site.reads]
    if reads:
        return reads
    layers: dict[tuple[str, int], list[Site]] = {}
    for site in sites:
        layers.setdefault((site.name.rpartition(".")[0], site.start), []).append(site)
    return list(layers.values())


def _pairs(group: Group, sites: list[Site], parameters: dict[str, nn.Parameter]) -> list[tuple[Tensor, Tensor]]:
    """(weights, gradients), each (rest, N), of one layer."""
    pairs = []
    for site in sites:
        parameter = parameters[site.name]
        if parameter.grad is not None:
            weight, gradient = (group.part(tensor, site) for tensor in (parameter.detach(), parameter.grad))
            pairs.append((weight.reshape(-1, group.size), gradient.reshape(-1, group.size)))
    return pairs


def _channels(group: Group, layers: list[list[Site]], parameters: dict[str, nn.Parameter]) -> Tensor:
    scores_N = torch.zeros(group.size, dtype=torch.float64)
    for sites in layers:
        change = sum((weight * gradient).sum(0).double().cpu() for weight, gradient in _pairs(group, sites, parameters))
        scores_N += torch.as_tensor(change).square()
    return scores_N


def _directions(group: Group, layers: list[list[Site]], parameters: dict[str, nn.Parameter]) -> Tensor:
    size = group.size // group.blocks
    scores_SMM = torch.zeros(group.blocks, size, size, dtype=torch.float64)
    for sites in layers:
        change_SMM = torch.zeros_like(scores_SMM)
        for weight, gradient in _pairs(group, sites, parameters):
            weight_SRM, gradient_SRM = (t.view(-1, group.blocks, size).transpose(0, 1) for t in (weight, gradient))
            change_SMM += (gradient_SRM.mT @ weight_SRM).double().cpu()
        even_SMM = (change_SMM + change_SMM.mT) / 2
        scores_SMM += even_SMM @ even_SMM
    return scores_SMM


@contextmanager
def _gradients(model: ElasticModel) -> Iterator[None]:
    """Within, the model is in eval mode and all its parameters take gradients; afterwards it has none."""
    modes = {module: module.training for module in (*model.modules(), model._full)}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        model.eval()
        for parameter, _ in kept:
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, training in modes.items():
            module.training = training
