import csv
import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_runs import width_result
from rich.console import Console

from slicevit.evaluation.results import (
    METRICS_COLUMNS,
    MetricsLog,
    macs_unit,
    read_metrics,
    read_results,
    results_table,
    short,
    write_results,
)
from slicevit.files import write_text

ROWS = [
    width_result("1/4"),
    dataclasses.replace(width_result("3/8", trained=False), latency_ms=None),
    width_result("1"),
]


def test_results_round_trip(tmp_path: Path) -> None:
    write_results(tmp_path, ROWS)
    assert read_results(tmp_path) == ROWS
    with (tmp_path / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["width"] for row in table] == ["1/4", "3/8", "1"]
    assert float(table[2]["top1"]) == ROWS[2].top1
    assert table[1]["latency_ms"] == ""
    assert table[1]["trained"] == "False"


def test_a_loss_that_diverged_is_still_json(tmp_path: Path) -> None:
    write_results(tmp_path, [dataclasses.replace(ROWS[0], loss=math.nan)])
    assert "NaN" not in (tmp_path / "results.json").read_text()
    assert math.isnan(read_results(tmp_path)[0].loss)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"top1"', '"top"'),
        lambda text: text.replace('"width": "1"', '"width": 1'),
        lambda text: text.replace('"width": "1"', '"width": "1/0"'),
        lambda text: text.replace('"1/4"', '"quarter"'),
        lambda _: "{}",
        lambda _: "[3]",
    ],
)
def test_broken_results_name_the_file(tmp_path: Path, change: Callable[[str], str]) -> None:
    write_results(tmp_path, ROWS)
    path = tmp_path / "results.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=r"results\.json is broken"):
        read_results(tmp_path)


def test_missing_results_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"results\.json is missing"):
        read_results(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path, ROWS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half_then_fail(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half_then_fail)
        with pytest.raises(ValueError, match=r"results.csv cannot be written \(no space"):
            write_results(tmp_path, ROWS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("replace failed")))
        with pytest.raises(ValueError, match="replace failed"):
            write_results(tmp_path, ROWS[:1])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_write_text_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_text(path, "old")
    write_text(path, "neu ü\n")
    assert path.read_bytes() == "neu ü\n".encode()
    assert list(path.parent.iterdir()) == [path]


def metrics(epoch: int, **values: float) -> list[dict[str, object]]:
    return [{"epoch": epoch, "step": 100 * epoch, "width": width, **values} for width in ("1/4", "1")]


def test_metrics_append_and_resume(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.append(metrics(1, train_loss=2.5, top1=10, lr=1e-3))
    log.append(metrics(2, train_loss=math.nan))
    resumed = MetricsLog(tmp_path)
    resumed.append(metrics(3, top1=30.25))
    rows = read_metrics(tmp_path)
    assert [(row["epoch"], row["step"], row["width"]) for row in rows] == [
        (epoch, 100 * epoch, width) for epoch in (1, 2, 3) for width in ("1/4", "1")
    ]
    assert rows[0] == dict.fromkeys(METRICS_COLUMNS) | metrics(1, train_loss=2.5, top1=10.0, lr=1e-3)[0]
    assert math.isnan(rows[2]["train_loss"])
    assert rows[4]["top1"] == 30.25
    assert rows[4]["train_loss"] is None


def test_metrics_truncate_drops_what_came_after(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for epoch in (1, 2, 3):
        log.append(metrics(epoch))
    log.truncate(200)
    assert [row["epoch"] for row in read_metrics(tmp_path)] == [1, 1, 2, 2]
    log.append(metrics(3))
    assert [row["epoch"] for row in read_metrics(tmp_path)] == [1, 1, 2, 2, 3, 3]


def test_metrics_without_a_file_are_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("row", [{"epoch": 1, "step": 1}, metrics(1, speed=3)[0]])
def test_metrics_refuse_other_columns(tmp_path: Path, row: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"metrics\.csv needs epoch, step and width"):
        MetricsLog(tmp_path).append([row])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "epoch,step\n1,2\n",
        ",".join(METRICS_COLUMNS) + "\n1,2,1/4,0.5\n",
        ",".join(METRICS_COLUMNS) + "\n1,2,1/4,,,,,,,9\n",
        ",".join(METRICS_COLUMNS) + "\none,2,1/4,,,,,,\n",
        ",".join(METRICS_COLUMNS) + "\n1,2,wide,,,,,,\n",
    ],
)
def test_broken_metrics_name_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.csv is broken"):
        read_metrics(tmp_path)


def test_table_fits_80_columns_and_marks_untrained_widths() -> None:
    rows = [*ROWS, width_result("31/32", trained=False)]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    table = results_table(rows, "Results [bold]of[/bold] a run")
    assert console.measure(table).minimum <= console.measure(table).maximum <= 80
    console.print(table)
    console.file.close()
    text = console.export_text()
    assert "Results [bold]of[/bold] a run" in text
    lines = text.splitlines()
    assert [line.split("│")[1].strip() for line in lines if "│" in line] == [
        "1/4",
        "3/8 not trained",
        "31/32 not trained",
        "1",
    ]
    full = next(line for line in lines if line.startswith("│ 1 "))
    assert [cell.strip() for cell in full.split("│")[2:-1]] == [
        "384",
        "22.1",
        "4.61",
        "76.50",
        "93.50",
        "6.60",
    ]


def test_macs_in_the_unit_that_reads_well() -> None:
    assert macs_unit(ROWS) == ("GMACs", 1)
    assert macs_unit(ROWS[:2]) == ("MMACs", 1000)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.08621, "0.0862"), (5.526, "5.53"), (22.05, "22.1"), (304.3, "304"), (1134.8, "1135")],
)
def test_short(value: float, text: str) -> None:
    assert short(value) == text


def test_results_json_is_a_plain_list(tmp_path: Path) -> None:
    write_results(tmp_path, ROWS)
    assert [row["channels"] for row in json.loads((tmp_path / "results.json").read_text())] == [96, 144, 384]
