"""The HTTP app, for any ASGI server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slicevit.runtime.profile import Profile
from slicevit.serving.forms import media_type
from slicevit.serving.masks import MASK_RESPONSE, as_png, prefers_png
from slicevit.serving.openapi import body, problems
from slicevit.serving.refusal import EngineFailed, Refusal
from slicevit.serving.runs import Runs
from slicevit.serving.schemas import Model, Segmented, SloChange, State, Status
from slicevit.serving.serves import Serves
from slicevit.serving.service import Service
from slicevit.serving.settings import Settings
from slicevit.serving.tasks import TASKS, Task
from slicevit.version import __version__

PAGE = Path(__file__).parent / "page.html"  # what it loads lies in page/
_FORM_BYTES = 2**16  # what a form or JSON may hold besides the image


def create_app(engine: Runs, table: Profile, settings: Settings) -> FastAPI:
    """An app that serves `engine`; its lifespan readies the widths and at the end answers whoever waits.

    Args:
        engine: a `slicevit.runtime.engine.Engine`; the caller closes it.
        table: the measured table of that engine on this machine (`slicevit.runtime.measured.read_profile`).
        settings: limits, target and policy.

    Returns:
        The app; `app.state.service` is its `Service`.

    Raises:
        ValueError: as `Service`.
    """
    service = Service(engine, table, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.start)
        yield
        await asyncio.to_thread(service.stop)

    return app_of(service, lifespan)


def app_of(service: Serves, lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None) -> FastAPI:
    """The routes and the page over `service`, which becomes `app.state.service`."""
    app = FastAPIOffline(title="slicevit serve", version=__version__, lifespan=lifespan, redoc_url=None)
    app.state.service = service
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(EngineFailed, _failed)
    app.add_exception_handler(Exception, _failed)
    _add_routes(app, service)
    paths = {getattr(route, "path", "") for route in app.routes}
    app.add_middleware(_Counted, count=service.requested, paths=paths)
    return app


def _add_routes(app: FastAPI, service: Serves) -> None:
    settings, described = service.settings, service.model()
    by_name: dict[str, type[Task]] = {task or "classification": kind for task, kind in TASKS.items()}
    task = by_name.pop(described.task)
    images = body(
        {"multipart/form-data": task.question.in_form, "application/json": task.question.in_json},
        width={"enum": [row.width for row in described.widths]},
        top_k={"maximum": described.num_classes},
    )

    @app.post(
        task.path,
        response_model=task.response,
        responses=(MASK_RESPONSE if task.response is Segmented else {})
        | problems(400, 408, 413, 415, 422, 429, 500, 503),
        openapi_extra=images,
        summary=task.summary,
    )
    async def respond(request: Request) -> Any:
        content_type = request.headers.get("content-type", "")
        in_base64 = media_type(content_type) == "application/json"
        limit = settings.max_bytes * 4 // 3 if in_base64 else settings.max_bytes
        with service.admitted():
            sent = await _read(request, limit + _FORM_BYTES, settings.body_seconds)
            response = await service.respond(sent, content_type)
        if isinstance(response, Segmented) and prefers_png(request.headers.get("accept", "")):
            return as_png(response)
        return response

    async def elsewhere(request: Request) -> Response:
        raise Refusal(404, f"a model for {described.task} is served here: post the image to {task.path}")

    for other in by_name.values():
        app.add_api_route(other.path, elsewhere, methods=["POST"], include_in_schema=False)

    @app.get("/v1/model", summary="What is served")
    async def model() -> Model:
        return service.model()

    @app.get("/v1/status", summary="The last ten seconds")
    async def status() -> Status:
        return await service.status()

    @app.put(
        "/v1/slo",
        responses=problems(400, 408, 413, 415, 422),
        openapi_extra=body({"application/json": SloChange}),
        summary="Another target",
    )
    async def slo(request: Request) -> Status:
        if media_type(request.headers.get("content-type", "")) != "application/json":
            raise Refusal(415, "send application/json")
        return await service.change_slo(await _read(request, _FORM_BYTES, settings.body_seconds))

    @app.get("/healthz", response_model=State, responses=problems(503), summary="Whether the server lives")
    async def healthz() -> Response:
        return _state(await service.healthy(), "ok", "the thread that computes has ended or is stuck")

    @app.get("/readyz", response_model=State, responses=problems(503), summary="Whether requests are taken")
    async def readyz() -> Response:
        return _state(await service.ready(), "ready", "the server takes no requests: it is starting or about to end")

    @app.get("/metrics", summary="For Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(await service.metrics_text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE)

    app.mount("/page", StaticFiles(directory=PAGE.with_suffix("")))


async def _read(request: Request, limit: int, seconds: float) -> bytes:
    """The body. Raises Refusal: 413 as soon as it is over `limit` bytes, 408 when it takes longer than `seconds`."""
    too_large = Refusal(413, f"the body may have up to {limit:,} bytes")
    declared = request.headers.get("content-length", "")
    if re.fullmatch("[0-9]+", declared) and (len(declared) > 18 or int(declared) > limit):
        raise too_large

    async def whole() -> bytes:
        sent = bytearray()
        async for chunk in request.stream():
            sent += chunk
            if len(sent) > limit:
                raise too_large
        return bytes(sent)

    try:
        return await asyncio.wait_for(whole(), seconds)
    except asyncio.TimeoutError:
        raise Refusal(408, f"the body did not come within {seconds:g} s") from None
    except ClientDisconnect:
        raise Refusal(400, "the client left before its body was whole") from None


def _state(good: bool, status: str, otherwise: str) -> Response:
    return JSONResponse({"status": status}) if good else _problem(503, otherwise)


def _problem(status: int, detail: str, retry_after: int | None = None) -> Response:
    headers = None if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse({"detail": detail}, status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _problem(error.status, error.detail, error.retry_after)


async def _failed(request: Request, error: Exception) -> Response:
    return _problem(500, "the server failed on this request; its log says why")


class _Counted:
    """Counts every request by its path, where there is such a route, and the status of its answer."""

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None], paths: Collection[str]):
        self._app, self._count, self._paths = app, count, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._count(path, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            if not begun:
                self._count(path, 500)  # the answer comes from further out
            raise
