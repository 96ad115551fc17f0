"""Fitting a cascade: the best thresholds within a budget of MACs, found exactly for two stages."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from slicevit.runtime.cascade import Cascade, fit_cascade, score_cascade

WIDTHS = ("1/4", "1/2", "3/4", "1")
MACS = (1.0, 4.0, 9.0, 16.0)

few = settings(max_examples=40, deadline=None)


@st.composite
def validations(draw: st.DrawFn, stages: int, max_images: int = 12) -> tuple[NDArray[Any], NDArray[Any]]:
    """Confidence with many ties and correctness, each (S, N)."""
    images = draw(st.integers(1, max_images))
    cells = stages * images
    confidence = draw(st.lists(st.integers(0, 5), min_size=cells, max_size=cells))
    correct = draw(st.lists(st.booleans(), min_size=cells, max_size=cells))
    shape = (stages, images)
    return np.array(confidence).reshape(shape) / 5, np.array(correct).reshape(shape)


def by_hand(thresholds: tuple[float, ...], confidence: NDArray[Any], correct: NDArray[Any]) -> tuple[float, float]:
    """Top-1 in per cent and mean MACs, image after image."""
    hits, spent = 0, 0.0
    for image in range(confidence.shape[1]):
        for stage in range(len(confidence)):
            spent += MACS[stage]
            if stage == len(thresholds) or confidence[stage, image] >= thresholds[stage]:
                hits += int(correct[stage, image])
                break
    return 100 * hits / confidence.shape[1], spent / confidence.shape[1]


def fit(confidence: NDArray[Any], correct: NDArray[Any], max_macs: float) -> Cascade:
    stages = len(confidence)
    return fit_cascade(WIDTHS[:stages], confidence, correct, MACS[:stages], max_macs)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@few
@given(data=st.data(), max_macs=st.integers(1, 35))
def test_a_fit_keeps_the_budget_and_says_what_it_scores(stages: int, data: st.DataObject, max_macs: int) -> None:
    confidence, correct = data.draw(validations(stages))
    fitted = fit(confidence, correct, max_macs)
    assert fitted.macs <= max_macs + 1e-9
    assert (fitted.top1, fitted.macs) == pytest.approx(by_hand(fitted.thresholds, confidence, correct))
    score = score_cascade(fitted, confidence, correct, MACS[:stages])
    assert (score.top1, score.macs) == (fitted.top1, fitted.macs)
    assert sum(score.shares) == pytest.approx(1)
    assert len(score.shares) == stages
    assert fitted == fit(confidence, correct, max_macs)


@few
@given(data=validations(2), max_macs=st.integers(1, 6))
def test_two_stages_are_fitted_exactly(data: tuple[NDArray[Any], NDArray[Any]], max_macs: int) -> None:
    confidence, correct = data
    fitted = fit(confidence, correct, max_macs)
    scores = [by_hand((cut,), confidence, correct) for cut in (-math.inf, *confidence[0], math.inf)]
    best = max((top1, -macs) for top1, macs in scores if macs <= max_macs + 1e-9)
    assert (fitted.top1, -fitted.macs) == pytest.approx(best)


@pytest.mark.parametrize("stages", [2, 3, 4])
@few
@given(data=st.data(), max_macs=st.integers(1, 35))
def test_a_wider_stage_more_never_hurts(stages: int, data: st.DataObject, max_macs: int) -> None:
    confidence, correct = data.draw(validations(stages))
    without = fit(confidence[:-1], correct[:-1], max_macs)
    assert fit(confidence, correct, max_macs).top1 >= without.top1 - 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_three_stages_come_near_the_best_of_all_thresholds(seed: int) -> None:
    """400 images whose hardness decides confidence and correctness; every pair of 20 quantiles is tried by hand."""
    confidence, correct = images_of_mixed_hardness(seed, 400)
    cuts = [np.unique(np.quantile(row, np.linspace(0, 1, 21))) for row in confidence[:2]]
    tried = [by_hand(pair, confidence, correct) for pair in product(*cuts)]
    for max_macs in (2.0, 4.0, 8.0):
        best = max(top1 for top1, macs in tried if macs <= max_macs)
        assert fit(confidence, correct, max_macs).top1 >= best - 0.5


def images_of_mixed_hardness(seed: int, images: int) -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    hardness = rng.uniform(0, 1, images)
    skill = np.array([0.6, 0.75, 0.9])[:, None]
    chance = 1 / (1 + np.exp(8 * (hardness - skill)))
    return chance + rng.normal(0, 0.05, chance.shape), rng.uniform(size=chance.shape) < chance


@pytest.mark.parametrize("seed", range(4))
def test_accuracy_against_macs_rises_with_the_budget_and_beats_the_narrow_width(seed: int) -> None:
    confidence, correct = images_of_mixed_hardness(seed, 2000)
    fitted = [fit(confidence[:2], correct[:2], budget) for budget in np.linspace(1, 5, 9)]
    assert [f.top1 for f in fitted] == sorted(f.top1 for f in fitted)
    assert fitted[0].top1 == pytest.approx(100 * correct[0].mean())
    assert fitted[-1].top1 >= 100 * correct[1].mean()
    other = images_of_mixed_hardness(seed + 100, 2000)
    assert score_cascade(fitted[4], other[0][:2], other[1][:2], MACS[:2]).top1 > 100 * other[1][0].mean()


def test_after_an_answer_the_next_stage_or_none() -> None:
    quarter, half, full = Fraction(1, 4), Fraction(1, 2), Fraction(1)
    fitted = Cascade((quarter, half, full), (0.8, -math.inf), 80.0, 1.0)
    assert fitted.after(quarter, 0.79) == half
    assert fitted.after(quarter, 0.8) is None
    assert fitted.after(half, 0.0) is None
    assert fitted.after(full, 0.0) is None
    with pytest.raises(ValueError, match="width 1/8 is no stage"):
        fitted.after(Fraction(1, 8), 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": ()}, "stages none"),
        ({"widths": ("1/2", "1/4")}, "stages 1/2, 1/4: give each width once"),
        ({"widths": [f"{n}/8" for n in range(1, 8)]}, "7 stages: a cascade is fitted over at most 6 widths"),
        ({"confidence": [[0.5, 0.5]]}, r"confidence \(1, 2\) and correct \(2, 2\) must both be \(2 widths, images\)"),
        ({"confidence": [[], []], "correct": [[], []]}, "no images"),
        ({"confidence": [[0.5, math.nan], [0.5, 0.5]]}, "confidence is not finite"),
        ({"correct": [[0, 2], [0, 1]]}, "correct must be 0 or 1"),
        ({"macs": (1.0,)}, "positive number for each of the 2 widths"),
        ({"macs": (0.0, 1.0)}, "positive number for each of the 2 widths"),
        ({"max_macs": 0.5}, "max_macs 0.5 is below the 1 of the narrowest stage, 1/4"),
        ({"max_macs": math.nan}, "max_macs nan"),
    ],
    ids=str,
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "widths": ("1/4", "1/2"),
        "confidence": [[0.5, 0.5], [0.5, 0.5]],
        "correct": [[0, 1], [1, 1]],
        "macs": (1.0, 4.0),
        "max_macs": 3.0,
    }
    with pytest.raises(ValueError, match=message):
        fit_cascade(**(good | change))


def test_a_cascade_with_the_wrong_number_of_thresholds_is_refused() -> None:
    with pytest.raises(ValueError, match="2 stages need 1 thresholds"):
        Cascade((Fraction(1, 2), Fraction(1)), (), 80.0, 1.0)
    with pytest.raises(ValueError, match="2 stages need 1 thresholds"):
        Cascade((Fraction(1, 2), Fraction(1)), (math.nan,), 80.0, 1.0)
