"""`slicevit profile`: what is measured and written, what is read back, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from engine_runs import WIDTHS, save

from slicevit import cli
from slicevit.cli.profile import ProfileArgs
from slicevit.evaluation.results import WidthResult, write_results
from slicevit.runtime import measured, peak
from slicevit.runtime.engine import ENGINES
from slicevit.runtime.measured import profile_path, profile_run, read_profile, read_table

pytestmark = pytest.mark.usefixtures("one_thread")

TOP1 = dict(zip(WIDTHS, (70.0, 80.0, 79.0, 82.0), strict=True))
RESULT = WidthResult(
    "vit_tiny", "scala", "1", True, 32, 0.0, 100.0, 90.0, 10.0, 1.0, 0.01, 0.001, None, 16, 1.0, "bicubic", 9
)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("runs") / "tiny")
    write_results(
        folder, [replace(RESULT, width=width, top1=top1, top1_err=100 - top1) for width, top1 in TOP1.items()]
    )
    return folder


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "run"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[float]]], None]:
    """`clock(times)`: what the timing of each width gives, whatever the batch."""

    def set_(times: dict[str, list[float]]) -> None:
        def in_turns(calls: dict[str, Callable[[], object]], seconds: float, progress: Any) -> dict[str, list[float]]:
            for call in calls.values():
                call()
            return {name: times[name] for name in calls}

        monkeypatch.setattr(measured, "time_in_turns", in_turns)

    return set_


# --- what is written ---------------------------------------------------------------------------------------


def test_every_width_is_measured_and_comes_back_for_the_policies(run: Path) -> None:
    told: list[tuple[str, float]] = []
    table = profile_run(run, batch=(2, 1, 2), seconds=0.01, progress=lambda *said: told.append(said))
    profile = read_profile(run)
    assert [str(row.width) for row in profile.rows] == list(WIDTHS)
    for row, stored in zip(profile.rows, table["rows"], strict=True):
        assert row.top1 == TOP1[str(row.width)]
        assert set(row.latency_ms) == {1, 2}
        assert all(stored["p99_ms"][str(size)] >= latency > 0 for size, latency in row.latency_ms.items())
        assert all(calls >= 3 for calls in stored["calls"].values())
    assert read_profile(run, latency="p99_ms").rows[0].latency_ms == {
        int(size): latency for size, latency in table["rows"][0]["p99_ms"].items()
    }
    assert read_table(run, "torch", "cpu") == table
    assert (table["engine"], table["device"], table["precision"]) == ("torch", "cpu", "float32")
    assert {"date", "hardware", "threads", "versions"} <= set(table)
    assert {"slicevit", "torch", "timm"} <= set(table["versions"])
    assert all(0 <= share <= 1 for _, share in told)
    assert {what for what, _ in told} >= {"width 1/4 is made ready", "batch 1 is timed", "batch 2 is timed"}


def test_weights_are_those_of_the_width_and_memory_adds_the_call(
    run: Path, clock: Callable[[dict[str, list[float]]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import slicevit

    clock({width: [1.0] for width in WIDTHS})
    batches: list[int] = []

    def growth(call: Any, device: str) -> int:
        batches.append(len(call.args[0]))
        return 3_000_000

    monkeypatch.setattr(measured, "peak_growth", growth)
    rows = profile_run(run, batch=(1, 4))["rows"]
    model = slicevit.from_pretrained(run)
    for row in rows:
        weights = 4e-6 * sum(parameter.numel() for parameter in model.to_timm(row["width"]).parameters())
        assert row["weights_mb"] == pytest.approx(weights)
        assert (row["call_mb"], row["memory_mb"]) == (3.0, pytest.approx(weights + 3.0))
    assert batches == [4] * len(WIDTHS)
    monkeypatch.setattr(measured, "peak_growth", lambda call, device: None)  # a system that does not tell
    profile_run(run, batch=(1,))
    assert read_profile(run).rows[0].memory_mb is None


def test_energy_is_that_of_an_image_where_the_machine_counts_it(
    run: Path,
    clock: Callable[[dict[str, list[float]]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock({width: [1.0] for width in WIDTHS})
    used = [0.0]
    real = measured.Engine.run

    def run_and_count(self: Any, images_BCHW: Any, width: Any) -> Any:
        used[0] += len(images_BCHW) * float(width)
        return real(self, images_BCHW, width)

    monkeypatch.setattr(measured.Engine, "run", run_and_count)
    monkeypatch.setattr(measured, "joules", lambda device: lambda: used[0])
    cli.main(["profile", str(run), "--batch", "1,4", "--seconds", "0.01"])
    assert "mJ/image" in capsys.readouterr().out
    for row in read_profile(run).rows:
        assert row.energy_j == pytest.approx(float(row.width))
    assert [str(row.width) for row in read_profile(run).within(max_energy=0.6).rows] == ["1/4", "1/2"]
    monkeypatch.setattr(measured, "joules", lambda device: lambda: 5.0)  # a counter that stands still
    assert profile_run(run, batch=(1,), seconds=0.01)["rows"][0]["energy_j"] is None


def test_median_percentile_and_what_is_beaten(run: Path, clock: Callable[[dict[str, list[float]]], None]) -> None:
    times = [float(k) for k in range(1, 102)]  # median 51, 99th percentile 100
    clock({"1/4": times, "1/2": [60.0], "3/4": [61.0], "1": [62.0]})
    rows = {row["width"]: row for row in profile_run(run, batch=(1, 4))["rows"]}
    assert (rows["1/4"]["latency_ms"], rows["1/4"]["p99_ms"]) == ({"1": 51.0, "4": 51.0}, {"1": 100.0, "4": 100.0})
    assert {width: row["beaten_by"] for width, row in rows.items()} == {
        "1/4": None,
        "1/2": None,
        "3/4": "1/2",
        "1": None,
    }
    assert [str(row.width) for row in read_profile(run).frontier().rows] == ["1/4", "1/2", "1"]


def test_each_engine_and_precision_has_a_file_of_its_own(
    run: Path, clock: Callable[[dict[str, list[float]]], None]
) -> None:
    clock({width: [1.0] for width in WIDTHS})
    profile_run(run, batch=(1,))
    clock({width: [2.0] for width in WIDTHS})
    profile_run(run, batch=(1,), precision="bfloat16", device="cpu")
    assert sorted(path.name for path in (run / "profiles").iterdir()) == ["torch-cpu-bf16.json", "torch-cpu.json"]
    assert read_profile(run).rows[0].latency_ms == {1: 1.0}
    assert read_profile(run, precision="bfloat16").rows[0].latency_ms == {1: 2.0}
    assert profile_path(run, "openvino", "cpu", "bfloat16") == run / "profiles" / "openvino-cpu-bf16.json"


@pytest.mark.skipif(not (peak._SELF / "clear_refs").exists(), reason="needs Linux")
def test_the_peak_of_a_call_is_seen_after_it_is_over() -> None:
    def call() -> None:
        bytearray(b"\1" * 50_000_000)[0] = 2  # both are gone when it returns

    grown = peak.peak_growth(call, "cpu")
    assert grown is not None
    assert 90e6 < grown < 130e6
    assert (peak.peak_growth(lambda: None, "cpu") or 0) < 5e6


def test_a_system_that_tells_nothing_still_runs_the_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peak, "_SELF", tmp_path / "none")
    called: list[int] = []
    assert peak.peak_growth(lambda: called.append(1), "cpu") is None
    assert called == [1]


# --- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [("--batch", "1", "4"), ("--batch", "1,4")])
def test_the_command_prints_the_table(
    batch: tuple[str, ...],
    run: Path,
    clock: Callable[[dict[str, list[float]]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock({"1/4": [1.0], "1/2": [2.0], "3/4": [2.5, 3.5], "1": [4.0]})
    cli.main(["profile", str(run), *batch, "--seconds", "0.01", "--device", "cpu", "--threads", "1"])
    said = capsys.readouterr().out
    (beaten,) = [line for line in said.splitlines() if "3/4" in line]
    assert "79.00" in beaten
    assert "3.00 (3.49)" in beaten
    assert beaten.rstrip("│ ").endswith("1/2")
    assert "torch-cpu.json" in said
    assert set(read_profile(run).rows[0].latency_ms) == {1, 4}


@pytest.mark.parametrize(("times", "said"), [([1.0, 1.0, 1.0, 9.0], True), ([1.0, 1.0, 1.0, 1.5], False)])
def test_a_machine_that_others_use_is_said(
    times: list[float],
    said: bool,
    run: Path,
    clock: Callable[[dict[str, list[float]]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock(dict.fromkeys(("1/4", "1/2", "3/4", "1"), times))
    cli.main(["profile", str(run), "--batch", "1", "--seconds", "0.01", "--device", "cpu", "--threads", "1"])
    assert ("the 99th percentile is 8.8 times the median" in capsys.readouterr().out) == said


def test_the_command_offers_every_engine() -> None:
    assert get_args(get_type_hints(ProfileArgs)["engine"]) == ENGINES


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_what_breaks_it_off_leaves_the_earlier_profile(
    failure: type[BaseException],
    run: Path,
    clock: Callable[[dict[str, list[float]]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock({width: [1.0] for width in WIDTHS})
    profile_run(run, batch=(1,))
    before = profile_path(run, "torch", "cpu").read_bytes()

    def broken_off(*args: Any, **options: Any) -> None:
        raise failure

    monkeypatch.setattr(measured, "time_in_turns", broken_off)
    with pytest.raises(SystemExit if failure is KeyboardInterrupt else failure):
        cli.main(["profile", str(run), "--batch", "1"])
    assert profile_path(run, "torch", "cpu").read_bytes() == before
    assert [path.name for path in (run / "profiles").iterdir()] == ["torch-cpu.json"]


# --- refusals ----------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *flags: str | Path) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["profile", *map(str, flags)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return str(line)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch", "0"], "--batch 0: give one or more batch sizes of 1 or more"),
        (["--seconds", "0"], "--seconds 0.0: give the seconds"),
        (["--seconds", "nan"], "--seconds nan: give the seconds"),
        (["--engine", "tflite"], "--engine"),
        (["--engine", "onnxruntime", "--device", "cuda"], "--device cuda: engine onnxruntime runs on the cpu alone"),
        (["--engine", "onnxruntime", "--precision", "bfloat16"], "engine onnxruntime computes in float32 alone"),
        (["--sekonds", "1"], "--sekonds is no option of slicevit profile; near it: --seconds"),
    ],
)
def test_flags_that_cannot_be_had(flags: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refusal(capsys, run, *flags)
    assert not (run / "profiles").exists()


def test_a_run_without_accuracy(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(rows[1:]))
    assert f"no accuracy of width 1/4 in its results: run `slicevit eval {run}` again" in refusal(capsys, run)
    (run / "results.json").unlink()
    assert f"run `slicevit eval {run}` first" in refusal(capsys, run)
    assert "is no folder" in refusal(capsys, "owner/name")


def test_a_profile_that_is_not_there_or_broken(run: Path, clock: Callable[[dict[str, list[float]]], None]) -> None:
    command = f"slicevit profile {run} --engine openvino --device cpu --precision bfloat16"
    with pytest.raises(ValueError, match="has no profile of engine openvino on the cpu") as missing:
        read_profile(run, "openvino", precision="bfloat16")
    assert command in str(missing.value)
    clock({width: [1.0] for width in WIDTHS})
    table = profile_run(run, batch=(1,))
    path = profile_path(run, "torch", "cpu")
    for broken in ("{", "[]", "{}", json.dumps(table | {"rows": []}), json.dumps(table | {"rows": [{"width": "1"}]})):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"torch-cpu.json is broken .*run `slicevit profile .* again"):
            read_profile(run)


def test_the_row_that_beats_another_is_the_most_accurate_one() -> None:
    from slicevit.runtime.profile import Profile

    profile = Profile.parse(
        {"width": width, "top1": top1, "latency_ms": {1: latency}}
        for width, top1, latency in (("1/4", 70, 1), ("1/2", 82, 1.5), ("3/4", 81, 2), ("1", 80, 3))
    )
    better = {str(row.width): profile.better_than(row) for row in profile.rows}
    assert {width: row and row.width for width, row in better.items()} == {
        "1/4": None, "1/2": None, "3/4": Fraction(1, 2), "1": Fraction(1, 2),
    }  # fmt: skip
