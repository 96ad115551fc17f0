import numpy as np
import pytest

from slicevit.evaluation.statistics import Interval, paired_bootstrap


def test_certain_differences() -> None:
    ones, zeros = np.ones((3, 50), bool), np.zeros((3, 50), bool)
    assert paired_bootstrap(ones, zeros, draws=100) == Interval(100, 100, 100)
    assert paired_bootstrap(ones, ones, draws=100) == Interval(0, 0, 0)


def test_the_same_images_are_drawn_for_both() -> None:
    """With one seed, a model compared with itself has no spread at all, however noisy its accuracy."""
    a = np.random.default_rng(0).random((1, 400)) < 0.5
    assert paired_bootstrap(a, a, draws=500) == Interval(0, 0, 0)


def test_one_seed_agrees_with_the_paired_normal_interval() -> None:
    rng = np.random.default_rng(1)
    a = rng.random((1, 4000)) < 0.75
    b = np.where(rng.random((1, 4000)) < 0.8, a, rng.random((1, 4000)) < 0.5)
    difference = a[0].astype(float) - b[0]
    mean, error = 100 * difference.mean(), 100 * difference.std() / np.sqrt(4000)
    interval = paired_bootstrap(a, b)
    assert interval.mean == pytest.approx(mean)
    assert interval.low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_seeds_of_a_and_b_are_drawn_on_their_own() -> None:
    """Seeds that score 0 or 100 %: the spread is that of two independent means of two."""
    a = np.repeat([[1], [0]], 20, axis=1)
    interval = paired_bootstrap(a, a, draws=4000)
    assert interval == Interval(0, -100, 100)


def test_widths_are_averaged_and_the_same_as_their_mean() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random((3, 4, 300)) < 0.7, rng.random((2, 4, 300)) < 0.6
    interval = paired_bootstrap(a, b, draws=2000)
    assert interval.mean == pytest.approx(100 * (a.mean() - b.mean()))
    assert interval.low < interval.mean < interval.high
    stacked = paired_bootstrap(a[:, :1], b[:, :1], draws=2000)
    assert stacked == paired_bootstrap(a[:, 0], b[:, 0], draws=2000)


def test_the_seed_decides_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random((3, 200)) < 0.7, rng.random((3, 200)) < 0.6
    whole = paired_bootstrap(a, b, draws=3000)
    assert whole == paired_bootstrap(a, b, draws=3000)
    assert whole != paired_bootstrap(a, b, draws=3000, seed=1)
    monkeypatch.setattr("slicevit.evaluation.statistics._CELLS_PER_CHUNK", 1000)
    chunked = paired_bootstrap(a, b, draws=3000)
    assert chunked.mean == whole.mean
    assert [chunked.low, chunked.high] == pytest.approx([whole.low, whole.high], abs=0.7)


def test_coverage() -> None:
    """Of 150 experiments about 95 % must hold the true difference (10 points) in their interval."""
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(150):
        a, b = rng.random((1, 300)) < 0.7, rng.random((1, 300)) < 0.6
        interval = paired_bootstrap(a, b, draws=400)
        held += interval.low <= 10 <= interval.high
    assert 134 <= held <= 149


@pytest.mark.parametrize("shape", [(50,), (1, 49), (1, 4, 50), (0, 50)])
def test_shapes_that_do_not_belong_together(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"correct_a.*correct_b"):
        paired_bootstrap(np.zeros(shape), np.zeros((1, 50)))
