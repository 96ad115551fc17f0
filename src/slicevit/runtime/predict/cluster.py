"""The way to a Ray cluster, and how many workers it has room for."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from slicevit.reasons import one_line
from slicevit.runtime.predict.settings import Job

_CONNECT_SECONDS = 5.0


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module ray, connected; a connection that this process has already is taken, and left open.

    Args:
        address: host:port or ray://host:port of a cluster; local for a new one on this machine; auto for the one that
            RAY_ADDRESS names or that runs on this machine, else a new one. A new one is gone in the end.

    Raises ValueError when ray is not installed or no cluster answers.
    """
    if importlib.util.find_spec("ray") is None:
        raise ValueError('--ray needs ray, not installed here: pip install "slicevit[ray]"')
    import ray

    if ray.is_initialized():
        yield ray
        return
    named = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    _look(named)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if "://" not in named:
        options["include_dashboard"] = False
    try:
        with _own_handler():
            ray.init(None if named == "auto" else named, **options)
    except Exception as error:
        ray.shutdown()
        raise ValueError(f"{_flag(address, named)}: no Ray cluster can be joined there ({one_line(error)})") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _look(address: str) -> None:
    """Raises ValueError unless something listens at `address`: Ray itself would try for a minute."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--ray {address}: give HOST:PORT of a cluster, ray://HOST:PORT, auto or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"--ray {address}: no Ray cluster answers there ({reason}); start one with ray start --head, or leave out "
            "the address to use this machine alone"
        ) from None


@contextmanager
def _own_handler() -> Iterator[None]:
    """ray.init puts a handler of SIGTERM in the place of ours."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _flag(address: str, named: str) -> str:
    return f"--ray {address}" if address == named else f"--ray with RAY_ADDRESS={named}"


def needs(ray: Any, job: Job) -> dict[str, float]:
    """What a worker reserves, as options of an actor: a GPU where the engine can use one and the cluster has some."""
    on_gpu = job.device == "cuda" or (job.device == "auto" and job.engine.startswith("torch"))
    has_gpu = job.device == "cuda" or ray.cluster_resources().get("GPU", 0) >= 1
    return {"num_cpus": job.num_cpus, "num_gpus": int(on_gpu and has_gpu)}


def room(ray: Any, reserved: dict[str, float]) -> int:
    """Workers for which the cluster has room now; at least one, which may have to wait."""
    free = ray.available_resources()
    fit = free.get("CPU", 0) // reserved["num_cpus"]
    if reserved["num_gpus"]:
        fit = min(fit, free.get("GPU", 0) // reserved["num_gpus"])
    return max(1, int(fit))


def no_room(ray: Any, reserved: dict[str, float]) -> str:
    """Why no worker may be ready yet, in a sentence."""
    whole, free = (
        f"{resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU"
        for resources in (ray.cluster_resources(), ray.available_resources())
    )
    return (
        f"no Ray worker is ready yet; each reserves {reserved['num_cpus']:g} CPU, {reserved['num_gpus']:g} GPU; "
        f"the cluster has {whole}; free now: {free}"
    )
