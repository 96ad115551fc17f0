"""What a run leaves in its folder, and the commands that read it."""

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

import slicevit
from slicevit import cli
from slicevit.data import eval_config, eval_transform
from slicevit.training import evaluate, loop
from slicevit.training.config import TrainConfig, from_dict
from slicevit.training.setup import build_model

CLASSES, PER_CLASS = 4, 16
WIDTHS = ["1/4", "1/2", "3/4", "1"]
MODEL_ARGS = {"img_size": 16, "patch_size": 8, "in_chans": 3, "embed_dim": 32, "depth": 2, "num_heads": 2}
FLAGS = [
    *("--model", "vit_tiny_patch16_224", "--model-args", *(f"{k}={v}" for k, v in MODEL_ARGS.items())),
    *("--grid", "1/4:1:1/4", "--batch-size", "8", "--device", "cpu", "--threads", "1"),
]
FILES = {
    *("config.json", "model.safetensors", "metrics.csv", "results.csv", "results.json"),
    *("frontier.png", "report.html", "README.md"),
}
TIMM_COLUMNS = {
    *("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"),
}


@pytest.fixture(autouse=True, scope="module")
def _quick_latency() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LATENCY_SECONDS", 0.02)
        patch.setattr(evaluate, "LATENCY_SECONDS", 0.02)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for split, count in (("train", PER_CLASS), ("val", 4)):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
            for k in range(count):
                pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{k}.png")
    return folder


def train(data: Path, out: Path, *flags: str) -> Path:
    cli.main(["train", "--data", str(data), "--out", str(out), *FLAGS, *flags])
    return out


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of 8 steps."""
    return train(data, tmp_path_factory.mktemp("runs") / "first-run", "--epochs", "2", "--eval-every", "1")


@pytest.fixture(scope="module")
def separate(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("--method", "separate", "--grid", "1/2:1:1/2", "--epochs", "1")
    return train(data, tmp_path_factory.mktemp("runs") / "apart", *flags)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def training_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())["slicevit"]["training"]


def assert_complete(run: Path, widths: list[str] = WIDTHS, method: str = "scala", files: set[str] = FILES) -> None:
    assert {path.name for path in run.iterdir()} >= files
    rows = rows_of(run / "results.csv")
    assert [row["width"] for row in rows] == widths
    assert {row["method"] for row in rows} == {method}
    assert {row["trained"] for row in rows} == {"True"}
    for row in rows:
        assert 0 <= float(row["top1"]) <= float(row["top5"]) <= 100
        assert math.isfinite(float(row["loss"]))
        assert float(row["latency_ms"]) > 0
    assert training_of(run)["method"] == method


# The folder


@pytest.mark.slow
def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`slicevit train`, cut to 8 of its 2,340 steps."""
    run = tmp_path / "demo"
    cli.main(["train", "--epochs", "0.05", "--out", str(run)])
    widths = ["1/4", "3/8", "1/2", "5/8", "3/4", "7/8", "1"]
    assert_complete(run, widths, "rotated")
    screen = capsys.readouterr().out
    for width, row in zip(widths, rows_of(run / "results.csv"), strict=True):
        (line,) = [line for line in screen.splitlines() if re.match(rf"\W*{width}\s", line)]
        numbers = re.findall(r"\d+\.?\d*", line.replace(width, "", 1))
        assert int(numbers[0]) == int(row["channels"]) == 96 * eval(width)
        assert [float(n) for n in numbers[3:5]] == [round(float(row["top1"]), 2), round(float(row["top5"]), 2)]
        assert row["images"] == "5000"
    for heading in ("Channels", "Params", "MACs", "Top-1", "Top-5", "Latency"):
        assert heading in screen
    assert str(run / "report.html") in screen


def test_config_rebuilds_model_and_run(run: Path, data: Path) -> None:
    assert_complete(run)
    config = from_dict(training_of(run))
    assert config == config.resolved()
    assert (config.data, config.epochs, config.batch_size, config.lr) == (str(data), 2, 8, 5e-4)
    assert config.model_args == MODEL_ARGS
    assert (config.isolation, config.transfer, config.sampling, config.calibration) == (
        *("smallest", "next", "stable"),
        True,
    )
    rebuilt = build_model(config, CLASSES)
    rebuilt.load_state_dict(load_file(run / "model.safetensors"), strict=True)


def test_timm_reads_the_folder(run: Path) -> None:
    full = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    assert full.state_dict().keys() == load_file(run / "model.safetensors").keys()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(full(images), slicevit.from_pretrained(run)(images))
    described = json.loads((run / "config.json").read_text())
    assert described["label_names"] == [f"class{k}" for k in range(CLASSES)]
    assert described["num_classes"] == CLASSES


@pytest.mark.parametrize("crop", ["pad", "center"])
def test_timm_prepares_images_as_the_run_does(crop: str, data: Path, tmp_path: Path) -> None:
    """By the folder alone; the image is not square."""
    folder = train(data, tmp_path / "run", "--crop", crop, "--epochs", "0.2")
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (31, 50, 3), dtype=np.uint8))
    ours = eval_transform(eval_config(json.loads((folder / "config.json").read_text())))
    assert torch.equal(create_transform(**resolve_model_data_config(plain))(image), ours(image))


def test_metrics(run: Path) -> None:
    rows = rows_of(run / "metrics.csv")
    assert [(row["epoch"], row["step"], row["width"]) for row in rows] == [
        (str(epoch), str(8 * (epoch + 1)), width) for epoch in range(2) for width in WIDTHS
    ]
    for row in rows:
        assert all(math.isfinite(float(row[name])) for name in ("train_loss", "top1", "top5", "loss", "lr"))
    last = {row["width"]: row for row in rows[-4:]}
    for row in rows_of(run / "results.csv"):  # the last epoch is what the results say
        assert float(row["top1"]) == float(last[row["width"]]["top1"])


def test_results(run: Path) -> None:
    rows = rows_of(run / "results.csv")
    assert rows[0].keys() >= TIMM_COLUMNS | {"width", "gmacs", "latency_ms"}
    assert [int(row["channels"]) for row in rows] == [8, 16, 24, 32]
    for row, same in zip(rows, json.loads((run / "results.json").read_text()), strict=True):
        assert {name: str(value) for name, value in same.items()} == row
        assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100)
        narrow = timm.create_model(
            "vit_tiny_patch16_224", num_classes=CLASSES, **MODEL_ARGS | {"embed_dim": int(row["channels"])}
        )
        count = sum(parameter.numel() for parameter in narrow.parameters())
        assert float(row["param_count"]) == pytest.approx(count / 1e6, rel=0.01)


def test_picture_page_and_card(run: Path) -> None:
    with Image.open(run / "frontier.png") as picture:
        picture.verify()
        assert min(picture.size) >= 300
    page = (run / "report.html").read_text()
    assert re.search(r"""<(script|link|img|iframe)\b[^>]*\b(src|href)=["']?(?!data:)""", page) is None  # self-contained
    assert 'name="viewport"' in page
    for text in ("first-run", "1/4", "3/4", "MACs", "atency", "arameters", "batch_size"):
        assert text in page, text
    card = (run / "README.md").read_text()
    assert card.startswith("---\n")
    assert "slicevit" in card


# eval, report, export


def test_eval_of_all_widths(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = rows_of(run / "results.csv")
    cli.main(["eval", str(run), "--device", "cpu"])
    screen = capsys.readouterr().out
    assert all(re.search(rf"^\W*{width}\s", screen, re.MULTILINE) for width in WIDTHS)
    for old, new in zip(before, rows_of(run / "results.csv"), strict=True):
        assert {k: v for k, v in old.items() if k != "latency_ms"} == {
            k: v for k, v in new.items() if k != "latency_ms"
        }
    untouched = (run / "results.csv").read_bytes()
    cli.main(["eval", str(run), "--data", str(data), "--device", "cpu"])
    assert (run / "results.csv").read_bytes() == untouched


def test_eval_with_merged_tokens(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer multiply-accumulates at the same parameters, and the results of the run stay as they were."""
    before = (run / "results.csv").read_bytes()
    cli.main(["eval", str(run), "--width", "1/2", "--device", "cpu"])
    whole = capsys.readouterr().out
    cli.main(["eval", str(run), "--width", "1/2", "--merged", "1", "--device", "cpu"])
    merged = capsys.readouterr().out
    assert "1 pair of tokens merged in every block" in " ".join(merged.split())
    (parameters, macs), (same, fewer) = (_costs(text) for text in (whole, merged))
    assert same == parameters
    assert fewer < macs
    assert (run / "results.csv").read_bytes() == before
    with pytest.raises(SystemExit):
        cli.main(["eval", str(run), "--merged", "-1", "--device", "cpu"])
    assert "--merged must not be negative" in capsys.readouterr().err


def _costs(screen: str) -> tuple[float, float]:
    (line,) = [line for line in screen.splitlines() if re.match(r"\W*1/2\s", line)]
    parameters, macs = (float(cell) for cell in re.findall(r"\d+\.\d+", line)[:2])
    return parameters, macs


def test_eval_of_one_width(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "results.csv").read_bytes()
    (row,) = [row for row in rows_of(run / "results.csv") if row["width"] == "1/2"]
    for width in ("1/2", "0.5"):
        cli.main(["eval", str(run), "--width", width, "--device", "cpu"])
        screen = capsys.readouterr().out
        (line,) = [line for line in screen.splitlines() if re.match(r"\W*1/2\s", line)]
        assert f"{float(row['top1']):.2f}" in line
        assert "not trained" not in screen
        assert not re.search(r"^\W*3/4\s", screen, re.MULTILINE)
    assert (run / "results.csv").read_bytes() == before


@pytest.mark.parametrize(("width", "channels"), [("3/8", "12"), ("5/16", "10"), ("7/8", "28")])
def test_eval_of_a_width_never_trained(
    width: str, channels: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "results.csv").read_bytes()
    cli.main(["eval", str(run), "--width", width, "--device", "cpu"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if width in line]
    assert "not trained" in line
    assert channels in line.split()
    assert (run / "results.csv").read_bytes() == before


def test_report_of_two_runs(run: Path, separate: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "report.html").read_bytes()
    cli.main(["report", str(run), str(separate), "--out", str(tmp_path / "both")])
    screen = capsys.readouterr().out
    page = (tmp_path / "both" / "report.html").read_text()
    assert "first-run" in page
    assert "apart" in page
    assert str(tmp_path / "both" / "frontier.png") in screen
    with Image.open(tmp_path / "both" / "frontier.png") as picture:
        picture.verify()
    assert (run / "report.html").read_bytes() == before


@pytest.mark.parametrize("width", ["1/4", "1/2", "1"])
def test_export_to_timm(width: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    cli.main(["export", str(run), "--width", width, "--to", "timm", str(out)])
    assert f"local-dir:{out}" in capsys.readouterr().out
    alone = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = slicevit.from_pretrained(run)(images, width=width)
        assert float((alone(images) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    assert alone.pretrained_cfg["mean"] == slicevit.from_pretrained(run).pretrained_cfg["mean"]
    assert alone.pretrained_cfg["label_names"] == [f"class{k}" for k in range(CLASSES)]


# Methods, teachers and starts


def test_separate_runs(separate: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"config.json", "metrics.csv", "results.csv", "results.json", "frontier.png", "report.html"}
    assert_complete(separate, ["1/2", "1"], "separate", own)
    together = rows_of(separate / "results.csv")
    for row, channels in zip(together, (16, 32), strict=True):
        part = separate / "separate" / row["width"].replace("/", "-")
        (alone,) = rows_of(part / "results.csv")
        assert alone["width"] == "1"
        assert {k: v for k, v in row.items() if k != "width"} == {k: v for k, v in alone.items() if k != "width"}
        assert int(row["channels"]) == channels
        model = timm.create_model(f"local-dir:{part}", pretrained=True)  # a stock model of this width
        assert model.embed_dim == channels
        own_metrics = [m for m in rows_of(separate / "metrics.csv") if m["width"] == row["width"]]
        assert [m["top1"] for m in own_metrics] == [m["top1"] for m in rows_of(part / "metrics.csv")]
        cli.main(["eval", str(part), "--device", "cpu"])
    assert "16" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["usnet", "autoformer", "matformer"])
def test_the_other_methods(method: str, data: Path, tmp_path: Path) -> None:
    run = train(data, tmp_path / "run", "--method", method, "--epochs", "0.5")
    assert_complete(run, method=method)
    channels = [int(row["channels"]) for row in rows_of(run / "results.csv")]
    assert channels == ([32] * 4 if method == "matformer" else [8, 16, 24, 32])
    costs = [float(row["gmacs"]) for row in rows_of(run / "results.csv")]
    assert costs == sorted(set(costs))
    model = slicevit.from_pretrained(run)
    assert model.settings.scope == ("mlp" if method == "matformer" else "all")
    assert model.settings.isolation == "off"


@pytest.mark.parametrize("kind", ["run", "separate"])
def test_an_external_teacher(kind: str, run: Path, separate: Path, data: Path, tmp_path: Path) -> None:
    """It changes the full width's loss, and nothing that the first step draws."""
    teacher = {"run": run, "separate": separate}[kind]
    losses = {}
    for name, flags in {"taught": ("--teacher", str(teacher), "--distillation", "soft"), "alone": ()}.items():
        out = train(data, tmp_path / name, "--epochs", "0.125", *flags)
        assert_complete(out)
        losses[name] = {row["width"]: float(row["train_loss"]) for row in rows_of(out / "metrics.csv")}
    assert losses["taught"]["1"] != losses["alone"]["1"]
    for width in WIDTHS[:-1]:
        assert losses["taught"][width] == losses["alone"][width]
    assert training_of(tmp_path / "taught")["teacher"] == str(teacher)


def test_a_teacher_of_other_classes(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--out", str(tmp_path / "run"), "--teacher", str(run), "--epochs", "0.05"])
    assert stop.value.code == 2
    assert re.fullmatch(r"slicevit: --teacher .* classes .*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_starting_from_another_run(run: Path, data: Path, tmp_path: Path) -> None:
    """One step of next to no learning rate leaves the weights of the run that it began with."""
    flags = ("--init", str(run), "--epochs", "0.125", "--lr", "1e-12", "--min-lr", "0", "--weight-decay", "0")
    out = train(data, tmp_path / "run", *flags)
    assert_complete(out)
    ours, theirs = load_file(out / "model.safetensors"), load_file(run / "model.safetensors")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-9)


def test_starting_from_another_run_on_another_grid(run: Path, data: Path, tmp_path: Path) -> None:
    out = train(data, tmp_path / "run", "--init", str(run), "--epochs", "0.25", "--grid", "1/2:1:1/4")
    assert_complete(out, ["1/2", "3/4", "1"])


def test_starting_from_another_run_keeps_the_recipe(run: Path) -> None:
    """Regularisation is the new run's, wherever its weights come from."""
    common: dict[str, Any] = {"model": "vit_tiny_patch16_224", "model_args": MODEL_ARGS, "grid": "1/4:1:1/4"}
    for init in ("scratch", str(run)):
        model = build_model(TrainConfig(**common, init=init, drop_path=0.3), CLASSES)
        rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
        assert max(rates) == pytest.approx(0.3), init


def test_a_change_of_the_grid(data: Path, tmp_path: Path) -> None:
    fine = ["1/4", "3/8", "1/2", "5/8", "3/4", "7/8", "1"]
    run = train(data, tmp_path / "run", "--epochs", "2", "--grid-change", "1/8@50%")
    assert_complete(run, fine)
    rows = rows_of(run / "metrics.csv")
    assert [row["width"] for row in rows if row["epoch"] == "0"] == WIDTHS
    assert [row["width"] for row in rows if row["epoch"] == "1"] == fine
    model = slicevit.from_pretrained(run)
    assert [str(width) for width in model.widths] == fine
