"""Bodies: what is read from them, and one sentence for what is wrong."""

from __future__ import annotations

import base64
import json

import pytest

pytestmark = pytest.mark.extra
pytest.importorskip("fastapi", reason='needs fastapi: pip install "slicevit[serve]"')

from slicevit.serving.forms import Asked, read_form  # noqa: E402
from slicevit.serving.refusal import Refusal, quoted  # noqa: E402

HINTS = {"width": "the widths are 1/2, 1", "top_k": "give 1 to 7", "deadline_ms": "give 1 to 60000"}
FORM = "multipart/form-data; boundary=x"


def form(*parts: tuple[str, bytes], end: bytes = b"--x--\r\n") -> bytes:
    lines = [b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (n.encode(), v) for n, v in parts]
    return b"".join(lines) + end


def read(body: bytes | dict[str, object], content_type: str = FORM, max_bytes: int = 1000) -> Asked:
    if isinstance(body, dict):
        body, content_type = json.dumps(body).encode(), "application/json"
    return read_form(body, content_type, max_bytes, HINTS)


def refused(body: bytes | dict[str, object], content_type: str = FORM, max_bytes: int = 1000) -> tuple[int, str]:
    with pytest.raises(Refusal) as refusal:
        read(body, content_type, max_bytes)
    detail = refusal.value.detail
    assert detail.isascii()
    assert detail.isprintable()
    assert len(detail) < 200
    return refusal.value.status, detail


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_json_and_forms_say_the_same() -> None:
    content = bytes(range(256))
    one = read({"image": text(content), "deadline_ms": 12.5, "width": "1/2", "top_k": 3})
    two = read(form(("image", content), ("deadline_ms", b"12.5"), ("width", b"1/2"), ("top_k", b"3")))
    assert one.image == two.image == content
    for asked in (one, two):
        assert (asked.options.deadline_ms, asked.options.width, asked.options.top_k) == (12.5, "1/2", 3)


def test_everything_but_the_image_is_optional() -> None:
    for asked in (read({"image": text(b"a"), "width": None}), read(form(("image", b"a")))):
        assert asked.image == b"a"
        assert (asked.options.deadline_ms, asked.options.width, asked.options.top_k) == (None, None, None)


def test_a_part_may_be_a_file_or_a_field_and_empty() -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    assert read(head + b"abc\r\n--x--\r\n").image == b"abc"
    assert read(head + b"\r\n--x--\r\n").image == b""


def test_wrapped_base64_is_base64() -> None:
    """As the command base64 writes it."""
    assert read({"image": base64.encodebytes(bytes(100)).decode()}).image == bytes(100)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "image: send the file"),
        ({"image": None}, "image: send the file"),
        ({"image": 5}, "image: send the file"),
        ({"image": "a"}, "no base64"),
        ({"image": "a*=="}, "no base64"),
        ({"image": "ä"}, "no base64"),
        ({"image": "data:image/png;base64,AAAA"}, "no base64; of a data: URL give what follows the comma"),
        ({"image": "AAAA", "width": "1/2 or so"}, "the widths are 1/2, 1"),
        ({"image": "AAAA", "width": 0.5}, "the widths are 1/2, 1"),
        ({"image": "AAAA", "width": "1e999999999"}, "the widths are 1/2, 1"),
        ({"image": "AAAA", "width": "9" * 10_000}, "the widths are 1/2, 1"),
        ({"image": "AAAA", "width": ["1/2"]}, "the widths are 1/2, 1"),
        ({"image": "AAAA", "top_k": 0}, "give 1 to 7"),
        ({"image": "AAAA", "top_k": 2.0}, "give 1 to 7"),
        ({"image": "AAAA", "top_k": "2"}, "give 1 to 7"),
        ({"image": "AAAA", "top_k": True}, "give 1 to 7"),
        ({"image": "AAAA", "deadline_ms": 0}, "give 1 to 60000"),
        ({"image": "AAAA", "deadline_ms": -5}, "give 1 to 60000"),
        ({"image": "AAAA", "deadline_ms": float("nan")}, "give 1 to 60000"),
        ({"image": "AAAA", "deadline_ms": float("inf")}, "give 1 to 60000"),
        ({"image": "AAAA", "deadline_ms": 1e308}, "give 1 to 60000"),
        ({"image": "AAAA", "deadline_ms": "50"}, "give 1 to 60000"),
        ({"image": "AAAA", "deadline": 50}, "'deadline': there is no such field; the fields are image, deadline_ms"),
        ({"image": "AAAA", "\u202e" * 100: 50}, "there is no such field"),
    ],
)
def test_json_that_cannot_be_used(body: dict[str, object], said: str) -> None:
    status, detail = refused(body)
    assert status == 422
    assert said in detail


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"nonsense", b"[" * 100_000, b'{"image": "\\ud800"}', b'{"image": "' + b"A" * 99, b"[1e]"],
)
def test_no_json(body: bytes) -> None:
    status, detail = refused(body, "application/json; charset=utf-8")
    assert status == 400
    assert "no JSON" in detail


@pytest.mark.parametrize("body", [b"[]", b"5", b"null", b'"image"', b"NaN"])
def test_json_that_is_no_object(body: bytes) -> None:
    assert refused(body, "application/json") == (
        422,
        "the body is no JSON object with image, deadline_ms, width, top_k",
    )


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], "image: it is missing"),
        ([("picture", b"a")], "image: it is missing"),
        ([("image", b"a"), ("image", b"b")], "'image': it is there twice"),
        ([("image", b"a"), ("width", b"")], "the widths are 1/2, 1"),
        ([("image", b"a"), ("width", b"\xff\xfe")], "the widths are 1/2, 1"),
        ([("image", b"a"), ("top_k", b"1.5")], "give 1 to 7"),
        ([("image", b"a"), ("top_k", b"9" * 5000)], "give 1 to 7"),
        ([("image", b"a"), ("deadline_ms", b"nan")], "give 1 to 60000"),
        ([("image", b"a"), ("deadline_ms", b"soon")], "give 1 to 60000"),
        ([("image", b"a"), ("colour", b"red")], "'colour': there is no such field"),
    ],
)
def test_forms_that_cannot_be_used(parts: list[tuple[str, bytes]], said: str) -> None:
    status, detail = refused(form(*parts))
    assert status == 422
    assert said in detail


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", FORM),
        (b"abc", FORM),
        (form(("image", b"a")), "multipart/form-data"),
        (form(("image", b"a")), "multipart/form-data; boundary=" + "x" * 1000),
        (form(("image", b"a")), "multipart/form-data; boundary=\xff"),
        (form(("image", b"a"), end=b""), FORM),
        (form(("image", b"a"))[:-3], FORM),
        (b"--x\r\n\r\nabc\r\n--x--\r\n", FORM),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--x--\r\n", FORM),
        (b"--x\r\n" + b"A" * 100_000 + b": b\r\n\r\n\r\n--x--\r\n", FORM),
        (form(*[(f"field{n}", b"") for n in range(1000)]), FORM),
    ],
)
def test_no_form(body: bytes, content_type: str) -> None:
    status, detail = refused(body, content_type)
    assert status in (400, 422)
    assert "form" in detail


@pytest.mark.parametrize("content_type", ["", "image/png", "text/plain", "application/x-www-form-urlencoded", "json"])
def test_another_content_type(content_type: str) -> None:
    assert refused(b"image=a", content_type)[0] == 415


def test_too_many_bytes() -> None:
    assert read(form(("image", b"a" * 50)), max_bytes=50).image == b"a" * 50
    for body in (form(("image", b"a" * 51)), {"image": text(b"a" * 51)}):
        assert refused(body, max_bytes=50) == (413, "image: the file may have up to 50 bytes, not 51")


def test_what_a_client_sent_is_quoted_safely() -> None:
    assert quoted("a\nb") == "'a\\nb'"
    assert quoted("\ud800") == "'\\ud800'"
    assert quoted("x" * 59) == repr("x" * 59)
    assert quoted("x" * 1_000_000) == repr("x" * 57 + "...")
    assert len(quoted("\U0001f600" * 60)) == 62
