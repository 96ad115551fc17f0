"""From the bytes of a request to what is queued.

Times are milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from slicevit.runtime.profile import Profile, Row, names
from slicevit.serving.forms import read_form, read_json
from slicevit.serving.images import read_image
from slicevit.serving.refusal import Refusal, quoted
from slicevit.serving.schemas import Options, SloChange
from slicevit.serving.settings import MAX_DEADLINE_MS, Settings
from slicevit.serving.tasks import Decoded, Task
from slicevit.widths import parse_fraction

PATIENCE = 10  # calls of its width that a request has time for which names a width and no deadline; at least the target


@dataclass(frozen=True)
class Prepared:
    """A request that can be queued.

    Attributes:
        image: what the engine takes.
        deadline: when its answer is due, on the server's clock.
        width: that it names, or None.
        options: what came with it.
        decoded: when the image was ready.
    """

    image: Decoded
    deadline: float
    width: Fraction | None
    options: Options
    decoded: float


class Intake:
    """Reads requests, in any thread, and refuses what cannot be one.

    Args:
        task: whose images they are.
        table: the widths that a request may name.
        legal: those that the policy may choose.
        settings: the limits.
        clock: of the deadlines.
    """

    def __init__(self, task: Task, table: Profile, legal: Profile, settings: Settings, clock: Callable[[], float]):
        self._task, self._table, self._settings, self._clock = task, table, settings, clock
        self._quickest = min(map(_least, legal.rows))
        span = f"give milliseconds from {self._quickest:g}, which the fastest width takes here, to {MAX_DEADLINE_MS:g}"
        self._hints = {
            "deadline_ms": span,
            "slo_ms": span,
            "width": f'the widths are {names(table.rows)}; write one as text, such as "{table.rows[-1].width}"',
            **task.hints,
        }

    def checked_slo(self, slo_ms: float, name: str) -> float:
        """The target. Raises ValueError when no legal width can keep it."""
        if slo_ms < self._quickest:
            raise ValueError(f"{name} {slo_ms:g} cannot be kept: {self._hints['slo_ms']}")
        return slo_ms

    def new_slo(self, body: bytes) -> float:
        """The target in a JSON body. Raises Refusal (400 or 422)."""
        try:
            return self.checked_slo(read_json(SloChange, body, self._hints, "slo_ms").slo_ms, "slo_ms")
        except ValueError as error:
            raise Refusal(422, str(error)) from None

    def prepare(
        self,
        body: bytes,
        content_type: str,
        arrival: float,
        slo_ms: float,
        admit: Callable[[float, Fraction | None], None],
    ) -> Prepared:
        """Read, check and decode.

        Args:
            body, content_type: of the request.
            arrival: when it came.
            slo_ms: the target of requests without a deadline of their own.
            admit: told (deadline, width) before the image is decoded; may raise.

        Raises:
            Refusal: 400, 413, 415 or 422; and what `admit` raises.
        """
        asked = read_form(body, content_type, self._settings.max_bytes, self._hints, self._task.question)
        row = None if asked.options.width is None else self._row(asked.options.width)
        due = self._due(asked.options.deadline_ms, row, slo_ms)
        if wrong := self._task.wrong(asked.options):
            raise Refusal(422, wrong)
        width = None if row is None else row.width
        admit(arrival + due, width)
        image = read_image(asked.image, self._task.decoded, self._settings.max_pixels)
        return Prepared(image, arrival + due, width, asked.options, self._clock())

    def _row(self, width: str) -> Row:
        try:
            return self._table.row(parse_fraction(width))
        except ValueError:
            raise Refusal(422, f"width: {quoted(width)} is none of them: {self._hints['width']}") from None

    def _due(self, deadline_ms: float | None, row: Row | None, slo_ms: float) -> float:
        if deadline_ms is None:
            return slo_ms if row is None else max(slo_ms, PATIENCE * row.latency(1))
        if row is not None and deadline_ms < _least(row):
            raise Refusal(422, f"deadline_ms: width {row.width} takes {_least(row):g} here; give at least that")
        if row is None and deadline_ms < self._quickest:
            raise Refusal(422, f"deadline_ms: {self._hints['deadline_ms']}")
        return deadline_ms


def _least(row: Row) -> float:
    """Its latency, rounded up, so that the number in a message is legal."""
    return math.ceil(row.latency(1) * 100) / 100
