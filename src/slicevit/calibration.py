"""BatchNorm statistics of every width: averages over images after training (US-Net, Yu and Huang, ICCV 2019).

Legend of axis names: B images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from slicevit.elastic import ElasticModel
from slicevit.skeletons import Statistics, batch_norms, statistics_of
from slicevit.widths import FULL, Width


@torch.no_grad()
def calibrate(
    model: ElasticModel,
    batches: Iterable[Tensor],
    widths: Iterable[Width] | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Give `widths` BatchNorm statistics of their own, from one pass over `batches`; returns how many images it saw.

    Means and variances are those of the batches, averaged with equal weights: give batches of equal size. Everything
    but the BatchNorms runs in eval mode, and the model's modes are restored. An error leaves all statistics as they
    were.

    Args:
        model: on the device of the batches, or any other.
        batches: images (B, C, H, W), two or more each, as the model sees them in use.
        widths: all of the grid by default. At full width the model's own buffers are written.
        progress: called after each batch with the number of images in it.

    Raises ValueError when the model has no BatchNorm, there are no batches, or a width is not legal.
    """
    if not model.has_batch_norm:
        raise ValueError(f"{type(model._full).__name__} has no BatchNorm: its widths need no statistics")
    legal = list(model.widths if widths is None else map(model.width, widths))
    device = next(model.parameters()).device
    seen = 0
    with _restored_on_error(model), _averaging(model, legal), torch.compiler.set_stance("force_eager"):
        for images_BCHW in batches:
            if len(images_BCHW) < 2:
                raise ValueError("a batch of one image has no statistics: give two or more")
            for width in legal:
                model(images_BCHW.to(device, non_blocking=True), width=width)
            seen += len(images_BCHW)
            if progress is not None:
                progress(len(images_BCHW))
        if not seen:
            raise ValueError("batches holds no images to calibrate on")
    return seen


def require_statistics(model: ElasticModel, run: str | Path, widths: Iterable[Fraction] | None = None) -> None:
    """Raise ValueError when one of `widths` (by default all) runs on BatchNorm statistics that are not its own."""
    for width in model.widths if widths is None else widths:
        if not model.is_calibrated(width):
            own = "" if widths is None else f" --width {width}"
            raise ValueError(
                f"{run} has no BatchNorm statistics of width {width}, or weights newer than they, so that what "
                f"this width answers says nothing: slicevit calibrate {run}{own}"
            )


@contextmanager
def _restored_on_error(model: ElasticModel) -> Iterator[None]:
    narrow, full = dict(model._statistics), statistics_of(model._full)
    try:
        yield
    except BaseException:
        model._statistics = narrow
        _write(model._full, full)
        raise


@contextmanager
def _averaging(model: ElasticModel, widths: list[Fraction]) -> Iterator[None]:
    """Within, calls at `widths` average their BatchNorm statistics, from nothing on."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = []
    model.eval()
    try:
        for _, norm in batch_norms(model._full):
            norm.training = True
        for width in widths:
            module = model._full if width == FULL else model.skeleton(width).module
            norms = [norm for _, norm in batch_norms(module)]
            momenta += [(norm, norm.momentum) for norm in norms]
            for norm in norms:
                norm.momentum = None  # an average with equal weights
            nothing = _nothing(module, model._full)
            if width == FULL:
                _write(module, nothing)
            else:
                model.set_statistics(width, nothing)
        yield
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        model.train(modes[0][1])  # LeViT's attention empties what it kept
        for module, training in modes[1:]:
            module.training = training


def _nothing(module: nn.Module, full: nn.Module) -> Statistics:
    """Statistics of no image, shaped as those of `module`, of the type and on the device of those of `full`."""
    statistics = statistics_of(module)
    for name, buffers in statistics.items():
        for key, buffer in buffers.items():
            assert buffer is not None
            buffers[key] = full.get_submodule(name).get_buffer(key).new_full(buffer.shape, key == "running_var")
    return statistics


def _write(module: nn.Module, statistics: Statistics) -> None:
    for name, norm in batch_norms(module):
        for key, value in statistics[name].items():
            norm._buffers[key].copy_(value)  # type: ignore[union-attr, arg-type]
