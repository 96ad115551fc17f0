"""`slicevit predict`: what is in the table, what is said, and which settings are refused."""

from __future__ import annotations

import importlib.util
import io
import re
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from predicting import BAD, IMAGES, LABELS, PARQUET, WIDTHS, Command, rows_of, saved_run
from rich.console import Console

import slicevit
from slicevit.checkpoint import save_pretrained
from slicevit.cli.predict import _Bar, _loading
from slicevit.runtime.engine import Engine
from slicevit.runtime.predict import output
from slicevit.runtime.predict.output import columns, format_of
from slicevit.runtime.predict.parts import Tally

pytestmark = pytest.mark.usefixtures("one_thread")


def expected_logits(run: Path, photos: Path, width: str) -> torch.Tensor:
    """Of the readable images, one by one, as the model's own front door computes them."""
    model = slicevit.from_pretrained(run)
    with Engine(run, device="cpu") as engine:
        images = [
            engine.transform(Image.open(photos / f"day{number // 7}" / f"{number}.png"))
            for number in range(IMAGES)
            if number not in BAD
        ]
    with torch.inference_mode():
        return model(torch.stack(images), width=width)


# --- the table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", PARQUET])
@pytest.mark.parametrize("width", [None, "1/2"])
def test_a_row_for_every_image_in_order(kind: str, width: str | None, slice_predict: Command) -> None:
    flags = ["--top-k", 2, *(["--width", width] if width else []), *(["--logits"] if kind != "csv" else [])]
    lines = slice_predict(f"new/table.{kind}", *flags)
    rows = rows_of(slice_predict.folder / "new" / f"table.{kind}")
    assert [row["path"] for row in rows] == [f"day{number // 7}/{number}.png" for number in range(IMAGES)]
    assert [number for number, row in enumerate(rows) if row["error"]] == list(BAD)
    assert all("cannot identify image file" in rows[number]["error"] for number in BAD)
    assert {row["label"] for row in rows if row["error"]} == {None}
    good = [row for row in rows if not row["error"]]
    assert {row["width"] for row in good} == {width or "1"}
    logits_RK = expected_logits(slice_predict.run, slice_predict.photos, width or "1")
    probabilities_Rk, classes_Rk = logits_RK.softmax(1).topk(2)
    assert len(set(classes_Rk[:, 0].tolist())) > 1
    for place, suffix in enumerate(("", "_2")):
        assert [int(row[f"class{suffix}"]) for row in good] == classes_Rk[:, place].tolist()
        assert [row[f"label{suffix}"] for row in good] == [LABELS[index] for index in classes_Rk[:, place]]
        got_R = torch.tensor([float(row[f"probability{suffix}"]) for row in good])
        torch.testing.assert_close(got_R, probabilities_Rk[:, place], rtol=0, atol=1e-5)
    if kind != "csv":
        torch.testing.assert_close(torch.tensor([row["logits"] for row in good]), logits_RK, rtol=0, atol=1e-4)
    assert "2 images have no answer: see the column error" in lines
    assert f"images per width: {width or '1'}: 21" in lines
    assert list((slice_predict.folder / "new").iterdir()) == [slice_predict.folder / "new" / f"table.{kind}"]


def test_columns_are_the_same_in_every_kind() -> None:
    names = columns("index", True, 2, True)
    assert list(names) == [
        *("index", "target", "label", "class", "probability", "label_2", "class_2", "probability_2"),
        *("width", "error", "logits"),
    ]
    assert list(columns("path", False, 1, False)) == ["path", "label", "class", "probability", "width", "error"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", PARQUET])
def test_the_same_rows_are_the_same_file_however_they_are_parted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = 100
    monkeypatch.setattr(output, "_ROW_GROUP", group)
    names = columns("index", False, 1, False)
    rows = [
        {"index": n, "label": f'"{n}",\n', "class": n % 7, "probability": n / 3, "width": "1/2"}
        for n in range(2 * group + 10)
    ]
    form = format_of(tmp_path / f"x.{kind}", False)
    tables = []
    for cuts in ([0, len(rows)], [0, 5, group, group + 1, len(rows)]):
        parts = [tmp_path / f"{cut}-{len(cuts)}" for cut in cuts[:-1]]
        for part, start, end in zip(parts, cuts, cuts[1:], strict=False):
            form.write(rows[start:end], names, part)
        form.join(parts, names, tmp_path / f"x.{kind}")
        tables.append((tmp_path / f"x.{kind}").read_bytes())
    assert tables[0] == tables[1]
    assert len(rows_of(tmp_path / f"x.{kind}")) == len(rows)


def test_a_labelled_set_gives_its_accuracy_too(slice_predict: Command, tmp_path: Path) -> None:
    for number, label in ((n, LABELS[n % 3].replace(", ", "")) for n in range(12)):
        for split in ("train", "val"):
            path = tmp_path / "set" / split / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), 20 * number).save(path)
    lines = slice_predict("table.jsonl", "--split", "val", images=tmp_path / "set")
    rows = rows_of(slice_predict.folder / "table.jsonl")
    assert [row["index"] for row in rows] == list(range(12))
    assert sorted({row["target"] for row in rows}) == sorted(LABELS)
    hits = sum(row["target"] == row["label"] for row in rows)
    assert 0 < hits < 12
    assert f"top-1 on these images: {100 * hits / 12:.2f} % of 12" in lines
    assert slice_predict.refused("x.csv", images="fashion-mnist").endswith("has 10 classes and the model in "
        f"{slice_predict.run} 3")  # fmt: skip


def test_an_answer_that_is_not_finite_is_an_error(slice_predict: Command, tmp_path: Path) -> None:
    broken = saved_run(tmp_path / "broken")
    model = slicevit.from_pretrained(broken)
    with torch.no_grad():
        model.head.bias.fill_(float("inf"))
    save_pretrained(model, broken, label_names=LABELS)
    slice_predict("table.csv", "--max-bad-share", "1", run=broken)
    rows = rows_of(slice_predict.folder / "table.csv")
    said = [row["error"] for number, row in enumerate(rows) if number not in BAD]
    assert set(said) == {"the model's answer is not finite"}


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_shown_on_the_way(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slicevit.cli.predict._SAY_SECONDS", 0.0)
    shown = io.StringIO()
    with _Bar(Console(file=shown, force_terminal=terminal, width=100)) as bar:
        bar.show(Tally(done=10, widths={"1/4": 10}), 100)
        bar.show(Tally(done=20, widths={"1/4": 10, "1/2": 10}), 100)
        bar.show(Tally(done=30, widths={"1/4": 10, "1/2": 20}), 100)
    assert re.search(r"30/100 [\d,]+ images/s ends \d\d:\d\d:\d\d width 1/2", shown.getvalue())
    assert "10/100" not in shown.getvalue() or terminal  # what earlier processes did is not said again


# --- budget ----------------------------------------------------------------------------------------------


def test_a_budget_that_is_ample_ends_at_the_most_accurate_width(slice_predict: Command) -> None:
    lines = slice_predict("table.csv", "--budget", "1000", "--batch-size", "1")
    widths = [row["width"] for row in rows_of(slice_predict.folder / "table.csv") if row["width"]]
    assert widths[:2] == ["1/4", "1/4"]
    assert widths[-1] == "1"
    estimate = sum(WIDTHS[width] for width in widths) / len(widths)
    assert f"estimated top-1, from the run's results: {estimate:.2f} %" in lines
    (line,) = (line for line in lines if line.startswith("budget"))
    assert line.startswith("budget kept: ")
    assert line.endswith(" s used of 1000 s")


def test_a_budget_that_is_too_small_is_said_and_everything_is_answered(slice_predict: Command) -> None:
    lines = slice_predict("table.csv", "--budget", "0.000001", "--batch-size", "1")
    assert lines[0].startswith("as it goes now, the budget of 1e-06 s cannot be kept: width 1/4 takes ")
    assert "images per width: 1/4: 21" in lines
    assert any(line.startswith("budget NOT kept: ") for line in lines)


def test_a_budget_counts_from_the_start_of_the_command(slice_predict: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that is the command; in one that calls it, such as this, from the call."""
    began = psutil.Process().create_time()
    command = ["predict", str(slice_predict.run), "FOLDER", "--budget", "9"]
    assert _loading(command[1:]) == 0.0
    monkeypatch.setattr(sys, "argv", ["slicevit", *command])
    assert _loading(command[1:]) == pytest.approx(time.time() - began, abs=1.0)


def test_a_budget_needs_accuracies(slice_predict: Command, tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run")
    (run / "results.json").unlink()
    assert (
        f"--budget needs the accuracy and costs of the widths: run slicevit eval {run} first"
        in slice_predict.refused("table.csv", "--budget", "5", run=run)
    )


@pytest.mark.parametrize(
    ("out", "flags", "said"),
    [
        ("table.txt", [], "end it in .csv, .jsonl, .parquet"),
        ("table.csv", ["--logits"], "--logits: a row of .csv has no place for them"),
        ("table.csv", ["--top-k", "4"], "--top-k 4: the model has 3 classes"),
        ("table.csv", ["--top-k", "0"], "--top-k 0: give 1 or more"),
        ("table.csv", ["--batch-size", "0"], "--batch-size 0: give 1 or more"),
        ("table.csv", ["--workers", "-1"], "--workers -1: give 0 or more"),
        ("table.csv", ["--max-bad-share", "nan"], "--max-bad-share nan: give a share from 0 to 1"),
        ("table.csv", ["--width", "1/3"], "--width 1/3: width 1/3 is none of the model's, 1/4, 1/2, 3/4, 1"),
        ("table.csv", ["--width", "wide"], "--width wide: 'wide' is not a width"),
        (
            "table.csv",
            ["--width", "1", "--budget", "5"],
            "--width and --budget each say which widths answer: give one of them",
        ),
        ("table.csv", ["--budget", "0"], "--budget 0: give a number of seconds above 0"),
        ("table.csv", ["--split", "test"], "--split test: give train or val"),
        ("table.csv", ["--engine", "abacus"], "--engine abacus is none of torch"),
        ("table.csv", ["--widht", "1"], "--widht is no option of slicevit predict; near it: --width"),
    ],
    ids=str,
)
def test_bad_settings(out: str, flags: list[str], said: str, slice_predict: Command) -> None:
    assert said in slice_predict.refused(out, *flags)
    assert not slice_predict.folder.exists()


def test_bad_places(slice_predict: Command, tmp_path: Path) -> None:
    assert "odd: no such folder or data set" in slice_predict.refused("table.csv", images=tmp_path / "odd")
    assert "odd is neither a folder nor" in slice_predict.refused("table.csv", run=tmp_path / "odd")
    (tmp_path / "empty").mkdir()
    assert "empty holds no images" in slice_predict.refused("table.csv", images=tmp_path / "empty")


def test_parquet_without_pyarrow_names_the_extra(slice_predict: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find_spec(name))
    said = slice_predict.refused("table.parquet")
    assert said.endswith('needs pyarrow, not installed here: pip install "slicevit[parquet]"')
