"""What a server is started with, whether by `slicevit serve` or by Ray Serve."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from slicevit.serving.settings import Settings
from slicevit.widths import parse_fraction

if TYPE_CHECKING:
    from slicevit.runtime.engine import Engine
    from slicevit.runtime.profile import Profile

_NEEDS = ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "fastapi_offline")


@dataclass
class Arguments:
    """The flags that every server has."""

    run: str
    """A run's folder, any folder that slicevit saved, or a Hub repository."""
    slo_ms: float = 100.0
    """Milliseconds within which a request is to be answered that brings no deadline of its own."""
    min_top1: float | None = None
    """The lowest top-1 accuracy that the policy may choose, as a share: 0.8 is 80 per cent. Of a segmenter
    mIoU."""
    policy: Literal["deadline-slack", "fixed", "budget"] = "deadline-slack"
    """deadline-slack: the most accurate width that keeps all deadlines. fixed: always --width. budget: the most
    accurate width whose call keeps --budget-ms."""
    width: str | None = None
    """The width of --policy fixed, such as 1/2."""
    budget_ms: float | None = None
    """Milliseconds of a call, for --policy budget."""
    headroom: float = 0.5
    """The share of its time that --policy deadline-slack keeps free for a burst: higher is narrower, and sheds less."""
    engine: Literal["torch", "torch-compile", "onnxruntime", "openvino"] = "torch"
    """What runs the widths."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic."""
    threads: int = 0
    """CPU threads of a call; 0 is the engine's own choice."""
    memory_limit: int | None = None
    """For onnxruntime and openvino, the most bytes that the weights of the ready widths may take together."""
    max_queue: int = 256
    """Requests that are held at once; more are refused with 429."""
    max_bytes: int = 10 * 2**20
    """Bytes of an image file."""
    max_pixels: int = 50_000_000
    """Pixels of an image."""
    decoders: int = 2
    """Threads that decode images."""
    body_seconds: float = 30.0
    """Seconds within which the body of a request must have come."""
    quantile: float = 0.95
    """The share of recent calls that the running estimate of service time is to cover."""

    def settings(self) -> Settings:
        """The limits and the policy. Raises ValueError naming the flag."""
        if self.min_top1 is not None and not 0 <= self.min_top1 <= 1:
            raise ValueError(f"--min-top1 {self.min_top1:g} is no share from 0 to 1: for 80 per cent write 0.8")
        return Settings(
            slo_ms=self.slo_ms,
            min_top1=None if self.min_top1 is None else round(100 * self.min_top1, 9),
            policy=self.policy,
            width=None if self.width is None else parse_fraction(self.width),
            budget_ms=self.budget_ms,
            headroom=self.headroom,
            max_queue=self.max_queue,
            max_bytes=self.max_bytes,
            max_pixels=self.max_pixels,
            decoders=self.decoders,
            body_seconds=self.body_seconds,
            quantile=self.quantile,
        )

    def open(self) -> Engine:
        """The engine; the caller closes it. Raises ValueError naming the flag."""
        from slicevit.runtime.engine import Engine

        return Engine(self.run, self.engine, self.device, self.precision, self.threads, self.memory_limit)

    def table(self, engine: Engine, say: Callable[[str], None]) -> Profile:
        """The measured table of this engine on this machine; measured now where there is none.

        `say` is told of what the operator should know. Raises ValueError when the run has no accuracies.
        """
        from slicevit.runtime.measured import measure_run, profile_of, read_table, write_table

        where = (self.run, engine.name, engine.device, engine.precision)
        try:
            table = read_table(*where)
        except ValueError as missing:
            say(f"{missing}; serve measures it now, about a second for each width and batch size")
            table = measure_run(*where[:3], precision=engine.precision, threads=self.threads)
            try:
                write_table(self.run, table)
            except OSError as error:
                say(f"the profile cannot be kept ({error}): the next start measures it again")
        threads = table["threads"]
        if threads != self.threads:
            say(
                f"the profile of {self.run} was measured with --threads {threads}: serve with as many, or measure again"
            )
        return profile_of(table)


def check_installed() -> None:
    """Raises ValueError naming the first package of extra [serve] that is not there."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'slicevit serve needs {missing[0]}, not installed here: pip install "slicevit[serve]"')


def quieten() -> None:
    """What a client sent wrong is its own affair: libraries that read it neither log nor warn in this process."""
    from PIL import Image

    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are refused
