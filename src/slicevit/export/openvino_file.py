"""A width as an OpenVINO model, model.xml and model.bin."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from slicevit.export.artefact import INPUT, OUTPUT, Format, Predictor

FILE = "model.xml"


def _write(program: ExportedProgram, folder: Path) -> None:
    """Weights stay float32. OpenVINO knows the batch alone as dynamic."""
    import openvino

    model = openvino.convert_model(program)
    (example,), _ = program.example_inputs
    model.reshape([-1, *example.shape[1:]])
    model.inputs[0].tensor.set_names({INPUT})
    model.outputs[0].tensor.set_names({OUTPUT})
    openvino.save_model(model, folder / FILE, compress_to_fp16=False)


def _load(folder: Path) -> Predictor:
    """In float32, where OpenVINO would by itself take bfloat16 on a processor that has it."""
    import openvino

    compiled = openvino.Core().compile_model(folder / FILE, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images_BCHW: torch.from_numpy(compiled({INPUT: images_BCHW.numpy()})[OUTPUT])


FORMAT = Format((FILE, "model.bin"), ("openvino",), _write, _load)
