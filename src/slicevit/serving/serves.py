"""What the app needs of whatever answers: `service.Service` in this process, or replicas in others."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from slicevit.serving.schemas import Model, Status
from slicevit.serving.settings import Settings
from slicevit.serving.tasks import Response


class Serves(Protocol):
    """Answers requests; the methods raise `Refusal` and `EngineFailed` of `refusal`."""

    @property
    def settings(self) -> Settings: ...

    def requested(self, path: str, status: int) -> None:
        """An HTTP request got its answer."""

    def admitted(self) -> AbstractContextManager[None]:
        """Holds a place from the first byte of a request to its answer."""

    async def respond(self, body: bytes, content_type: str) -> Response:
        """The answer to a request whose body came just now."""

    def model(self) -> Model:
        """What is served."""

    async def status(self) -> Status:
        """The last ten seconds."""

    async def change_slo(self, body: bytes) -> Status:
        """Another target, from JSON, for the requests that come from now on."""

    async def healthy(self) -> bool:
        """Whether it lives."""

    async def ready(self) -> bool:
        """Whether requests are taken."""

    async def metrics_text(self) -> bytes:
        """For Prometheus."""
