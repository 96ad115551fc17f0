"""A run survives: kills, signals, a full disk, broken files, losses that are not finite.

Most runs are forks of a driver (resume_driver.py) that has imported slicevit once, because the import takes longer
than the run. One kill and one pair of signals go through `python -m slicevit`.
"""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import leaves, read_checkpoint
from driving import driving
from PIL import Image
from safetensors.torch import load_file

import slicevit
from slicevit import cli

CLASSES, PER_CLASS, BATCH, EPOCHS = 4, 16, 8, 4
EPOCH_STEPS = CLASSES * PER_CLASS // BATCH
STEPS = EPOCHS * EPOCH_STEPS
WIDTHS = 4
RANDOM_KILLS = 12  # with those at chosen places and one of a real process more than 20 in all
MODEL_ARGS = {"img_size": 16, "patch_size": 8, "in_chans": 3, "embed_dim": 32, "depth": 2, "num_heads": 2}
FLAGS = [
    *("--model", "vit_tiny_patch16_224", "--model-args", *(f"{k}={v}" for k, v in MODEL_ARGS.items())),
    *("--grid", "1/4:1:1/4", "--epochs", f"{EPOCHS}", "--batch-size", f"{BATCH}", "--full-width-first", "0.125"),
    *("--warmup-epochs", "1", "--transfer-ramp", "0.5", "--ema-decay", "0.9", "--drop-path", "0.2"),
    *("--mixup", "0.8", "--cutmix", "1.0", "--smoothing", "0.1", "--random-erasing", "0.25"),
    *("--rand-augment", "rand-m9-mstd0.5-inc1", "--checkpoint-steps", "2", "--eval-every", "2"),
    *("--device", "cpu", "--threads", "1"),
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "200"}
DRIVER = Path(__file__).with_name("resume_driver.py")

Runner = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_images(folder)
    return folder


def write_images(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for split, count in (("train", PER_CLASS), ("val", 4)):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
            for k in range(count):
                pixels = draw.integers(0, 160, (16, 16, 3), dtype=np.uint8)
                pixels[..., label % 3] += np.uint8(20 * label)
                Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{k}.png")


@pytest.fixture(scope="module")
def execute(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """`execute(argv, **job)` runs the command line in a fork of the driver and tells how it ended."""
    log = tmp_path_factory.mktemp("logs") / "log"
    with driving(str(DRIVER), env=ENVIRONMENT) as ask:
        yield lambda argv, **job: ask({"argv": argv, "log": str(log), **job})


def train(data: Path, out: Path, *flags: str, workers: int = 2) -> list[str]:
    return ["train", "--data", str(data), "--out", str(out), *FLAGS, "--workers", str(workers), *flags]


def go_on(run: Path, data: Path, *flags: str) -> list[str]:
    """The command that takes up `run` again: before its config.json there is no run yet."""
    return ["train", "--resume", str(run)] if (run / "config.json").exists() else train(data, run, *flags)


def real_process(argv: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "slicevit", *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str], seconds: float = 90) -> None:
    """Until the process has written one, the first or a new one."""

    def written() -> int | None:
        return path.stat().st_ino if path.exists() else None

    path = run / "checkpoint.pt"
    before, end = written(), time.monotonic() + seconds
    while written() == before:
        assert process.poll() is None, "the run ended before it was to be stopped"
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="module")
def reference(data: Path, execute: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run never stopped, with its pictures."""
    out = tmp_path_factory.mktemp("reference") / "run"
    ended = execute(train(data, out), slow_end=True)
    assert ended["status"] == 0, ended["text"]
    return out


def results_without_latency(run: Path) -> list[dict[str, str]]:
    with open(run / "results.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "latency_ms"} for row in csv.DictReader(file)]


def assert_same_end(run: Path, reference: Path) -> None:
    """Bitwise the same weights, checkpoint and metrics."""
    assert (run / "metrics.csv").read_text() == (reference / "metrics.csv").read_text()
    ours, theirs = load_file(run / "model.safetensors"), load_file(reference / "model.safetensors")
    assert {k: leaves(v) for k, v in ours.items()} == {k: leaves(v) for k, v in theirs.items()}
    ours, theirs = leaves(read_checkpoint(run)), leaves(read_checkpoint(reference))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert (run / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert (run / "config.json").read_text() == (reference / "config.json").read_text()
    assert results_without_latency(run) == results_without_latency(reference)


def assert_one_sentence(text: str, *parts: str) -> None:
    """One message of the command line, no traceback, with all of `parts` in it."""
    said = [line for line in text.splitlines() if line.startswith("slicevit: ")]
    assert "Traceback" not in text, text
    assert len(said) == 1, text
    for part in parts:
        assert re.search(part, said[0]), f"{part!r} is not in: {said[0]}"


def finish(run: Path, data: Path, execute: Runner, reference: Path, *flags: str) -> None:
    ended = execute(go_on(run, data, *flags))
    assert ended["status"] == 0, ended["text"]
    assert_same_end(run, reference)


# SIGKILL


def test_the_reference_trained_something(reference: Path) -> None:
    with open(reference / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == sorted(list(range(EPOCHS)) * WIDTHS)
    assert {row["width"] for row in rows} == {"1/4", "1/2", "3/4", "1"}
    state = read_checkpoint(reference)
    assert state["step"] == STEPS
    assert leaves(state["model"]) != leaves(state["ema"])


def test_a_checkpoint_holds_all_that_resuming_needs(reference: Path) -> None:
    state = read_checkpoint(reference)
    moments = state["optimizer"]["state"]
    assert len(moments) == len(slicevit.create_model("vit_tiny_patch16_224", "1:1:1", **MODEL_ARGS).state_dict())
    assert all(float(moment["step"]) == STEPS for moment in moments.values())
    shown = load_file(reference / "model.safetensors")  # what is evaluated and saved is the average
    assert leaves(shown) == leaves(state["ema"])


@pytest.mark.slow
def test_killed_at_random_moments(data: Path, execute: Runner, reference: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("SLICEVIT_KILL_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
    print(f"SLICEVIT_KILL_SEED={seed}")
    draw = random.Random(seed)
    unbroken = execute(train(data, tmp_path / "timed"))
    assert_same_end(tmp_path / "timed", reference)
    kills, chain, run, moments = 0, 0, tmp_path / "run0", []
    while kills < RANDOM_KILLS:
        delay = draw.uniform(0, 0.5 * unbroken["seconds"])
        ended = execute(go_on(run, data), signal=signal.SIGKILL, delay=delay)
        assert ended["status"] in (0, -signal.SIGKILL), ended["text"]
        if ended["status"]:
            kills += 1
            moments.append(read_checkpoint(run)["step"] if (run / "checkpoint.pt").exists() else 0)
        else:  # it was ready before its time had come: another run is killed on
            assert_same_end(run, reference)
            chain += 1
            run = tmp_path / f"run{chain}"
    print(f"steps of the checkpoints at the kills: {moments}")
    finish(run, data, execute, reference)


@pytest.mark.slow
def test_a_real_process_killed_and_signalled(data: Path, reference: Path, tmp_path: Path) -> None:
    """SIGKILL, then Ctrl-C, which the whole process group gets, then SIGTERM, then the end."""
    run = tmp_path / "run"
    process = real_process(train(data, run))
    step = 0
    for number, send in ((signal.SIGKILL, os.kill), (signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)):
        wait_for_checkpoint(run, process)
        send(process.pid, number)
        _, text = process.communicate(timeout=60)
        if number == signal.SIGKILL:  # its orphaned workers may well complain
            assert process.returncode == -signal.SIGKILL
        else:
            assert "Traceback" not in text, text
            assert process.returncode == 128 + number, text
            assert f"slicevit train --resume {run}" in text
            assert step < read_checkpoint(run)["step"] < STEPS
        step = read_checkpoint(run)["step"]
        process = real_process(["train", "--resume", str(run)])
    _, text = process.communicate(timeout=200)
    assert process.returncode == 0, text
    assert_same_end(run, reference)
    assert {path.name for path in run.iterdir()} >= {path.name for path in reference.iterdir()}


# steps 2, 4, 6, 8, then 8 again at the epoch's end: the third checkpoint is in mid-epoch, the fifth closes the epoch
PLACES: list[dict[str, dict[str, Any]]] = [  # one run is killed at all the places of an entry, in turn
    {
        "between the first weights and their configuration": {"call": "replace", "file": "config.json", "nth": 1},
        "half of the first checkpoint": {"call": "save", "nth": 1},
        "half of a checkpoint in mid-epoch": {"call": "save", "nth": 3},
        "before a checkpoint is on the disk": {"call": "fsync", "nth": 7},
        "before the results": {"call": "replace", "file": "results.csv", "nth": 1},
    },
    {
        "before a checkpoint takes its place": {"call": "replace", "file": "checkpoint.pt", "nth": 5},
        "after a checkpoint took its place": {"call": "replace", "file": "checkpoint.pt", "nth": 5, "after": True},
        "between two widths of a step": {"call": "backward", "nth": 4 * 5 + 2},
        "before the weights take their place": {"call": "replace", "file": "model.safetensors", "nth": 1},
    },
    {
        "between the weights and the metrics": {"call": "replace", "file": "metrics.csv", "nth": 3},
        "after the metrics": {"call": "replace", "file": "metrics.csv", "nth": 3, "after": True},
    },
]


@pytest.mark.slow
@pytest.mark.parametrize("places", PLACES, ids=["checkpoint", "step", "metrics"])
def test_killed_at_chosen_places(
    places: dict[str, dict[str, Any]], data: Path, execute: Runner, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for place, fault in places.items():
        ended = execute(go_on(run, data), fault=fault | {"do": "kill"})
        assert ended["status"] == -signal.SIGKILL, f"{place}: {ended['text']}"
        if (run / "checkpoint.pt").exists():
            read_checkpoint(run)  # whole, whenever it is there
    finish(run, data, execute, reference)


GRID_CHANGE = ("--grid-change", "1/8@50%", "--eval-every", "1", "--epochs", "2")


@pytest.fixture(scope="module")
def changed(data: Path, execute: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run never stopped whose grid changes between its two epochs."""
    out = tmp_path_factory.mktemp("changed") / "run"
    ended = execute(train(data, out, *GRID_CHANGE))
    assert ended["status"] == 0, ended["text"]
    with open(out / "metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0"] * 4 + ["1"] * 7
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        pytest.param({"call": "save", "nth": 3}, id="before"),
        pytest.param({"call": "replace", "file": "metrics.csv", "nth": 2}, id="at the end of the epoch before"),
        pytest.param({"call": "save", "nth": 8}, id="after"),
    ],
)
def test_killed_around_a_change_of_the_grid(
    place: dict[str, Any], data: Path, execute: Runner, changed: Path, tmp_path: Path
) -> None:
    """A resumed run measures an epoch on the grid that it was trained on."""
    run = tmp_path / "run"
    ended = execute(train(data, run, *GRID_CHANGE), fault=place | {"do": "kill"})
    assert ended["status"] == -signal.SIGKILL, ended["text"]
    finish(run, data, execute, changed, *GRID_CHANGE)


@pytest.mark.slow
def test_a_separate_run_is_resumed_by_its_own_folder(data: Path, execute: Runner, tmp_path: Path) -> None:
    flags = ("--method", "separate", "--epochs", "1", "--grid", "1/2:1:1/2")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert execute(train(data, whole, *flags, workers=0))["status"] == 0
    ended = execute(train(data, run, *flags, workers=0), fault={"call": "save", "nth": 8, "do": "kill"})
    assert ended["status"] == -signal.SIGKILL, ended["text"]
    ended = execute(["train", "--resume", str(run)])
    assert ended["status"] == 0, ended["text"]
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert results_without_latency(run) == results_without_latency(whole)


def test_a_separate_run_stopped_by_a_signal_names_its_own_folder(data: Path, execute: Runner, tmp_path: Path) -> None:
    flags = ("--method", "separate", "--epochs", "1", "--grid", "1/2:1:1/2")
    run = tmp_path / "run"
    fault = {"call": "backward", "nth": 3, "do": "sigterm"}
    ended = execute(train(data, run, *flags, workers=0), fault=fault)
    assert ended["status"] == 143, ended["text"]
    assert re.search(rf"--resume {re.escape(str(run))}\s*$", ended["text"], re.MULTILINE), ended["text"]


# Ctrl-C and SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_group(
    number: int, status: int, data: Path, execute: Runner, reference: Path, tmp_path: Path
) -> None:
    """As a terminal, systemd, timeout and slurm send them: the loader's workers get it too."""
    run = tmp_path / "run"
    job = {"path": str(run / "checkpoint.pt"), "delay": 0.05, "group": True, "signal": number}
    ended = execute(train(data, run), **job)
    assert "Traceback" not in ended["text"], ended["text"]
    assert ended["status"] == status, ended["text"]
    assert f"slicevit train --resume {run}" in ended["text"]
    finish(run, data, execute, reference)


def test_a_signal_saves_the_very_step(data: Path, execute: Runner, reference: Path, tmp_path: Path) -> None:
    """Not only what --checkpoint-steps would have saved."""
    run = tmp_path / "run"
    fault = {"call": "backward", "nth": 4 + 4 * 6 + 2, "do": "sigterm"}  # 4 steps of one width, then of four
    ended = execute(train(data, run), fault=fault)
    assert ended["status"] == 143, ended["text"]
    assert read_checkpoint(run)["step"] == 11
    assert "--resume" in ended["text"]
    finish(run, data, execute, reference)


@pytest.mark.slow
def test_a_signal_while_an_epoch_ends(data: Path, execute: Runner, reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = {"call": "replace", "file": "model.safetensors", "nth": 3, "do": "sigterm"}
    ended = execute(train(data, run), fault=fault)
    assert ended["status"] == 143, ended["text"]
    assert f"slicevit train --resume {run}" in ended["text"]
    finish(run, data, execute, reference)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_last_evaluation(
    number: int, status: int, data: Path, execute: Runner, reference: Path, tmp_path: Path
) -> None:
    """All is trained and saved, the results are not yet written: the run still says how to go on."""
    run = tmp_path / "run"
    job = {"path": str(run / "metrics.csv"), "rows": EPOCHS * WIDTHS, "delay": 0.6, "signal": number}
    ended = execute(train(data, run, workers=0), slow_end=True, **job)
    assert not (run / "results.json").exists(), "the signal came too late for this test"
    assert ended["status"] == status, ended["text"]
    assert f"slicevit train --resume {run}" in ended["text"]


# A loss that is not finite


def assert_good(run: Path) -> int:
    """The checkpoint loads, is finite, and its weights give finite logits at every width; returns its step."""
    state = read_checkpoint(run)
    for name in ("model", "ema"):
        model = slicevit.create_model("vit_tiny_patch16_224", "1/4:1:1/4", num_classes=CLASSES, **MODEL_ARGS).eval()
        model.load_state_dict(state[name])
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        for tensor in state[name].values():
            assert tensor.isfinite().all(), f"{name} of the checkpoint of step {state['step']} is not finite"
        with torch.no_grad():
            for width in model.widths:
                logits = model(images, width=width)
                assert logits.isfinite().all(), f"{name} of the checkpoint of step {state['step']} at width {width}"
    return int(state["step"])


@pytest.mark.parametrize("every", [1, 2])
def test_exploding_weights(every: int, data: Path, execute: Runner, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--lr", "1e30", "--checkpoint-steps", str(every), "--full-width-first", "0")
    ended = execute(train(data, run, *flags, workers=0))
    assert ended["status"] == 2, ended["text"]
    assert_one_sentence(ended["text"], r"step \d+", "1/4.*1|1.*1/4", "finite")
    if (run / "checkpoint.pt").exists():
        step = assert_good(run)
        assert_one_sentence(ended["text"], rf"checkpoint of step {step}\b")


def test_a_loss_that_is_not_finite(
    data: Path,
    reference: Path,
    execute: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Gradients of one step turn to nan: nothing is saved after it, and what was there goes on."""
    run, bad_step = tmp_path / "run", 5
    from slicevit.training import trainee

    real, calls = trainee.accumulate_gradients, [0]

    def poisoned(model: Any, *args: Any, **kwargs: Any) -> Any:
        losses = real(model, *args, **kwargs)
        calls[0] += 1
        if calls[0] == bad_step + 1:
            for parameter in model.parameters():
                parameter.grad.fill_(float("nan"))
            losses = {width: loss * float("nan") for width, loss in losses.items()}
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(trainee, "accumulate_gradients", poisoned)
        with pytest.raises(SystemExit) as stop:
            cli.main(train(data, run, workers=0))
    assert stop.value.code == 2
    assert_one_sentence(capsys.readouterr().err, rf"step {bad_step}\b", r"widths? .*\b1\b.*1/4", r"step 4\b", "finite")
    assert assert_good(run) == 4
    ended = execute(["train", "--resume", str(run)])
    assert ended["status"] == 0, ended["text"]
    for name in ("metrics.csv", "model.safetensors"):
        assert (run / name).read_bytes() == (reference / name).read_bytes()


# A full disk

FULL_DISK: dict[str, dict[str, Any]] = {
    "checkpoint, half written": {"call": "save", "nth": 3},
    "checkpoint, at the flush": {"call": "fsync", "nth": 3},
    "checkpoint, at the renaming": {"call": "replace", "file": "checkpoint.pt", "nth": 3},
    "weights": {"call": "replace", "file": "model.safetensors", "nth": 3},
    "metrics": {"call": "replace", "file": "metrics.csv", "nth": 3},
    "configuration": {"call": "replace", "file": "config.json", "nth": 1},
    "results": {"call": "replace", "file": "results.csv", "nth": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("place", FULL_DISK)
def test_a_full_disk(place: str, data: Path, execute: Runner, reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = execute(train(data, run), fault=FULL_DISK[place] | {"do": "enospc"})
    assert ended["status"] == 2, ended["text"]
    assert_one_sentence(ended["text"], re.escape(str(run)), "No space left on device")
    if place.startswith("checkpoint"):
        assert read_checkpoint(run)["step"] == 4
        assert_one_sentence(ended["text"], "--resume")
        assert_good(run)
    assert list(run.glob(".*")) == []  # what was half written is gone
    if place in ("checkpoint, half written", "weights", "metrics"):
        finish(run, data, execute, reference)


@pytest.mark.slow
def test_a_disk_that_takes_no_more(data: Path, execute: Runner, reference: Path, tmp_path: Path) -> None:
    """The kernel itself refuses the rest of a checkpoint."""
    run = tmp_path / "run"
    assert execute(train(data, run), fault={"call": "save", "nth": 4, "do": "kill"})["status"] == -signal.SIGKILL
    ended = execute(["train", "--resume", str(run)], largest_file=(run / "checkpoint.pt").stat().st_size // 2)
    assert ended["status"] == 2, ended["text"]
    assert_one_sentence(ended["text"], "checkpoint.pt", "--resume")
    assert assert_good(run) == 6
    finish(run, data, execute, reference)


@pytest.mark.slow
def test_a_small_disk(data: Path, execute: Runner, reference: Path, tmp_path: Path) -> None:
    """A file system of 1 MB holds one checkpoint of 0.5 MB and not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        ended = execute(train(data, disk / "run"))
        assert ended["status"] == 2, ended["text"]
        assert_one_sentence(ended["text"], "checkpoint.pt", "[Nn]o space left on device|[Ff]ull", "--resume")
        assert assert_good(disk / "run") == 2
        subprocess.run([mount, "-o", "remount,size=16m", disk], check=True)
        finish(disk / "run", data, execute, reference)
    finally:
        subprocess.run(["umount", disk], check=True)


# Broken files and wrong words


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_checkpoint(
    kept: float, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    whole = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(whole[: int(kept * len(whole))])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--resume", str(run)])
    assert stop.value.code == 2
    assert_one_sentence(capsys.readouterr().err, re.escape(str(run / "checkpoint.pt")), "broken")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_model(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    text = (run / "config.json").read_text().replace('"depth": 2', '"depth": 3')
    (run / "config.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--resume", str(run)])
    assert stop.value.code == 2
    assert_one_sentence(capsys.readouterr().err, "--resume", "config.json")


WRONG: dict[str, tuple[list[str], str]] = {
    "model": (["--model", "vit_tinny_patch16_224"], "vit_tinny_patch16_224"),
    "grid": (["--grid", "1/4:1:2/7"], "1/4:1:2/7"),
    "grid, words": (["--grid", "a quarter"], "a quarter"),
    "grid of this model": (["--grid", "1/5:1:1/5"], "1/5:1:1/5.*nearest grid"),
    "grid change": (["--grid-change", "1/8@never"], "--grid-change"),
    "preset": (["--preset", "deit-huge"], "--preset deit-huge.*deit-small-imagenet"),
    "data": (["--data", "/nowhere/at/all"], "--data /nowhere/at/all"),
    "init": (["--init", "/nowhere/at/all"], "/nowhere/at/all"),
    "teacher": (["--teacher", "no_such_teacher"], "--teacher no_such_teacher"),
    "epochs": (["--epochs", "0"], "--epochs"),
    "batch": (["--batch-size", "100000"], "--batch-size"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_words(what: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, said = WRONG[what]
    with pytest.raises(SystemExit) as stop:
        cli.main(train(data, tmp_path / "run", *flags, workers=0))
    assert stop.value.code == 2
    assert_one_sentence(capsys.readouterr().err, said)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "resnet18", "--model-args", "in_chans=3"], "resnet18|ResNet"),
        (["--model", "vit_tiny_patch16_224", "--model-args", "no_such_argument=3"], "no_such_argument"),
        (["--model", "vit_tiny_patch16_224", "--model-args", "depth"], "--model-args.*depth"),
    ],
    ids=["family", "model argument", "model argument, no value"],
)
def test_a_wrong_model(
    flags: list[str], said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--data", str(data), "--out", str(tmp_path / "run"), "--batch-size", "8", *flags])
    assert stop.value.code == 2
    assert_one_sentence(capsys.readouterr().err, said)


@pytest.mark.parametrize("flag", ["--method", "--isolation", "--layout"])
def test_a_word_that_is_no_choice(flag: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(train(data, tmp_path / "run", flag, "sideways", workers=0))
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert flag in text
    assert "sideways" in text


def test_another_number_of_classes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    shutil.rmtree(broken / "val" / "class3")
    with pytest.raises(SystemExit) as stop:
        cli.main(train(broken, tmp_path / "run", workers=0))
    assert stop.value.code == 2
    assert_one_sentence(capsys.readouterr().err, "--data", "class3")


def test_a_wrong_width(data: Path, reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for width, said in (("1/8", "1/8"), ("half", "half"), ("16", "16")):
        with pytest.raises(SystemExit) as stop:
            cli.main(["eval", str(reference), "--width", width])
        assert stop.value.code == 2
        assert_one_sentence(capsys.readouterr().err, said)


def test_a_folder_is_not_trained_over(data: Path, reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (reference / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        cli.main(train(data, reference, workers=0))
    assert stop.value.code == 2
    assert_one_sentence(capsys.readouterr().err, f"--resume {re.escape(str(reference))}")
    assert (reference / "checkpoint.pt").read_bytes() == before


def test_no_run_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "--resume", str(folder)])
        assert stop.value.code == 2
        assert_one_sentence(capsys.readouterr().err, re.escape(str(folder)))


# Unreadable images


def spoil(data: Path, folder: Path, split: str, count: int) -> list[Path]:
    """A copy of the data in which `count` images of `split` cannot be read: cut short, or no image at all."""
    shutil.copytree(data, folder)
    bad = [folder / split / f"class{k % CLASSES}" / f"{1 + k // CLASSES}.png" for k in range(count)]
    for k, path in enumerate(bad):
        path.write_bytes(path.read_bytes()[:60] if k % 2 else b"no image")
    return bad


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_and_skipped(workers: int, data: Path, execute: Runner, tmp_path: Path) -> None:
    bad = spoil(data, tmp_path / "data", "train", 3)
    flags = ("--max-bad-share", "0.05", "--epochs", "2")
    ended = execute(train(tmp_path / "data", tmp_path / "run", *flags, workers=workers))
    assert ended["status"] == 0, ended["text"]
    for path in bad:
        assert str(path) in ended["text"]
    ended = execute(
        train(tmp_path / "data", tmp_path / "killed", *flags, workers=workers),
        fault={"call": "save", "nth": 7, "do": "kill"},
    )
    assert ended["status"] == -signal.SIGKILL, ended["text"]
    finish(tmp_path / "killed", data, execute, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images(workers: int, data: Path, execute: Runner, tmp_path: Path) -> None:
    bad = spoil(data, tmp_path / "data", "train", 4)
    for share in (["--max-bad-share", "0.05"], []):
        run = tmp_path / f"run{len(share)}"
        ended = execute(train(tmp_path / "data", run, *share, workers=workers))
        assert ended["status"] == 2, ended["text"]
        assert_one_sentence(ended["text"], "--data", "max.bad.share", "|".join(re.escape(str(path)) for path in bad))


@pytest.mark.slow
def test_unreadable_test_images(data: Path, execute: Runner, tmp_path: Path) -> None:
    """The stated share holds for the images that a run is measured on, too."""
    (bad,) = spoil(data, tmp_path / "data", "val", 1)
    flags = ("--max-bad-share", "0.1", "--epochs", "1")
    ended = execute(train(tmp_path / "data", tmp_path / "run", *flags))
    assert ended["status"] == 0, ended["text"]
    assert str(bad) in ended["text"]
    with open(tmp_path / "run" / "results.csv", newline="") as file:
        assert {row["images"] for row in csv.DictReader(file)} == {"15"}
    ended = execute(train(tmp_path / "data", tmp_path / "refused", "--epochs", "1"))
    assert ended["status"] == 2, ended["text"]
    assert_one_sentence(ended["text"], re.escape(str(bad)))
