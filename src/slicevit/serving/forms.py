"""The body of a request, read: an image and its options, or one sentence on what is wrong with it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from python_multipart.multipart import File, FormParser, parse_options_header

from slicevit.serving.refusal import Refusal, quoted
from slicevit.serving.schemas import CLASSIFY, Options, Question

_MOST_PARTS = 16
_IMAGE_HINT = "send the file as field image of multipart/form-data, or in base64 as image of JSON"

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Asked:
    """An image file with its options."""

    image: bytes
    options: Options


def read_form(
    body: bytes, content_type: str, max_bytes: int, hints: Mapping[str, str], question: Question = CLASSIFY
) -> Asked:
    """The image and options of a body.

    Args:
        body: all of it.
        content_type: the header.
        max_bytes: of the image file.
        hints: field -> its legal values, for messages.
        question: what may be in it.

    Raises:
        Refusal: 400 no such body as the content type says; 413 too many bytes; 415 another content type; 422 a field
            that is missing, unknown, twice there or out of range.
    """
    kind = media_type(content_type)
    if kind == "application/json":
        asked = _from_json(body, {"image": _IMAGE_HINT, **hints}, question)
    elif kind == "multipart/form-data":
        asked = _from_multipart(body, content_type, {"image": _IMAGE_HINT, **hints}, question)
    else:
        raise Refusal(415, "send multipart/form-data or application/json; see /docs")
    if len(asked.image) > max_bytes:
        raise Refusal(413, f"image: the file may have up to {max_bytes:,} bytes, not {len(asked.image):,}")
    return asked


def media_type(content_type: str) -> str:
    """Its type and subtype, without parameters."""
    return content_type.partition(";")[0].strip().lower()


def read_json(kind: type[M], body: bytes, hints: Mapping[str, str], fields: str) -> M:
    """A model from JSON. Raises Refusal: 400 when it is no JSON, 422 when it is another; `fields` are its fields."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refused(error, hints, fields) from None


def _from_json(body: bytes, hints: Mapping[str, str], question: Question) -> Asked:
    found = read_json(question.in_json, body, hints, question.fields)
    try:
        image = base64.b64decode("".join(found.image.split()), validate=True)
    except (binascii.Error, ValueError):
        hint = "; of a data: URL give what follows the comma" if found.image.startswith("data:") else ""
        raise Refusal(422, f"image: it is no base64{hint}") from None
    return Asked(image, found)


def _from_multipart(body: bytes, content_type: str, hints: Mapping[str, str], question: Question) -> Asked:
    parts = _parts(body, content_type)
    names = [name for name, _ in parts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise Refusal(422, f"{quoted(twice)}: it is there twice; give each field once")
    fields = dict(parts)
    if "image" not in fields:
        raise Refusal(422, f"image: it is missing; {_IMAGE_HINT}")
    image = fields.pop("image")
    try:
        # a number in a form is text: JSON's reading of it is the one reading
        options = question.options.model_validate_strings({name: _text(value) for name, value in fields.items()})
    except ValidationError as error:
        raise _refused(error, hints, question.fields) from None
    return Asked(image, options)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")


def _parts(body: bytes, content_type: str) -> list[tuple[str, bytes]]:
    """Names and values, in their order, of a form that is whole."""
    found: list[tuple[str, bytes]] = []
    ended = []

    def keep(name: bytes | None, value: bytes) -> None:
        if len(found) == _MOST_PARTS:
            raise Refusal(400, f"the form has more than {_MOST_PARTS} fields")
        found.append((_text(name or b""), value))

    def keep_file(part: File) -> None:
        part.file_object.seek(0)
        keep(part.field_name, part.file_object.read())

    try:
        parser = FormParser(
            "multipart/form-data",
            on_field=lambda part: keep(part.field_name, part.value or b""),
            on_file=keep_file,
            on_end=lambda: ended.append(True),
            boundary=parse_options_header(content_type)[1].get(b"boundary"),
            config={"MAX_MEMORY_FILE_SIZE": len(body)},  # nothing goes to the disk
        )
        parser.write(body)
        parser.finalize()
    except Refusal:
        raise
    except Exception as error:  # of a library that reads what a stranger wrote
        raise Refusal(400, f"the body is no multipart form ({quoted(error)})") from None
    if not ended:
        raise Refusal(400, "the body is no whole multipart form: its last boundary is missing")
    return found


def _refused(error: ValidationError, hints: Mapping[str, str], fields: str) -> Refusal:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is no JSON ({quoted(first['msg'])})")
    if not first["loc"]:
        return Refusal(422, f"the body is no JSON object with {fields}")
    name = str(first["loc"][0])
    if name in hints:
        return Refusal(422, f"{name}: {hints[name]}")
    if first["type"] == "extra_forbidden":
        return Refusal(422, f"{quoted(name)}: there is no such field; the fields are {fields}")
    return Refusal(422, f"{name}: {first['msg']}")
