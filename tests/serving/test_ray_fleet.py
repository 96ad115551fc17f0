"""Many replicas as one, without a cluster: retries, refusals, the target, reports, metrics, and the arguments."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.extra
for package in ("ray.serve", "fastapi", "prometheus_client", "python_multipart", "fastapi_offline"):
    pytest.importorskip(package, reason=f'needs {package}: pip install "slicevit[ray]"')

from mask_files import save_segmenter  # noqa: E402
from ray.serve import Application  # noqa: E402
from serving_fakes import TABLE, FakeEngine  # noqa: E402

from slicevit.serving.ray import app  # noqa: E402
from slicevit.serving.ray import fleet as fleets  # noqa: E402
from slicevit.serving.ray.fleet import MOST_LOST, Fleet, ReplicaLost  # noqa: E402
from slicevit.serving.ray.merge import merged  # noqa: E402
from slicevit.serving.ray.options import read_arguments  # noqa: E402
from slicevit.serving.ray.replica import Answered, Report  # noqa: E402
from slicevit.serving.refusal import EngineFailed, Refusal  # noqa: E402
from slicevit.serving.schemas import Classified, Label  # noqa: E402
from slicevit.serving.service import Service  # noqa: E402
from slicevit.serving.settings import Settings  # noqa: E402

SETTINGS = Settings(slo_ms=100.0)
ANSWER = Classified(
    labels=[Label(label="a", index=0, probability=1.0)],
    width="1/2",
    batch=1,
    decode_ms=1.0,
    queue_ms=1.0,
    compute_ms=1.0,
    reason="it is the one",
)
LATE = Refusal(429, "the server is overloaded, no answer in time: try again in 3 s", 3)
ENDING = Refusal(503, "the server takes no requests: it is starting or about to end", 1)
LOST = ReplicaLost("killed")


class FakeReplicas:
    """Says what it is told to, in turn; an exception that no replica returns is raised.

    Attributes:
        targets: the target of every request.
        everywhere_says: by method.
        asked: how often all were asked.
    """

    def __init__(self, *says: Any):
        self._says: Iterator[Any] = iter(says)
        self.targets: list[float] = []
        self.everywhere_says: dict[str, Any] = {"report": []}
        self.asked = 0

    async def respond(self, body: bytes, content_type: str, slo_ms: float) -> Any:
        self.targets.append(slo_ms)
        said = next(self._says)
        if isinstance(said, ReplicaLost):
            raise said
        return said

    async def everywhere(self, method: str, *args: Any) -> list[Any]:
        self.asked += 1
        said = self.everywhere_says[method]
        if isinstance(said, Exception):
            raise said
        return list(said)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "_PAUSE_SECONDS", 0.001)


def fleet_of(replicas: FakeReplicas, places: int = 4) -> Fleet:
    return Fleet(replicas, Service(FakeEngine(), TABLE, SETTINGS).model(), SETTINGS, places)


def classified(replicas: FakeReplicas) -> tuple[Any, Fleet]:
    """What one request got, an error too, and the fleet."""

    async def ask() -> tuple[Any, Fleet]:
        fleet = fleet_of(replicas)
        try:
            return await fleet.respond(b"", "image/png"), fleet
        except (Refusal, EngineFailed) as error:
            return error, fleet

    return asyncio.run(ask())


def lost(fleet: Fleet) -> float:
    (line,) = [
        line for line in asyncio.run(fleet.metrics_text()).decode().splitlines() if line.startswith("slicevit_lost_tot")
    ]
    return float(line.split()[-1])


@pytest.mark.parametrize(
    ("before", "losses"),
    [
        ([], 0),
        ([LOST], 1),
        ([LOST, LOST], 2),
        ([ENDING], 0),
        ([LOST, LATE, LATE, ENDING], 1),
        ([ENDING, LOST, LATE], 1),
    ],
)
def test_an_accepted_request_is_answered(before: list[Any], losses: int) -> None:
    replicas = FakeReplicas(*before, Answered(ANSWER, 20_000.0))
    answer, fleet = classified(replicas)
    assert answer == ANSWER
    assert len(replicas.targets) == len(before) + 1
    assert lost(fleet) == losses
    status = asyncio.run(fleet.status())
    assert (status.attainment, status.widths["1/2"], status.shed_per_s) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("refusal", [LATE, Refusal(422, "image: it is empty"), Refusal(413, "too large")])
def test_a_refusal_is_passed_on_at_once(refusal: Refusal) -> None:
    replicas = FakeReplicas(refusal)
    answer, fleet = classified(replicas)
    assert answer is refusal
    status = asyncio.run(fleet.status())
    assert (status.shed_per_s > 0, status.attainment) == ((True, 0.0) if refusal is LATE else (False, None))


def test_bad_input_is_refused_after_a_loss_too() -> None:
    refusal = Refusal(422, "image: it is empty")
    assert classified(FakeReplicas(LOST, refusal))[0] is refusal


def test_what_ends_replicas_is_given_up() -> None:
    answer, fleet = classified(FakeReplicas(*[LOST] * MOST_LOST))
    assert isinstance(answer, EngineFailed)
    assert "3 replicas have ended while they held it: killed" in str(answer)
    assert asyncio.run(fleet.status()).attainment == 0.0


def test_an_error_of_the_engine_is_not_tried_again() -> None:
    failure = EngineFailed("out of memory")
    replicas = FakeReplicas(failure)
    assert classified(replicas)[0] is failure
    assert len(replicas.targets) == 1


def test_an_answer_after_its_time_counts_as_late() -> None:
    answer, fleet = classified(FakeReplicas(LOST, Answered(ANSWER, 1e-6)))
    assert answer == ANSWER
    assert asyncio.run(fleet.status()).attainment == 0.0


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "_GIVE_UP_SECONDS", 0.05)
    answer, fleet = classified(FakeReplicas(*[ENDING] * 10_000))
    assert (answer.status, answer.retry_after) == (503, 1)
    assert asyncio.run(fleet.status()).attainment == 0.0


def test_places_are_bounded() -> None:
    fleet = fleet_of(FakeReplicas(), places=2)
    with fleet.admitted(), fleet.admitted():
        with pytest.raises(Refusal, match="it holds 2 requests") as refused, fleet.admitted():
            pass
        assert (refused.value.status, refused.value.retry_after, fleet.held) == (429, 1, 2)
    assert fleet.held == 0


# The target


def test_a_target_holds_for_every_later_request() -> None:
    async def change() -> list[float]:
        replicas = FakeReplicas(Answered(ANSWER, 100.0), Answered(ANSWER, 100.0))
        replicas.everywhere_says["change_slo"] = [80.0, 80.0]
        fleet = fleet_of(replicas)
        await fleet.respond(b"", "")
        assert (await fleet.change_slo(b'{"slo_ms": 80}')).slo_ms == 80.0
        await fleet.respond(b"", "")
        return replicas.targets

    assert asyncio.run(change()) == [100.0, 80.0]


@pytest.mark.parametrize(
    ("said", "status"),
    [([80.0, Refusal(422, "slo_ms 80 cannot be kept")], 422), ([], 503), (TimeoutError(), 503)],
)
def test_a_target_that_not_all_can_take_changes_nothing(said: Any, status: int) -> None:
    replicas = FakeReplicas()
    replicas.everywhere_says["change_slo"] = said
    fleet = fleet_of(replicas)
    with pytest.raises(Refusal) as refused:
        asyncio.run(fleet.change_slo(b'{"slo_ms": 80}'))
    assert (refused.value.status, fleet.slo_ms) == (status, 100.0)


# Reports


def report(name: str, queue: int = 0, ready: bool = True) -> tuple[str, Report]:
    return name, Report(ready, queue, b"# TYPE answers_total counter\nanswers_total 2.0\n")


@pytest.mark.parametrize(
    ("reports", "ready"),
    [([], False), ([report("a", ready=False)], False), ([report("a"), report("b", ready=False)], True)],
)
def test_it_is_ready_when_a_replica_is(reports: list[Any], ready: bool) -> None:
    replicas = FakeReplicas()
    replicas.everywhere_says["report"] = reports
    assert asyncio.run(fleet_of(replicas).ready()) is ready


def test_reports_are_kept_for_a_moment_and_while_a_replica_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(fleets, "milliseconds", lambda: now[0])
    replicas = FakeReplicas()
    replicas.everywhere_says["report"] = [report("a", queue=3), report("b", queue=4)]
    fleet = fleet_of(replicas)
    assert asyncio.run(fleet.status()).queue == 7
    replicas.everywhere_says["report"] = [report("a", queue=1)]
    assert (asyncio.run(fleet.status()).queue, replicas.asked) == (7, 1)
    now[0] += 1000
    assert (asyncio.run(fleet.status()).queue, replicas.asked) == (1, 2)
    now[0] += 1000
    replicas.everywhere_says["report"] = TimeoutError()
    assert (asyncio.run(fleet.status()).queue, replicas.asked) == (1, 3)


def test_metrics_of_all_in_one_text() -> None:
    service = Service(FakeEngine(), TABLE, SETTINGS)
    text = service.metrics.text()
    found = merged({"a": text, "b": text}).decode()
    for sample in ('slicevit_shed_total{reason="late",replica="a"} 0.0', 'slicevit_slo_seconds{replica="b"} 0.1'):
        assert sample in found.splitlines()
    assert found.count("# TYPE slicevit_batch_size histogram") == 1
    assert found.count("slicevit_batch_size_bucket{") == 2 * text.decode().count("slicevit_batch_size_bucket{")


def test_a_refusal_travels() -> None:
    there = pickle.loads(pickle.dumps(LATE))
    assert (there.status, there.detail, there.retry_after, str(there)) == (429, LATE.detail, 3, LATE.detail)


# The arguments


def test_arguments_are_flags_as_text_or_as_yaml_has_them(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    read = read_arguments({"run": "run", "slo-ms": "70", "min_top1": 0.8, "max-replicas": 8, "threads": None})
    assert (read.run, read.slo_ms, read.min_top1, read.max_replicas) == (str(tmp_path / "run"), 70.0, 0.8, 8)
    assert (read.min_replicas, read.threads, read.settings().min_top1) == (1, 0, 80.0)
    assert read_arguments({"run": "owner/name"}).run == "owner/name"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"slo-ms": "abc"}, "--slo-ms abc: input should be a valid number"),
        ({"slo-ms": 0}, "--slo-ms 0: give milliseconds above 0"),
        ({"slow-ms": 3}, "slow-ms is no option of slicevit.serving.ray:app; near it: slo-ms"),
        ({"port": 80}, "port is no option"),
        ({"min-top1": 80}, "--min-top1 80 is no share from 0 to 1: for 80 per cent write 0.8"),
        ({"policy": "fixed"}, "--policy fixed and --width go together"),
        ({"engine": "steam"}, "--engine steam: input should be 'torch'"),
        ({"min-replicas": 0}, "--min-replicas 0: give at least 1"),
        ({"max-replicas": 2, "min-replicas": 3}, "--max-replicas 2 is below --min-replicas 3"),
        ({"max-replicas": 2.5}, "--max-replicas 2.5: input should be a valid integer"),
        ({"target-ongoing": 0}, "--target-ongoing 0: give requests above 0"),
        ({"cpus": -1}, "--cpus -1: give 0 or more"),
        ({"gpus": "nan"}, "--gpus nan: give 0 or more"),
        ({"run": None}, "run is missing"),
    ],
)
def test_arguments_that_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        read_arguments({"run": "r", **given}).settings()
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


def test_a_segmenter_is_served_too(tmp_path: Path) -> None:
    run = save_segmenter(tmp_path / "segmenter", tmp_path)
    assert isinstance(app({"run": str(run), "slo-ms": 500}), Application)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("/missing", "/missing is neither a folder nor a Hub repository such as owner/name"),
        ("a/b/c", "a/b/c is neither a folder nor a Hub repository such as owner/name"),
        ("empty", "empty holds no config.json and no model.safetensors: it is not a saved slicevit model"),
    ],
)
def test_a_run_that_is_not_there_is_refused_before_anything_is_deployed(
    given: str, said: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        app({"run": given, "slo-ms": 100})
    assert str(refused.value).endswith(said)
