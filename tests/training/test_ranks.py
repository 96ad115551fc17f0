"""Training on several processes: the same weights as one, one reduction a step, and what survives the loss of one.

Most ranks are forks of a driver (ranks_driver.py) that has imported slicevit once; torchrun and accelerate start the
ranks of the tests at the end. All is on the CPU, over gloo. Images are augmented one by one; Mixup and drop path,
which draw for a whole batch, are off.
"""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driving import driving
from PIL import Image

import slicevit
from slicevit import WidthGrid
from slicevit.elastic import ElasticModel
from slicevit.training import evaluate, micro_batch, trainee
from slicevit.training.config import TrainConfig
from slicevit.training.micro_batch import most_images
from slicevit.training.ranks import Ranks, SharedGradients
from slicevit.training.sampling import draw_widths

DRIVER = Path(__file__).with_name("ranks_driver.py")
TRAIN_IMAGES, VAL_IMAGES = (10, 9, 9, 9), (2, 2, 2, 1)  # of each class; neither fills whole batches
CLASSES, BATCH, EPOCHS, EPOCH_STEPS, LR = 4, 8, 3, 37 // 8, 5e-4
STEPS = EPOCHS * EPOCH_STEPS
GRID = "1/4:1:1/8"  # steps draw 4 of 7 widths
MODEL_ARGS = {"img_size": 16, "patch_size": 8, "in_chans": 3, "embed_dim": 32, "depth": 2, "num_heads": 2}
FLAGS = [
    *("--model", "vit_tiny_patch16_224", "--model-args", *(f"{k}={v}" for k, v in MODEL_ARGS.items())),
    *("--grid", GRID, "--epochs", f"{EPOCHS}", "--batch-size", f"{BATCH}", "--lr", f"{LR}", "--warmup-epochs", "1"),
    *("--transfer-ramp", "0.5", "--ema-decay", "0.9", "--clip-grad", "1", "--smoothing", "0.1"),
    *("--rand-augment", "rand-m9-mstd0.5-inc1", "--random-erasing", "0.25"),
    *("--drop-path", "0", "--mixup", "0", "--cutmix", "0", "--eval-every", "2", "--eval-batch-size", "2"),
    *("--device", "cpu", "--threads", "1", "--workers", "0"),
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "200"}
FLOAT64 = {"all": "torch.set_default_dtype(torch.float64)"}

# Sums of 8 images in another order differ by a few units in the last place, and AdamW, which divides a gradient by its
# own size, keeps relative errors small where a gradient is far above AdamW's epsilon (1e-8). The middle third of
# qkv.bias, the keys', is apart: softmax does not change when a constant is added to a query's scores, so its gradient
# is zero but for rounding, 1e-9 in float32, which AdamW blows up to steps of the order of the learning rate. It may
# differ by as much as all steps together and changes no answer of the model. In float64 the rounding, 1e-18, is so far
# below epsilon that it stays nothing.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
KEY_BIAS_TOLERANCE = {torch.float32: 2 * STEPS * LR, torch.float64: 1e-12}
LOGIT_TOLERANCE = 1e-5  # in float32

Runner = Callable[..., dict[str, Any]]


def write_images(folder: Path, train: tuple[int, ...] = TRAIN_IMAGES, val: tuple[int, ...] = VAL_IMAGES) -> Path:
    draw = np.random.default_rng(0)
    for split, counts in (("train", train), ("val", val)):
        for label, count in enumerate(counts):
            (folder / split / f"class{label}").mkdir(parents=True)
            for k in range(count):
                pixels = draw.integers(0, 160, (16, 16, 3), dtype=np.uint8)
                pixels[..., label % 3] += np.uint8(20 * label)
                Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def execute(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """`execute(argv, ranks, **job)`: the command line in that many forks of the driver, and how each ended."""
    log = tmp_path_factory.mktemp("logs") / "log"
    with driving(str(DRIVER), env=ENVIRONMENT) as ask:
        yield lambda argv, ranks=2, **job: ask({"argv": argv, "ranks": ranks, "log": str(log), **job})


def train(data: Path | str, out: Path, *flags: str) -> list[str]:
    return ["train", "--data", str(data), "--out", str(out), *FLAGS, *flags]


def finished(ended: dict[str, Any], run: Path) -> Path:
    assert set(ended["status"]) == {0}, ended["text"]
    assert (run / "results.csv").exists()
    return run


@pytest.fixture(scope="module")
def one(data: Path, execute: Runner, tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """The run on one rank."""
    folder = tmp_path_factory.mktemp("one")
    wide, plain = folder / "float64", folder / "float32"
    return {
        torch.float64: finished(execute(train(data, wide), 1, plant=FLOAT64), wide),
        torch.float32: finished(execute(train(data, plain), 1), plain),
    }


@pytest.fixture(scope="module")
def two(data: Path, execute: Runner, tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """The run on two ranks; a record of the one in float32 lies beside it."""
    folder = tmp_path_factory.mktemp("two")
    wide, plain = folder / "float64", folder / "float32"
    note = {"all": f"record({str(folder)!r}, RANK)"}
    return {
        torch.float64: finished(execute(train(data, wide), plant=FLOAT64), wide),
        torch.float32: finished(execute(train(data, plain), plant=note), plain),
    }


def read_checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoint.pt", weights_only=True)


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_record(folder: Path, rank: int) -> list[dict[str, Any]]:
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def largest_difference(run: Path, other: Path) -> tuple[float, float]:
    """Between the two runs' trained and averaged weights: of the keys' biases, and of everything else."""
    ours, theirs = read_checkpoint(run), read_checkpoint(other)
    assert ours["step"] == theirs["step"] == STEPS
    keys, rest = [0.0], [0.0]
    for part in ("model", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        for name, tensor in ours[part].items():
            assert tensor.isfinite().all()
            differences = (tensor - theirs[part][name]).abs()
            if name.endswith("attn.qkv.bias"):
                query, key, value = differences.chunk(3)
                keys.append(float(key.max()))
                differences = torch.cat([query, value])
            rest.append(float(differences.max()))
    return max(keys), max(rest)


def assert_same_weights(run: Path, other: Path) -> None:
    dtype = read_checkpoint(run)["model"]["head.weight"].dtype
    keys, rest = largest_difference(run, other)
    print(f"{dtype}: the keys' biases differ by {keys:.1e}, the rest by {rest:.1e}")
    assert rest <= TOLERANCE[dtype]
    assert keys <= KEY_BIAS_TOLERANCE[dtype]


def said(ended: dict[str, Any]) -> list[str]:
    lines = [line for text in ended["text"] for line in text.splitlines()]
    return [line for line in lines if line.startswith(("slicevit: ", "stopped by "))]


def assert_one_sentence(ended: dict[str, Any], *parts: str) -> None:
    """All ranks ended, by themselves; together they said one message, with all of `parts` in it, no traceback."""
    assert None not in ended["status"], f"it hangs: {ended}"
    assert 0 not in ended["status"], ended
    assert not any("Traceback" in text for text in ended["text"]), "\n".join(ended["text"])
    assert len(said(ended)) == 1, ended
    for part in parts:
        assert re.search(part, said(ended)[0]), f"{part!r} is not in: {said(ended)[0]}"


def go_on(execute: Runner, run: Path, ranks: int, copy: Path, **job: Any) -> Path:
    shutil.copytree(run, copy)
    return finished(execute(["train", "--resume", str(copy)], ranks, **job), copy)


# --- the same weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_two_ranks_end_with_the_weights_of_one(
    dtype: torch.dtype, one: dict[torch.dtype, Path], two: dict[torch.dtype, Path]
) -> None:
    assert read_checkpoint(two[dtype])["model"]["head.weight"].dtype == dtype
    assert_same_weights(two[dtype], one[dtype])


def test_two_ranks_end_with_the_answers_of_one(one: dict[torch.dtype, Path], two: dict[torch.dtype, Path]) -> None:
    """In float32, the noise in the keys' biases included."""
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    answers = []
    for run in (one[torch.float32], two[torch.float32]):
        model = slicevit.create_model("vit_tiny_patch16_224", GRID, num_classes=CLASSES, **MODEL_ARGS).eval()
        model.load_state_dict(read_checkpoint(run)["model"])
        with torch.no_grad():
            answers.append(torch.stack([model(images, width=width) for width in model.widths]))
    torch.testing.assert_close(*answers, rtol=0, atol=LOGIT_TOLERANCE)


def assert_same_metrics(run: Path, other: Path, rel: float) -> None:
    ours, theirs = read_rows(run / "metrics.csv"), read_rows(other / "metrics.csv")
    assert len(ours) == len(theirs)
    for row, twin in zip(ours, theirs, strict=True):
        for name in row:
            if name in ("train_loss", "loss", "lr") and row[name] and twin[name]:
                assert float(row[name]) == pytest.approx(float(twin[name]), rel=rel), (name, row, twin)
            else:
                assert row[name] == twin[name], (name, row, twin)


def test_two_ranks_write_the_metrics_of_one(one: dict[torch.dtype, Path], two: dict[torch.dtype, Path]) -> None:
    """The top-1s to the last image. Losses of an evaluation are summed in float32."""
    assert_same_metrics(two[torch.float64], one[torch.float64], rel=1e-6)
    for row, twin in zip(*(read_rows(run[torch.float64] / "results.csv") for run in (one, two)), strict=True):
        for name in ("width", "trained", "top1", "top5", "images"):
            assert row[name] == twin[name]


def test_gradient_accumulation_equals_one_part(
    data: Path, execute: Runner, one: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    for ranks, images in ((1, 2), (1, 3), (2, 2)):
        run = tmp_path / f"{ranks}x{images}"
        ended = execute(train(data, run, "--micro-batch", f"{images}"), ranks, plant=FLOAT64)
        assert_same_weights(finished(ended, run), one[torch.float64])
        assert_same_metrics(run, one[torch.float64], rel=1e-6)


def test_gradient_checkpointing_changes_nothing(
    data: Path, execute: Runner, one: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    """Recomputed blocks are those of the same width, with the same drop path."""
    run = tmp_path / "plain"
    finished(execute(train(data, run, "--grad-checkpointing", "True"), plant=FLOAT64), run)
    assert_same_weights(run, one[torch.float64])
    runs = [tmp_path / "kept", tmp_path / "recomputed"]
    for run, switch in zip(runs, ("False", "True"), strict=True):
        flags = ("--drop-path", "0.3", "--grad-checkpointing", switch)
        finished(execute(train(data, run, *flags), plant=FLOAT64), run)
    assert_same_weights(*runs)
    assert largest_difference(runs[0], one[torch.float64])[1] > 1e-4  # it did drop paths


@pytest.mark.parametrize("method", ["separate", "usnet", "rotated"])
def test_other_methods_on_two_ranks(method: str, data: Path, execute: Runner, tmp_path: Path) -> None:
    runs = [tmp_path / f"{ranks}" for ranks in (1, 2)]
    for run in runs:
        flags = ("--method", method, "--grid", "1/2:1:1/2", "--epochs", "1")
        finished(execute(train(data, run, *flags), int(run.name), plant=FLOAT64), run)
    assert_same_metrics(*runs, rel=1e-6)


# --- one reduction a step --------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--widths-per-rank", "own"], ["--micro-batch", "2"]], ids=str)
def test_four_backward_passes_and_one_reduction(flags: list[str], data: Path, execute: Runner, tmp_path: Path) -> None:
    run, note = tmp_path / "run", {"all": f"record({str(tmp_path)!r}, RANK, collectives=True)"}
    finished(execute(train(data, run, "--epochs", "1", *flags), plant=note), run)
    for rank in (0, 1):
        steps = read_record(tmp_path, rank)
        assert len(steps) == EPOCH_STEPS
        for step in steps:
            assert step["images"] == BATCH // 2
            assert len(step["widths"]) == 4
            assert step["backward"] == 4 * (2 if "--micro-batch" in flags else 1)
            assert [name for name, _ in step["sent"]] == ["allreduce_"], step["sent"]
            assert step["sent"][0][1] - step["trained"] in range(8)  # all gradients, and a few flags


def test_what_is_reduced_is_the_mean_gradient(two: dict[torch.dtype, Path]) -> None:
    ranks = [read_record(two[torch.float32].parent, rank) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == STEPS
    for ours, theirs in zip(*ranks, strict=True):
        assert not torch.equal(ours["own"], theirs["own"])  # of other images
        torch.testing.assert_close(ours["shared"], (ours["own"] + theirs["own"]) / 2, rtol=1e-5, atol=1e-8)
        assert torch.equal(ours["shared"], theirs["shared"])
        assert torch.equal(ours["weights"], theirs["weights"])


# --- widths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["stable", "free", "one"])
def test_ranks_draw_their_own_widths(draw: Any) -> None:
    grid = WidthGrid.parse("1/4:1:1/16")
    drawn = [[draw_widths(grid, draw, 3, step, rank) for step in range(200)] for rank in range(4)]
    assert drawn[0] == [draw_widths(grid, draw, 3, step) for step in range(200)]  # those of a single process
    assert drawn == [[draw_widths(grid, draw, 3, step, rank) for step in range(200)] for rank in range(4)]
    for a in range(4):
        for b in range(a):
            assert sum(x == y for x, y in zip(drawn[a], drawn[b], strict=True)) < 40, (a, b)
        assert {width for widths in drawn[a] for width in widths} == set(grid)  # each visits all


def config(data: Path, **settings: Any) -> TrainConfig:
    """What FLAGS say, in short."""
    return TrainConfig(
        data=str(data),
        model_args=MODEL_ARGS,
        grid=GRID,
        batch_size=BATCH,
        epochs=EPOCHS,
        device="cpu",
        **settings,
    )


def trainee_at(rank: int, count: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> trainee.Trainee:
    """Without the other ranks: nothing may be reduced."""
    with monkeypatch.context() as patch:
        patch.setattr(trainee, "join", lambda device: Ranks(rank, count, torch.device("cpu")))
        return trainee.Trainee(config)


def test_same_and_own_widths(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draws(how: Any, rank: int, count: int) -> list[tuple[Fraction, ...]]:
        run = trainee_at(rank, count, config(data, widths_per_rank=how), monkeypatch)
        return [run.widths_of(step) for step in range(40)]

    alone = draws("same", 0, 1)
    assert len(set(alone)) > 1
    assert alone == draws("same", 0, 4) == draws("same", 1, 4) == draws("same", 3, 4)
    assert alone == draws("own", 0, 1) == draws("own", 0, 4)
    own = [draws("own", rank, 4) for rank in range(3)]
    assert own[0] != own[1] != own[2] != own[0]


def test_the_full_width_comes_first_on_all_ranks(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainee_at(1, 2, config(data, widths_per_rank="own", full_width_first=1 / EPOCHS), monkeypatch)
    assert [len(run.widths_of(step)) for step in range(EPOCH_STEPS + 1)] == [1] * EPOCH_STEPS + [4]


def test_a_run_with_own_widths(
    data: Path, execute: Runner, one: dict[torch.dtype, Path], two: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    run, note = tmp_path / "run", {"all": f"record({str(tmp_path)!r}, RANK)"}
    finished(execute(train(data, run, "--widths-per-rank", "own"), plant=note), run)
    ranks = [read_record(tmp_path, rank) for rank in (0, 1)]
    same = [read_record(two[torch.float32].parent, rank) for rank in (0, 1)]
    widths = [[step["widths"] for step in steps] for steps in (*ranks, *same)]
    assert widths[0] == widths[2] == widths[3]
    assert widths[1] != widths[0]
    for ours, theirs in zip(*ranks, strict=True):
        torch.testing.assert_close(ours["shared"], (ours["own"] + theirs["own"]) / 2, rtol=1e-5, atol=1e-8)
        assert torch.equal(ours["weights"], theirs["weights"])
    for row in read_rows(run / "metrics.csv"):  # the mean over all visits of a width, on both ranks
        epoch = [step for steps in ranks for step in steps if step["step"] // EPOCH_STEPS == int(row["epoch"])]
        losses = [step["losses"][row["width"]] for step in epoch if row["width"] in step["losses"]]
        assert (row["train_loss"] != "") == bool(losses)
        assert not losses or float(row["train_loss"]) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    # what another sampling makes of the weights is far beyond the tolerance of the tests above
    assert largest_difference(run, one[torch.float32])[1] > 100 * TOLERANCE[torch.float32]


# --- sharded optimizer -----------------------------------------------------------------------------------


def test_a_sharded_optimizer(data: Path, execute: Runner, two: dict[torch.dtype, Path], tmp_path: Path) -> None:
    """The same weights and the same checkpoint; each rank keeps a share of the state; still one reduction."""
    run, note = tmp_path / "run", {"all": f"record({str(tmp_path)!r}, RANK, collectives=True)"}
    finished(execute(train(data, run, "--shard-optimizer", "True"), plant=note), run)
    assert_same_weights(run, two[torch.float32])
    assert_same_metrics(run, two[torch.float32], rel=1e-6)
    shares = []
    for rank in (0, 1):
        steps = read_record(tmp_path, rank)
        assert all([name for name, _ in step["sent"]].count("allreduce_") == 1 for step in steps)
        shares.append(steps[-1]["moments"])
    assert sum(shares) == steps[-1]["trained"]
    assert max(shares) < 0.7 * sum(shares)
    ours, theirs = read_checkpoint(run)["optimizer"], read_checkpoint(two[torch.float32])["optimizer"]
    assert [group["params"] for group in ours["param_groups"]] == [group["params"] for group in theirs["param_groups"]]
    assert ours["state"].keys() == theirs["state"].keys()
    for place, moments in ours["state"].items():
        assert moments["exp_avg"].shape == theirs["state"][place]["exp_avg"].shape


@pytest.mark.parametrize("sharded", ["False", "True"])
def test_a_stopped_run_goes_on_with_any_number_of_ranks(
    sharded: str, data: Path, execute: Runner, two: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    """SIGTERM to one of two ranks, within an epoch."""
    run = tmp_path / "run"
    ended = execute(
        train(data, run, "--shard-optimizer", sharded), plant=FLOAT64 | {"1": "before(Run, 'train_step', 5, term)"}
    )
    assert ended["status"] == [143, 143], ended
    assert_one_sentence(ended, f"SIGTERM.*slicevit train --resume {re.escape(str(run))}$")
    assert read_checkpoint(run)["step"] in (6, 7)
    for ranks in (1, 2, 4):
        copy = go_on(execute, run, ranks, tmp_path / f"{ranks}", plant=FLOAT64)
        assert_same_weights(copy, two[torch.float64])
    assert_same_metrics(tmp_path / "2", two[torch.float64], rel=1e-6)


def test_the_metrics_of_a_run_that_goes_on_with_fewer_ranks(
    data: Path, execute: Runner, two: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    """The training loss of the epoch that was broken off weighs all its steps alike."""
    run = tmp_path / "run"
    ended = execute(train(data, run), plant=FLOAT64 | {"1": "before(Run, 'train_step', 5, term)"})
    assert ended["status"] == [143, 143], ended
    assert_same_metrics(go_on(execute, run, 1, tmp_path / "1", plant=FLOAT64), two[torch.float64], rel=1e-6)


# --- signals ---------------------------------------------------------------------------------------------

SIGNALS = {
    "to all": {"all": "before(Run, 'train_step', 6, term)"},
    "to all, not in the same step": {
        "0": "before(Run, 'train_step', 6, term)",
        "1": "before(Run, 'train_step', 7, term)",
    },
    "to the first": {"0": "before(Run, 'train_step', 6, term)"},
    "to one that evaluates": {"1": "before(loop, 'measure_accuracy', 1, term)"},
    "to one in the last evaluation": {"1": "before(loop, 'measure_accuracy', 2, term)"},
    "to one that saves": {"0": "before(os, 'fsync', 1, term)"},
}


@pytest.mark.parametrize("where", SIGNALS)
def test_sigterm(where: str, data: Path, execute: Runner, two: dict[torch.dtype, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = execute(train(data, run), plant=SIGNALS[where])
    assert ended["status"] == [143, 143], ended
    assert_one_sentence(ended, f"SIGTERM.*slicevit train --resume {re.escape(str(run))}$")
    least = {"to one that evaluates": 8, "to one in the last evaluation": STEPS, "to one that saves": 4}.get(where, 6)
    assert least <= read_checkpoint(run)["step"] <= least + 2
    assert not (run / "results.csv").exists()
    assert_same_weights(go_on(execute, run, 1, tmp_path / "1"), two[torch.float32])


def test_sigterm_from_two_senders(data: Path, execute: Runner, tmp_path: Path) -> None:
    """A scheduler that signals all processes of a job reaches the ranks directly and through torchrun."""
    run = tmp_path / "run"
    twice = {"all": "before(Run, 'train_step', 6, lambda: (term(), time.sleep(0.05), term()))"}
    ended = execute(train(data, run), plant=twice)
    assert ended["status"] == [143, 143], ended
    assert_one_sentence(ended, f"SIGTERM.*slicevit train --resume {re.escape(str(run))}$")
    assert read_checkpoint(run)["step"] >= 6


# --- ranks that are lost ---------------------------------------------------------------------------------

LOST: dict[str, tuple[int, dict[str, str], list[str], int]] = {  # ranks, plant, flags, step of the checkpoint
    "the second, in a step": (2, {"1": "before(Run, 'train_step', 6, die)"}, [], 5),
    "the first, in a step": (2, {"0": "before(Run, 'train_step', 6, die)"}, [], 5),
    "one of four, in a step": (4, {"2": "before(Run, 'train_step', 6, die)"}, [], 5),
    "in the first step": (2, {"1": "before(Run, 'train_step', 1, die)"}, [], 0),
    "the second, evaluating": (2, {"1": "before(loop, 'measure_accuracy', 1, die)"}, [], 8),
    "the first, evaluating": (2, {"0": "before(loop, 'measure_accuracy', 1, die)"}, [], 8),
    "the first, saving": (2, {"0": "before(os, 'fsync', 2, die)"}, [], 8),
    "the first, writing metrics": (2, {"0": "before(checkpoint, 'save_weights', 3, die)"}, [], 8),
    "sharded, in a step": (2, {"1": "before(Run, 'train_step', 6, die)"}, ["--shard-optimizer", "True"], 4),
    "sharded, in the update": (
        2,
        {"1": "after(SharedGradients, 'reduce', 6, die)"},
        ["--shard-optimizer", "True"],
        4,
    ),
    "sharded, saving": (
        2,
        {"1": "before(torch.distributed.optim.ZeroRedundancyOptimizer, 'consolidate_state_dict', 2, die)"},
        ["--shard-optimizer", "True"],
        4,
    ),
}


@pytest.mark.parametrize("where", LOST)
def test_a_rank_that_is_lost(
    where: str, data: Path, execute: Runner, two: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    """SIGKILL of one rank. The others are not told by a torchrun, as on another machine."""
    ranks, plant, flags, step = LOST[where]
    run = tmp_path / "run"
    ended = execute(train(data, run, *flags), ranks, plant=plant, limit=30)
    assert ended["status"].count(-signal.SIGKILL) == 1, ended
    assert_one_sentence(ended, f"lost.*step {step} is saved.*--resume {re.escape(str(run))}")
    assert read_checkpoint(run)["step"] == step
    copy = go_on(execute, run, 1, tmp_path / "1")
    assert_same_weights(copy, two[torch.float32])
    assert list(copy.glob(".*")) == []  # nothing is left of what was half written


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_is_lost_before_the_run_is_described(
    rank: str, data: Path, execute: Runner, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = execute(train(data, run), plant={rank: "before(keeper.Keeper, 'begin', 1, die)"}, limit=30)
    assert_one_sentence(ended, "lost")
    assert "No such file" not in said(ended)[0]
    assert not (run / "checkpoint.pt").exists() or read_checkpoint(run)["step"] == 0


def test_a_rank_that_is_lost_while_the_disk_is_full(data: Path, execute: Runner, tmp_path: Path) -> None:
    """The rank that is left can save nothing more; it says so, and what was saved is kept."""
    run = tmp_path / "run"
    plant = {"0": "before(Run, 'train_step', 6, die)", "1": "before(os, 'replace', 1, full_disk)"}
    ended = execute(train(data, run), plant=plant, limit=30)
    assert_one_sentence(ended, "--resume")
    assert read_checkpoint(run)["step"] == EPOCH_STEPS


# --- faults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nth", [2, 3])
def test_a_full_disk(nth: int, data: Path, execute: Runner, two: dict[torch.dtype, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = execute(train(data, run), plant={"0": f"before(os, 'fsync', {nth}, full_disk)"}, limit=30)
    assert ended["status"] == [2, 2], ended
    assert_one_sentence(ended, "checkpoint.pt", "No space left on device", f"--resume {re.escape(str(run))}")
    assert read_checkpoint(run)["step"] == (nth - 1) * EPOCH_STEPS
    assert list(run.glob(".*")) == []
    assert_same_weights(go_on(execute, run, 1, tmp_path / "1"), two[torch.float32])


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", [5, STEPS - 1])
def test_a_loss_that_is_not_finite_on_one_rank(
    step: int, rank: int, every: int, data: Path, execute: Runner, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ("--checkpoint-steps", f"{every}")
    ended = execute(train(data, run, *flags), plant={f"{rank}": f"nan_at({step})"}, limit=30)
    assert ended["status"] == [2, 2], ended
    good = step // every * every
    assert_one_sentence(ended, rf"loss of step {step}\b.*not finite", rf"checkpoint of step {good}\b")
    state = read_checkpoint(run)
    assert state["step"] == good
    assert all(tensor.isfinite().all() for part in ("model", "ema") for tensor in state[part].values())
    assert all(moment["exp_avg"].isfinite().all() for moment in state["optimizer"]["state"].values())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_with_fewer_batches(rank: str, data: Path, execute: Runner, tmp_path: Path) -> None:
    """It ends in one message, or is survived with all epochs' metrics; a run that hangs is neither."""
    run = tmp_path / "run"
    ended = execute(train(data, run), plant={rank: "batches_short_by(1)"}, limit=10)
    if ended["status"] == [0, 0]:
        assert len(read_rows(run / "metrics.csv")) == EPOCHS * len(WidthGrid.parse(GRID))
    else:
        assert_one_sentence(ended)


def test_a_machine_with_fewer_images(data: Path, execute: Runner, tmp_path: Path) -> None:
    """Its copy of the data is not whole: it has fewer batches."""
    folders = [tmp_path / "machine0", tmp_path / "machine1"]
    for folder in folders:
        shutil.copytree(data, folder / "data")
    for k in range(8):
        (folders[1] / "data" / "train" / "class0" / f"{k}.png").unlink()
    ended = execute(train("data", tmp_path / "run"), folders=[str(folder) for folder in folders], limit=10)
    assert_one_sentence(ended, "data")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_without_the_images(rank: int, data: Path, execute: Runner, tmp_path: Path) -> None:
    folders = [tmp_path / "machine0", tmp_path / "machine1"]
    for folder in folders:
        folder.mkdir()
    shutil.copytree(data, folders[1 - rank] / "data")
    ended = execute(train("data", tmp_path / "run"), folders=[str(folder) for folder in folders], limit=10)
    assert_one_sentence(ended, "--data")


@pytest.mark.parametrize("image", [0, 1])  # by turns the images are the first and the second rank's
def test_unreadable_test_images_of_one_rank(image: int, data: Path, execute: Runner, tmp_path: Path) -> None:
    spoilt, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, spoilt)
    bad = spoilt / "val" / "class0" / f"{image}.png"
    bad.write_bytes(b"no image")
    ended = execute(train(spoilt, run), limit=30)
    assert_one_sentence(ended, re.escape(str(bad)), "max-bad-share")
    assert read_checkpoint(run)["step"] == 2 * EPOCH_STEPS


def test_unreadable_training_images_of_one_rank(data: Path, execute: Runner, tmp_path: Path) -> None:
    spoilt, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, spoilt)
    bad = spoilt / "train" / "class0" / "1.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"no image")
    ended = execute(train(spoilt, run), limit=30)
    assert_one_sentence(ended, re.escape(str(bad)), "max-bad-share")
    bad.write_bytes(whole)
    go_on(execute, run, 2, tmp_path / "2")


WRONG: dict[str, tuple[list[str], str]] = {
    "odd batch": (["--batch-size", "7"], "--batch-size 7.* 2 processes"),
    "part": (["--micro-batch=-1"], "--micro-batch must not be negative"),
    "odd batch of a rank, mixed": (["--batch-size", "6", "--mixup", "0.8"], "--batch-size"),
    "batch larger than the data": (["--batch-size", "38"], "--data.*--batch-size"),
    "choice": (["--widths-per-rank", "some"], "widths-per-rank"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_words(what: str, data: Path, execute: Runner, tmp_path: Path) -> None:
    flags, message = WRONG[what]
    ended = execute(train(data, tmp_path / "run", *flags), limit=30)
    assert ended["status"] == [2, 2], ended
    assert_one_sentence(ended, message)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_is_not_trained_over(data: Path, execute: Runner, two: dict[torch.dtype, Path]) -> None:
    run = two[torch.float32]
    ended = execute(train(data, run), limit=30)
    assert ended["status"] == [2, 2], ended
    assert_one_sentence(ended, f"--resume {re.escape(str(run))}")


def test_batches_that_do_not_divide() -> None:
    divided = TrainConfig(batch_size=24)
    assert [divided.rank_batch(ranks) for ranks in (1, 2, 4, 8)] == [24, 12, 6, 3]
    for ranks in (5, 16):
        with pytest.raises(ValueError, match=f"--batch-size 24 .*{ranks} processes"):
            divided.rank_batch(ranks)
    with pytest.raises(ValueError, match=r"--batch-size 24 over 8 processes must be even"):
        TrainConfig(batch_size=24, cutmix=1.0).rank_batch(8)


def test_parameters_of_several_types_cannot_share_gradients() -> None:
    layers = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).to(torch.bfloat16)]
    with pytest.raises(ValueError, match="bfloat16"):
        SharedGradients([p for layer in layers for p in layer.parameters()], Ranks(0, 2, torch.device("cpu")))


# --- batch size that fits --------------------------------------------------------------------------------


def tiny_model() -> ElasticModel:
    return slicevit.create_model("vit_tiny_patch16_224", GRID, num_classes=CLASSES, **MODEL_ARGS).train()


def limit_memory(images: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every pass over more than `images` runs out of memory; returns where the sizes tried will be."""
    real, tried = ElasticModel.forward, []

    def forward(self: ElasticModel, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        tried.append(len(x))
        if len(x) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, x, *args, **kwargs)

    monkeypatch.setattr(ElasticModel, "forward", forward)
    return tried


@pytest.mark.parametrize(("fits", "parts"), [(12, 1), (11, 2), (6, 2), (5, 3), (4, 3), (3, 4), (2, 6), (1, 12)])
def test_the_most_images_that_fit(fits: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tried = limit_memory(fits, monkeypatch)
    assert most_images(model, 12, (3, 16, 16), torch.enable_grad) == 12 // parts
    assert tried[-1] == 12 // parts
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training


def test_not_even_one_image_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(0, monkeypatch)
    with pytest.raises(ValueError, match=r"--micro-batch 0.*one image"):
        most_images(tiny_model(), 4, (3, 16, 16), torch.enable_grad)


def test_another_error_is_not_taken_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(micro_batch, "_try_pass", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        most_images(tiny_model(), 4, (3, 16, 16), torch.enable_grad)


def micro_batch_of(run: Path) -> int:
    return json.loads((run / "config.json").read_text())["slicevit"]["training"]["micro_batch"]


@pytest.mark.parametrize(("ranks", "who"), [(1, "all"), (2, "all"), (2, "0"), (2, "1")])
def test_what_fits_is_found_and_kept(
    ranks: int, who: str, data: Path, execute: Runner, one: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    """The rank with the least memory decides. A resumed run takes what was found and does not search again."""
    run, few = tmp_path / "run", f"torch.set_default_dtype(torch.float64); memory_for({2 if who == 'all' else 3})"
    stop = "; before(Run, 'train_step', 6, term)"
    plant = {"all": (few if who == "all" else FLOAT64["all"]) + stop} | ({} if who == "all" else {who: few})
    ended = execute(train(data, run, "--micro-batch", "0"), ranks, plant=plant)
    assert ended["status"] == [143] * ranks, ended
    assert micro_batch_of(run) == 2
    copy = go_on(execute, run, ranks, tmp_path / "on", plant={"all": f"{few}; trainee.most_images = None"})
    assert micro_batch_of(copy) == 2
    assert_same_weights(copy, one[torch.float64])


def test_what_fits_two_ranks_fits_one(
    data: Path, execute: Runner, one: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    """One rank with the same memory has twice the images: it takes more parts, or says what to do."""
    run, few = tmp_path / "run", "torch.set_default_dtype(torch.float64); memory_for(2)"
    plant = {"all": f"{few}; before(Run, 'train_step', 6, term)"}
    ended = execute(train(data, run, "--micro-batch", "0"), plant=plant)
    assert ended["status"] == [143, 143], ended
    ended = execute(["train", "--resume", str(run)], 1, plant={"all": few})
    if ended["status"] == [0]:
        assert_same_weights(run, one[torch.float64])
    else:
        assert_one_sentence(ended, "memory")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_with_no_memory_at_all(rank: str, data: Path, execute: Runner, tmp_path: Path) -> None:
    ended = execute(train(data, tmp_path / "run", "--micro-batch", "0"), plant={rank: "memory_for(0)"}, limit=30)
    assert_one_sentence(ended, "--micro-batch 0.*one image")


# --- evaluation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("val", "batch"), [(VAL_IMAGES, 2), (VAL_IMAGES, 500), ((0, 0, 1, 0), 2), ((1, 0, 1, 1), 1)], ids=str
)
def test_evaluation_counts_each_image_once(
    val: tuple[int, ...], batch: int, execute: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 4 ranks, some with fewer images or none, the scores are those of one process."""
    monkeypatch.setattr(evaluate, "LATENCY_SECONDS", 0.0)
    data, run = write_images(tmp_path / "data", val=val), tmp_path / "run"
    flags = ("--epochs", "0.25", "--eval-batch-size", f"{batch}", "--grid", "1/2:1:1/2")
    finished(execute(train(data, run, *flags), 4), run)
    shared = read_rows(run / "results.csv")
    alone, _ = evaluate.evaluate_run(run, device="cpu")
    assert {int(row["images"]) for row in shared} == {sum(val)}
    for row, twin in zip(shared, alone, strict=True):
        assert (row["width"], float(row["top1"]), float(row["top5"])) == (twin.width, twin.top1, twin.top5)
        assert float(row["loss"]) == pytest.approx(twin.loss, rel=1e-5)


# --- torchrun and accelerate -----------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts `python -m *words`; at the end nothing of what it started is left."""
    mark = f"SLICEVIT_TEST_LAUNCH={uuid.uuid4()}"
    started: list[subprocess.Popen[bytes]] = []

    def start(log: Path, *words: str) -> subprocess.Popen[bytes]:
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT | dict([mark.split("=")]),
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start
    for folder in Path("/proc").glob("[0-9]*"):  # ranks have sessions of their own
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue
    for process in started:
        process.wait(20)


def read_ended(log: Path, process: subprocess.Popen[bytes]) -> tuple[int, str]:
    status = process.wait(150)
    return status, log.read_text(errors="replace")


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.slow
def test_torchrun(data: Path, two: dict[torch.dtype, Path], launch: Any, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    status, text = read_ended(log, launch(log, *TORCHRUN, "-m", "slicevit", *train(data, run)))
    assert status == 0, text
    assert_same_weights(run, two[torch.float32])
    assert text.count("epoch 1:") == 1  # one of them speaks
    assert (run / "frontier.png").exists()
    assert (run / "report.html").exists()


@pytest.mark.slow
def test_accelerate_launch(launch: Any, tmp_path: Path) -> None:
    """On the bundled images, all 5,000 test images once."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = ("accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2")
    options = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    sizes = ("img_size=28", "patch_size=7", "in_chans=1", "embed_dim=32", "depth=2", "num_heads=2")
    flags = ("--grid", "1/2:1:1/2", "--epochs", "0.05", "--batch-size", "256", "--threads", "1", "--device", "cpu")
    words = ("train", "--preset", "fashion", "--model-args", *sizes, *flags, "--out", str(run))
    status, text = read_ended(log, launch(log, *command, *options, "-m", "slicevit", *words))
    assert status == 0, text
    assert {row["images"] for row in read_rows(run / "results.csv")} == {"5000"}


@pytest.mark.slow
def test_sigterm_to_torchrun(
    data: Path, execute: Runner, two: dict[torch.dtype, Path], launch: Any, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    plant = json.dumps({"all": "slow(0.15)", "0": "before(Run, 'train_step', 2, stop_launcher)"})
    status, text = read_ended(log, launch(log, *TORCHRUN, str(DRIVER), "--plant", plant, *train(data, run)))
    assert status != 0, text
    assert text.count(f"stopped by SIGTERM; go on with: slicevit train --resume {run}") == 1, text
    assert "slicevit: " not in text
    assert 1 <= read_checkpoint(run)["step"] < STEPS
    assert_same_weights(go_on(execute, run, 1, tmp_path / "1"), two[torch.float32])
    assert_same_weights(go_on(execute, run, 2, tmp_path / "2"), two[torch.float32])


@pytest.mark.slow
def test_a_rank_of_torchrun_is_killed(
    data: Path, execute: Runner, two: dict[torch.dtype, Path], launch: Any, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    plant = json.dumps({"1": "before(Run, 'train_step', 6, die)"})
    status, text = read_ended(log, launch(log, *TORCHRUN, str(DRIVER), "--plant", plant, *train(data, run)))
    assert status > 0, text
    assert_one_sentence({"status": [status], "text": ["\n".join(lines_of_slicevit(text))]}, "step 5 is saved")
    assert read_checkpoint(run)["step"] == 5
    assert_same_weights(go_on(execute, run, 1, tmp_path / "1"), two[torch.float32])


def lines_of_slicevit(text: str) -> list[str]:
    """Without what torchrun itself has to say of a rank that ended."""
    assert "slicevit/cli.py" not in text, text  # no traceback through the command line
    return [line for line in text.splitlines() if line.startswith(("slicevit: ", "stopped by "))]


@pytest.mark.slow
def test_a_machine_of_two_is_lost(
    data: Path, execute: Runner, two: dict[torch.dtype, Path], launch: Any, tmp_path: Path
) -> None:
    """Two torchruns with a rank each; the second is killed with its rank."""
    run, plant = tmp_path / "run", json.dumps({"1": "before(Run, 'train_step', 6, lose_machine)"})
    place = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}")
    logs = [tmp_path / f"log{node}" for node in (0, 1)]
    nodes = [
        launch(
            log,
            *("torch.distributed.run", *place, f"--node-rank={node}"),
            *(str(DRIVER), "--plant", plant, *train(data, run)),
        )
        for node, log in enumerate(logs)
    ]
    (status, text), (lost, other) = (read_ended(log, node) for log, node in zip(logs, nodes, strict=True))
    assert lost == -signal.SIGKILL, other
    assert status > 0, text
    ended = {"status": [status], "text": ["\n".join(lines_of_slicevit(text + other))]}
    assert_one_sentence(ended, "step 5 is saved")
    assert_same_weights(go_on(execute, run, 1, tmp_path / "1"), two[torch.float32])
