"""`Engine`: every engine's answers against the model's own, the memory limit, threads, and what is refused."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from engine_runs import CLASSES, LABELS, SIZE, WIDTHS, expected, images, save
from PIL import Image
from torch._dynamo.utils import counters

from slicevit.checkpoint import from_pretrained
from slicevit.runtime import engine as engine_module
from slicevit.runtime.backends import Backend, Call
from slicevit.runtime.backends.torch_views import TorchCompiled
from slicevit.runtime.engine import ENGINES, Engine

pytestmark = pytest.mark.usefixtures("one_thread")
PACKAGES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
BATCHES = (1, 2, 3, 7)


def here(name: str) -> Any:
    """The engine as a parameter; skipped where its packages are missing."""
    missing = [package for package in PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]
    marks = [pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")]
    return pytest.param(name, marks=[*marks, pytest.mark.extra] if name in PACKAGES else marks)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without a C++ compiler."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setitem(TorchCompiled.options, "backend", "aot_eager")
    yield
    torch._dynamo.reset()


# --- answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [here("torch"), here("onnxruntime"), here("openvino")])
def test_logits_are_the_models_at_every_width_and_batch_from_any_thread(name: str, run: Path) -> None:
    asked = [(width, batch) for width in WIDTHS for batch in BATCHES] * 2
    with Engine(run, name) as engine, ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda call: engine.run(images(call[1]), call[0]), asked)
        for (width, batch), logits in zip(asked, answers, strict=True):
            wanted = expected(run, images(batch), width)
            assert (logits.dtype, logits.shape, logits.is_inference()) == (torch.float32, (batch, CLASSES), False)
            assert (logits - wanted).abs().max() <= (0.0 if name == "torch" else 1e-5) * wanted.abs().max()
        for fraction, held in engine.held.items():
            weights = 4 * sum(p.numel() for p in from_pretrained(run).skeleton(fraction).module.parameters())
            assert held == weights if name == "torch" else weights <= held <= 2.2 * weights
        assert len(engine.held) == len(WIDTHS)


@pytest.mark.usefixtures("traced")
def test_compiled_once_for_every_batch_size(run: Path) -> None:
    with Engine(run, "torch-compile") as engine:
        for width in WIDTHS:
            engine.ready(width)
        programs = counters["stats"]["unique_graphs"]
        for width in WIDTHS:
            for batch in (*BATCHES, 16):
                wanted = expected(run, images(batch), width)
                assert (engine.run(images(batch), width) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert 0 < programs == counters["stats"]["unique_graphs"] <= 3 * len(WIDTHS)
        assert not counters["graph_break"]


@pytest.mark.parametrize("name", [here("torch"), here("openvino")])
def test_bfloat16_is_near_and_not_the_same(name: str, run: Path) -> None:
    if name == "openvino":
        import openvino

        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            with pytest.raises(ValueError, match="this processor has no bfloat16"):
                Engine(run, name, precision="bfloat16")
            return
    with Engine(run, name, precision="bfloat16") as engine:
        for batch in (1, 7):
            wanted = expected(run, images(batch), "1/2")
            error = (engine.run(images(batch), "1/2") - wanted).abs().max() / wanted.abs().max()
            assert 1e-4 < error < 0.05


def test_any_spelling_of_a_width_and_any_strides_of_the_images(run: Path) -> None:
    wanted = expected(run, images(2), "1/2")
    turned = images(2).to(memory_format=torch.channels_last).transpose(2, 3).contiguous().transpose(2, 3)
    with torch.inference_mode(), Engine(run) as engine:  # also where no tensor of the caller's is tracked
        for width in ("1/2", "2/4", 0.5, Fraction(1, 2)):
            assert torch.equal(engine.run(turned, width), wanted)


def test_what_it_says_of_the_run(run: Path, tmp_path: Path) -> None:
    with Engine(run, device="cpu") as engine:
        assert engine.widths == tuple(map(Fraction, WIDTHS))
        assert (engine.input_size, engine.num_classes, engine.label_names) == (SIZE, CLASSES, LABELS)
        assert (engine.name, engine.device, engine.architecture) == ("torch", "cpu", "vit_tiny_patch16_224")
        for mode in ("RGB", "RGBA", "L", "P", "CMYK", "1", "I;16"):
            tensor = engine.transform(Image.new(mode, (40, 20)))
            assert (tensor.shape, tensor.dtype) == (SIZE, torch.float32)


# --- what is held ------------------------------------------------------------------------------------------


class Counted(Backend):
    """Answers with the width itself; a width of k/4 holds k bytes."""

    devices = ("cpu",)
    precisions = ("float32",)
    shared = False
    built: ClassVar[list[str]] = []
    gate: ClassVar[threading.Event] = threading.Event()

    def weights(self, width: Fraction) -> int:
        return int(4 * width)

    def build(self, width: Fraction) -> Call:
        assert self.gate.wait(20)
        self.built.append(str(width))
        return lambda images_BCHW: torch.full((len(images_BCHW), CLASSES), float(width))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    monkeypatch.setitem(engine_module._BACKENDS, "onnxruntime", Counted)
    monkeypatch.setattr(Counted, "built", [])
    Counted.gate.set()
    return Counted


def test_the_least_recently_used_widths_make_room(run: Path, counted: type[Counted]) -> None:
    engine = Engine(run, "onnxruntime", memory_limit=5)
    assert not engine.held
    for width in ("1/2", "1/4", "1/2", "3/4"):  # 2 and 1 bytes; 2 again; then 3, for which 1/4 goes
        assert engine.run(images(1), width)[0, 0] == float(Fraction(width))
        assert sum(engine.held.values()) <= 5
    assert engine.held == {Fraction(1, 2): 2, Fraction(3, 4): 3}
    engine.ready("1")  # 4 bytes: both go
    assert engine.held == {Fraction(1): 4}
    engine.ready("1/4")
    engine.ready("1")
    assert counted.built == ["1/2", "1/4", "3/4", "1", "1/4"]
    engine.close()
    assert not engine.held


def test_a_width_above_the_limit_is_refused_and_the_others_stay(run: Path, counted: type[Counted]) -> None:
    engine = Engine(run, "onnxruntime", memory_limit=3)
    engine.ready("1/2")
    with pytest.raises(ValueError, match="width 1 takes 4 bytes in engine onnxruntime, and the memory limit is 3"):
        engine.run(images(1), "1")
    assert (engine.held, counted.built) == ({Fraction(1, 2): 2}, ["1/2"])


def test_a_width_is_built_once_while_those_that_are_ready_answer(run: Path, counted: type[Counted]) -> None:
    engine = Engine(run, "onnxruntime")
    engine.ready("1/4")
    counted.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(engine.run, images(1), "1") for _ in range(2)]
        try:
            for width in ("1/4", 0.25):
                assert engine.run(images(2), width)[1, 0] == 0.25
            assert not any(answer.done() for answer in waiting)
        finally:
            counted.gate.set()
        assert [float(answer.result(20)[0, 0]) for answer in waiting] == [1.0, 1.0]
    assert counted.built == ["1/4", "1"]


# --- refusals ----------------------------------------------------------------------------------------------


def test_images_and_widths_that_do_not_fit(run: Path) -> None:
    with Engine(run) as engine:
        with pytest.raises(ValueError, match=r"width 1/3 is not on the grid 1/4:1:1/4"):
            engine.run(images(1), "1/3")
        for wrong in (images(1)[0], images(1)[:, :, 1:], images(0), images(1).double()):
            with pytest.raises(ValueError, match=r"this model takes \(B, 1, 16, 16\) with B of 1 or more"):
                engine.run(wrong, "1")
    with pytest.raises(RuntimeError, match="closed"):
        engine.run(images(1), "1")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "tensorrt"}, f"--engine tensorrt is none of {', '.join(ENGINES)}"),
        ({"device": "tpu"}, "--device tpu is none of auto, cpu, cuda"),
        ({"engine": "openvino", "device": "cuda"}, "--device cuda: engine openvino runs on the cpu alone"),
        ({"precision": "float16"}, "--precision float16 is none of float32, bfloat16"),
        (
            {"engine": "onnxruntime", "precision": "bfloat16"},
            "--precision bfloat16: engine onnxruntime computes in float32 alone",
        ),
        ({"threads": -1}, "--threads -1: give the number of threads"),
        ({"engine": "onnxruntime", "memory_limit": -1}, "--memory-limit -1: give bytes above 0"),
        ({"memory_limit": 10**9}, "--memory-limit: engine torch holds all widths in one set of weights"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], said: str, run: Path) -> None:
    with pytest.raises(ValueError, match=r"^--") as refusal:
        Engine(run, **options)
    assert said in str(refusal.value)


def test_runs_that_have_no_model_of_every_width(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a folder nor a Hub repository"):
        Engine(tmp_path / "none")
    (tmp_path / "run" / "separate" / "1-4").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"trained each width alone.*name the folder of one, such as .*separate/1-4"):
        Engine(tmp_path / "run")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_installed(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else find_spec(asked))
    with pytest.raises(ValueError, match=rf'--engine {name} needs .*{name}.*pip install "slicevit\[export\]"'):
        Engine(run, name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(run: Path) -> None:
    with pytest.raises(ValueError, match="--device cuda: no CUDA device is here; use --device cpu"):
        Engine(run, device="cuda")
