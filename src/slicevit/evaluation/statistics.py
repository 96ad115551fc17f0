"""Is a better than b? A paired bootstrap over test images and training seeds.

Shape legend: S seeds, W widths, N images, D bootstrap draws, G distinct columns.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CELLS_PER_CHUNK = 20_000_000


@dataclass(frozen=True)
class Interval:
    """A difference and its 95 % interval, in points of accuracy.

    Attributes:
        mean: the difference that was observed.
        low: 2.5th percentile of the bootstrap.
        high: 97.5th percentile of the bootstrap.
    """

    mean: float
    low: float
    high: float


def paired_bootstrap(correct_a: ArrayLike, correct_b: ArrayLike, draws: int = 10_000, seed: int = 0) -> Interval:
    """Accuracy of a minus accuracy of b, with the spread due to the test images and the seeds.

    Each draw takes images with replacement, the same ones for a and b and for every width, and, for
    each of a and b on its own, seeds with replacement. Widths are averaged. With one seed the interval
    speaks of the images alone; with few seeds it is somewhat too narrow, as any bootstrap of few.

    Args:
        correct_a: 0/1 or bool, (seeds, images) or (seeds, widths, images).
        correct_b: the same images and widths; the number of seeds may differ.
        draws: number of resamples D.
        seed: of the resampling.

    Raises:
        ValueError: shapes that do not belong together.
    """
    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.ndim not in (2, 3) or a.shape[1:] != b.shape[1:] or 0 in a.shape + b.shape:
        raise ValueError(
            f"correct_a {a.shape} and correct_b {b.shape} must both be (seeds, images) or "
            "(seeds, widths, images), with the same widths and images"
        )
    widths = a.shape[1] if a.ndim == 3 else 1
    images = a.shape[-1]
    hits_SN = np.concatenate([_sum_widths(a), _sum_widths(b)])
    # Images with the same column of hits are interchangeable: drawing how often each distinct column
    # comes up is drawing images, over far fewer cells.
    columns_SG, counts_G = np.unique(hits_SN, axis=1, return_counts=True)
    to_points = 100 / (widths * images)

    rng = np.random.default_rng(seed)
    chunk = max(1, _CELLS_PER_CHUNK // len(counts_G))
    differences = []
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        weights_DG = rng.multinomial(images, counts_G / images, size=size)
        points_DS = weights_DG @ columns_SG.T * to_points
        differences.append(_resampled_mean(points_DS[:, : len(a)], rng) - _resampled_mean(points_DS[:, len(a) :], rng))
    low, high = np.percentile(np.concatenate(differences), [2.5, 97.5])
    observed = hits_SN[: len(a)].sum(1).mean() - hits_SN[len(a) :].sum(1).mean()
    return Interval(float(observed * to_points), float(low), float(high))


def _sum_widths(correct: NDArray[Any]) -> NDArray[np.float64]:
    """(S, N) or (S, W, N) -> hits over the widths (S, N)."""
    return correct.astype(np.float64).reshape(len(correct), -1, correct.shape[-1]).sum(1)


def _resampled_mean(points_DS: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Mean over seeds drawn with replacement, afresh in each draw: (D, S) -> (D,)."""
    draws, seeds = points_DS.shape
    weights_DS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    return (points_DS * weights_DS).sum(1) / seeds
