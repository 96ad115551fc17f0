"""Bad input is one clear sentence on stderr, exit status 2, no traceback, and nothing is lost (issue 2, point 6)."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import slicevit
from slicevit.cli import main

ARGS = ("img_size=32", "patch_size=16", "in_chans=3", "depth=1", "embed_dim=16", "num_heads=2")


def write_images(folder: Path, classes: int = 2, train: int = 6, val: int = 2) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for c in range(classes):
            (folder / split / f"c{c}").mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"c{c}" / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(data: Path, train_quickly: Callable[[list[str]], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, trained by the command itself."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train_quickly(flags(data, folder))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run to break."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("slicevit.training.loop.LATENCY_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def flags(data: Path | str, out: Path | str, *more: str) -> list[str]:
    given = ["--data", str(data), "--model", "vit_tiny_patch16_224", "--grid", "1/4:1:1/4", "--epochs", "1"]
    given += ["--batch-size", "4", "--threads", "1", "--device", "cpu", "--out", str(out), "--model-args", *ARGS]
    return [*given, *more]


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused(*argv)` runs the command, checks the manner of its refusal and gives the sentence."""

    def call(*argv: str | Path) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in argv])
        captured = capfd.readouterr()
        assert stop.value.code == 2, captured.err
        assert "Traceback" not in captured.out + captured.err
        lines = [line for line in captured.err.splitlines() if line.strip()]
        assert len(lines) == 1, f"more than one sentence:\n{captured.err}"
        assert len(lines[0]) < 600
        return lines[0]

    return call


Refused = Callable[..., str]


# --- the command itself ----------------------------------------------------------------------------------


def test_an_unknown_command(refused: Refused) -> None:
    message = refused("trian")
    assert "trian" in message
    assert "train" in message.replace("trian", "")


@pytest.mark.parametrize("command", ["train", "eval", "report", "export", "import"])
def test_an_unknown_flag(command: str, refused: Refused, tmp_path: Path) -> None:
    assert "--no-such-flag" in refused(command, "--no-such-flag", "1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["eval", "report", "export", "import"])
def test_a_command_without_its_arguments(command: str, refused: Refused) -> None:
    told = refused(command)
    assert "(required)" in told or command == "report"
    assert not re.search("---|──", told)
    assert told.count("--help") <= 1


# --- train -----------------------------------------------------------------------------------------------


BAD_FLAGS: dict[str, tuple[list[str], list[str]]] = {
    "preset": (["--preset", "odd"], ["odd", "fashion"]),
    "preset_without_a_value": (["--preset"], ["--preset"]),
    "model": (["--model", "vit_odd_patch16_224"], ["vit_odd_patch16_224"]),
    "model_of_no_family": (["--model", "resnet18", "--model-args", "img_size=32"], ["resnet18"]),
    "model_argument": (["--model-args", *ARGS, "odd_argument=3"], ["odd_argument"]),
    "model_argument_without_value": (["--model-args", "depth"], ["--model-args", "depth"]),
    "grid_text": (["--grid", "a:b"], ["a:b"]),
    "grid_steps": (["--grid", "1/4:1:1/3"], ["1/4:1:1/3"]),
    "grid_of_the_model": (["--grid", "1/4:1:1/64"], ["1/4:1:1/64", "nearest"]),
    "grid_change": (["--grid-change", "1/8"], ["--grid-change"]),
    "grid_change_step": (["--grid-change", "1/7@50%"], ["1/7"]),
    "grid_change_share": (["--grid-change", "1/8@150%"], ["150"]),
    "grid_change_of_the_model": (["--grid-change", "1/64@50%"], ["1/64"]),
    "method": (["--method", "odd"], ["odd", "scala"]),
    "isolation": (["--isolation", "odd"], ["odd"]),
    "layout": (["--layout", "odd"], ["odd"]),
    "epochs": (["--epochs", "0"], ["epochs"]),
    "epochs_text": (["--epochs", "many"], ["many"]),
    "batch_size": (["--batch-size", "-1"], ["batch-size"]),
    "batch_larger_than_data": (["--batch-size", "400"], ["batch"]),
    "lr": (["--lr", "-1"], ["lr"]),
    "lr_nan": (["--lr", "nan"], ["lr"]),
    "ema": (["--ema-decay", "1.5"], ["ema-decay"]),
    "drop_path": (["--drop-path", "1.5"], ["drop-path"]),
    "teacher_share": (["--teacher-share", "2"], ["teacher-share"]),
    "rand_augment": (["--rand-augment", "odd"], ["odd"]),
    "data": (["--data", "/no/such/folder"], ["/no/such/folder"]),
    "data_package": (["--data", "wds/odd"], ["wds/odd"]),
    "data_torch": (["--data", "torch/odd"], ["torch/odd"]),
    "init": (["--init", "/no/such/folder"], ["/no/such/folder"]),
    "init_pretrained_offline": (["--init", "pretrained"], ["--init"]),
    "teacher": (["--teacher", "/no/such/folder"], ["--teacher"]),
    "teacher_model": (["--teacher", "vit_odd"], ["vit_odd"]),
    "teacher_offline": (["--teacher", "deit_tiny_patch16_224"], ["--teacher"]),
    "device": (["--device", "odd"], ["odd"]),
    "seed": (["--seed", "-1"], ["seed"]),
}


@pytest.mark.parametrize("bad", BAD_FLAGS)
def test_train_refuses_a_bad_flag_and_leaves_no_folder(bad: str, data: Path, refused: Refused, tmp_path: Path) -> None:
    given, named = BAD_FLAGS[bad]
    base = flags(data, tmp_path / "out")
    for flag in (argument for argument in given if argument.startswith("--")):
        if flag in base:
            end = base.index(flag) + 1
            while end < len(base) and not base[end].startswith("--"):
                end += 1
            del base[base.index(flag) : end]
    message = refused("train", *base, *given)
    for word in named:
        assert word in message
    assert not (tmp_path / "out").exists(), "a folder is left that stops the corrected command"


def test_no_cuda_is_said(data: Path, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = flags(data, tmp_path / "out")
    base[base.index("cpu")] = "cuda"
    assert "--device" in refused("train", *base)


@pytest.mark.parametrize("lacks", ["train", "val", "classes", "images", "same_classes"])
def test_train_refuses_a_data_folder_that_lacks_something(lacks: str, refused: Refused, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    if lacks in ("train", "val"):
        shutil.rmtree(folder / lacks)
    elif lacks == "classes":
        for c in range(2):
            shutil.rmtree(folder / "train" / f"c{c}")
    elif lacks == "images":
        for path in folder.glob("train/*/*.png"):
            path.unlink()
    else:
        (folder / "val" / "c1").rename(folder / "val" / "other")
    message = refused("train", *flags(folder, tmp_path / "out"))
    assert str(folder) in message
    assert not (tmp_path / "out").exists()


def test_unreadable_images_beyond_the_share_are_named(refused: Refused, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    for k in range(5):
        (folder / "train" / "c0" / f"{k}.png").write_bytes(b"no image")
    message = refused("train", *flags(folder, tmp_path / "out"))
    assert str(folder / "train" / "c0") in message


def test_a_teacher_of_other_classes(run: Path, refused: Refused, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "three", classes=3)
    message = refused("train", *flags(folder, tmp_path / "out", "--teacher", str(run)))
    assert "2 classes" in message
    assert "3" in message


def test_a_run_folder_that_exists_is_kept(run: Path, data: Path, refused: Refused) -> None:
    before = digest(run)
    message = refused("train", *flags(data, run))
    assert str(run) in message
    assert "--resume" in message
    assert digest(run) == before


def test_out_is_a_file(data: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refused("train", *flags(data, tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("form", [["--model", "deit_tiny_patch16_224"], ["--model=deit_tiny_patch16_224"]], ids=len)
def test_naming_a_model_drops_the_default_ones_arguments(form: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to write a flag mean the same: a whole DeiT-Ti, not one of 96 channels and 28 pixels."""
    configs: list[dict[str, Any]] = []
    monkeypatch.setattr("slicevit.training.runs.start", lambda config, *a, **k: configs.append(asdict(config)) or [])
    main(["train", *form])
    assert configs[0]["model"] == "deit_tiny_patch16_224"
    assert configs[0]["model_args"] == {}


# --- resume ----------------------------------------------------------------------------------------------


def test_resume_of_nothing(refused: Refused, tmp_path: Path) -> None:
    assert "odd" in refused("train", "--resume", tmp_path / "odd")
    assert not (tmp_path / "odd").exists()
    assert "--resume" in refused("train", "--resume")


@pytest.mark.parametrize("kind", ["init", "teacher"])
def test_resume_where_the_source_is_gone(kind: str, run: Path, data: Path, refused: Refused, tmp_path: Path) -> None:
    """The folder was named from where the first command ran."""
    source, second = tmp_path / "source", tmp_path / "second"
    shutil.copytree(run, source)
    given = ["--data", str(data), "--out", str(second), "--epochs", "1", "--batch-size", "4", "--device", "cpu"]
    main(["train", *(given if kind == "init" else flags(data, second)), f"--{kind}", "source"])
    source.rename(tmp_path / "moved")
    assert f"was begun with --{kind} {source}, which is not there" in refused("train", "--resume", second)
    (tmp_path / "moved").rename(source)
    main(["train", "--resume", str(second)])


def test_resume_takes_no_other_flags(run: Path, refused: Refused) -> None:
    before = digest(run)
    assert "--lr" in refused("train", "--resume", run, "--lr", "1")
    assert digest(run) == before


BREAK_RUN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "checkpoint_cut": (lambda f: cut(f / "checkpoint.pt"), "checkpoint.pt"),
    "checkpoint_empty": (lambda f: (f / "checkpoint.pt").write_bytes(b""), "checkpoint.pt"),
    "checkpoint_text": (lambda f: (f / "checkpoint.pt").write_text("hello"), "checkpoint.pt"),
    "checkpoint_a_list": (lambda f: torch.save([1], f / "checkpoint.pt"), "checkpoint"),
    "checkpoint_lacks_the_model": (lambda f: torch.save({"step": 1}, f / "checkpoint.pt"), "checkpoint"),
    "checkpoint_of_another_model": (lambda f: other_model(f), "checkpoint"),
    "config_cut": (lambda f: cut(f / "config.json"), "config.json"),
    "config_of_no_run": (lambda f: edit(f / "config.json", lambda c: c["slicevit"].pop("training")), "config.json"),
    "config_of_a_newer_version": (
        lambda f: edit(f / "config.json", lambda c: c["slicevit"]["training"].update(odd=1)),
        "odd",
    ),
    "config_missing": (lambda f: (f / "config.json").unlink(), "config.json"),
    "metrics_cut": (lambda f: (f / "metrics.csv").write_text("epoch,st"), "metrics.csv"),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def other_model(folder: Path) -> None:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["model"]["norm.weight"] = torch.zeros(3)
    torch.save(state, folder / "checkpoint.pt")


@pytest.mark.parametrize("way", BREAK_RUN)
def test_resume_of_a_broken_run_names_the_file_and_changes_nothing(way: str, run: Path, refused: Refused) -> None:
    damage, named = BREAK_RUN[way]
    damage(run)
    before = digest(run)
    message = refused("train", "--resume", run)
    assert named in message
    assert run.name in message or way == "config_of_a_newer_version"
    assert digest(run) == before


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """`small_disk(size)`: no file may grow beyond `size` bytes, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(run: Path, refused: Refused, small_disk: Callable[[int], None]) -> None:
    """Its checkpoint goes back to a finished one of one epoch; two are wanted, and there is no room for the next."""
    edit(run / "config.json", lambda c: c["slicevit"]["training"].update(epochs=2))
    before = digest(run)
    small_disk((run / "checkpoint.pt").stat().st_size // 2)
    message = refused("train", "--resume", run)
    assert "checkpoint.pt" in message
    assert str(run) in message
    after = digest(run)
    for name in ("checkpoint.pt", "model.safetensors", "config.json", "metrics.csv"):
        assert after[name] == before[name], name
    assert not [name for name in after if name.endswith(".tmp")]


def test_a_loss_that_is_not_finite_names_step_widths_and_checkpoint(
    run: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(run / "config.json", lambda c: c["slicevit"]["training"].update(epochs=2))
    before = torch.load(run / "checkpoint.pt", weights_only=True)
    weights, metrics = digest(run)["model.safetensors"], digest(run)["metrics.csv"]
    cross_entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *a, **k: cross_entropy(*a, **k) * float("nan"))
    message = refused("train", "--resume", run)
    assert "step 3" in message
    assert "widths 1, 3/4, 1/2, 1/4" in message
    assert str(run) in message
    after = torch.load(run / "checkpoint.pt", weights_only=True)
    assert after["step"] == before["step"] == 3
    assert all(torch.equal(value, before["model"][name]) for name, value in after["model"].items())
    assert (digest(run)["model.safetensors"], digest(run)["metrics.csv"]) == (weights, metrics)


# --- eval, report, export, import ------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["eval", "report", "export"])
@pytest.mark.parametrize("folder", ["odd", "runs/odd", "a/b/c/odd"])
def test_a_run_that_is_not_there(command: str, folder: str, refused: Refused, tmp_path: Path) -> None:
    more = [tmp_path / "out", "--width", "1/2"] if command == "export" else []
    assert "odd" in refused(command, folder, *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("width", ["3/16", "odd", "2", "0", "8"])
def test_eval_of_a_width_that_cannot_be(width: str, run: Path, refused: Refused) -> None:
    before = digest(run)
    assert width in refused("eval", run, "--width", width)
    assert digest(run) == before


def test_eval_on_data_of_other_classes(run: Path, refused: Refused, tmp_path: Path) -> None:
    before = digest(run)
    message = refused("eval", run, "--data", write_images(tmp_path / "three", classes=3))
    assert "3 classes" in message
    assert "2" in message
    assert digest(run) == before


def test_eval_on_data_that_is_not_there(run: Path, refused: Refused) -> None:
    assert "/no/such" in refused("eval", run, "--data", "/no/such")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
@pytest.mark.parametrize("command", ["eval", "export"])
def test_eval_and_export_of_a_broken_run(command: str, damage: str, file: str, run: Path, refused: Refused) -> None:
    (run / file).unlink() if damage == "missing" else cut(run / file)
    before = digest(run)
    more = [run.parent / "out", "--width", "1/2"] if command == "export" else []
    assert file in refused(command, run, *more)
    assert digest(run) == before
    assert not (run.parent / "out").exists()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_report_of_a_run_without_results(damage: str, run: Path, refused: Refused) -> None:
    (run / "results.json").unlink() if damage == "missing" else cut(run / "results.json")
    before = digest(run)
    assert "results.json" in refused("report", run)
    assert digest(run) == before


@pytest.mark.parametrize("width", ["3/8", "odd", "8"])
def test_export_of_a_width_off_the_grid(width: str, run: Path, refused: Refused, tmp_path: Path) -> None:
    message = refused("export", run, tmp_path / "out", "--width", width)
    assert width in message
    if width == "8":
        assert "8 channels is 1/2" in message
    assert not (tmp_path / "out").exists()


def test_export_to_an_unknown_format(run: Path, refused: Refused, tmp_path: Path) -> None:
    assert "odd" in refused("export", run, tmp_path / "out", "--width", "1/2", "--to", "odd")
    assert not (tmp_path / "out").exists()


def published(path: Path, **changes: Any) -> Path:
    net = timm.create_model("deit_tiny_patch16_224", img_size=224, depth=12, embed_dim=48, num_heads=3, num_classes=4)
    torch.save({"model": net.state_dict() | changes, "args": argparse.Namespace(lr=1e-3)}, path)
    return path


class Evil:
    """What no published file holds."""


BREAK_FILE: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: None,
    "a_folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("version https://git-lfs"),
    "cut": lambda path: cut(published(path)),
    "no_weights": lambda path: torch.save({"optimizer": 1}, path),
    "a_list": lambda path: torch.save([1, 2], path),
    "another_model": published,
    "unsafe": lambda path: torch.save({"model": Evil()}, path),
}


@pytest.mark.parametrize("way", BREAK_FILE)
def test_import_of_a_file_that_is_no_published_checkpoint(way: str, refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "published.pth"
    BREAK_FILE[way](path)
    message = refused("import", path, tmp_path / "out", "--model", "deit_tiny_patch16_224", "--grid", "1/4:1:1/4")
    assert "published.pth" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flag", "value"), [("--model", "vit_odd"), ("--model", "resnet18"), ("--grid", "1/4:1")])
def test_import_with_a_bad_flag(flag: str, value: str, refused: Refused, tmp_path: Path) -> None:
    path = published(tmp_path / "published.pth")
    message = refused("import", path, tmp_path / "out", flag, value)
    assert value in message or (value == "resnet18" and "ResNet" in message)
    assert not (tmp_path / "out").exists()


# --- what is not bad input still works -------------------------------------------------------------------


def test_the_run_that_the_tests_break_is_whole(run: Path, data: Path, tmp_path: Path) -> None:
    main(["eval", str(run)])
    main(["eval", str(run), "--width", "5/8"])
    main(["report", str(run)])
    main(["export", str(run), str(tmp_path / "out"), "--width", "1/2", "--to", "timm"])
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).embed_dim == 8
    assert slicevit.from_pretrained(run).num_classes == 2
    weights = (run / "model.safetensors").read_bytes()
    main(["train", "--resume", str(run)])  # of a run that is finished: evaluated again, nothing trained
    assert (run / "model.safetensors").read_bytes() == weights
