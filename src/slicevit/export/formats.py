"""Widths as files that run without slicevit: one folder a width, checked before it is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from slicevit.calibration import require_statistics
from slicevit.export import executorch_file, onnx_file, openvino_file, timm_folder, torch_program
from slicevit.export.artefact import CASTS, INT8, MANIFEST, Format, Target, require
from slicevit.export.check import Checked, Comparison
from slicevit.export.classifier import Classifier
from slicevit.export.images import Calibration, Images
from slicevit.export.opened import Opened, Options
from slicevit.export.opening import open_model
from slicevit.export.placing import DISK_FULL, check_free, place, staging
from slicevit.reasons import one_line
from slicevit.version import versions
from slicevit.widths import parse_fraction

FORMATS: dict[str, Format] = {
    "onnx": onnx_file.FORMAT,
    "openvino": openvino_file.FORMAT,
    "torch-export": torch_program.FORMAT,
    "executorch": executorch_file.FORMAT,
}
TARGETS: dict[str, Target] = {"timm": timm_folder.TARGET, **FORMATS}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Cut:
    """One width to export.

    Attributes:
        run: the folder of the model, or its Hub repository.
        width: what to cut out of it.
        name: the width to be called by; another than `width` for a model that was trained alone.
        folder: where to write it, below the export's folder.
    """

    run: Path
    width: str
    name: str
    folder: str = "."


@dataclass(frozen=True)
class _Source:
    """A cut, opened."""

    cut: Cut
    opened: Opened
    width: Fraction
    name: str


def export_widths(
    to: str,
    out: Path,
    cuts: Sequence[Cut],
    options: Options | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[Checked]:
    """Write each of `cuts` in the format `to` below `out`, with a manifest.json, and check it.

    Args:
        to: a key of `TARGETS`.
        progress: is told which width is in hand, and how many images of how many have checked it.

    Every width is written and checked aside before the first is put in its place. An earlier export in this format
    is replaced file by file, its manifest last.

    Raises ValueError when the format has not this precision or cannot hold the model, a package is missing, a folder
    holds anything else, a run, a width or images cannot be had, a model cannot be written in this format, the disk does
    not take it, or its logits or accuracy are off (see `check.Comparison`); `out` is then as it was.
    """
    options = options or Options()
    target = _target(to, options.precision)
    for cut in cuts:
        check_free(out / cut.folder, to, target)
    opened = lru_cache(open_model)  # widths of one run share its model
    sources = [_source(cut, opened(cut.run)) for cut in cuts]
    first = sources[0].opened
    if first.task and not target.dense:
        others = ", ".join(name for name, other in TARGETS.items() if other.dense)
        raise ValueError(f"--to {to} holds classifiers alone, and {first.run} is a segmenter: give --to {others}")
    images = first.images(options)
    calibration = first.calibration(images, options) if options.precision == INT8 else None
    with staging(out) as staged:
        folders = [staged / cut.folder for cut in cuts]
        verdicts = []
        for done, (source, folder) in enumerate(zip(sources, folders, strict=True), 1):
            say = partial(progress, f"width {source.name}, {done} of {len(sources)}")
            name = (out / source.cut.folder).resolve().name
            say(0, images.count)
            try:
                folder.mkdir(exist_ok=True)
                _write(to, source, options.precision, calibration, folder, name)
                verdicts.append(_check(to, source, folder, images, options, say))
            except Exception as error:  # each exporter raises its own
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise
                reason = one_line(error, 300)
                raise ValueError(
                    f"{source.cut.run} at width {source.name} is not exported to {to}: {reason}"
                ) from error
            _describe(to, source, options.precision, calibration, verdicts[-1], folder)
        for source, folder in zip(sources, folders, strict=True):
            place(target, folder, out / source.cut.folder)
    return verdicts


def _target(to: str, precision: str) -> Target:
    target = TARGETS[to]
    if precision not in ("fp32", *target.reduced):
        others = [name for name, other in TARGETS.items() if precision in other.reduced]
        raise ValueError(
            f"--to {to} has no --quantize {precision}: it has {' and '.join(target.reduced)}, and {precision} is there "
            f"with --to {', '.join(others)}"
        )
    target.require(f"--to {to}")
    if precision == INT8 and target.quantizer:
        require(target.quantizer.packages, target.quantizer.extra, f"--to {to} --quantize {precision}")
    return target


def _source(cut: Cut, opened: Opened) -> _Source:
    try:
        width, name = opened.model.width(cut.width), str(parse_fraction(cut.name))
    except ValueError as error:
        raise ValueError(f"--width {cut.name}: {error}") from None
    require_statistics(opened.model, cut.run, [width])
    return _Source(cut, opened, width, name)


def _write(to: str, source: _Source, precision: str, calibration: Calibration | None, folder: Path, name: str) -> None:
    dtype, opened = CASTS.get(precision, torch.float32), source.opened
    if to == "timm":
        assert isinstance(opened, Classifier)
        timm_folder.write(opened.model, source.width, opened.config, opened.transform_config, dtype, folder, name)
        return
    form, module = FORMATS[to], opened.model.to_timm(source.width).eval()
    cast = module if dtype == torch.float32 else torch_program.Cast(module, dtype)
    program = torch_program.traced(cast, opened.input_size)
    if calibration is None:
        form.write(program, folder)
    else:
        assert form.quantizer
        form.quantizer.write(program, calibration.images_NCHW, folder)


def _check(
    to: str, source: _Source, folder: Path, images: Images, options: Options, say: Callable[[int, int], None]
) -> Checked:
    opened, target = source.opened, TARGETS[to]
    comparison = Comparison(partial(opened.model, width=source.width), target.load(folder), opened.figure)
    return opened.check(comparison, images, target.largest_batch, options, say)


def _describe(
    to: str, source: _Source, precision: str, calibration: Calibration | None, checked: Checked, folder: Path
) -> None:
    target = TARGETS[to]
    module: Any = source.opened.model.skeleton(source.width).module
    packages, calibrated = target.packages, {}
    if calibration and target.quantizer:
        packages += target.quantizer.packages
        calibrated = {"calibration": {"data": calibration.name, "images": len(calibration.images_NCHW)}}
    entries = {
        "format": to,
        "files": sorted(path.name for path in folder.iterdir()),
        "width": source.name,
        "channels": int(getattr(module, "embed_dim", None) or module.num_features),
        "precision": precision,
        "largest_batch": target.largest_batch,
        **calibrated,
        "versions": versions(packages),
    }
    described = source.opened.manifest(checked, **entries)
    (folder / MANIFEST).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
