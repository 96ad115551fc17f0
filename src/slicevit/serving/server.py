"""`slicevit serve`: the app on uvicorn, on one socket, until a signal."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from slicevit.serving.connections import LimitedConnection
from slicevit.serving.service import Service

DRAIN_SECONDS = 30.0  # after which a server that was told to end does not wait any longer
_CLOSE_SECONDS = 5  # for connections, after the last answer
_IDLE_SECONDS = 75  # of a connection; longer than the 60 that proxies keep one, or they would send on a closed one

logger = logging.getLogger("slicevit.serving")


def listener(host: str, port: int) -> socket.socket:
    """A socket bound to the address; port 0 takes a free one. Raises ValueError naming the flag."""
    if not 0 <= port <= 65_535:
        raise ValueError(f"--port {port}: give a number from 1 to 65535, or 0 for a free one")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: there is no such address ({error})") from None
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(
            f"--host {host} --port {port} cannot be used ({error.strerror}): give another --port, or 0 for a free one"
        ) from None
    return bound


def url(bound: socket.socket) -> str:
    """The address of a socket, for a browser."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"


def configuration(app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves the app."""
    return uvicorn.Config(
        app,
        http=LimitedConnection,
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )


def serve(app: FastAPI, bound: socket.socket, greeting: str) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer whoever was admitted.

    `greeting` is printed once requests are taken. A second Ctrl-C ends the process at once, with status 130.
    """
    _Server(configuration(app), app.state.service, greeting).run([bound])


class _Server(uvicorn.Server):
    """uvicorn, whose first signal drains: it ends when nobody is left to be answered."""

    def __init__(self, config: uvicorn.Config, service: Service, greeting: str):
        super().__init__(config)
        self._service, self._greeting = service, greeting
        self._told: float | None = None  # when the signal came

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started:
            self.should_exit = True
        elif self._told is None:
            self._told = time.monotonic()
            self._service.draining = True
        elif sig == signal.SIGINT:
            os._exit(128 + sig)  # nothing is left to be saved, and the engine may be stuck

    async def on_tick(self, counter: int) -> bool:
        if self._told is not None and not self.should_exit:
            late = time.monotonic() > self._told + DRAIN_SECONDS
            if late:
                logger.warning("%d requests are not answered after %g s", self._service.held, DRAIN_SECONDS)
            self.should_exit = late or not self._service.held
        return await super().on_tick(counter)
