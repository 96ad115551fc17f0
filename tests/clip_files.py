"""Clips made from images in motion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def write_clip(path: Path, frames: Sequence[Image.Image], codec: str = "ffv1") -> Path:
    """A clip of these frames; with ffv1, in .mkv, they come back to the bit."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        container.mux(stream.encode())
    return path


def in_motion(image: Image.Image, count: int, side: int, start: int = 0) -> list[Image.Image]:
    """A window of `side` pixels that moves over the image, a pixel a frame, and turns back at its end."""
    room = image.width - side
    steps = [(start + k) % (2 * room) for k in range(count)]
    lefts = [min(step, 2 * room - step) for step in steps]
    return [image.crop((left, 0, left + side, side)) for left in lefts]
