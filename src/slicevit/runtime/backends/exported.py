"""Engines `onnxruntime` and `openvino`: a width is exported in a temporary folder and opened by its own runtime."""

from __future__ import annotations

import tempfile
import threading
from abc import abstractmethod
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from slicevit.costs import model_input_size
from slicevit.elastic import ElasticModel
from slicevit.export import onnx_file, openvino_file
from slicevit.export.artefact import INPUT, OUTPUT, Format
from slicevit.export.torch_program import traced
from slicevit.reasons import one_line
from slicevit.runtime.backends import Backend, Call, Precision, Settings

_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}  # of the largest logit


class Exported(Backend):
    """Each width has weights of its own, as its runtime lays them out; the model stays, to build further widths from.

    Attributes:
        name: the engine's.
        format: how a width becomes files.
        copies: bytes that the runtime holds, after a call, for each byte of a width's float32 weights; measured.
    """

    devices = ("cpu",)
    shared = False
    name: ClassVar[str]
    format: ClassVar[Format]
    copies: ClassVar[Mapping[Precision, float]]

    def __init__(self, model: ElasticModel, settings: Settings):
        self.format.require(f"--engine {self.name}")
        super().__init__(model, settings)

    @abstractmethod
    def open(self, folder: Path) -> Call:
        """What runs the files in `folder`, which are deleted when this returns."""

    def weights(self, width: Fraction) -> int:
        return int(4 * self.copies[self.settings.precision] * self.parameters(width))

    def build(self, width: Fraction) -> Call:
        module = self.model.to_timm(width).eval()
        size = model_input_size(self.model)
        try:
            with tempfile.TemporaryDirectory(prefix="slicevit-") as folder:
                self.format.write(traced(module, size), Path(folder))
                call = self.open(Path(folder))
        except Exception as error:  # each exporter and runtime raises its own
            reason = one_line(error, 300)
            raise ValueError(f"engine {self.name} cannot run width {width}: {reason}") from error
        images_BCHW = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected_BK = module(images_BCHW)
        off, scale = float((call(images_BCHW) - expected_BK).abs().max()), float(expected_BK.abs().max())
        if not off <= _TOLERANCES[self.settings.precision] * scale:
            raise ValueError(
                f"engine {self.name} is off by {off:.1e} at width {width}, where the largest logit is {scale:.1e}"
            )
        return call


class OnnxRuntime(Exported):
    """ONNX Runtime's CPU provider."""

    name = "onnxruntime"
    format = onnx_file.FORMAT
    packages = format.packages
    precisions = ("float32",)
    copies: ClassVar[Mapping[Precision, float]] = {"float32": 1.1}

    def open(self, folder: Path) -> Call:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.settings.threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle widths must not spin
        session = onnxruntime.InferenceSession(folder / onnx_file.FILE, options, providers=["CPUExecutionProvider"])
        return lambda images_BCHW: torch.from_numpy(session.run([OUTPUT], {INPUT: images_BCHW.contiguous().numpy()})[0])


class OpenVino(Exported):
    """OpenVINO's CPU plugin; calls at one width take turns."""

    name = "openvino"
    format = openvino_file.FORMAT
    packages = format.packages
    precisions = ("float32", "bfloat16")
    copies: ClassVar[Mapping[Precision, float]] = {"float32": 2.1, "bfloat16": 1.6}

    def __init__(self, model: ElasticModel, settings: Settings):
        super().__init__(model, settings)
        import openvino

        self._core = openvino.Core()
        self._core.set_property({"ENABLE_MMAP": False})  # the file is deleted
        known = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if settings.precision == "bfloat16" and "BF16" not in known:
            raise ValueError("--precision bfloat16: this processor has no bfloat16 for OpenVINO; use float32")
        hint = {"float32": "f32", "bfloat16": "bf16"}[settings.precision]
        self._options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": 1}
        if settings.threads:
            self._options["INFERENCE_NUM_THREADS"] = settings.threads

    def open(self, folder: Path) -> Call:
        request = self._core.compile_model(folder / openvino_file.FILE, "CPU", self._options).create_infer_request()
        turn = threading.Lock()

        def call(images_BCHW: Tensor) -> Tensor:
            with turn:
                results = request.infer({INPUT: images_BCHW.contiguous().numpy()}, share_inputs=True)
                return torch.from_numpy(results[OUTPUT])

        return call
