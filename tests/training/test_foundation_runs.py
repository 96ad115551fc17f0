"""Runs without labels: they learn, stop and go on, on several ranks too, and say what is wrong with their flags."""

from __future__ import annotations

import csv
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from checkpoints import leaves, read_checkpoint
from driving import driving
from foundation import STUDENT_ARGS, foundation_config, save_teacher, write_unlabelled
from rich.console import Console
from safetensors.torch import load_file

import slicevit
from slicevit import cli
from slicevit.training import runs, setup
from slicevit.training.config import TrainConfig
from slicevit.training.evaluate import evaluate_run
from slicevit.training.fits import FitResult, read_fits
from slicevit.training.loop import Run
from slicevit.training.presets import preset
from slicevit.training.signals import Interrupted

QUIET = Console(quiet=True)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "200"}

pytestmark = pytest.mark.usefixtures("one_thread_a_module")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unlabelled(tmp_path_factory.mktemp("images") / "plain")


@pytest.fixture(autouse=True)
def _no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slicevit.training.loop.LATENCY_SECONDS", 0.0)


def without_latency(run: Path) -> list[FitResult]:
    return [replace(row, latency_ms=None) for row in read_fits(run)]


# --- learning --------------------------------------------------------------------------------------------


def small_run(teacher: Path, images: Path, folder: Path, **settings: Any) -> Run:
    return Run(foundation_config(images, teacher, **settings), folder, QUIET)


def test_training_lowers_the_objective_at_every_width(teacher: Path, images: Path, tmp_path: Path) -> None:
    run = small_run(teacher, images, tmp_path / "run", epochs=12, lr=8e-3, crop="center", hflip=0.0, eval_every=12)
    before = run._evaluate()
    rows = run.train()
    assert [row.width for row in rows] == ["1/4", "1/2", "3/4", "1"]
    for row in rows:
        assert isinstance(row, FitResult)
        assert row.loss < 0.5 * before[row.width].loss
        assert row.cosine > before[row.width].cosine + 0.2


# --- folders ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(one_thread_a_module: None, teacher: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped, with all that a resumed one must take up."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slicevit.training.loop.LATENCY_SECONDS", 0.0)
        runs.start(demanding(images, teacher), folder, QUIET)
    return folder


def demanding(images: Path, teacher: Path) -> TrainConfig:
    return foundation_config(
        images,
        teacher,
        ema_decay=0.9,
        drop_path=0.2,
        mixup=0.8,
        cutmix=1.0,
        micro_batch=4,
        clip_grad=1.0,
        transfer_ramp=0.5,
        full_width_first=0.25,
        rand_augment="rand-m9-mstd0.5-inc1",
    )


def test_a_resumed_run_is_the_unbroken_one(
    finished: Path, images: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within the second epoch: weights, projections, averages, optimizer, metrics and rows to the bit."""
    with monkeypatch.context() as patch:
        real = Run.train_step

        def train_step(self: Run, *args: Any) -> None:
            if self.step == 6:
                signal.raise_signal(signal.SIGTERM)
            real(self, *args)

        patch.setattr(Run, "train_step", train_step)
        with pytest.raises(Interrupted):
            runs.start(demanding(images, teacher), tmp_path, QUIET)
    assert read_checkpoint(tmp_path)["step"] == 7
    runs.resume(tmp_path, QUIET)
    ours, theirs = leaves(read_checkpoint(tmp_path)), leaves(read_checkpoint(finished))
    assert ours["/'step'"] == 8
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert any("distiller" in name and "projections" in name for name in ours)
    assert (tmp_path / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()
    assert without_latency(tmp_path) == without_latency(finished)


def test_what_a_run_without_labels_leaves(finished: Path) -> None:
    """Its model has no classes and no projections; its metrics are the loss against the teacher."""
    model = slicevit.from_pretrained(finished)
    assert model.num_classes == 0
    assert load_file(finished / "model.safetensors").keys() == model.state_dict().keys()
    assert model.to_timm("1/2")(torch.zeros(1, 3, 16, 16)).shape == (1, 16)
    rows = read_fits(finished)
    assert [(row.width, row.images) for row in rows] == [(width, 2) for width in ("1/4", "1/2", "3/4", "1")]
    with open(finished / "metrics.csv", newline="") as file:
        metrics = list(csv.DictReader(file))
    assert {row["top1"] for row in metrics} == {""}
    assert [float(row["loss"]) for row in metrics[-4:]] == [row.loss for row in rows]
    assert not (finished / "results.csv").exists()
    with pytest.raises(ValueError, match=r"no classes to score.*distillation\.csv"):
        evaluate_run(finished, device="cpu")


def test_its_model_is_the_start_of_one_with_classes(finished: Path, images: Path, teacher: Path) -> None:
    config = TrainConfig(model_args=STUDENT_ARGS, grid="1/4:1:1/4", init=str(finished))
    model = setup.build_model(config, 10)
    assert model(torch.zeros(1, 3, 16, 16), width="1/4").shape == (1, 10)
    weights = load_file(finished / "model.safetensors")
    assert torch.equal(model.state_dict()["blocks.1.attn.qkv.weight"], weights["blocks.1.attn.qkv.weight"])


def test_classes_are_left_aside(teacher: Path, tmp_path: Path) -> None:
    """Folders with classes, each width alone, images kept in memory."""
    for split, count in (("train", 12), ("val", 3)):
        for label in ("a", "b"):
            write_unlabelled(tmp_path / "data" / split / label, count)
    settings = {"method": "separate", "grid": "1/2:1:1/2", "epochs": 1, "in_memory": True, "mixup": 0.8}
    rows = runs.start(foundation_config(tmp_path / "data", teacher, **settings), tmp_path / "run", QUIET)
    assert [(row.width, row.channels, row.images) for row in rows] == [("1/2", 16, 6), ("1", 32, 6)]


# --- several ranks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def execute(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """The command line in so many forks of the driver, over gloo, in float64."""
    log, driver = tmp_path_factory.mktemp("logs") / "log", Path(__file__).with_name("ranks_driver.py")
    plant = {"all": "torch.set_default_dtype(torch.float64)"}
    with driving(str(driver), env=ENVIRONMENT) as ask:
        yield lambda argv, ranks: ask({"argv": argv, "ranks": ranks, "log": str(log), "plant": plant, "limit": 300})


@pytest.mark.slow
def test_two_ranks_end_with_the_weights_of_one(
    teacher: Path, images: Path, execute: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    flags = [
        *(
            "train",
            "--preset",
            "fashion-paper",
            "--data",
            str(images),
            "--model",
            "vit_tiny_patch16_224",
            "--model-args",
        ),
        *(f"{key}={value}" for key, value in STUDENT_ARGS.items()),
        *("--teacher", str(teacher), "--teacher-objective", "features", "--teacher-features", "class", "feature"),
        *("patch", "--grid", "1/4:1:1/4", "--batch-size", "8", "--epochs", "1", "--ema-decay", "0.9", "--clip-grad"),
        *("1", "--device", "cpu", "--threads", "1", "--eval-batch-size", "1", "--log-with"),
    ]
    for ranks in (1, 2):
        ended = execute([*flags, "--out", str(tmp_path / str(ranks))], ranks)
        assert set(ended["status"]) == {0}, ended["text"]
    one, two = (read_checkpoint(tmp_path / str(ranks)) for ranks in (1, 2))
    assert one["step"] == two["step"] == 4
    for ours, theirs in (
        (one["model"], two["model"]),
        *zip(*(s["distiller"].values() for s in (one, two)), strict=True),
    ):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-11, msg=name)
    for row, twin in zip(without_latency(tmp_path / "1"), without_latency(tmp_path / "2"), strict=True):
        assert (row.width, row.images) == (twin.width, twin.images)
        assert (row.loss, row.cosine) == pytest.approx((twin.loss, twin.cosine), rel=1e-9)


# --- flags -----------------------------------------------------------------------------------------------

FEATURES = ("--teacher-objective", "features")
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no teacher": (FEATURES, "--teacher-objective features needs --teacher"),
    "an unknown objective": (("--teacher", "{t}", "--teacher-objective", "pixels"), "pixels"),
    "an unknown feature": (("--teacher", "{t}", *FEATURES, "--teacher-features", "register"), "register"),
    "a feature twice": (("--teacher", "{t}", *FEATURES, "--teacher-features", "class", "class"), "each objective once"),
    "a share of all": (("--teacher", "{t}", *FEATURES, "--mask-share", "1"), "--mask-share must lie between 0 and 1"),
    "half a patch": (("--teacher", "{t}", *FEATURES, "--teacher-size", "30"), "--teacher-size 30 is not a multiple"),
    "labels of none": (("--teacher", "{t}"), "no train/ in .*--teacher-objective features"),
    "a CNN": (("--teacher", "resnet10t", *FEATURES), "resnet10t has no class token and patch tokens"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(
    what: str,
    teacher: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One sentence, exit status 2, and no folder."""
    real = timm.create_model

    def without_download(name: str, **options: Any) -> Any:
        return real(name, **options | {"pretrained": False})

    monkeypatch.setattr(timm, "create_model", without_download)
    given, part = REFUSED[what]
    flags = [flag.format(t=teacher) for flag in given]
    args = ("--model-args", *(f"{key}={value}" for key, value in STUDENT_ARGS.items()))
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--data", str(images), "--model", "vit_tiny_patch16_224", *args, *flags, "--out", str(out)])
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("slicevit: ")
    assert len(said.splitlines()) == 1
    assert re.search(part, said), said
    assert not out.exists()


@pytest.mark.parametrize("name", ["deit-small-imagenet-dinov2", "deit-base-imagenet-dinov2"])
def test_presets_name_a_teacher_of_timm(name: str) -> None:
    config = preset(name)
    assert not config.learns_labels
    assert config.teacher in timm.list_pretrained("*dinov2*")
    model = slicevit.create_model(config.model, config.grid, num_classes=0, **config.model_args | {"depth": 1})
    assert model.patch_embed.grid_size == (16, 16)  # as the teacher's at --teacher-size: nothing is interpolated
    assert config.teacher_size == 16 * 14
