"""Hybrids with BatchNorm end to end: trained, calibrated, evaluated, exported, run by the engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import slicevit
from slicevit import cli
from slicevit.runtime.engine import Engine
from slicevit.saved_statistics import STATISTICS

HYBRIDS = {
    "swiftformer_xs": ["layers=(1,1,1,1)", "embed_dims=(16,32,48,64)"],
    "tiny_vit_5m_224": [
        *("depths=(1,1,1,1)", "num_heads=(2,2,2,2)", "embed_dims=(16,32,32,64)"),
    ],
    "uniformer_xs": ["depths=(1,1,2,1)", "num_heads=(0,0,2,2)", "embed_dims=(16,16,32,32)"],
}
WIDTHS = ("1/4", "1/2", "3/4", "1")


def flags(name: str, data: Path, out: Path) -> list[str]:
    model = ["--model", name, "--model-args", *HYBRIDS[name], "--grid", "1/4:1:1/4"]
    short = ["--epochs", "2", "--batch-size", "6", "--statistics-images", "12", "--crop", "center", "--hflip", "0"]
    return ["--data", str(data), *model, *short, "--device", "cpu", "--threads", "1", "--workers", "0", "--mixup", "0",
            "--cutmix", "0", "--drop-path", "0", "--ema-decay", "0.5", "--out", str(out)]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for c in range(2):
            (folder / split / f"c{c}").mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 128 + 127 * c, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"c{c}" / f"{k}.png")
    return folder


@pytest.fixture(scope="module", params=HYBRIDS)
def finished(
    request: pytest.FixtureRequest,
    data: Path,
    train_quickly: Callable[[list[str]], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run of each hybrid."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    train_quickly(flags(request.param, data, folder))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """A run to change."""
    monkeypatch.setattr("slicevit.training.evaluate.LATENCY_SECONDS", 0.01)
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_trained_hybrid_is_right_at_every_width(run: Path, tmp_path: Path) -> None:
    model, engine = slicevit.from_pretrained(run), Engine(run, device="cpu")
    images = torch.randn(2, *engine.input_size, generator=torch.Generator().manual_seed(0))
    for width in WIDTHS:
        assert model.is_calibrated(width)
        alone = model.to_timm(width).eval()
        expected = alone(images)
        assert torch.equal(model(images, width=width), expected)
        torch.testing.assert_close(engine.run(images, width), expected, rtol=1e-5, atol=1e-6)
    cli.main(["export", str(run), "--width", "1/2", "--to", "timm", str(tmp_path / "half")])
    exported = timm.create_model(f"local-dir:{tmp_path / 'half'}", pretrained=True).eval()
    torch.testing.assert_close(exported(images), model(images, width="1/2"), rtol=1e-5, atol=1e-6)


def test_calibrating_anew_gives_what_training_saved_and_other_images_something_else(run: Path) -> None:
    saved, weights = load_file(run / STATISTICS), load_file(run / "model.safetensors")
    (run / STATISTICS).unlink()
    cli.main(["calibrate", str(run), "--images", "12", "--batch-size", "12", "--device", "cpu"])
    again = load_file(run / STATISTICS)
    assert all(torch.equal(again[name], value) for name, value in saved.items())
    assert all(torch.equal(load_file(run / "model.safetensors")[name], value) for name, value in weights.items())
    cli.main(["calibrate", str(run), "--images", "12", "--batch-size", "6", "--seed", "1", "--device", "cpu"])
    assert not all(torch.equal(load_file(run / STATISTICS)[name], value) for name, value in saved.items())
    cli.main(["eval", str(run), "--device", "cpu"])


def test_a_run_without_statistics_is_refused(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (run / STATISTICS).unlink()
    for command in (["eval"], ["export", "--width", "1/2", "--to", "timm", str(tmp_path / "out")], ["profile"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([command[0], str(run), *command[1:]])
        assert stop.value.code == 2
        assert f"slicevit calibrate {run}" in capsys.readouterr().err
    cli.main(["eval", str(run), "--width", "1", "--device", "cpu"])


def test_resuming_a_finished_run_keeps_its_statistics(run: Path) -> None:
    saved = load_file(run / STATISTICS)
    cli.main(["train", "--resume", str(run)])
    assert all(torch.equal(load_file(run / STATISTICS)[name], value) for name, value in saved.items())
    assert slicevit.from_pretrained(run).is_calibrated("1/2")


def test_a_width_that_was_not_trained_is_calibrated_before_it_is_evaluated(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", str(run), "--width", "5/8", "--device", "cpu"])
    assert f"slicevit calibrate {run} --width 5/8" in capsys.readouterr().err
    small = ["--images", "8", "--batch-size", "4", "--device", "cpu"]
    cli.main(["calibrate", str(run), "--width", "5/8", *small])
    cli.main(["eval", str(run), "--width", "5/8", "--device", "cpu"])
    cli.main(["eval", str(run), "--device", "cpu"])  # the others are there still


@pytest.mark.parametrize(
    ("wrong", "named"),
    [(["--images", "1"], "--images"), (["--width", "1/3"], "--width 1/3"), (["--data", "nowhere"], "nowhere")],
)
def test_what_cannot_be_calibrated_is_one_sentence(
    wrong: list[str], named: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        cli.main(["calibrate", str(run), *wrong])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert named in said
    assert said.count("\n") == 1
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
