"""The tables of a run: results.csv and results.json (a row per width), metrics.csv (per epoch and width)."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from types import NoneType
from typing import Any, Protocol, TypeVar

from rich.table import Table
from rich.text import Text

from slicevit.files import write_text


@dataclass(frozen=True)
class WidthResult:
    """What one width of one run scored and costs; the columns are timm's where timm has them.

    Attributes:
        model: timm's name of the architecture.
        method: how it was trained.
        width: the fraction of the full width, "1/4".
        trained: whether training visited this width.
        channels: embedding width in channels.
        top1, top1_err, top5, top5_err: accuracy and 100 minus it, in per cent.
        loss: mean cross-entropy, in nats.
        param_count: parameters, in millions.
        gmacs: multiply-accumulates of one image, in thousand millions.
        latency_ms: median milliseconds of a call, or None where it was not measured.
        img_size: side of the input, in pixels.
        crop_pct: share of the resized image that the centre crop keeps.
        interpolation: of the resize.
        images: number of test images.
    """

    model: str
    method: str
    width: str
    trained: bool
    channels: int
    top1: float
    top1_err: float
    top5: float
    top5_err: float
    loss: float
    param_count: float
    gmacs: float
    latency_ms: float | None
    img_size: int
    crop_pct: float
    interpolation: str
    images: int


ACCURACY_FIGURES = ("top1", "top5", "loss")  # what an epoch measures of a classifier


def metrics_columns(figures: Sequence[str]) -> tuple[str, ...]:
    """The columns of metrics.csv where an epoch measures `figures`."""
    return ("epoch", "step", "width", "train_loss", *figures, "lr")


METRICS_COLUMNS = metrics_columns(ACCURACY_FIGURES)
_RESULT_COLUMNS = tuple(field.name for field in fields(WidthResult))
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, NoneType),
}


def write_results(folder: Path | str, rows: Sequence[WidthResult]) -> None:
    """Write results.csv and results.json, each in one step."""
    table = [asdict(row) for row in rows]
    for row in table:
        row["loss"] = row["loss"] if math.isfinite(row["loss"]) else None  # JSON has no nan
    write_text(Path(folder, "results.csv"), to_csv(_RESULT_COLUMNS, table))
    write_text(Path(folder, "results.json"), json.dumps(table, indent=2, allow_nan=False) + "\n")


def read_results(folder: Path | str) -> list[WidthResult]:
    """Read results.json; a loss that was not finite comes back as nan.

    Raises:
        ValueError: the file is missing or broken.
    """
    path = Path(folder, "results.json")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise ValueError("it is not a list")
        return [_width_result(row) for row in rows]
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: evaluate the run first") from error
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is broken ({error}): delete it and evaluate the run again") from error


def read_figures(folder: Path | str, column: str) -> dict[Fraction, float]:
    """Width -> what it scored, in per cent: this column of results.json, of whatever task.

    Raises:
        ValueError: the file is missing or broken.
    """
    path = Path(folder, "results.json")
    try:
        return {Fraction(row["width"]): float(row[column]) for row in json.loads(path.read_text(encoding="utf-8"))}
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: evaluate the run first") from error
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is broken ({error}): delete it and evaluate the run again") from error


def _width_result(row: Any) -> WidthResult:
    row = dict(row, loss=math.nan) if row["loss"] is None else row
    result = WidthResult(**row)
    for field in fields(WidthResult):
        value = getattr(result, field.name)
        if not isinstance(value, _KINDS[str(field.type)]):
            raise ValueError(f"{field.name} is {value!r}")
    Fraction(result.width)
    return result


class MetricsLog:
    """metrics.csv of a run: a row per epoch and width, rewritten whole and in one step.

    Args:
        folder: the run's.
        figures: what an epoch measures of every width.

    Raises:
        ValueError: the folder has a metrics.csv that is broken.
    """

    def __init__(self, folder: Path | str, figures: Sequence[str] = ACCURACY_FIGURES) -> None:
        self.path = Path(folder, "metrics.csv")
        self.columns = metrics_columns(figures)
        self._rows = read_metrics(folder, figures)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What `read_metrics` gives."""
        return list(self._rows)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; columns that a row lacks stay empty.

        Raises:
            ValueError: a row without epoch, step or width, or with a column that metrics.csv has not.
        """
        for row in rows:
            if not {"epoch", "step", "width"} <= set(row) <= set(self.columns):
                raise ValueError(
                    f"a row of {self.path} needs epoch, step and width, and may have no other columns than "
                    f"{', '.join(self.columns)}: got {', '.join(row)}"
                )
        self._write(self._rows + [{name: row.get(name) for name in self.columns} for row in rows])

    def truncate(self, step: int) -> None:
        """Drop the rows after `step`, so that a run resumed there writes them again."""
        self._write([row for row in self._rows if row["step"] <= step])

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_text(self.path, to_csv(self.columns, rows))
        self._rows = rows


def read_metrics(folder: Path | str, figures: Sequence[str] = ACCURACY_FIGURES) -> list[dict[str, Any]]:
    """Read metrics.csv: epoch and step as int, width as str, the rest as float or None where empty.

    Without the file there are no rows.

    Raises:
        ValueError: the file is broken.
    """
    path, columns = Path(folder, "metrics.csv"), metrics_columns(figures)
    if not path.exists():
        return []
    reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True)
    try:
        if tuple(reader.fieldnames or ()) != columns:
            raise ValueError(f"its columns are {', '.join(reader.fieldnames or ['none'])}")
        return [_metrics_row(row, columns) for row in reader]
    except (ValueError, csv.Error, ZeroDivisionError) as error:
        raise ValueError(f"{path} is broken ({error}): delete it or mend it by hand") from error


def _metrics_row(row: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    if None in row or None in row.values():
        raise ValueError(f"a row has not {len(columns)} cells")
    Fraction(row["width"])
    numbers = {name: float(row[name]) if row[name] else None for name in columns[3:]}
    return {"epoch": int(row["epoch"]), "step": int(row["step"]), "width": row["width"], **numbers}


def write_rows(folder: Path, rows: Sequence[Any], hidden: Sequence[str] = ()) -> None:
    """Write dataclasses as results.csv and results.json, each in one step; `hidden` columns go to the JSON alone."""
    table = [asdict(row) for row in rows]
    columns = [name for name in table[0] if name not in hidden]
    write_text(folder / "results.csv", to_csv(columns, [{name: row[name] for name in columns} for row in table]))
    write_text(folder / "results.json", json.dumps(table, indent=2) + "\n")


def to_csv(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """A table as text: a line of `columns`, and one for each row."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def by_width(rows: Iterable[WidthResult]) -> list[WidthResult]:
    """The rows, narrowest first."""
    return sorted(rows, key=lambda row: Fraction(row.width))


class Costed(Protocol):
    """What has been counted of a width."""

    @property
    def gmacs(self) -> float: ...


def macs_unit(rows: Iterable[Costed]) -> tuple[str, float]:
    """The unit that reads well for these rows, and how many of it are in one GMAC."""
    return ("GMACs", 1.0) if max((row.gmacs for row in rows), default=1.0) >= 1 else ("MMACs", 1000.0)


def short(value: float) -> str:
    """Three significant digits, never in powers of ten: 0.0862, 5.53, 22.1, 1130."""
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


class Measured(Costed, Protocol):
    """What a table of widths shows of each besides its scores."""

    @property
    def width(self) -> str: ...
    @property
    def channels(self) -> int: ...
    @property
    def param_count(self) -> float: ...
    @property
    def latency_ms(self) -> float | None: ...


R = TypeVar("R", bound=Measured)


def widths_table(
    rows: Sequence[R],
    title: str,
    scores: Mapping[str, Callable[[R], str]],
    trained: Callable[[R], bool] = lambda row: True,
) -> Table:
    """The rows for a terminal, 80 columns wide, in their order; `scores` are columns by heading, before the latency."""
    unit, scale = macs_unit(rows)
    table = Table(title=Text(title), title_justify="left")
    table.add_column("Width", no_wrap=True)
    for heading in ("Channels", "Params\nM", unit, *scores, "Latency\nms"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.width if trained(row) else f"{row.width} not trained",
            str(row.channels),
            short(row.param_count),
            short(row.gmacs * scale),
            *(score(row) for score in scores.values()),
            "–" if row.latency_ms is None else short(row.latency_ms),
            style=None if trained(row) else "dim",
        )
    return table


def results_table(rows: Sequence[WidthResult], title: str) -> Table:
    """The results for a terminal, 80 columns wide, narrowest width first."""
    scores = {"Top-1\n%": lambda row: f"{row.top1:.2f}", "Top-5\n%": lambda row: f"{row.top5:.2f}"}
    return widths_table(by_width(rows), title, scores, trained=lambda row: row.trained)
