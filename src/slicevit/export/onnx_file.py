"""A width as an ONNX model, model.onnx."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from slicevit.export.artefact import INPUT, OUTPUT, Format, Predictor

FILE = "model.onnx"
OPSET = 23  # the newest that torch writes, with attention as one operator


def _write(program: ExportedProgram, folder: Path) -> None:
    """Weights above protobuf's limit of 2 GB go to model.onnx.data."""
    import onnx

    written = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    assert written is not None
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with this machine's paths
    written.save(folder / FILE)
    onnx.checker.check_model(str(folder / FILE), full_check=True)


def _load(folder: Path) -> Predictor:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    return lambda images_BCHW: torch.from_numpy(session.run([OUTPUT], {INPUT: images_BCHW.numpy()})[0])


FORMAT = Format((FILE, f"{FILE}.data"), ("onnx", "onnxscript", "onnxruntime"), _write, _load)
