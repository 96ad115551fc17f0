"""Bytes that a stranger sent, to what the engine takes."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from slicevit.serving.refusal import Refusal, quoted

T = TypeVar("T")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_ASPECT = 50  # a side of 1 pixel times 50 million is resized to billions of pixels
_MAX_SCANS = 32  # of a progressive JPEG with max_pixels; each of them costs a pass over the image
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM")
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError)


def read_image(content: bytes, transform: Callable[[Image.Image], T], max_pixels: int) -> T:
    """Decode an image and transform it to what the engine takes.

    The size in the header is checked before anything is decoded. An animation gives its first frame. What becomes of a
    palette, 16 bits, CMYK or transparency is the transform's affair, and EXIF orientation is not applied: both as
    when the run was evaluated (`slicevit.data.open_dataset`).

    Args:
        content: the image file.
        transform: such as `Engine.transform`, which decodes it.
        max_pixels: the largest width times height.

    Raises:
        Refusal: 413 too many pixels; 415 another format; 422 empty, broken, cut short, or too long and thin.
    """
    if not content:
        raise Refusal(422, "image: it is empty")
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            _check_size(*image.size, max_pixels, content)
            return transform(image)
    except Refusal:
        raise
    except _TOO_LARGE:
        raise Refusal(413, _too_large(max_pixels)) from None
    except UnidentifiedImageError:
        if content.startswith(_BEGINNINGS) or (content[:4], content[8:12]) == (b"RIFF", b"WEBP"):
            raise Refusal(422, "image: it is broken: its header cannot be read") from None
        raise Refusal(415, f"image: its format is none of {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise whatever they like
        raise Refusal(422, f"image: it is broken: it cannot be decoded ({quoted(error)})") from None


def _check_size(width: int, height: int, max_pixels: int, content: bytes) -> None:
    if width * height > max_pixels:
        raise Refusal(413, f"{_too_large(max_pixels)}, not {width} x {height}")
    if min(width, height) * MAX_ASPECT < max(width, height):
        raise Refusal(422, f"image: it has {width} x {height} pixels: one side is over {MAX_ASPECT} times the other")
    scans = content.count(b"\xff\xda") if content.startswith(b"\xff\xd8") else 1
    if scans > _MAX_SCANS and scans * width * height > _MAX_SCANS * max_pixels:
        raise Refusal(413, f"image: it is a JPEG of {width} x {height} pixels in {scans} scans; save it with fewer")


def _too_large(max_pixels: int) -> str:
    return f"image: it may have up to {max_pixels:,} pixels"
