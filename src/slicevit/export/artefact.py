"""What the formats share: how a width becomes files.

Legend of axis names: B images of a batch, N all images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from slicevit.export.check import Predictor

MANIFEST = "manifest.json"
INPUT, OUTPUT = "images", "logits"  # the names in the files
CASTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INT8 = "int8"


@dataclass(frozen=True)
class Quantizer:
    """A format's own tool for int8.

    Attributes:
        write: writes the program into a folder with weights and activations in 8 bits, whose ranges are those of the
            images (N, C, H, W).
        packages: what it needs beyond the format's own, brought by the extra `extra`.
    """

    write: Callable[[ExportedProgram, Tensor, Path], None]
    packages: tuple[str, ...] = ()
    extra: str = "export"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a width can become.

    Attributes:
        files: every name that may be written.
        packages: what it needs beside torch, brought by the extra `extra`.
        load: what a folder's files compute, run by the format's own runtime; float32 in and out.
        casts: the keys of `CASTS` that it can be written in.
        quantizer: what makes it int8.
        largest_batch: the most images at once; None is any number.
        dense: whether it holds models that answer for every pixel too.
    """

    files: tuple[str, ...]
    load: Callable[[Path], Predictor]
    packages: tuple[str, ...] = ()
    extra: str = "export"
    casts: tuple[str, ...] = tuple(CASTS)
    quantizer: Quantizer | None = None
    largest_batch: int | None = None
    dense: bool = True

    @property
    def reduced(self) -> tuple[str, ...]:
        """The precisions beside fp32."""
        return (*((INT8,) if self.quantizer else ()), *(name for name in self.casts if name != "fp32"))

    def require(self, flag: str) -> None:
        """Raises ValueError, naming what to install for `flag`, when a package is missing."""
        require(self.packages, self.extra, flag)


@dataclass(frozen=True, kw_only=True)
class Format(Target):
    """A target that a traced model is written to, into a folder."""

    write: Callable[[ExportedProgram, Path], None]


def require(packages: Iterable[str], extra: str, flag: str) -> None:
    """Raises ValueError, naming what to install for `flag`, when a package is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise ValueError(f'{flag} needs {names}, not installed here: pip install "slicevit[{extra}]"')


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Without the warnings, log lines and progress bars of other people's tools; their errors pass."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
