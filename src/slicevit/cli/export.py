"""slicevit export"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from slicevit.cli.options import parse
from slicevit.widths import WidthGrid, parse_fraction

if TYPE_CHECKING:
    from slicevit.export.check import Checked
    from slicevit.export.formats import Cut
    from slicevit.export.formats import Progress as Report


@dataclass
class ExportArgs:
    """Cut one width out of a run, or all of them."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder, any folder that slicevit saved, or a Hub repository."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder to write."""
    width: str
    """The width, such as 1/2; all: every legal width, in OUT/1-4, OUT/1-2 and so on."""
    to: Literal["timm", "onnx", "openvino", "torch-export", "executorch"] = "timm"
    """timm: a folder that timm.create_model("local-dir:OUT", pretrained=True) loads without slicevit. onnx, openvino,
    torch-export, executorch: OUT/model.onnx, .xml, .pt2 or .pte, for any batch size (executorch: up to 8)."""
    quantize: Literal["int8", "fp16", "bf16"] | None = None
    """Smaller numbers. int8 (onnx, openvino, executorch): weights and activations, after training. fp16, bf16: the
    weights, and what the format's runtime computes in. The top-1, or mIoU, that it costs is measured, printed and
    stored."""
    calibrate: str | None = None
    """Where int8 takes its ranges from: a data set (its training images), or a folder of images; by default the data
    set of the check."""
    max_loss: float = 5.0
    """With --quantize: the largest loss of top-1, or of a segmenter's mIoU, in points, that is not refused."""
    data: str | None = None
    """Another data set for the check than the run's own; as in train, or as in segment."""
    data_root: str | None = None
    """Where a timm dataset string finds its files."""
    images: int | None = None
    """How many validation images check each width; by default 64, and all of them with --quantize."""


def run(arguments: list[str]) -> None:
    from slicevit.export.formats import Options, export_widths

    args = parse(ExportArgs, arguments, "export")
    _check_options(args)
    cuts = _cuts(args.run, args.width)
    options = Options(args.quantize or "fp32", args.data, args.data_root, args.images, args.calibrate, args.max_loss)
    with _leaving_nothing(), _reporting() as report:
        verdicts = export_widths(args.to, args.out, cuts, options, report)
    for cut, checked in zip(cuts, verdicts, strict=True):
        print(_line(args, args.out / cut.folder, cut.name, checked))


def _check_options(args: ExportArgs) -> None:
    from slicevit.export.check import BATCH

    if args.images is not None and args.images < BATCH:
        raise ValueError(f"--images must be {BATCH} or more, for that many are run at once, got {args.images}")
    if not 0 <= args.max_loss <= 100:
        raise ValueError(f"--max-loss is a loss of top-1 between 0 and 100 points, got {args.max_loss:g}")
    if args.calibrate is not None and args.quantize != "int8":
        raise ValueError("--calibrate goes with --quantize int8")
    if args.data_root is not None and args.data is None and args.calibrate is None:
        raise ValueError("--data-root goes with --data or --calibrate")


def _cuts(run: Path, width: str) -> list[Cut]:
    """What `--width` names. Raises ValueError when the run cannot be read, or holds no such width."""
    from slicevit.checkpoint import SEGMENTATION, task_of
    from slicevit.dense.saved import read_segmenter
    from slicevit.export.formats import Cut
    from slicevit.export.opening import open_model
    from slicevit.training.methods import is_separate, part_folder
    from slicevit.training.runs import read_train_config

    if not is_separate(run):
        names = [str(legal) for legal in open_model(run).model.widths] if width == "all" else [width]
        return [Cut(run, name, name, _folder(name, width)) for name in names]
    grid = read_segmenter(run)["grid"] if task_of(run) == SEGMENTATION else read_train_config(run).grid
    names = [str(legal) for legal in WidthGrid.parse(grid)]  # each a run, at its full width
    if width != "all":
        asked = _parsed(width)
        if asked not in names:
            raise ValueError(f"--width {width}: {run} holds the widths {', '.join(names)}, each trained alone")
        names = [asked]
    return [Cut(part_folder(run, name), "1", name, _folder(name, width)) for name in names]


def _parsed(width: str) -> str:
    try:
        return str(parse_fraction(width))
    except ValueError as error:
        raise ValueError(f"--width {width}: {error}") from None


def _folder(name: str, width: str) -> str:
    return name.replace("/", "-") if width == "all" else "."


@contextmanager
def _leaving_nothing() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: what was begun is removed on the way out."""

    def stop(signum: int, frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _reporting() -> Iterator[Report]:
    """A bar on a terminal's standard error, for as long as it takes."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _line(args: ExportArgs, folder: Path, width: str, checked: Checked) -> str:
    from slicevit.registry import is_timms

    parity, accuracy, figure = checked.parity, checked.accuracy, checked.figure
    what = f"{args.to} in {args.quantize}" if args.quantize else args.to
    cost = ""
    if accuracy:
        change = accuracy.artefact - accuracy.source
        cost = f"{figure.name} {accuracy.source:.2f} -> {accuracy.artefact:.2f} ({change:+.2f} points), "
    load = ""
    if args.to == "timm":
        own = "" if is_timms(json.loads((folder / "config.json").read_text())["architecture"]) else "import slicevit; "
        load = f'; {own}timm.create_model("local-dir:{folder}", pretrained=True)'
    return (
        f"{folder}: {what} at width {width}; {cost}largest logit error {parity.max_abs_error:.1e} of "
        f"{parity.max_abs_logit:.1e}, {figure.answer} agreement {parity.agreement:.1%} on {parity.images} "
        f"{figure.unit} of {parity.data}{load}"
    )
