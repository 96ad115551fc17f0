"""The figure by which the widths of a model are compared, by what the model is for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A figure in per cent; more is better.

    Attributes:
        column: its name in results and manifests.
        name: as it is said.
        heading: of a column.
        answer: whose agreement two models are compared by.
        unit: what a model computes at once.
    """

    column: str
    name: str
    heading: str
    answer: str
    unit: str


TOP1 = Figure("top1", "top-1", "Top-1", "top-1", "images")
MIOU = Figure("miou", "mIoU", "mIoU", "pixel", "windows")
FIGURES = {figure.column: figure for figure in (TOP1, MIOU)}
