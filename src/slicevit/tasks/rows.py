"""The rows of a run's table, a width each, whatever it scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from fractions import Fraction
from typing import Any, Protocol, TypeVar

from slicevit.costs import width_costs
from slicevit.elastic import ElasticModel

R = TypeVar("R")


class Rebuilds(Protocol):
    """What a recipe says of the images and the backbone."""

    @property
    def backbone(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...


def width_rows(
    kind: type[R],
    model: ElasticModel,
    recipe: Rebuilds,
    scores: Mapping[str, Any],
    latency: Mapping[str, float],
    method: str,
) -> list[R]:
    """A `kind` for each width of `scores`, narrowest first; its other columns are the fields of the score."""
    rows = []
    for name, score in sorted(scores.items(), key=lambda item: Fraction(item[0])):
        costs = width_costs(model, name)
        columns = {
            "model": recipe.backbone,
            "method": method,
            "width": name,
            "channels": costs.channels,
            "param_count": costs.params / 1e6,
            "gmacs": costs.macs / 1e9,
            "latency_ms": latency.get(name),
            "img_size": f"{recipe.size[0]}x{recipe.size[1]}",
        }
        rows.append(kind(**columns, **asdict(score)))
    return rows
