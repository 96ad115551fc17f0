"""Many replicas that answer as one. Times are milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from slicevit.runtime.profile import Profile
from slicevit.serving.batcher import milliseconds
from slicevit.serving.live import Live
from slicevit.serving.ray.merge import merged
from slicevit.serving.ray.replica import Answered, Outcome, Report
from slicevit.serving.refusal import EngineFailed, Refusal
from slicevit.serving.schemas import Model, Status
from slicevit.serving.settings import MAX_DEADLINE_MS, Settings
from slicevit.serving.tasks import Response

MOST_LOST = 3  # replicas that may end while they hold the same request: it may be what ends them
_GIVE_UP_SECONDS = 1.5 * MAX_DEADLINE_MS / 1000
_PAUSE_SECONDS = 0.1  # before a request is sent again, longer each time
_LONGEST_PAUSE_SECONDS = 1.0
_FRESH_MS = 500.0  # for so long a report is not asked for again


class ReplicaLost(Exception):
    """A replica ended before its answer came."""


class Replicas(Protocol):
    """All replicas of `replica.Replica`."""

    async def respond(self, body: bytes, content_type: str, slo_ms: float) -> Outcome:
        """One of them answers. Raises ReplicaLost when it ended meanwhile."""

    async def everywhere(self, method: str, *args: Any) -> list[Any]:
        """What each that lives returns. Raises TimeoutError when one does not answer."""


class Fleet:
    """`slicevit.serving.serves.Serves` over replicas: admits, sends each request to one of them, counts.

    A request whose replica ended before it answered is sent to another one: an answer changes nothing, so it may
    well be done twice. From then on it is not refused for lack of time either; its answer is late instead. What ends
    `MOST_LOST` replicas is given up.

    Args:
        replicas: who answers.
        model: what they serve.
        settings: the limits, as every replica has them.
        places: requests that are held at once; more are refused with 429.

    Attributes:
        slo_ms: the target now; it goes with every request, so a replica that starts later has it too.
        held: requests admitted and not yet answered.
    """

    def __init__(self, replicas: Replicas, model: Model, settings: Settings, places: int):
        self._replicas, self._model, self._places = replicas, model, places
        self.settings, self.slo_ms, self.held = settings, settings.slo_ms, 0
        rows = [row.model_dump(include={"width", "top1", "latency_ms"}) for row in model.widths]
        self._started = milliseconds()
        self._live = Live(Profile.parse(rows), self._started)
        self._reports: dict[str, Report] = {}
        self._reported = float("-inf")
        self._registry = own = CollectorRegistry()
        self._requests = Counter(
            "slicevit_requests", "HTTP requests by path and status", ["path", "status"], registry=own
        )
        self._lost = Counter("slicevit_lost", "Requests whose replica ended before it answered", registry=own)
        held = Gauge("slicevit_ingress_held", "Requests admitted and not yet answered", registry=own)
        held.set_function(lambda: self.held)

    def requested(self, path: str, status: int) -> None:
        """An HTTP request got its answer."""
        self._requests.labels(path, str(status)).inc()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold a place. Raises Refusal: 429 when all are taken."""
        if self.held >= self._places:
            self._live.missed(milliseconds(), shed=True)
            raise Refusal(429, f"the server is overloaded, it holds {self.held} requests: try again in 1 s", 1)
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    async def respond(self, body: bytes, content_type: str) -> Response:
        """The answer of a replica to a request whose body came just now.

        Raises:
            Refusal: as a replica refuses it; 503 when none answers.
            EngineFailed: the engine raised, or `MOST_LOST` replicas ended on it.
        """
        arrival = milliseconds()
        try:
            answered = await asyncio.wait_for(self._answer(body, content_type), _GIVE_UP_SECONDS)
        except asyncio.TimeoutError:
            self._live.missed(milliseconds(), shed=False)
            raise Refusal(503, f"no replica has answered within {_GIVE_UP_SECONDS:g} s", 1) from None
        except Refusal as refusal:
            if refusal.status in (429, 503):
                self._live.missed(milliseconds(), shed=refusal.status == 429)
            raise
        except EngineFailed:
            self._live.missed(milliseconds(), shed=False)
            raise
        now = milliseconds()
        width = Fraction(answered.response.width)
        self._live.answered(now, now - arrival, now - arrival <= answered.due_ms, width)
        return answered.response

    async def _answer(self, body: bytes, content_type: str) -> Answered:
        lost, pause = 0, 0.0
        while True:
            await asyncio.sleep(pause)
            pause = min(pause + _PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
            try:
                outcome = await self._replicas.respond(body, content_type, self.slo_ms)
            except ReplicaLost as error:
                self._lost.inc()
                lost += 1
                if lost == MOST_LOST:
                    raise EngineFailed(f"{lost} replicas have ended while they held it: {error}") from None
                continue
            if isinstance(outcome, Answered):
                return outcome
            about_to_end = isinstance(outcome, Refusal) and outcome.status == 503
            no_time = isinstance(outcome, Refusal) and outcome.status == 429
            if not (about_to_end or (lost and no_time)):
                raise outcome

    def model(self) -> Model:
        """What is served; accuracies and latencies are those of the replica that started first."""
        return self._model

    async def status(self) -> Status:
        """The last ten seconds, of all replicas together, as they look from here: the way to them counts."""
        now = milliseconds()
        return Status(
            slo_ms=self.slo_ms,
            min_top1=self.settings.min_top1,
            queue=sum(report.queue for report in (await self._asked()).values()),
            uptime_s=(now - self._started) / 1000,
            **asdict(self._live.figures(now)),
        )

    async def change_slo(self, body: bytes) -> Status:
        """Another target for all replicas, from JSON. Raises Refusal: 400, 422, or 503 when not all of them answer."""
        try:
            said = await self._replicas.everywhere("change_slo", body)
        except TimeoutError:
            said = []
        if not said:
            raise Refusal(503, "not every replica answers: the target is what it was; try again in 5 s", 5)
        for each in said:
            if isinstance(each, Refusal):
                raise each
        self.slo_ms = said[0]
        return await self.status()

    async def healthy(self) -> bool:
        """Whether requests can come in; Ray replaces replicas that are not well by itself."""
        return True

    async def ready(self) -> bool:
        """Whether a replica takes requests."""
        return any(report.ready for report in (await self._asked()).values())

    async def metrics_text(self) -> bytes:
        """For Prometheus: what each replica counts, with its name as a label, and what is counted here."""
        texts = {name: report.metrics for name, report in (await self._asked()).items()}
        return merged({"ingress": generate_latest(self._registry), **texts})

    async def _asked(self) -> dict[str, Report]:
        """Name to report of every replica; the last ones as long as one of them does not answer."""
        now = milliseconds()
        if now - self._reported > _FRESH_MS:
            try:
                named: Sequence[tuple[str, Report]] = await self._replicas.everywhere("report")
                self._reports = dict(named)
            except TimeoutError:
                pass
            self._reported = now
        return self._reports
