"""A mask as an image instead of JSON."""

from __future__ import annotations

import base64
from typing import Any

from fastapi.responses import Response

from slicevit.serving.schemas import Segmented

WIDTH_HEADER = "Slicevit-Width"
MASK_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The mask: as JSON, or with Accept: image/png the image alone.",
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        "headers": {
            WIDTH_HEADER: {"schema": {"type": "string"}, "description": "Beside an image: the width that answered."},
            "Server-Timing": {
                "schema": {"type": "string"},
                "description": "Beside an image: milliseconds (dur) of decode, queue and compute.",
            },
        },
    }
}


def prefers_png(accept: str) -> bool:
    """Whether a client that sends this header takes image/png, and does not name JSON too."""
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return "image/png" in kinds and "application/json" not in kinds


def as_png(segmented: Segmented) -> Response:
    """The mask, with its width and times in headers."""
    times = {name: getattr(segmented, f"{name}_ms") for name in ("decode", "queue", "compute")}
    headers = {
        WIDTH_HEADER: segmented.width,
        "Server-Timing": ", ".join(f"{name};dur={took:.3f}" for name, took in times.items()),
    }
    return Response(base64.b64decode(segmented.mask), media_type="image/png", headers=headers)
