"""`slicevit serve` as a process: what it says, how it ends, and what it refuses to begin."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from serving_fakes import encoded, noise

pytestmark = pytest.mark.extra
for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "fastapi_offline"):
    pytest.importorskip(package, reason=f'needs {package}: pip install "slicevit[serve]"')

import slicevit  # noqa: E402
from slicevit import cli  # noqa: E402
from slicevit.cli import serve as cli_serve  # noqa: E402
from slicevit.evaluation.results import WidthResult, write_results  # noqa: E402
from slicevit.runtime import measured  # noqa: E402
from slicevit.runtime.measured import measure_run, profile_path, profile_run  # noqa: E402

WIDTHS = ("1/2", "1")
SLOW = """
import sys, time
from serving_fakes import TABLE, FakeEngine
from slicevit.serving.app import create_app
from slicevit.serving.server import listener, serve, url
from slicevit.serving.settings import Settings

engine = FakeEngine()
app = create_app(engine, TABLE, Settings(slo_ms=20_000.0))
engine.before = lambda images_BCHW, width: time.sleep(float(sys.argv[1]) * (len(engine.calls) > 9))  # not to warm up
bound = listener("127.0.0.1", 0)
serve(app, bound, f"slow at {url(bound)}")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with made-up accuracies and a profile of this machine."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    small = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    slicevit.create_model("vit_tiny_patch16_224", "1/2:1:1/2", num_classes=3, **small).eval().save_pretrained(folder)
    rest = (0.0, 100.0, 90.0, 10.0, 1.0, 0.01, 0.001, None, 16, 1.0, "bicubic", 9)
    write_results(
        folder, [WidthResult("vit", "scala", width, True, 8, 70.0 + k, *rest[1:]) for k, width in enumerate(WIDTHS)]
    )
    profile_run(folder, seconds=0.01, batch=(1, 2), threads=1)
    return folder


class Process:
    """A server in a process of its own."""

    def __init__(self, *command: str):
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.greeting = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.greeting)
        assert found, (self.greeting, self.process.communicate(timeout=20))
        self._port = int(found[1])

    def ask(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> tuple[int, Any]:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request(method, path, body, {"Content-Type": kind})
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        return response.status, json.loads(answer) if answer[:1] == b"{" else answer

    def classify(self) -> tuple[int, Any]:
        body = b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\n%s\r\n--x--\r\n' % encoded(noise())
        return self.ask("POST", "/v1/classify", body, "multipart/form-data; boundary=x")

    def metric(self, name: str) -> float:
        found = re.search(rf"^{name} (.*)$", self.ask("GET", "/metrics")[1].decode(), re.MULTILINE)
        assert found
        return float(found[1])

    def end(self, *signals: int) -> tuple[int, str]:
        """Exit status and what it said on standard error, after these signals."""
        for signum in signals:
            self.process.send_signal(signum)
        error = self.process.communicate(timeout=60)[1]
        return self.process.returncode, error


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Process]]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    processes: list[Process] = []

    def start(*command: str) -> Process:
        processes.append(Process(*command))
        return processes[-1]

    yield start
    for each in processes:
        each.process.kill()
        each.process.communicate()


def test_the_command(run: Path, started: Callable[..., Process]) -> None:
    flags = ("--port", "0", "--slo-ms", "20000", "--min-top1", "0.705", "--threads", "1")
    server = started(sys.executable, "-m", "slicevit", "serve", str(run), *flags)
    assert server.greeting.startswith(f"serving {run} at http://127.0.0.1:")
    assert "target 20000 ms, torch on cpu" in server.greeting
    status, answer = server.classify()
    assert (status, answer["width"], len(answer["labels"])) == (200, "1", 3)
    model = server.ask("GET", "/v1/model")[1]
    assert (model["input_size"], [row["width"] for row in model["widths"]]) == ([1, 16, 16], ["1/2", "1"])
    assert server.ask("GET", "/v1/status")[1]["min_top1"] == 70.5
    assert server.ask("GET", "/")[0] == 200
    assert server.end(signal.SIGTERM) == (0, "")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_nobody(signum: int, started: Callable[..., Process]) -> None:
    """Calls of a second; 20 requests of which 8 at most go into a call."""
    server = started(sys.executable, "-c", SLOW, "1")
    with ThreadPoolExecutor(20) as pool:
        admitted = [pool.submit(server.classify) for _ in range(20)]
        while server.metric("slicevit_requests_held") + server.metric("slicevit_request_seconds_count") < 20:
            time.sleep(0.01)
        server.process.send_signal(signum)
        deadline = time.monotonic() + 20
        while server.ask("GET", "/readyz")[0] == 200:
            assert time.monotonic() < deadline
        status, refusal = server.classify()
        assert status == 503
        assert "about to end" in refusal["detail"]
        assert server.ask("GET", "/healthz")[0] == 200
        assert [future.result()[0] for future in admitted] == [200] * 20
    assert server.end() == (0, "")


def test_a_second_ctrl_c_does_not_wait(started: Callable[..., Process]) -> None:
    server = started(sys.executable, "-c", SLOW, "60")
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(server.classify)
        while server.ask("GET", "/v1/status")[1]["queue"] or not server.metric("slicevit_requests_held"):
            time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        while server.ask("GET", "/readyz")[0] == 200:
            time.sleep(0.01)
        begin = time.monotonic()
        assert server.end(signal.SIGINT) == (130, "")
        assert time.monotonic() - begin < 20
        assert lost.exception() is not None


# What it refuses to begin


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one sentence that `slicevit serve` ends with."""

    def call(*argv: str | Path) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(["serve", *map(str, argv)])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return str(line)

    return call


def test_a_port_that_is_taken(run: Path, refused: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refused(run, "--port", port)
    assert f"--port {port} cannot be used" in message
    assert "give another --port" in message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "70000"], "--port 70000: give a number from 1 to 65535"),
        (["--port", "-1"], "--port -1"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 0 cannot be used"),
        (["--min-top1", "80"], "--min-top1 80 is no share from 0 to 1: for 80 per cent write 0.8"),
        (["--min-top1", "0.99"], "--min-top1 0.99: the most accurate width is 1 with 0.71, "),
        (["--slo-ms", "1e-6"], "--slo-ms 1e-06 cannot be kept: give milliseconds from"),
        (["--slo-ms", "nan"], "--slo-ms nan"),
        (["--policy", "fixed"], "--policy fixed and --width go together"),
        (["--policy", "fixed", "--width", "3/8"], "3/8"),
        (["--policy", "fixed", "--width", "wide"], "wide"),
        (["--width", "1/2"], "go together"),
        (["--max-queue", "0"], "--max-queue 0"),
        (["--device", "abacus"], "--device abacus"),
        (["--engine", "steam"], "steam"),
        (["--thread", "1"], "--thread is no option of slicevit serve; near it: --threads"),
    ],
)
def test_flags_that_cannot_be(flags: list[str], said: str, run: Path, refused: Callable[..., str]) -> None:
    flags = flags if "--port" in flags else [*flags, "--port", "0"]
    assert said in refused(run, *flags, *([] if "--thread" in flags else ["--threads", "1"]))


def test_a_run_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "nothing" in refused(tmp_path / "nothing", "--port", "0")


@pytest.mark.parametrize("package", ["fastapi", "python_multipart"])
def test_a_package_that_is_not_installed(
    package: str, run: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    assert refused(run).endswith(f'needs {package}, not installed here: pip install "slicevit[serve]"')


# The table


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The apps that would be served."""
    found: list[Any] = []

    def serve(app: Any, bound: socket.socket, greeting: str) -> None:
        found.append(app)

    monkeypatch.setattr("slicevit.serving.server.serve", serve)
    return found


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_without_a_profile_is_measured(
    broken: bool,
    run: Path,
    tmp_path: Path,
    served: list[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "results.json", "results.csv"):
        (folder / name).write_bytes((run / name).read_bytes())
    path = profile_path(folder, "torch", "cpu")
    if broken:
        path.parent.mkdir()
        path.write_text("{")
    monkeypatch.setattr(measured, "measure_run", partial(measure_run, seconds=0.01))
    cli.main(["serve", str(folder), "--port", "0", "--threads", "1", "--slo-ms", "1000"])
    said = capsys.readouterr().err
    assert f"slicevit profile {folder}" in said
    assert "serve measures it now" in said
    assert json.loads(path.read_text())["threads"] == 1
    assert len(served) == 1


def test_a_profile_that_cannot_be_kept(
    run: Path, tmp_path: Path, served: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a run on a shared disk that may only be read."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("profiles"))
    (folder / "profiles").symlink_to(tmp_path / "nowhere")  # root may write into every folder that there is
    monkeypatch.setattr(measured, "measure_run", partial(measure_run, seconds=0.01))
    cli.main(["serve", str(folder), "--port", "0", "--threads", "1", "--slo-ms", "1000"])
    assert "the next start measures it again" in capsys.readouterr().err
    assert len(served) == 1


def test_a_profile_of_another_number_of_threads_is_said(
    run: Path, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for threads, lines in (("1", 0), ("2", 1)):
        cli.main(["serve", str(run), "--port", "0", "--threads", threads, "--slo-ms", "1000"])
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines
    assert "measured with --threads 1" in said[0]
    assert len(served) == 2


def test_flags_become_settings() -> None:
    flags = {"policy": "fixed", "width": "0.5", "max_queue": 3, "max_bytes": 4, "max_pixels": 5, "decoders": 6}
    args = cli_serve.ServeArgs(run="r", slo_ms=70.0, min_top1=0.826, body_seconds=2.0, quantile=0.5, **flags)
    settings = args.settings()
    assert (settings.slo_ms, settings.min_top1, str(settings.width)) == (70.0, 82.6, "1/2")
    assert (settings.max_queue, settings.max_bytes, settings.max_pixels, settings.decoders) == (3, 4, 5, 6)
    assert (settings.policy, settings.body_seconds, settings.quantile) == ("fixed", 2.0, 0.5)
