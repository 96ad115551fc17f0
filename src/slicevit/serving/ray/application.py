"""The Ray Serve application: an ingress that speaks HTTP, and replicas that compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from slicevit.checkpoint import SEGMENTATION, is_hub_name, read_config, task_of
from slicevit.dense.saved import read_segmenter
from slicevit.serving.app import app_of
from slicevit.serving.arguments import check_installed
from slicevit.serving.ray.fleet import Fleet, ReplicaLost
from slicevit.serving.ray.options import RayArguments, read_arguments
from slicevit.serving.ray.replica import Outcome, Replica
from slicevit.serving.server import DRAIN_SECONDS

_ANSWER_SECONDS = 5.0  # within which every replica says how it is
_STARTS = 3  # after so many attempts a replica that cannot start fails the deployment
_LOST = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError)


class Handles:
    """`fleet.Replicas` over a Ray Serve handle."""

    def __init__(self, handle: DeploymentHandle[Replica]):
        self._handle = handle

    async def respond(self, body: bytes, content_type: str, slo_ms: float) -> Outcome:
        try:
            outcome: Outcome = await self._handle.respond.remote(body, content_type, slo_ms)
        except _LOST as error:
            raise ReplicaLost(str(error)) from error
        return outcome

    async def everywhere(self, method: str, *args: Any) -> list[Any]:
        try:
            asked = self._handle.broadcast(method, *args)
            said = await asked.results_async(timeout_s=_ANSWER_SECONDS, return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        return [each for each in said if not isinstance(each, _LOST)]


@serve.ingress()
class Ingress:
    """The HTTP app of `slicevit serve`, whose requests the replicas answer; it decodes no image itself."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, handle: DeploymentHandle[Replica], arguments: RayArguments
    ):
        places = arguments.max_queue * arguments.max_replicas
        self._fleet = Fleet(Handles(handle), await handle.model.remote(), arguments.settings(), places)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return app_of(self._fleet)


def app(args: dict[str, Any]) -> serve.Application:
    """Ray Serve's application builder.

    Args:
        args: see `options.RayArguments`; `serve run slicevit.serving.ray:app run=FOLDER slo-ms=100`.

    Returns:
        The deployments Ingress and Replica.

    Raises:
        ValueError: one sentence that names the flag, or says that there is no such run here. What only a replica can
            see fails the deployment with such a sentence.
    """
    check_installed()
    arguments = read_arguments(args)
    arguments.settings()  # refuses here what would else fail on the replicas
    if Path(arguments.run).is_dir() or not is_hub_name(arguments.run):
        if task_of(arguments.run) == SEGMENTATION:
            read_segmenter(Path(arguments.run))
        else:
            read_config(arguments.run)
    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": DRAIN_SECONDS,
        "max_constructor_retry_count": _STARTS,
        "logging_config": LoggingConfig(enable_access_log=False),
    }
    replica = serve.deployment(
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.target_ongoing,
        },
        max_ongoing_requests=2 * arguments.max_queue,  # the replica refuses by itself what is over max_queue
        **common,
    )(Replica)
    ingress = serve.deployment(
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * arguments.max_queue * arguments.max_replicas,
        **common,
    )(Ingress)
    return ingress.bind(replica.bind(arguments), arguments)
