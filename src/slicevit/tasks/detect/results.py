"""The tables of a detection run: results.csv and results.json, a row for each width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from slicevit.evaluation.results import widths_table


@dataclass(frozen=True)
class DetectResult:
    """One width of one run; the columns that `slicevit.evaluation.results.WidthResult` has too mean the same.

    Attributes:
        model: timm's name of the backbone.
        channels: of the backbone.
        map, map50: mean average precision over overlaps from 0.5 to 0.95, and at 0.5, in per cent.
        param_count, gmacs: of backbone, pyramid and heads together.
        latency_ms: of one image, picking the boxes included.
        img_size: height and width that images are resized to, as "512x512".
        images: how many were evaluated on.
    """

    model: str
    method: str
    width: str
    channels: int
    map: float
    map50: float
    param_count: float
    gmacs: float
    latency_ms: float | None
    img_size: str
    images: int


def detect_table(
    rows: Sequence[DetectResult], title: str, trained: Callable[[DetectResult], bool] = lambda row: True
) -> Table:
    """The results for a terminal, 80 columns wide, narrowest width first."""
    scores = {"mAP\n%": lambda row: f"{row.map:.2f}", "mAP50\n%": lambda row: f"{row.map50:.2f}"}
    return widths_table(rows, title, scores, trained)
