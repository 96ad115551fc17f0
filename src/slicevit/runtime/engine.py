"""`Engine`: a run loaded once, which answers at every width.

Legend of axis names: B images of a batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import get_args

import torch
from PIL import Image
from torch import Tensor

from slicevit.calibration import require_statistics
from slicevit.export.opening import open_model
from slicevit.runtime.backends import Backend, Call, Precision, Settings
from slicevit.runtime.backends.exported import OnnxRuntime, OpenVino
from slicevit.runtime.backends.torch_views import TorchCompiled, TorchViews
from slicevit.widths import Width

_BACKENDS: dict[str, type[Backend]] = {
    "torch": TorchViews,
    "torch-compile": TorchCompiled,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
}
ENGINES = tuple(_BACKENDS)


@dataclass(frozen=True)
class _Ready:
    call: Call
    weights: int


class Engine:
    """A run's model, ready to answer at any of its widths, from any thread.

    Args:
        run: a run's folder, any folder that slicevit saved, or a Hub repository such as "owner/name".
        engine: one of `ENGINES`.
        device: auto (CUDA where there is one and the engine can use it), cpu or cuda.
        precision: float32 or bfloat16.
        threads: of one call on the CPU; 0 is the library's own choice. torch has one setting for the whole process.
        memory_limit: for onnxruntime and openvino, the most bytes that the weights of the ready widths may take
            together; the least recently used is dropped for the next. None is no limit.

    Attributes:
        name: the engine's name.
        device: cpu or cuda.
        precision: float32 or bfloat16.
        threads: as given.
        packages: what the engine needs beside torch.
        task: what it is for, as `slicevit.checkpoint.task_of` says it.
        figure: by which its widths are compared.
        architecture: timm's name of the model, or of a segmenter's backbone.
        widths: the legal widths, narrowest first.
        input_size: (C, H, W) of the images, or of a segmenter's windows.
        num_classes: K.
        label_names: the names of the classes where the run knows them, else None.

    Raises ValueError when the run cannot be read, or the engine does not go with a device, a precision or a limit.
    """

    @torch.inference_mode(False)  # weights made in inference mode could not be bound
    def __init__(
        self,
        run: str | Path,
        engine: str = "torch",
        device: str = "auto",
        precision: Precision = "float32",
        threads: int = 0,
        memory_limit: int | None = None,
    ):
        settings = _settings(engine, device, precision, threads, memory_limit)
        self.opened = opened = open_model(run)
        model = opened.model
        require_statistics(model, run)
        self.name, self.device, self.precision = engine, settings.device, settings.precision
        self.threads, self.packages = threads, _BACKENDS[engine].packages
        self.task, self.figure, self.architecture = opened.task, opened.figure, opened.architecture
        self.widths, self.input_size = model.widths, opened.input_size
        self.num_classes, self.label_names = opened.num_classes, opened.label_names
        self._legal = model.width
        self._limit = memory_limit
        self._ready: OrderedDict[Width, _Ready] = OrderedDict()  # least recently used first; 0.5 and 1/2 are one key
        self._lock, self._building = threading.Lock(), threading.Lock()
        self._backend: Backend | None = _BACKENDS[engine](model, settings)
        if self._backend.instant:
            for width in self.widths:
                self.ready(width)

    @property
    def held(self) -> dict[Fraction, int]:
        """The widths that are ready, and the bytes of the weights of each; the torch engines' lie in one storage."""
        with self._lock:
            return {Fraction(width): ready.weights for width, ready in self._ready.items()}

    def transform(self, image: Image.Image) -> Tensor:
        """The float32 tensor (C, H, W) of an image in any mode, as the run was evaluated.

        It has the size that `run` takes; of a segmenter the shorter side has that of a window.
        """
        return self.opened.prepared(image)

    def ready(self, width: Width) -> None:
        """Build `width` now if it is not there, so that the next `run` need not.

        Raises ValueError when the grid does not hold it, the engine cannot run it, or it alone is over the memory
        limit; RuntimeError after `close`.
        """
        self._call(width)

    def run(self, images_BCHW: Tensor, width: Width) -> Tensor:
        """Float32 logits (B, K) of float32 images (B, C, H, W) at `width`, both on the CPU; in any thread.

        Of a segmenter (B, K, H, W), of windows.

        Raises what `ready` raises, and ValueError for images of another size or type.
        """
        if (
            images_BCHW.ndim != 4
            or images_BCHW.shape[1:] != self.input_size
            or not len(images_BCHW)
            or images_BCHW.dtype != torch.float32
        ):
            raise ValueError(
                f"images of shape {tuple(images_BCHW.shape)} and {images_BCHW.dtype}: this model takes (B, "
                f"{', '.join(map(str, self.input_size))}) with B of 1 or more, and torch.float32"
            )
        return self._call(width)(images_BCHW)

    def _call(self, width: Width) -> Call:
        call = self._used(width)
        if call is None:  # it is not ready, or `width` is no number
            legal = self._legal(width)
            call = self._used(legal) or self._build(legal)
        return call

    def _used(self, width: Width) -> Call | None:
        with self._lock:
            ready = self._ready.get(width)
            if ready is None:
                return None
            self._ready.move_to_end(width)
            return ready.call

    @torch.inference_mode(False)
    def _build(self, width: Fraction) -> Call:
        """Make `width` ready; one at a time, while those that are ready go on."""
        with self._building:
            if self._backend is None:
                raise RuntimeError("this engine was closed")
            call = self._used(width)
            if call is None:
                weights = self._backend.weights(width)
                self._make_room(width, weights)
                call = self._backend.build(width)
                with self._lock:
                    self._ready[width] = _Ready(call, weights)
            return call

    def _make_room(self, width: Fraction, weights: int) -> None:
        if self._limit is None:
            return
        if weights > self._limit:
            raise ValueError(
                f"width {width} takes {weights:,} bytes in engine {self.name}, and the memory limit is {self._limit:,}"
            )
        with self._lock:
            while sum(ready.weights for ready in self._ready.values()) + weights > self._limit:
                self._ready.popitem(last=False)

    def close(self) -> None:
        """Give the memory back, when the calls that have begun are at their end."""
        with self._building, self._lock:
            self._ready.clear()
            self._backend = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _settings(engine: str, device: str, precision: Precision, threads: int, memory_limit: int | None) -> Settings:
    """What was asked for, checked. Raises ValueError that names the flag."""
    if engine not in _BACKENDS:
        raise ValueError(f"--engine {engine} is none of {', '.join(_BACKENDS)}")
    kind = _BACKENDS[engine]
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device} is none of auto, cpu, cuda")
    if device not in ("auto", *kind.devices):
        raise ValueError(f"--device {device}: engine {engine} runs on the {' and '.join(kind.devices)} alone")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is here; use --device cpu")
    if device == "auto":
        device = "cuda" if "cuda" in kind.devices and torch.cuda.is_available() else "cpu"
    if precision not in get_args(Precision):
        raise ValueError(f"--precision {precision} is none of {', '.join(get_args(Precision))}")
    if precision not in kind.precisions:
        raise ValueError(f"--precision {precision}: engine {engine} computes in {' and '.join(kind.precisions)} alone")
    if threads < 0:
        raise ValueError(f"--threads {threads}: give the number of threads, or 0 for the library's own choice")
    if memory_limit is not None and memory_limit <= 0:
        raise ValueError(f"--memory-limit {memory_limit}: give bytes above 0")
    if memory_limit is not None and kind.shared:
        raise ValueError(
            f"--memory-limit: engine {engine} holds all widths in one set of weights, so that dropping one gives "
            "nothing back; it is for onnxruntime and openvino"
        )
    return Settings(device, precision, threads)
