"""A cascade: narrow first, wider where the answer is unsure. The thresholds are fitted on a validation set.

Shape legend: S stages, narrowest first; N images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slicevit.widths import Width, parse_fraction

_TRIES = 700  # combinations of thresholds on the coarse grid of a fit
_STARTS = 8  # of them, those that are refined
_MAX_STAGES = 6  # so that the coarse grid has at least 3 levels an axis
_ROUNDS = 20  # over the thresholds, at most


@dataclass(frozen=True)
class Cascade:
    """Narrow first; widen where the answer is unsure. Made by `fit_cascade`.

    Attributes:
        widths: the stages, narrowest first.
        thresholds: one for each stage but the last: an answer with at least this confidence stands. -inf: all stand.
            inf: none does.
        top1: accuracy on the images it was fitted on, in per cent.
        macs: average multiply-accumulates of an image there, in the unit of the fit. An image pays for every stage
            that it visits.

    Raises:
        ValueError: stages that are not narrowest first, or not one threshold fewer than stages.
    """

    widths: tuple[Fraction, ...]
    thresholds: tuple[float, ...]
    top1: float
    macs: float

    def __post_init__(self) -> None:
        _check_stages(self.widths)
        if len(self.thresholds) != len(self.widths) - 1 or any(map(math.isnan, self.thresholds)):
            raise ValueError(f"{len(self.widths)} stages need {len(self.widths) - 1} thresholds: {self.thresholds}")

    def after(self, width: Fraction, confidence: float) -> Fraction | None:
        """The width to run next after an answer of `width`; None when that answer stands.

        Raises ValueError when `width` is no stage.
        """
        if width not in self.widths:
            raise ValueError(f"width {width} is no stage of the cascade {', '.join(map(str, self.widths))}")
        stage = self.widths.index(width)
        stands = stage == len(self.thresholds) or confidence >= self.thresholds[stage]
        return None if stands else self.widths[stage + 1]


@dataclass(frozen=True)
class CascadeScore:
    """A cascade on a set of images.

    Attributes:
        top1: accuracy, in per cent.
        macs: average multiply-accumulates of an image, in the unit given.
        shares: (S,) the share of the images that each stage answers; they sum to 1.
    """

    top1: float
    macs: float
    shares: tuple[float, ...]


def fit_cascade(
    widths: Sequence[Width], confidence: ArrayLike, correct: ArrayLike, macs: Sequence[float], max_macs: float
) -> Cascade:
    """The thresholds with the best top-1 on these images within an average of `max_macs` an image.

    A confidence threshold for each stage, as in cascades of models (Wang et al., Wisdom of Committees, ICLR 2022).
    With two stages the result is the best there is. With more it is the best of a coarse grid, refined on ever finer
    ones and then threshold by threshold: near the best, and never worse than that of the stages without the widest.

    The accuracy is that on the images of the fit, and so too good: report `score_cascade` on others.

    Args:
        widths: the stages, narrowest first; at most 6.
        confidence: (S, N), any number that is higher where the answer is surer.
        correct: (S, N), 0/1 or bool.
        macs: (S,) multiply-accumulates of an image at each width, in any one unit.
        max_macs: the average allowed, in that unit; at least that of the narrowest stage, which every image visits.

    Raises:
        ValueError: more than 6 stages, shapes that do not belong together, values that are not finite, no images, or
            a budget below the narrowest stage.
    """
    stages = tuple(parse_fraction(width) for width in widths)
    _check_stages(stages)
    if len(stages) > _MAX_STAGES:
        raise ValueError(f"{len(stages)} stages: a cascade is fitted over at most {_MAX_STAGES} widths")
    confidence_SN, correct_SN, macs_S = _check_validation(len(stages), confidence, correct, macs)
    if not max_macs >= macs_S[0]:
        raise ValueError(f"max_macs {max_macs} is below the {macs_S[0]:g} of the narrowest stage, {stages[0]}")

    limit = max_macs * (1 + 1e-9)  # sums of MACs are rounded
    best: list[float] = []
    for count in range(2, len(stages) + 1):
        best = _fit([*best, -math.inf], limit, confidence_SN[:count], correct_SN[:count], macs_S[:count])
    top1, mean, _ = _score(best, confidence_SN, correct_SN, macs_S)
    return Cascade(stages, tuple(best), 100 * top1, mean)


def _fit(start: list[float], max_macs: float, *data: NDArray[Any]) -> list[float]:
    """Thresholds no worse than `start`, which is within the budget."""
    levels = [_levels(row_N) for row_N in data[0][:-1]]

    def thresholds_at(places: Sequence[int]) -> list[float]:
        return [float(level[place]) for level, place in zip(levels, places, strict=True)]

    def merit(thresholds: Sequence[float]) -> tuple[float, float]:
        top1, mean, _ = _score(thresholds, *data)
        return (top1, -mean) if mean <= max_macs else (-math.inf, -mean)

    def merit_at(places: Sequence[int]) -> tuple[float, float]:
        return merit(thresholds_at(places))

    sizes = [len(level) for level in levels]
    each = int(_TRIES ** (1 / len(levels)))
    coarse = product(*(np.unique(np.linspace(0, size - 1, each).astype(int)).tolist() for size in sizes))
    starts = sorted(coarse, key=merit_at, reverse=True)[:_STARTS]
    climbed = [thresholds_at(_climb(places, sizes, max(sizes) // each + 1, merit_at)) for places in starts]
    refined = (_one_by_one(thresholds, max_macs, *data) for thresholds in (start, *climbed))
    return max(refined, key=merit)


def _climb(
    places: Sequence[int], sizes: list[int], step: int, merit_at: Callable[[Sequence[int]], tuple[float, float]]
) -> Sequence[int]:
    """The best place that moves of `step` along any axes lead to, then of half of it, and so on down to 1."""
    while step:
        axes = [
            sorted({max(place - step, 0), place, min(place + step, size - 1)})
            for place, size in zip(places, sizes, strict=True)
        ]
        better = max(product(*axes), key=merit_at)
        if merit_at(better) > merit_at(places):
            places = better
        else:
            step //= 2
    return places


def _levels(confidence_N: NDArray[Any]) -> NDArray[np.float64]:
    """All thresholds that part these images differently, from "all stand" to "none does"."""
    return np.concatenate([[-math.inf], np.unique(confidence_N)[1:], [math.inf]])


def score_cascade(fitted: Cascade, confidence: ArrayLike, correct: ArrayLike, macs: Sequence[float]) -> CascadeScore:
    """Accuracy against average MACs on images other than those of the fit; arguments and errors as `fit_cascade`'s."""
    confidence_SN, correct_SN, macs_S = _check_validation(len(fitted.widths), confidence, correct, macs)
    top1, mean, shares_S = _score(fitted.thresholds, confidence_SN, correct_SN, macs_S)
    return CascadeScore(100 * top1, mean, tuple(map(float, shares_S)))


def _score(
    thresholds: Sequence[float], confidence_SN: NDArray[Any], correct_SN: NDArray[Any], macs_S: NDArray[Any]
) -> tuple[float, float, NDArray[np.float64]]:
    """Share answered rightly, mean MACs, and the share of the images that each stage answers."""
    stop_N = _stops(thresholds, confidence_SN)
    shares_S = np.bincount(stop_N, minlength=len(macs_S)) / stop_N.size
    hits_N = correct_SN[stop_N, np.arange(stop_N.size)]
    return float(hits_N.mean()), float(shares_S @ np.cumsum(macs_S)), shares_S


def _stops(thresholds: Sequence[float], confidence_SN: NDArray[Any]) -> NDArray[np.int64]:
    """(N,) the stage that answers each image: the first whose confidence reaches its threshold, else the last."""
    stands_SN = confidence_SN >= np.array([*thresholds, -math.inf])[:, None]
    return stands_SN.argmax(0)


def _one_by_one(thresholds: list[float], max_macs: float, *data: NDArray[Any]) -> list[float]:
    """Set one threshold after another to its best given the others, until none gets better."""
    result = list(thresholds)
    for _ in range(_ROUNDS):
        before = list(result)
        for stage in reversed(range(len(result))):
            result[stage] = _best_threshold(stage, result, max_macs, *data)
        if result == before:
            break
    return result


def _best_threshold(
    stage: int,
    thresholds: list[float],
    max_macs: float,
    confidence_SN: NDArray[Any],
    correct_SN: NDArray[Any],
    macs_S: NDArray[Any],
) -> float:
    """The most accurate threshold of one stage within the budget: every place where it can cut is scored at once."""
    images_N = np.arange(confidence_SN.shape[1])
    spent_S = np.cumsum(macs_S)
    onward_N = _stops([*thresholds[:stage], math.inf, *thresholds[stage + 1 :]], confidence_SN)
    reached_N = onward_N > stage
    if not reached_N.any():
        return thresholds[stage]
    # With no stop here all go onward. Each stop, surest first, exchanges an image's answer for this stage's.
    order_N = images_N[reached_N][np.argsort(-confidence_SN[stage, reached_N], kind="stable")]
    gains = correct_SN[stage, order_N] - correct_SN[onward_N[order_N], order_N]
    savings = spent_S[onward_N[order_N]] - spent_S[stage]
    gained = np.concatenate([[0], np.cumsum(gains)])
    mean_macs = (spent_S[onward_N].sum() - np.concatenate([[0], np.cumsum(savings)])) / images_N.size
    surest_first = confidence_SN[stage, order_N]
    # A cut between equal confidences cannot be made.
    possible = np.concatenate([[True], surest_first[1:] != surest_first[:-1], [True]])
    value = np.where(possible & (mean_macs <= max_macs), gained, -math.inf)
    if value.max() == -math.inf:
        return thresholds[stage]
    cut = int(np.flatnonzero(value == value.max())[-1])  # of equals, the one that widens least
    if cut == 0:
        return math.inf
    return -math.inf if cut == order_N.size else float(surest_first[cut - 1])


def _check_stages(widths: tuple[Fraction, ...]) -> None:
    if not widths or any(below >= above for below, above in pairwise(widths)):
        raise ValueError(f"stages {', '.join(map(str, widths)) or 'none'}: give each width once, narrowest first")


def _check_validation(
    stages: int, confidence: ArrayLike, correct: ArrayLike, macs: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    confidence_SN, correct_SN = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    macs_S = np.asarray(macs, np.float64)
    if confidence_SN.shape != correct_SN.shape or confidence_SN.ndim != 2 or len(confidence_SN) != stages:
        raise ValueError(
            f"confidence {confidence_SN.shape} and correct {correct_SN.shape} must both be ({stages} widths, images)"
        )
    if not confidence_SN.size:
        raise ValueError("confidence and correct hold no images")
    if macs_S.shape != (stages,) or not (np.isfinite(macs_S) & (macs_S > 0)).all():
        raise ValueError(f"macs {macs_S}: give a positive number for each of the {stages} widths")
    if not np.isfinite(confidence_SN).all():
        raise ValueError("confidence is not finite everywhere")
    if not np.isin(correct_SN, (0, 1)).all():
        raise ValueError("correct must be 0 or 1 everywhere")
    return confidence_SN, correct_SN, macs_S
