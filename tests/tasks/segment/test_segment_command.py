"""`slicevit segment` from end to end: all widths in one network, each width alone, resumed, refused."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from segmenting import FLAGS, WIDTHS, refused, saved_backbone, table

from slicevit import cli
from slicevit.tasks.segment.initial import load_segmenter, modules_of
from slicevit.training import trainee

Segment = Callable[..., None]


def test_one_network_for_all_widths(segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    segment(run, "--epochs", "16", "--eval-split", "test")
    said = capsys.readouterr().out
    rows = table(run)
    assert [row["width"] for row in rows] == list(WIDTHS)
    assert [int(row["channels"]) for row in rows] == [8, 16, 24, 32]
    assert {row["images"] for row in rows} == {"5"}  # of the test split
    assert all(float(row["miou"]) > 75 for row in rows), rows  # one class everywhere is 33 at best
    written = json.loads((run / "results.json").read_text())
    assert [np.mean(row["ious"]) for row in written] == pytest.approx([float(row["miou"]) for row in rows])
    assert f"{float(rows[0]['miou']):.2f}" in said
    assert "epoch 16: mIoU 1/4 " in said
    with Image.open(run / "predictions.png") as picture:
        assert picture.width > picture.height
    with (run / "metrics.csv").open(newline="") as lines:
        measured = list(csv.DictReader(lines))
    assert [row["miou"] for row in measured[-4:]] == [row["miou"] for row in rows]
    assert measured[0]["miou"] == ""
    assert measured[0]["train_loss"] != ""


def test_a_backbone_with_batch_norm_has_statistics_of_every_width(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made anew of the same weights they are the same ones, and they come back with the saved segmenter.

    Without them it is refused.
    """
    hybrid = ("--model", "swiftformer_xs", "--model-args", "layers=(1,1,1,1)", "embed_dims=(16,32,48,64)")
    short = ("--epochs", "1", "--size", "64", "64", "--drop-path", "0")
    monkeypatch.setattr("slicevit.training.loop.LATENCY_SECONDS", 0.01)
    flags = ("--data", str(data), "--out", str(tmp_path / "run"), *hybrid, *FLAGS[FLAGS.index("--grid") :], *short)
    cli.main(["segment", *flags])
    model, recipe = load_segmenter(tmp_path / "run")
    assert all(model.is_calibrated(width) for width in WIDTHS)
    narrow = model.statistics("1/2")
    assert narrow is not None
    name = "backbone.stem.4"
    full = dict(model.named_buffers())[f"{name}.running_mean"]
    assert not torch.allclose(narrow[name]["running_mean"], full[: len(narrow[name]["running_mean"])], atol=1e-3)  # type: ignore[arg-type]
    run = str(tmp_path / "run")
    (tmp_path / "run" / "statistics.safetensors").unlink()
    assert f"slicevit calibrate {run}" in refused(capsys, lambda: cli.main(["eval", run]))
    cli.main(["calibrate", run, "--images", "16"])
    again = load_segmenter(tmp_path / "run")[0].statistics("1/2")
    assert again is not None
    torch.testing.assert_close(again[name]["running_mean"], narrow[name]["running_mean"])
    cli.main(["eval", run])
    shown = modules_of(tmp_path / "run")
    window_1CHW = torch.randn(1, 3, *recipe.size, generator=torch.Generator().manual_seed(0))
    for width, (module, _) in shown.items():
        assert torch.equal(module(window_1CHW), model(window_1CHW, width=width))


def test_each_width_cut_out_and_trained_alone(segment: Segment, tmp_path: Path) -> None:
    backbone, run = saved_backbone(tmp_path / "backbone"), tmp_path / "run"
    segment(run, "--init", backbone, "--method", "separate", "--epochs", "1", "--micro-batch", "0")
    rows = table(run)
    assert [row["width"] for row in rows] == list(WIDTHS)
    assert [int(row["channels"]) for row in rows] == [8, 16, 24, 32]
    modules = modules_of(run)
    decoders = {name: module.decoder.classifier.weight.shape for name, (module, _) in modules.items()}
    assert set(decoders.values()) == {(3, 16, 1, 1)}  # not sliced
    assert (run / "predictions.png").exists()


def test_a_width_that_was_cut_out_begins_with_the_weights_of_that_width(segment: Segment, tmp_path: Path) -> None:
    """A learning rate of almost nothing leaves them as they were."""
    backbone, run = saved_backbone(tmp_path / "backbone"), tmp_path / "run"
    segment(
        run, "--init", backbone, "--method", "separate", "--width", "1/4", "--epochs", "0.25", "--lr", "1e-30",
        "--min-lr", "0",
    )  # fmt: skip
    assert [row["width"] for row in table(run)] == ["1/4"]
    mine = load_segmenter(run)[0].state_dict()
    whole = load_file(backbone / "model.safetensors")
    assert torch.equal(mine["backbone.blocks.2.mlp.fc1.weight"], whole["blocks.2.mlp.fc1.weight"][-32:, -8:])
    assert torch.equal(mine["backbone.patch_embed.proj.weight"], whole["patch_embed.proj.weight"][-8:])


def test_separate_classifiers_begin_separate_segmenters(
    segment: Segment, train_quickly: Callable[[list[str]], None], tmp_path: Path
) -> None:
    for label in ("a", "b"):
        for split in ("train", "val"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (24, 24), (number * 20, 0, 9)).save(folder / f"{number}.png")
    backbone, run = tmp_path / "backbone", tmp_path / "run"
    train_quickly(
        ["--data", str(tmp_path / "images"), "--out", str(backbone), "--method", "separate", "--grid", "1/2:1:1/2",
         "--model", "vit_tiny_patch16_224", "--model-args", "img_size=24", "patch_size=8", "embed_dim=32", "depth=2",
         "num_heads=2", "--epochs", "1", "--batch-size", "4", "--device", "cpu", "--workers", "0", "--log-with"]
    )  # fmt: skip
    segment(
        run, "--init", backbone, "--method", "separate", "--grid", "1/2:1:1/2", "--epochs", "0.25", "--lr", "1e-30",
        "--min-lr", "0",
    )  # fmt: skip
    assert [row["channels"] for row in table(run)] == ["16", "32"]
    mine = load_file(run / "separate" / "1-2" / "model.safetensors")
    whole = load_file(backbone / "separate" / "1-2" / "model.safetensors")
    assert torch.equal(mine["backbone.blocks.1.attn.qkv.weight"], whole["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize("method", ["scala", "separate"])
def test_a_stopped_run_goes_on_to_the_same_weights(
    segment: Segment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = ("--method", method, "--grid", "1/2:1:1/2", "--epochs", "2", "--drop-path", "0.2", "--ema-decay", "0.9")
    segment(whole, *flags)
    steps, original = [], trainee.Trainee.train_step

    def train_step(self: trainee.Trainee, *args: object) -> None:
        original(self, *args)
        steps.append(self.step)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainee.Trainee, "train_step", train_step)
    told = refused(capsys, lambda: segment(run, *flags), status=143)
    assert told.endswith(f"go on with: slicevit segment --resume {run}")
    cli.main(["segment", "--resume", str(run)])
    assert len(steps) == (16 if method == "separate" else 8)  # none done twice
    for weights in sorted(whole.rglob("model.safetensors")):
        mine, theirs = load_file(run / weights.relative_to(whole)), load_file(weights)
        assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    kept = [[(row["width"], row["miou"]) for row in table(folder)] for folder in (whole, run)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--data", "nowhere"), "--data nowhere: nowhere/train/images is no folder"),
        (("--method", "rotated"), "--method rotated is for classifiers: train one by it"),
        (("--width", "1/2"), "--width trains one width alone"),
        (("--method", "separate", "--width", "1/3"), "--width 1/3: "),
        (("--decoder-channels", "36"), "--decoder-channels must be a multiple of 8, got 36"),
        (("--grid", "1/8:1:1/8"), "at width 1/8 its norms have no whole groups of 4 channels; give a multiple of 64"),
        (("--num-classes", "1"), "--num-classes must lie between 2 and 255"),
        (("--init", "nowhere"), "nowhere is neither a folder nor"),
        (("--model", "vit_nonsense"), "unknown model"),
        (("--init", "nowhere", "--model", "vit_tiny_patch16_224"), "--model is for --init scratch or pretrained"),
        (("--init", "nowhere", "--model-args", "depth=2"), "--model-args are for --init scratch or pretrained"),
        (("--scale", "2", "1"), "--scale must be above 0 and ascend"),
        (("--lr", "0"), "--lr must be above 0"),
        (("--class-names", "sky", "sea"), "--class-names gives 2 names for --num-classes 3"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(
    segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    run = tmp_path / "run"
    assert said in refused(capsys, lambda: segment(run, *flags))
    assert not (run / "model.safetensors").exists()


def test_a_backbone_that_is_tied_to_its_size(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused at another size, and taken when it was built for it."""
    monkeypatch.setattr("slicevit.training.loop.LATENCY_SECONDS", 0.01)
    mixer = ("--model", "mixer_s32_224", "--size", "64", "64", "--epochs", "0.5")
    given = ["segment", "--data", str(data), *FLAGS, *mixer]
    told = refused(capsys, lambda: cli.main([*given, "--out", str(tmp_path / "no")]))
    assert "--size 64 64 does not go with MlpMixer" in told
    assert "give the size that it was built for, --size 224 224, or build it for this one" in told
    cli.main([*given, "--out", str(tmp_path / "run"), "--model-args", "img_size=64"])
    assert [row["width"] for row in table(tmp_path / "run")] == list(WIDTHS)


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, lambda: cli.main(["segment"])) == "slicevit: --data: name a folder of images and masks"
    told = refused(capsys, lambda: cli.main(["segment", "--data", "pairs", "--out", str(tmp_path / "run")]))
    assert told.startswith("slicevit: --num-classes: say how many classes the masks of pairs have")


def test_a_classifier_is_no_segmenter_nor_the_other_way_round(
    segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone, run = saved_backbone(tmp_path / "backbone"), tmp_path / "run"
    told = refused(capsys, lambda: cli.main(["segment", "--resume", str(backbone)]))
    assert told == f"slicevit: {backbone} is no segmenter's folder: slicevit segment makes one"
    segment(run, "--grid", "1/2:1:1/2", "--epochs", "0.25", "--decoder", "mask-transformer")
    assert "classes" in dict(load_segmenter(run)[0].decoder.named_parameters())
    told = refused(capsys, lambda: cli.main(["probe", str(run), "--data", "x"]))
    assert told == f"slicevit: {run} is a run of slicevit segment, not a classifier of slicevit train"
    assert refused(capsys, lambda: cli.main(["report", str(run), "--out", str(tmp_path / "page")])) == told
    told = refused(capsys, lambda: cli.main(["predict", str(run), str(run), "--out", str(tmp_path / "out.csv")]))
    assert "whose answers are no table: `slicevit serve` gives the masks" in told
    told = refused(capsys, lambda: cli.main(["train", "--resume", str(run)]))
    assert told == f"slicevit: {run} is a run of slicevit segment, not of slicevit train"
