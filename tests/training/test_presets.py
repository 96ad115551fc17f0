"""The presets: every one is a whole configuration, and those named after the paper hold its recipe."""

from __future__ import annotations

import pytest

from slicevit.training.config import from_dict
from slicevit.training.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves(name: str) -> None:
    config = preset(name).resolved()
    assert config == config.resolved()
    assert config.method == ("scala" if name.endswith(("-paper", "-dinov2")) or name == "own-data" else "rotated")
    assert (config.rewire, config.isolation) == ("rotate", "off") or config.method == "scala"


@pytest.mark.parametrize("size", ["small", "base"])
def test_the_papers_recipe(size: str) -> None:
    """10 epochs of the full width, as its code has for both sizes; ours costs as much: n + n / 2 epochs for n."""
    ours, papers = preset(f"deit-{size}-imagenet"), preset(f"deit-{size}-imagenet-paper")
    assert papers.full_width_first is not None
    assert papers.full_width_first * papers.epochs == pytest.approx(10)
    assert (papers.layout, papers.attn_scale, papers.isolation) == ("flat", "full", "mirror")
    assert ours.epochs == 1.5 * papers.epochs
    assert ours.resolved().full_width_first == pytest.approx(2 / 3)
    dinov2 = preset(f"deit-{size}-imagenet-dinov2")
    assert dinov2.full_width_first is not None
    assert dinov2.full_width_first * dinov2.epochs == pytest.approx(10)


def test_an_older_run_keeps_its_epochs_of_the_full_width() -> None:
    config = from_dict({"epochs": 20, "full_width_epochs": 5.0, "rewire": "off", "isolation": "smallest"})
    assert config.full_width_first == 0.25
    assert from_dict({"epochs": 5, "full_width_epochs": 5.0}).full_width_first == pytest.approx(1)
