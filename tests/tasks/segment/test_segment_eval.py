"""`slicevit eval` of a segmenter: the figures of the end of training, other data, other widths, refusals."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mask_files import write_pairs
from segmenting import refused, table

from slicevit import cli
from slicevit.runtime.measured import profile_run

Segment = Callable[..., None]
FIGURES = ("width", "miou", "pixel_accuracy", "loss", "param_count", "gmacs", "images")


def figures(folder: Path) -> list[list[str]]:
    return [[row[name] for name in FIGURES] for row in table(folder)]


def test_the_figures_are_those_of_the_end_of_training(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, written = figures(trained), json.loads((trained / "results.json").read_text())
    (trained / "results.csv").write_text("gone")
    cli.main(["eval", str(trained)])
    assert figures(trained) == before
    again = json.loads((trained / "results.json").read_text())
    assert [row["ious"] for row in again] == [row["ious"] for row in written]
    said = capsys.readouterr().out
    assert "mIoU" in said
    assert f"{written[0]['miou']:.2f}" in said
    assert f"written to {trained / 'results.csv'}" in said


def test_other_data_and_a_width_alone_are_shown_and_not_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = write_pairs(tmp_path / "others", {"val": 2})
    before = (trained / "results.csv").read_bytes()
    cli.main(["eval", str(trained), "--data", str(others)])
    cli.main(["eval", str(trained), "--width", "1/2"])
    said = capsys.readouterr().out
    assert "written" not in said
    assert "not trained" not in said
    assert (trained / "results.csv").read_bytes() == before
    config = json.loads((trained / "config.json").read_text())
    config["slicevit"]["grid"] = config["slicevit"]["segmenter"]["grid"] = "1/2:1:1/2"
    (trained / "config.json").write_text(json.dumps(config))
    cli.main(["eval", str(trained), "--width", "3/4"])
    assert "3/4 not" in capsys.readouterr().out


def test_each_width_of_a_run_that_trained_them_alone(segment: Segment, tmp_path: Path) -> None:
    run = tmp_path / "run"
    segment(run, "--method", "separate", "--grid", "1/2:1:1/2", "--epochs", "0.5")
    before = figures(run)
    cli.main(["eval", str(run)])
    assert figures(run) == before
    cli.main(["eval", str(run / "separate" / "1-2")])
    with (run / "separate" / "1-2" / "results.csv").open(newline="") as lines:
        assert [row["width"] for row in csv.DictReader(lines)] == ["1/2"]
    (row,) = profile_run(run / "separate" / "1-2", seconds=0.01, batch=(1,), threads=1)["rows"]
    assert (row["width"], row["miou"]) == ("1", pytest.approx(float(table(run)[0]["miou"]), abs=0.01))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--data-root", "x"), "--data-root is for classifiers: "),
        (("--batch-size", "4"), "--batch-size is for classifiers: "),
        (("--merged", "2"), "--merged is for classifiers: "),
        (("--data", "nowhere"), "--data nowhere: "),
        (("--width", "1/3"), "--width 1/3 "),
        (("--width", "wide"), "--width wide"),
    ],
)
def test_refusals(trained: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str) -> None:
    assert said in refused(capsys, lambda: cli.main(["eval", str(trained), *flags]))
