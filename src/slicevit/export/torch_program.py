"""A width as a torch.export program, model.pt2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from slicevit.export.artefact import Format, Predictor

FILE = "model.pt2"


def traced(module: nn.Module, input_size: tuple[int, int, int]) -> ExportedProgram:
    """The program of `module` for any number of images of `input_size` (C, H, W)."""
    images = torch.zeros(2, *input_size)
    return torch.export.export(module.requires_grad_(False), (images,), dynamic_shapes=({0: Dim("batch", min=1)},))


def _write(program: ExportedProgram, folder: Path) -> None:
    torch.export.save(program, folder / FILE)


def _load(folder: Path) -> Predictor:
    module: Any = torch.export.load(folder / FILE).module()
    return module


FORMAT = Format((FILE,), (), _write, _load)
