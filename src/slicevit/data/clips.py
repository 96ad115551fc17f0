"""Folders of video clips, as the frames that stand for them.

Legend of axis names: N clips.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from .folders import FolderSet, open_labelled
from .image_set import ImageSet

ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
FRAMES = 8  # of a clip, as in the paper's linear probe on UCF101
_SPEC = re.compile(r"(clips|ucf101):([^?]+)\??(.*)")
_KEYS = {"clips": ("frames",), "ucf101": ("frames", "fold")}


class ClipSet(ImageSet):
    """`frames` frames of every clip, one after another: frame k is the one in the middle of the k-th equal part.

    A clip is decoded once for all its frames when they are read in order. One that cannot be decoded has only
    unreadable frames.
    """

    def __init__(self, files: FolderSet, frames: int):
        super().__init__(files.spec, files.split, files.in_chans, files.classes, files.num_classes)
        self.frames = frames
        self._files = files
        self._last: tuple[str, list[Image.Image]] = ("", [])

    def __len__(self) -> int:
        return len(self._files) * self.frames

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": ("", [])}

    def _read(self, index: int) -> tuple[Image.Image, int]:
        clip, frame = divmod(index, self.frames)
        path = self._files.name(clip)
        if self._last[0] != path:
            self._last = (path, _decoded(path, self.frames, self._mode))
        return self._last[1][frame], int(self._files.targets()[clip])

    def name(self, index: int) -> str:
        return self._files.name(index // self.frames)

    def targets(self) -> np.ndarray:
        return self._files.targets().repeat(self.frames)


def clip_source(spec: str) -> bool:
    """Whether `spec` names clips."""
    return _SPEC.fullmatch(spec) is not None


def open_clips(spec: str, split: str, in_chans: int) -> ClipSet:
    """The frames of the clips of `split`.

    Args:
        spec: "clips:FOLDER", which holds train/ and val/ (or validation/ or test/) with a folder of clips a class, or
            "ucf101:FOLDER" with the data set as its authors give it: UCF-101/ and ucfTrainTestlist/. "?frames=8"
            after it says how many frames stand for a clip; "?fold=1" which of UCF101's three splits.

    Raises ValueError when PyAV or a folder, a list or a clip of it is missing, or what follows the "?" is wrong.
    """
    kind, folder, query = _SPEC.fullmatch(spec).groups()  # type: ignore[union-attr]
    if importlib.util.find_spec("av") is None:
        raise ValueError(f'--data {spec} needs PyAV: pip install "slicevit[video]"')
    given = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := [key for key in given if key not in _KEYS[kind]]:
        raise ValueError(f"--data {spec}: {unknown[0]} is none of {', '.join(_KEYS[kind])}, which may follow the ?")
    frames = _whole(spec, "frames", given.get("frames", str(FRAMES)))
    where = Path(folder).expanduser()
    if not where.is_dir():
        raise ValueError(f"--data {spec}: there is no folder {where}")
    if kind == "clips":
        return ClipSet(open_labelled(spec, split, in_chans, where, ENDINGS), frames)
    fold = _whole(spec, "fold", given.get("fold", "1"))
    return ClipSet(_of_ucf101(spec, split, in_chans, where, fold), frames)


def _whole(spec: str, key: str, text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise ValueError(f"--data {spec}: {key}={text} is no whole number above 0")
    return int(text)


def _of_ucf101(spec: str, split: str, in_chans: int, folder: Path, fold: int) -> FolderSet:
    """The clips that ucfTrainTestlist/trainlist0F.txt or testlist0F.txt names."""
    listed = folder / "ucfTrainTestlist"
    try:
        numbered = (line.split() for line in (listed / "classInd.txt").read_text().splitlines() if line.strip())
        classes = [name for _, name in sorted((int(number), name) for number, name in numbered)]
        lines = (listed / f"{'train' if split == 'train' else 'test'}list{fold:02d}.txt").read_text().splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {spec}: {listed} does not hold UCF101's lists ({error})") from None
    numbers = {name: number for number, name in enumerate(classes)}
    files = []
    for path in (line.split()[0] for line in lines if line.strip()):
        name, clip = path.partition("/")[0], folder / "UCF-101" / path
        if name not in numbers or not clip.exists():
            raise ValueError(f"--data {spec}: {listed} names {path}, and {clip} is not there")
        files.append((str(clip), numbers[name]))
    return FolderSet(spec, split, in_chans, files, classes)


def _decoded(path: str, frames: int, mode: str) -> list[Image.Image]:
    """Those frames of a clip. Raises ValueError where it has none, and what PyAV raises."""
    import av

    with av.open(path) as container:
        if not container.streams.video:
            raise ValueError("there is no video in it")
        total = sum(packet.size > 0 for packet in container.demux(video=0))
    wanted = [(2 * k + 1) * total // (2 * frames) for k in range(frames)]
    found: dict[int, Image.Image] = {}
    last = -1
    with av.open(path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted or number == total - 1:
                found[number] = frame.to_image().convert(mode)
                last = number
    if last < 0:
        raise ValueError("it has no frames")
    return [found[number] if number in found else found[last] for number in wanted]
