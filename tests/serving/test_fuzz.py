"""Whatever is sent, the server says 2xx or 4xx: from its OpenAPI, and with images that were tampered with.

The slow tests are the same with thousands.
"""

from __future__ import annotations

import base64
import random
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import DataObject, data
from serving_fakes import FORMATS, TABLE, FakeEngine, encoded, noise

pytestmark = [pytest.mark.extra, pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")]
pytest.importorskip("fastapi", reason='needs fastapi: pip install "slicevit[serve]"')
schemathesis = pytest.importorskip("schemathesis", reason='needs schemathesis: pip install "slicevit[serve-test]"')

from fastapi import FastAPI  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

from slicevit.serving.app import create_app  # noqa: E402
from slicevit.serving.settings import Settings  # noqa: E402

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]


def new_app() -> FastAPI:
    return create_app(FakeEngine(), TABLE, Settings(slo_ms=20_000.0, max_bytes=100_000, max_pixels=100_000))


# From the OpenAPI


def fuzz(app: FastAPI, examples: int) -> int:
    """So many requests for every operation, half of them against its schema where it has a body; says how many."""
    schema, sent = schemathesis.openapi.from_asgi("/openapi.json", app), 0

    @settings(
        max_examples=examples // 2,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data())
    def send(draw: DataObject) -> None:
        nonlocal sent
        case = draw.draw(strategy)
        # in a form [5] and 5 are sent alike, so a value that is not legal may become one on its way
        strict = [checks.negative_data_rejection] if case.media_type == "application/json" else []
        case.call_and_validate(checks=CHECKS + strict)
        sent += 1

    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode if operation.body else [schemathesis.GenerationMode.POSITIVE]:
            strategy = operation.as_strategy(generation_mode=mode)
            send()
    return sent


def test_openapi() -> None:
    assert fuzz(new_app(), 20) > 40


@pytest.mark.slow
def test_openapi_at_length() -> None:
    assert fuzz(new_app(), 1_000) > 2_000


# Images


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(new_app()) as client:
        yield client


def originals() -> list[bytes]:
    """Every format, and the kinds of it that other code reads."""
    plain, flat, frames = noise((40, 30)), noise((40, 30)).quantize(16), [noise((20, 20), seed) for seed in range(3)]
    several = {"save_all": True, "append_images": frames[1:]}
    return [
        *(encoded(plain, kind) for kind in FORMATS),
        encoded(plain, "JPEG", progressive=True),
        encoded(plain.convert("CMYK"), "JPEG"),
        encoded(plain.convert("RGBA"), "PNG"),
        encoded(flat, "PNG", transparency=3),
        encoded(plain, "WEBP", lossless=True),
        encoded(flat, "BMP"),
        *(encoded(frames[0], kind, **several) for kind in ("GIF", "PNG", "WEBP", "MPO")),
    ]


def tampered(content: bytes, draw: random.Random) -> bytes:
    """A few bytes turned, set to extremes, taken out, doubled or cut off, more often near the header."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        at = draw.randrange(min(len(changed), draw.choice((64, 10**9)))) if changed else 0
        kind = draw.randrange(5)
        if kind == 0 and changed:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and changed:
            changed[at] = draw.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del changed[at : at + draw.randrange(1, 9)]
        elif kind == 3:
            changed[at:at] = changed[at : at + draw.randrange(1, 50)]
        else:
            del changed[draw.randrange(len(changed) + 1) :]
    return bytes(changed)


def send_tampered(client: TestClient, rounds: int) -> Counter[int]:
    """How often each status came; alternately as a form and as JSON."""
    draw, statuses = random.Random(0), Counter[int]()
    for number in range(rounds):
        for content in originals():
            image = tampered(content, draw)
            if number % 2:
                body = {"image": base64.b64encode(image).decode()}
                response = client.post("/v1/classify", json=body)
            else:
                response = client.post("/v1/classify", files={"image": ("a", image)})
            statuses[response.status_code] += 1
            assert response.status_code in (200, 413, 415, 422), (response.text, image.hex())
            assert "detail" in response.json() or response.status_code == 200
    return statuses


def test_tampered_images(client: TestClient) -> None:
    statuses = send_tampered(client, 12)
    assert set(statuses) == {200, 413, 415, 422}, statuses
    assert client.get("/healthz").status_code == 200


@pytest.mark.slow
def test_thousands_of_tampered_images(client: TestClient) -> None:
    statuses = send_tampered(client, 200)
    assert sum(statuses.values()) >= 3_000
    assert client.get("/healthz").status_code == 200
