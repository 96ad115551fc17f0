"""Runs as a training would leave them, without training anything."""

import json
import math
from fractions import Fraction
from pathlib import Path

from slicevit.evaluation.results import MetricsLog, WidthResult, write_results


def width_result(width: Fraction | str, gain: float = 0.0, trained: bool = True, full: int = 384) -> WidthResult:
    """A row that looks like DeiT-S on ImageNet."""
    width = Fraction(width)
    r = float(width)
    top1 = 76.5 - 22 * (1 - r) ** 1.8 + gain if trained else 1.5 + r
    top5 = min(99.0, top1 + 17)
    return WidthResult(
        model="vit_small_patch16_224",
        method="scala",
        width=str(width),
        trained=trained,
        channels=int(full * width),
        top1=top1,
        top1_err=100 - top1,
        top5=top5,
        top5_err=100 - top5,
        loss=4.6 - top1 / 22,
        param_count=22.05 * r**2 * (full / 384) ** 2,
        gmacs=4.61 * r**2 * (full / 384) ** 2,
        latency_ms=1.4 + 5.2 * r**1.5,
        img_size=224,
        crop_pct=0.9,
        interpolation="bicubic",
        images=50_000,
    )


def write_run(
    folder: Path,
    step: str = "1/8",
    untrained: tuple[str, ...] = (),
    gain: float = 0.0,
    epochs: int = 20,
    full: int = 384,
) -> None:
    """Write config.json, results and metrics.csv: widths from 1/4 to 1 in steps, `full` channels wide."""
    folder.mkdir()
    count = int(Fraction(3, 4) / Fraction(step)) + 1
    widths = [Fraction(1, 4) + k * Fraction(step) for k in range(count)]
    rows = [width_result(width, gain, full=full) for width in widths]
    rows += [width_result(width, trained=False, full=full) for width in untrained]
    write_results(folder, rows)
    config = {"architecture": rows[0].model, "slicevit": {"data": {"name": "imagenet-1k"}, "lr": 2e-3}}
    (folder / "config.json").write_text(json.dumps(config))
    log = MetricsLog(folder)
    log.append(
        [
            {
                "epoch": epoch,
                "step": 1250 * (epoch + 1),
                "width": str(width),
                "train_loss": 6.9 * math.exp(-(epoch + 1) / 8) + 1.5 + 1.6 * (1 - float(width)),
                "top1": width_result(width, gain).top1 * (1 - math.exp(-(epoch + 1) / 5)),
                "lr": 2e-3,
            }
            for epoch in range(epochs)
            for width in widths
        ]
    )
