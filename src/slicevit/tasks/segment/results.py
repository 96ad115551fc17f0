"""The tables of a segmentation run: results.csv and results.json, a row for each width."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from slicevit.evaluation.results import widths_table, write_rows

RESULTS = "results.json"


@dataclass(frozen=True)
class SegmentResult:
    """One width of one run; the columns that `slicevit.evaluation.results.WidthResult` has too mean the same.

    Attributes:
        model: timm's name of the backbone.
        channels: of the backbone.
        miou: mean intersection over union, in per cent.
        pixel_accuracy: in per cent.
        loss: mean cross-entropy of a pixel, in nats.
        param_count, gmacs, latency_ms: of backbone and decoder together; of one window.
        img_size: height and width of a window, in pixels, as "192x256".
        ious: of each class in per cent, None where it is neither in the masks nor predicted; in results.json alone.
        images: how many were evaluated on.
    """

    model: str
    method: str
    width: str
    channels: int
    miou: float
    pixel_accuracy: float
    loss: float
    param_count: float
    gmacs: float
    latency_ms: float | None
    img_size: str
    images: int
    ious: tuple[float | None, ...]


def write_segment_results(folder: Path, rows: Sequence[SegmentResult]) -> None:
    """Write results.csv and results.json, each in one step."""
    write_rows(folder, rows, hidden=("ious",))


def read_segment_results(folder: Path) -> list[SegmentResult]:
    """Read results.json. Raises ValueError when it is missing or broken."""
    path = folder / RESULTS
    try:
        return [SegmentResult(**row | {"ious": tuple(row["ious"])}) for row in json.loads(path.read_text("utf-8"))]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: go on with the run first") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is broken ({error}): delete it and go on with the run") from None


def segment_table(
    rows: Sequence[SegmentResult], title: str, trained: Callable[[SegmentResult], bool] = lambda row: True
) -> Table:
    """The results for a terminal, 80 columns wide, narrowest width first."""
    scores = {"mIoU\n%": lambda row: f"{row.miou:.2f}", "Pixels\n%": lambda row: f"{row.pixel_accuracy:.2f}"}
    return widths_table(rows, title, scores, trained)
