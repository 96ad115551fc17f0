import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slicevit.evaluation.frontier import (
    RunRecord,
    accuracy_span,
    cost_axes,
    edge_note,
    labelled_widths,
    load_run,
    mark,
    plot_frontier,
)

MakeRun = Callable[..., RunRecord]


def test_load_run(make_run: MakeRun) -> None:
    run = make_run("a", step="1/4", epochs=2)
    assert run.name == "a"
    assert run.config["slicevit"]["data"]["name"] == "imagenet-1k"
    assert [row.width for row in run.results] == ["1/4", "1/2", "3/4", "1"]
    assert len(run.metrics) == 2 * 4
    assert load_run(str(run.folder)) == run


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_load_run_names_a_bad_config(make_run: MakeRun, text: str | None) -> None:
    path = make_run("a").folder / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is (missing|broken)"):
        load_run(path.parent)


def test_axes_hold_what_was_measured(make_run: MakeRun) -> None:
    run = make_run("a", step="1/4")
    macs, latency, params = cost_axes([run])
    assert (macs.name, macs.log, macs.ticks) == ("GMACs", True, [0.5, 1, 2, 5])
    assert [cost for _, cost in params.points[0]] == [row.param_count for row in run.results]
    assert not latency.log  # 2.1 to 6.6 ms: less than a factor of four
    assert macs.place(macs.low) == 0
    assert macs.place(macs.high) == pytest.approx(1)
    unmeasured = dataclasses.replace(run, results=[dataclasses.replace(row, latency_ms=None) for row in run.results])
    assert [axis.name for axis in cost_axes([unmeasured])] == ["GMACs", "Parameters"]
    assert cost_axes([unmeasured, run])[1].points[0] == []


def test_small_models_are_drawn_in_mmacs(make_run: MakeRun) -> None:
    axis = cost_axes([make_run("a", step="1/4", full=48)])[0]
    assert axis.label == "Multiply-accumulates (MMACs)"
    assert axis.points[0][-1][1] == pytest.approx(72, abs=0.1)


@pytest.mark.parametrize("step", ["1/8", "1/16", "1/32"])
def test_width_labels_never_touch(make_run: MakeRun, step: str) -> None:
    for axis in cost_axes([make_run("a", step=step)]):
        labels = sorted((axis.place(cost), len(width), width) for width, cost, _ in labelled_widths(axis, 0.022))
        assert {"1/4", "1/2", "1"} <= {width for *_, width in labels}
        for (left, left_size, _), (right, right_size, _) in pairwise(labels):
            assert right - left > 0.022 * (left_size + right_size) / 2


def test_hopeless_untrained_widths_do_not_flatten_the_rest(make_run: MakeRun) -> None:
    trained, sliced = make_run("a"), make_run("b", untrained=("5/16",))
    assert accuracy_span([sliced]) == accuracy_span([trained])
    assert edge_note([trained]) is None
    assert edge_note([sliced]) == "width not trained (at the lower edge: off the scale)"
    near = [dataclasses.replace(row, top1=60.0) if not row.trained else row for row in sliced.results]
    low, _ = accuracy_span([dataclasses.replace(sliced, results=near)])
    assert low < 60
    assert edge_note([dataclasses.replace(sliced, results=near)]) == "width not trained"


def test_marks_differ_without_colour() -> None:
    looks = [mark(index) for index in range(42)]
    assert len({(look.symbol, look.dashes) for look in looks}) == 42
    assert {look.symbol for look in looks[:7]} == {look.symbol for look in looks}


def ink(path: Path) -> float:
    """The share of the picture that is not white."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return float((np.asarray(image.convert("L")) < 250).mean())


def test_picture_opens_and_shows_every_run(make_run: MakeRun, tmp_path: Path) -> None:
    one, two = make_run("one"), make_run("_two $x$ <b>", untrained=("5/16",), gain=-5)
    plot_frontier([one], tmp_path / "one.png")
    plot_frontier([one, two], str(tmp_path / "two.png"))
    assert 0.02 < ink(tmp_path / "one.png") < 0.3
    with Image.open(tmp_path / "two.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for index in range(2):
        colour = [int(mark(index).light[place : place + 2], 16) for place in (1, 3, 5)]
        assert (pixels == colour).all(1).sum() > 500


@pytest.mark.parametrize("count", [1, 9])
def test_long_names_leave_room_for_the_axes(make_run: MakeRun, tmp_path: Path, count: int) -> None:
    """matplotlib warns, which is an error here, when the legend squeezes the axes away."""
    run = make_run("a")
    runs = [dataclasses.replace(run, name=f"{index} " + "a long name " * 10) for index in range(count)]
    plot_frontier(runs, tmp_path / "out.png")
    assert ink(tmp_path / "out.png") > 0.02


def test_one_width_is_enough(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a")
    plot_frontier([dataclasses.replace(run, results=run.results[-1:])], tmp_path / "out.png")
    assert ink(tmp_path / "out.png") > 0.005


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run has results"):
        plot_frontier([RunRecord("a", tmp_path, {}, [], [])], tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []
