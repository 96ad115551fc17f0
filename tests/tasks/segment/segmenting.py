"""What the tests of segmenters share."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import slicevit
from slicevit.checkpoint import save_pretrained

MODEL_ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
WIDTHS = ("1/4", "1/2", "3/4", "1")
MODEL_FLAGS = [
    *("--model", "vit_tiny_patch16_224", "--model-args", *(f"{key}={value}" for key, value in MODEL_ARGS.items())),
]
FLAGS = [
    *("--grid", "1/4:1:1/4", "--num-classes", "3", "--size", "32", "48", "--decoder-channels", "32"),
    *("--epochs", "4", "--batch-size", "4", "--lr", "4e-3", "--warmup-epochs", "0", "--scale", "1", "1"),
    *("--eval-every", "2", "--device", "cpu", "--log-with"),
]


def saved_backbone(folder: Path, **options: Any) -> Path:
    """A classifier with random weights, as training leaves it, for images of another size."""
    torch.manual_seed(1)
    arguments = MODEL_ARGS | {"img_size": 24, "num_classes": 5} | options
    save_pretrained(slicevit.create_model("vit_tiny_patch16_224", "1/4:1:1/4", **arguments), folder)
    return folder


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def refused(capsys: pytest.CaptureFixture[str], call: Callable[[], None], status: int = 2) -> str:
    with pytest.raises(SystemExit) as stop:
        call()
    captured = capsys.readouterr()
    assert stop.value.code == status, captured
    return captured.err.splitlines()[-1]
