"""`slicevit detect` from end to end: all widths in one detector, evaluated again, resumed, refused."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detecting import FLAGS, MODEL_FLAGS, SIZE, WIDTHS, write_coco
from safetensors.torch import load_file

from slicevit import cli
from slicevit.data.boxes import BoxSet
from slicevit.dense.detector import build_detector, load_detector
from slicevit.export.opening import open_model
from slicevit.tasks.detect.evaluate import measure_boxes
from slicevit.training import trainee

pytestmark = [pytest.mark.extra, pytest.mark.usefixtures("one_thread")]
pytest.importorskip("pycocotools", reason='needs pycocotools: pip install "slicevit[detect]"')

Detect = Callable[..., None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("boxes"), {"train": 48, "val": 12})


@pytest.fixture
def detect(data: Path, monkeypatch: pytest.MonkeyPatch) -> Detect:
    """`slicevit detect` on `data` with these flags beside the usual ones."""
    monkeypatch.setattr("slicevit.training.loop.LATENCY_SECONDS", 0.01)

    def call(out: Path, *flags: object) -> None:
        cli.main(["detect", "--data", str(data), "--out", str(out), *FLAGS, *MODEL_FLAGS, *map(str, flags)])

    return call


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as lines:
        return [{name: cell for name, cell in row.items() if name != "latency_ms"} for row in csv.DictReader(lines)]


def refused(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 2) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    assert stop.value.code == status
    return capsys.readouterr().err.splitlines()[-1]


def test_every_width_learns_where_the_rectangles_are(
    detect: Detect, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    detect(run)
    said, rows = capsys.readouterr().out, table(run)
    assert [row["width"] for row in rows] == list(WIDTHS)
    assert [int(row["channels"]) for row in rows] == [32, 64]
    assert {row["img_size"] for row in rows} == {"64x64"}
    model, recipe = load_detector(run)
    assert (recipe.class_names, recipe.num_classes, recipe.size) == (("red", "green"), 2, SIZE)
    torch.manual_seed(0)
    untrained = measure_boxes(build_detector(recipe).eval(), model.widths, BoxSet(data, "val"))
    for row in rows:
        assert float(row["map50"]) > untrained[row["width"]].map50 + 40, (rows, untrained)
        assert float(row["map50"]) >= float(row["map"])
    assert f"{float(rows[0]['map50']):.2f}" in said
    assert "epoch 8: mAP 1/2 " in said
    with (run / "metrics.csv").open(newline="") as lines:
        assert [row["map50"] for row in list(csv.DictReader(lines))[-2:]] == [row["map50"] for row in rows]

    (run / "results.csv").write_text("gone")
    cli.main(["eval", str(run)])
    assert table(run) == rows
    cli.main(["eval", str(run), "--width", "3/4"])
    assert "3/4 not" in capsys.readouterr().out
    assert table(run) == rows
    assert "--batch-size is for classifiers: " in refused(capsys, "eval", str(run), "--batch-size", "4")
    with pytest.raises(ValueError, match="is a run of slicevit detect, which is neither exported nor served"):
        open_model(run)
    others = write_coco(tmp_path / "others", {"val": 1})
    path = others / "annotations" / "instances_val.json"
    path.write_text(path.read_text().replace("red", "blue"))
    assert "has other categories than the detector" in refused(capsys, "eval", str(run), "--data", str(others))
    told = refused(capsys, "export", str(run), str(tmp_path / "out"), "--width", "1", "--to", "onnx")
    assert "which is neither exported nor served" in told


def test_a_stopped_run_goes_on_to_the_same_weights(
    detect: Detect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = ("--epochs", "1", "--drop-path", "0.2", "--ema-decay", "0.9", "--color-jitter", "0.2")
    detect(whole, *flags)
    steps, original = [], trainee.Trainee.train_step

    def train_step(self: trainee.Trainee, *args: object) -> None:
        original(self, *args)
        steps.append(self.step)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainee.Trainee, "train_step", train_step)
    with pytest.raises(SystemExit) as stop:
        detect(run, *flags)
    assert stop.value.code == 143
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"go on with: slicevit detect --resume {run}")
    cli.main(["detect", "--resume", str(run)])
    assert len(steps) == 6  # none done twice
    mine, theirs = load_file(run / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    assert table(run) == table(whole)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--data", "nowhere"), "--data nowhere: nowhere/train is no folder"),
        (("--size", "64", "60"), "--size must be multiples of 32, got 64 60"),
        (("--channels", "18"), "--channels 18 does not go with the grid 1/2:1:1/2"),
        (("--channels", "0"), "--channels must be above 0"),
        (("--init", "nowhere"), "--model is for --init scratch or pretrained"),
        (("--eval-split", "test"), "test is no folder"),
        (("--preset", "voc"), "--preset voc is unknown; there are coco"),
        (("--lr", "0"), "--lr must be above 0"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(
    detect: Detect, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit):
        detect(tmp_path / "run", *flags)
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_statistics_are_taken_anew(data: Path, detect: Detect, tmp_path: Path) -> None:
    run, hybrid = tmp_path / "run", ("--model", "swiftformer_xs", "--model-args", "layers=(1,1,1,1)")
    cli.main(["detect", "--data", str(data), "--out", str(run), *FLAGS, *hybrid, "--epochs", "0.2"])
    model, _ = load_detector(run)
    made = model.statistics("1/2")
    (run / "statistics.safetensors").unlink()
    cli.main(["calibrate", str(run), "--images", "48"])
    again = load_detector(run)[0].statistics("1/2")
    assert made is not None
    assert again is not None
    name = next(iter(made))
    torch.testing.assert_close(again[name]["running_mean"], made[name]["running_mean"])


def test_other_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "detect") == "slicevit: --data: name a folder of images and COCO's annotations"
    (tmp_path / "config.json").write_text(json.dumps({"slicevit": {"task": "segmentation"}}))
    told = refused(capsys, "detect", "--resume", str(tmp_path))
    assert told == f"slicevit: {tmp_path} is no detector's folder: slicevit detect makes one"
