"""What a run without labels tells of every width: how near it comes to the teacher, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias, TypeGuard

from rich.table import Table

from slicevit.costs import width_costs
from slicevit.data import TransformConfig
from slicevit.elastic import ElasticModel
from slicevit.evaluation.results import WidthResult, to_csv, widths_table
from slicevit.files import write_text
from slicevit.training.distiller import Fit

FITS = "distillation.json"


@dataclass(frozen=True)
class FitResult:
    """One width of one run; the columns that `slicevit.evaluation.results.WidthResult` has too mean the same.

    Attributes:
        loss: sum of the objectives' mean squared errors against the teacher, on the test images.
        cosine: mean cosine similarity of the projected tokens and the teacher's.
        img_size: side of the input, in pixels.
        images: number of test images.
    """

    model: str
    method: str
    width: str
    channels: int
    loss: float
    cosine: float
    param_count: float
    gmacs: float
    latency_ms: float | None
    img_size: int
    images: int

    @property
    def top1(self) -> None:
        """There are no classes."""
        return None


Rows: TypeAlias = Sequence[WidthResult | FitResult]


def are_fits(rows: Rows) -> TypeGuard[Sequence[FitResult]]:
    """Whether these are rows of a run without labels."""
    return bool(rows) and all(isinstance(row, FitResult) for row in rows)


def fit_rows(
    model: ElasticModel,
    fits: Mapping[str, Fit],
    latency: Mapping[str, float],
    transform: TransformConfig,
    method: str,
) -> list[FitResult]:
    """The rows of distillation.csv, narrowest first."""
    rows = []
    for name, fit in sorted(fits.items(), key=lambda item: Fraction(item[0])):
        costs = width_costs(model, name)
        rows.append(
            FitResult(
                model=model.pretrained_cfg.get("architecture", ""),
                method=method,
                width=name,
                channels=costs.channels,
                loss=fit.loss,
                cosine=fit.cosine,
                param_count=costs.params / 1e6,
                gmacs=costs.macs / 1e9,
                latency_ms=latency.get(name),
                img_size=transform.img_size[1],
                images=fit.images,
            )
        )
    return rows


def write_fits(folder: Path, rows: Sequence[FitResult]) -> None:
    """Write distillation.csv and distillation.json, each in one step."""
    table = [asdict(row) for row in rows]
    write_text(folder / "distillation.csv", to_csv([field.name for field in fields(FitResult)], table))
    write_text(folder / FITS, json.dumps(table, indent=2, allow_nan=False) + "\n")


def read_fits(folder: Path) -> list[FitResult]:
    """Read distillation.json. Raises ValueError when it is missing or broken."""
    path = folder / FITS
    try:
        return [FitResult(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it and go on with the run") from None


def fits_table(rows: Sequence[FitResult], title: str) -> Table:
    """The rows for a terminal, 80 columns wide."""
    return widths_table(rows, title, {"Loss": lambda row: f"{row.loss:.4f}", "Cosine": lambda row: f"{row.cosine:.4f}"})
