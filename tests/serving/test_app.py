"""The HTTP contract, in this process."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from serving_fakes import CLASSES, FULL, HALF, QUARTER, TABLE, FakeEngine, Gate, encoded, noise, picture

pytestmark = pytest.mark.extra
pytest.importorskip("fastapi", reason='needs fastapi: pip install "slicevit[serve]"')
pytest.importorskip("httpx2", reason='needs httpx2: pip install "slicevit[serve-test]"')

from fastapi.testclient import TestClient  # noqa: E402
from starlette.types import Receive  # noqa: E402

from slicevit.runtime.profile import Profile  # noqa: E402
from slicevit.serving import service as service_module  # noqa: E402
from slicevit.serving.app import PAGE, create_app  # noqa: E402
from slicevit.serving.settings import Settings  # noqa: E402

PNG = encoded(picture(3))


class Served:
    """An app with its engine and a client."""

    def __init__(self, stack: ExitStack, table: Profile = TABLE, **settings: Any):
        self.engine = FakeEngine()
        self.app = create_app(self.engine, table, Settings(**{"slo_ms": 20_000.0, **settings}))
        self.client = stack.enter_context(TestClient(self.app))
        self.engine.calls.clear()  # of the warm-up

    def classify(self, content: bytes = PNG, **fields: str) -> Any:
        return self.client.post("/v1/classify", files={"image": ("a", content)}, data=fields)

    def get(self, path: str) -> Any:
        response = self.client.get(path)
        assert response.status_code == 200
        return response.json()

    def metric(self, name: str) -> float:
        """The value of a line of /metrics."""
        found = re.search(rf"^{re.escape(name)} (.*)$", self.client.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def served(stack: ExitStack) -> Served:
    return Served(stack)


# Answers


def test_form_and_json_get_the_contract(served: Served) -> None:
    form = served.classify()
    body = {"image": base64.b64encode(PNG).decode()}
    for response in (form, served.client.post("/v1/classify", json=body)):
        assert response.status_code == 200
        answer = response.json()
        assert set(answer) == {"labels", "width", "batch", "decode_ms", "queue_ms", "compute_ms", "reason"}
        assert len(answer["labels"]) == 5
        assert answer["labels"][0] == {"label": "d", "index": 3, "probability": pytest.approx(0.901, abs=1e-3)}
        chances = [label["probability"] for label in answer["labels"]]
        assert chances == sorted(chances, reverse=True)
        assert (answer["width"], answer["batch"]) == ("1", 1)
        assert "most accurate" in answer["reason"]
        assert all(answer[name] >= 0 for name in ("decode_ms", "queue_ms", "compute_ms"))
    assert served.engine.calls == [(FULL, 1)] * 2


def test_options(served: Served) -> None:
    answer = served.classify(width="0.5", top_k="7", deadline_ms="10000").json()
    assert answer["width"] == "1/2"
    assert sum(label["probability"] for label in answer["labels"]) == pytest.approx(1.0)
    assert served.engine.calls == [(HALF, 1)]


def test_classes_without_names_are_numbers(served: Served) -> None:
    served.engine.label_names = None
    assert served.classify(top_k="1").json()["labels"][0]["label"] == "3"
    assert served.get("/v1/model")["label_names"] is None


def test_requests_that_come_together_are_computed_together(served: Served) -> None:
    gate = Gate(served.engine)
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(served.classify)
        assert gate.reached.wait(20)
        rest = [pool.submit(served.classify, encoded(picture(red))) for red in range(8)]
        while served.get("/v1/status")["queue"] < 8:
            time.sleep(0.01)
        gate.open()
        answers = [future.result().json() for future in (first, *rest)]
    assert [answer["labels"][0]["index"] for answer in answers] == [3, 0, 1, 2, 3, 4, 5, 6, 0]
    assert {answer["batch"] for answer in answers[1:]} == {8}
    assert served.engine.calls == [(FULL, 1), (FULL, 8)]


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ({"policy": "fixed", "width": QUARTER}, "1/4"),
        ({"policy": "budget", "budget_ms": 4.0}, "1/2"),
        ({"min_top1": 85.0}, "1"),
    ],
)
def test_policies(settings: dict[str, Any], width: str, stack: ExitStack) -> None:
    assert Served(stack, **settings).classify().json()["width"] == width


# Refusals of one's own making


@pytest.mark.parametrize(
    ("content", "fields", "status", "said"),
    [
        (b"", {}, 422, "empty"),
        (b"nonsense", {}, 415, "JPEG, PNG, WEBP, GIF, BMP"),
        (PNG[:60], {}, 422, "broken"),
        (encoded(picture(size=(30, 40))), {}, 413, "up to 1,000 pixels, not 30 x 40"),
        (encoded(picture(size=(1, 60))), {}, 422, "1 x 60"),
        (b"a" * 2_001, {}, 413, "up to 2,000 bytes, not 2,001"),
        (b"a" * 90_000, {}, 413, "bytes"),
        (PNG, {"width": "3/4"}, 422, "'3/4' is none of them: the widths are 1/4, 1/2, 1"),
        (PNG, {"width": "wide"}, 422, "the widths are 1/4, 1/2, 1"),
        (PNG, {"width": "1/0"}, 422, "the widths are 1/4, 1/2, 1"),
        (PNG, {"top_k": "8"}, 422, "from 1 to 7"),
        (PNG, {"top_k": "9" * 30}, 422, "from 1 to 7"),
        (PNG, {"deadline_ms": "0.99"}, 422, "from 1, which the fastest width takes here, to 60000"),
        (PNG, {"deadline_ms": "60000.1"}, 422, "to 60000"),
        (PNG, {"deadline_ms": "4.9", "width": "1"}, 422, "width 1 takes 5"),
    ],
)
def test_each_bad_input_has_its_own_4xx(
    content: bytes, fields: dict[str, str], status: int, said: str, stack: ExitStack
) -> None:
    served = Served(stack, max_bytes=2_000, max_pixels=1_000)
    response = served.classify(content, **fields)
    assert response.status_code == status
    assert set(response.json()) == {"detail"}
    assert said in response.json()["detail"]
    assert not served.engine.calls
    assert served.metric(f'slicevit_requests_total{{path="/v1/classify",status="{status}"}}') == 1
    assert served.get("/v1/status")["attainment"] is None  # no fault of the server
    assert served.classify(encoded(picture(size=(9, 9)))).status_code == 200


@pytest.mark.parametrize("in_base64", [False, True])
def test_bytes_are_limited_without_a_length(in_base64: bool, stack: ExitStack) -> None:
    served, read = Served(stack, max_bytes=100_000), []

    async def receive() -> dict[str, Any]:
        read.append(10_000)
        return {"type": "http.request", "body": b"a" * 10_000, "more_body": True}

    status, detail = posted(served, receive, "application/json" if in_base64 else "multipart/form-data; boundary=x")
    limit = int(100_000 * (4 / 3 if in_base64 else 1) + 65_536)
    assert status == 413
    assert f"{limit:,} bytes" in detail
    assert limit < sum(read) <= limit + 10_000


@pytest.mark.parametrize("length", ["165537", "9" * 18, "9" * 5_000])
def test_bytes_are_limited_by_the_length_that_is_declared(length: str, stack: ExitStack) -> None:
    async def receive() -> dict[str, Any]:
        raise AssertionError("it was read")

    assert posted(Served(stack, max_bytes=100_000), receive, length=length)[0] == 413


def test_a_body_that_does_not_come(stack: ExitStack) -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.03)
        return {"type": "http.request", "body": b"a", "more_body": True}

    status, detail = posted(Served(stack, body_seconds=0.1), receive)
    assert status == 408
    assert "0.1 s" in detail


def test_a_client_that_leaves(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    assert posted(served, receive)[0] == 400
    assert served.app.state.service.held == 0
    assert not caplog.records


def posted(
    served: Served, receive: Receive, content_type: str = "multipart/form-data; boundary=x", length: str = ""
) -> tuple[int, str]:
    """Status and detail of a request whose body comes from `receive`."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", content_type.encode()), *([(b"content-length", length.encode())] if length else [])]
    scope = {"type": "http", "method": "POST", "path": "/v1/classify", "query_string": b"", "headers": headers}
    asyncio.run(served.app(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])["detail"]


def test_the_largest_image_in_base64_fits(stack: ExitStack) -> None:
    content = encoded(noise((100, 100)), "BMP")
    served = Served(stack, max_bytes=len(content))
    body = {"image": base64.b64encode(content).decode()}
    assert served.client.post("/v1/classify", json=body).status_code == 200
    body = {"image": base64.b64encode(content + b"a").decode()}
    assert served.client.post("/v1/classify", json=body).status_code == 413


def test_other_methods_and_paths(served: Served) -> None:
    assert served.client.get("/v1/classify").status_code == 405
    assert served.client.get("/nothing").json() == {"detail": "Not Found"}
    assert served.metric('slicevit_requests_total{path="other",status="404"}') == 1


# Overload, errors, the end


def test_late_requests_are_shed_and_say_when_to_come_back(served: Served) -> None:
    gate = Gate(served.engine)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(served.classify)
        assert gate.reached.wait(20)
        late = [pool.submit(served.classify, deadline_ms="1000") for _ in range(2)]
        time.sleep(1.2)
        gate.open()
        assert first.result().status_code == 200
        for future in late:
            assert future.result().status_code == 429
            assert future.result().headers["retry-after"] == "1"
            assert "overloaded" in future.result().json()["detail"]
    status = served.get("/v1/status")
    assert status["attainment"] == pytest.approx(1 / 3)
    assert status["shed_per_s"] > 0
    assert served.metric('slicevit_shed_total{reason="late"}') == 2
    assert len(served.engine.calls) == 1


def test_the_queue_is_bounded(stack: ExitStack) -> None:
    served = Served(stack, max_queue=3)
    gate = Gate(served.engine)
    with ThreadPoolExecutor(3) as pool:
        held = [pool.submit(served.classify) for _ in range(3)]
        while served.app.state.service.held < 3:
            time.sleep(0.01)
        response = served.classify()
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert "3 requests" in response.json()["detail"]
        gate.open()
        assert [future.result().status_code for future in held] == [200] * 3
    assert served.metric('slicevit_shed_total{reason="full"}') == 1
    assert served.classify().status_code == 200
    assert served.app.state.service.held == 0


def test_a_request_that_cannot_be_in_time_is_not_decoded(stack: ExitStack) -> None:
    served = Served(stack)
    margin = served.app.state.service._margin
    for _ in range(30):
        margin.delivery_took(time.perf_counter() * 1000, 5_000.0)
    gate = Gate(served.engine)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(served.classify, deadline_ms="19000")
        assert gate.reached.wait(20)
        response = served.classify(b"no image at all", deadline_ms="9000")
        assert response.status_code == 429
        gate.open()
        assert running.result().status_code == 200


def test_an_error_of_the_engine_is_500_and_the_server_goes_on(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*call: object) -> None:
        raise RuntimeError("a secret of the server")

    served.engine.before = broken
    response = served.classify()
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "a secret of the server" in caplog.text
    served.engine.before = lambda *call: None
    assert served.classify().status_code == 200
    assert served.metric("slicevit_engine_failures_total") == 1
    assert served.metric('slicevit_requests_total{path="/v1/classify",status="500"}') == 1
    assert served.get("/healthz") == {"status": "ok"}
    assert served.get("/v1/status")["attainment"] == 0.5


def test_draining_answers_whoever_was_admitted(served: Served) -> None:
    gate = Gate(served.engine)
    with ThreadPoolExecutor(1) as pool:
        admitted = pool.submit(served.classify)
        assert gate.reached.wait(20)
        assert served.get("/readyz") == {"status": "ready"}
        served.app.state.service.draining = True
        for response in (served.client.get("/readyz"), served.classify()):
            assert response.status_code == 503
            assert "about to end" in response.json()["detail"]
        assert served.get("/healthz") == {"status": "ok"}
        gate.open()
        assert admitted.result().status_code == 200


def test_a_server_that_has_not_started_is_not_ready() -> None:
    app = create_app(FakeEngine(), TABLE, Settings(slo_ms=100.0))
    client = TestClient(app)  # without its lifespan
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 503
    assert client.post("/v1/classify", files={"image": PNG}).status_code == 503


def test_a_call_that_is_stuck_is_not_healthy(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "STUCK_MS", 50.0)
    gate = Gate(served.engine)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.classify)
        assert gate.reached.wait(20)
        time.sleep(0.1)
        assert served.client.get("/healthz").status_code == 503
        gate.open()
        assert waiting.result().status_code == 200
    end = time.monotonic() + 20
    while served.client.get("/healthz").status_code != 200:  # the thread that computes ends its call after the answer
        assert time.monotonic() < end


# What is served, and how it goes


def test_model(served: Served) -> None:
    model = served.get("/v1/model")
    assert set(model) == {
        *("task", "figure", "architecture", "engine", "device", "input_size", "num_classes", "label_names", "widths")
    }
    assert (model["architecture"], model["engine"], model["device"]) == ("fake", "torch", "cpu")
    assert (model["input_size"], model["num_classes"], model["label_names"]) == ([3, 8, 8], CLASSES, [*"abcdefg"])
    assert [row["width"] for row in model["widths"]] == ["1/4", "1/2", "1"]
    assert model["widths"][1] == {
        "width": "1/2",
        "top1": 80.0,
        "latency_ms": {"1": 2.0, "4": 5.0, "8": 9.0},
        "on_frontier": True,
    }


def test_a_width_off_the_frontier_is_said_and_not_chosen(stack: ExitStack) -> None:
    rows = [{"width": str(row.width), "top1": row.top1, "latency_ms": row.latency_ms} for row in TABLE.rows]
    rows[2]["top1"] = 79.0
    served = Served(stack, table=Profile.parse(rows))
    assert [row["on_frontier"] for row in served.get("/v1/model")["widths"]] == [True, True, False]
    assert served.classify().json()["width"] == "1/2"
    assert served.classify(width="1").json()["width"] == "1"


def test_status(stack: ExitStack) -> None:
    served = Served(stack, min_top1=75.0)
    idle = served.get("/v1/status")
    assert idle | {"uptime_s": 0.0} == {
        "slo_ms": 20_000.0,
        "min_top1": 75.0,
        "queue": 0,
        "requests_per_s": 0.0,
        "p50_ms": None,
        "p99_ms": None,
        "attainment": None,
        "widths": {"1/4": 0.0, "1/2": 0.0, "1": 0.0},
        "top1": None,
        "shed_per_s": 0.0,
        "uptime_s": 0.0,
    }
    for width in ("1/2", "1", "1", "1/4"):
        served.classify(width=width)
    busy = served.get("/v1/status")
    assert (busy["attainment"], busy["top1"]) == (1.0, (80 + 90 + 90 + 70) / 4)
    assert busy["widths"] == {"1/4": 0.25, "1/2": 0.25, "1": 0.5}
    assert busy["requests_per_s"] > 0
    assert 0 < busy["p50_ms"] <= busy["p99_ms"]
    assert busy["uptime_s"] >= idle["uptime_s"] > 0


def test_the_target_can_be_changed(served: Served) -> None:
    response = served.client.put("/v1/slo", json={"slo_ms": 80})
    assert response.status_code == 200
    assert response.json()["slo_ms"] == 80.0
    assert served.get("/v1/status")["slo_ms"] == 80.0
    assert served.metric("slicevit_slo_seconds") == 0.08


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"slo_ms": 0.9}', 422),
        (b'{"slo_ms": 60001}', 422),
        (b'{"slo_ms": NaN}', 422),
        (b'{"slo_ms": -Infinity}', 422),
        (b'{"slo_ms": 1e999}', 422),
        (b'{"slo_ms": "80"}', 422),
        (b'{"slo_ms": null}', 422),
        (b'{"slo_ms": 80, "more": 1}', 422),
        (b"{}", 422),
        (b"[80]", 422),
        (b"80 ms", 400),
        (b"", 400),
        (b" " * 2**17, 413),
    ],
)
def test_an_illegal_target_changes_nothing(body: bytes, status: int, served: Served) -> None:
    response = served.client.put("/v1/slo", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    if b'"slo_ms"' in body and b"more" not in body:
        assert "milliseconds from 1, which the fastest width takes here, to 60000" in response.json()["detail"]
    assert served.get("/v1/status")["slo_ms"] == 20_000.0
    assert served.client.put("/v1/slo", content=body).status_code == 415


def test_metrics(served: Served) -> None:
    for width in ("1", "1/2", "1/2"):
        served.classify(width=width)
    assert served.metric('slicevit_answers_total{width="1/2"}') == 2
    assert served.metric("slicevit_answers_in_time_total") == 3
    assert served.metric('slicevit_requests_total{path="/v1/classify",status="200"}') == 3
    for name in ("request", "decode", "queue"):
        assert served.metric(f"slicevit_{name}_seconds_count") == 3
    assert served.metric('slicevit_compute_seconds_count{width="1/2"}') == 2
    assert served.metric("slicevit_batch_size_sum") == 3
    assert served.metric("slicevit_queue_depth") == 0
    assert served.metric("slicevit_top1_sum") == pytest.approx(0.9 + 0.8 + 0.8)
    assert served.metric("slicevit_margin_ratio") >= 1
    assert served.client.get("/metrics").headers["content-type"].startswith("text/plain; version=")


def test_several_apps_in_a_process_count_apart(stack: ExitStack) -> None:
    one, two = Served(stack), Served(stack)
    one.classify()
    assert one.metric("slicevit_answers_in_time_total") == 1
    assert two.metric("slicevit_answers_in_time_total") == 0


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_nothing_from_elsewhere(path: str, served: Served) -> None:
    page = served.client.get(path)
    assert page.headers["content-type"].startswith("text/html")
    loaded = [name for name in re.findall(r"""(?:src|href)=["']([^"']+)""", page.text) if not name.startswith("data:")]
    assert loaded
    for name in loaded:
        assert "//" not in name
        assert served.client.get("/" + name.removeprefix("/")).status_code == 200
    assert path == "/docs" or page.content == PAGE.read_bytes()


def test_a_classifier_does_not_segment(served: Served) -> None:
    response = served.client.post("/v1/segment", files={"image": ("a", PNG)})
    assert response.status_code == 404
    said = "a model for classification is served here: post the image to /v1/classify"
    assert response.json() == {"detail": said}


def test_openapi_names_every_path(served: Served) -> None:
    assert set(served.get("/openapi.json")["paths"]) == {
        *("/v1/classify", "/v1/model", "/v1/status", "/v1/slo", "/healthz", "/readyz", "/metrics")
    }


# Settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"slo_ms": 0.5}, "--slo-ms 0.5 cannot be kept: give milliseconds from 1"),
        ({"slo_ms": 4.0, "policy": "fixed", "width": FULL}, "--slo-ms 4 cannot be kept: give milliseconds from 5"),
        ({"slo_ms": 4.0, "min_top1": 85.0}, "--slo-ms 4 cannot be kept"),
        ({"slo_ms": 0.0}, "--slo-ms 0"),
        ({"slo_ms": float("nan")}, "--slo-ms nan"),
        ({"slo_ms": 1e9}, "--slo-ms 1e+09"),
        ({"min_top1": 95.0}, "--min-top1 0.95: the most accurate width is 1 with 0.9, so give no more than that"),
        ({"policy": "fixed"}, "--policy fixed and --width go together"),
        ({"width": HALF}, "--width go together"),
        ({"policy": "fixed", "width": FULL / 3}, "width 1/3 is not in the table"),
        ({"policy": "budget"}, "--policy budget and --budget-ms go together"),
        ({"policy": "budget", "budget_ms": float("inf")}, "--budget-ms inf"),
        ({"policy": "cascade"}, "--policy cascade is none of deadline-slack, fixed, budget"),
        ({"max_queue": 0}, "--max-queue 0"),
        ({"max_bytes": 0}, "--max-bytes 0"),
        ({"max_pixels": -1}, "--max-pixels -1"),
        ({"decoders": 0}, "--decoders 0"),
        ({"body_seconds": 0.0}, "--body-seconds 0"),
        ({"quantile": 1.0}, "--quantile 1.0"),
        ({"headroom": 1.0}, "--headroom 1.0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        create_app(FakeEngine(), TABLE, Settings(**{"slo_ms": 100.0, **settings}))


def test_a_table_of_another_model() -> None:
    rows = [{"width": "3/4", "top1": 80.0, "latency_ms": {1: 2.0}}]
    with pytest.raises(ValueError, match="width 3/4, the model has not"):
        create_app(FakeEngine(), Profile.parse(rows), Settings(slo_ms=100.0))
