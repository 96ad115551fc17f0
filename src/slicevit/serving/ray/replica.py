"""A replica: one engine, which chooses its widths by itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ray import serve

from slicevit.serving.arguments import Arguments, quieten
from slicevit.serving.refusal import EngineFailed, Refusal
from slicevit.serving.schemas import Model
from slicevit.serving.service import Service
from slicevit.serving.tasks import Response

logger = logging.getLogger("slicevit.serving")


@dataclass(frozen=True)
class Answered:
    """An image's answer.

    Attributes:
        response: as it goes over the wire.
        due_ms: within how many milliseconds it was due, from when the replica had the request.
    """

    response: Response
    due_ms: float


@dataclass(frozen=True)
class Report:
    """How a replica is.

    Attributes:
        ready: whether it takes requests.
        queue: images that wait to be computed.
        metrics: in Prometheus's text format.
    """

    ready: bool
    queue: int
    metrics: bytes


Outcome = Answered | Refusal | EngineFailed


class Replica:
    """Holds every width of the run and answers requests as `slicevit serve` does, without HTTP.

    A refusal is returned and not raised, because Ray would log each with its traceback. All methods run on one event
    loop.

    Args:
        arguments: what to serve, and how.

    Raises:
        ValueError: as `slicevit serve` refuses to begin; the message names the flag.
    """

    def __init__(self, arguments: Arguments):
        quieten()
        self._engine = arguments.open()
        table = arguments.table(self._engine, logger.warning)
        self._service = Service(self._engine, table, arguments.settings())
        self._service.start()

    async def model(self) -> Model:
        """What is served."""
        return self._service.model()

    async def respond(self, body: bytes, content_type: str, slo_ms: float) -> Outcome:
        """The answer to a request, under the target that holds for all replicas."""
        self._service.slo_ms = slo_ms
        try:
            with self._service.admitted():
                return Answered(*await self._service.answer(body, content_type))
        except (Refusal, EngineFailed) as failure:
            return failure

    async def change_slo(self, body: bytes) -> float | Refusal:
        """Takes the target in a JSON body, milliseconds, and gives it."""
        try:
            return (await self._service.change_slo(body)).slo_ms
        except Refusal as refusal:
            return refusal

    async def report(self) -> tuple[str, Report]:
        """Its name among the replicas, and how it is."""
        name = serve.get_replica_context().replica_id.unique_id
        status = await self._service.status()
        return name, Report(await self._service.ready(), status.queue, await self._service.metrics_text())

    async def check_health(self) -> None:
        """Ray asks every ten seconds, and replaces a replica that raises."""
        if not await self._service.healthy():
            raise RuntimeError("the thread that computes has ended or is stuck")

    async def __del__(self) -> None:
        """Ray calls it when nobody waits for an answer any more."""
        if hasattr(self, "_service"):
            self._service.stop()
            self._engine.close()
