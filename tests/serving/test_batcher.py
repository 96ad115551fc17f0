"""The queue and its one thread, without HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from fractions import Fraction

import pytest
import torch
from serving_fakes import FULL, HALF, QUARTER, SIZE, TABLE, FakeEngine, Gate
from torch import Tensor

from slicevit.runtime.profile import Profile
from slicevit.serving.batcher import Answer, Batcher, milliseconds
from slicevit.serving.choice import policy_of
from slicevit.serving.margin import Margin
from slicevit.serving.refusal import EngineFailed, Refusal

Started = Callable[..., Batcher]
LONG = 20_000.0


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def margin() -> Margin:
    return Margin(TABLE, 0.95)


@pytest.fixture
def calls() -> list[tuple[Fraction, int, float]]:
    return []


def shares(logits_BK: Tensor) -> Tensor:
    return logits_BK.softmax(1)


@pytest.fixture
def started(engine: FakeEngine, margin: Margin, calls: list[tuple[Fraction, int, float]]) -> Iterator[Started]:
    batchers = []

    def start(legal: tuple[Fraction, ...] = FakeEngine.widths) -> Batcher:
        batcher = Batcher(
            engine, TABLE, legal, policy_of("deadline-slack"), margin, lambda *call: calls.append(call), shares
        )
        batcher.start()
        batchers.append(batcher)
        return batcher

    yield start
    for batcher in batchers:
        batcher.stop()


def image(red: int) -> Tensor:
    return torch.full((3, SIZE, SIZE), float(red))


def submit(batcher: Batcher, red: int, within: float = LONG, width: Fraction | None = None) -> Future[Answer]:
    now = milliseconds()
    return batcher.submit(image(red), now, now + within, width)


def classes(futures: list[Future[Answer]]) -> list[int]:
    return [int(future.result(20).output.argmax()) for future in futures]


def test_each_gets_the_answer_to_its_own_image(engine: FakeEngine, started: Started) -> None:
    gate, batcher = Gate(engine), started()
    first = submit(batcher, 6)
    assert gate.reached.wait(20)
    rest = [submit(batcher, n) for n in range(7)]
    assert len(batcher) == 7
    gate.open()
    assert classes([first, *rest]) == [6, *range(7)]
    assert engine.calls[0] == (FULL, 1)
    assert sum(batch for _, batch in engine.calls) == 8
    assert len(engine.calls) < 8  # those that came meanwhile went together
    assert len(batcher) == 0


def test_an_answer_says_how_it_came_about(started: Started, calls: list[tuple[Fraction, int, float]]) -> None:
    before = milliseconds()
    answer = submit(started(), 2).result(20)
    assert (answer.width, answer.batch) == (FULL, 1)
    assert "most accurate" in answer.reason
    assert before <= answer.started <= answer.ended <= answer.finished <= milliseconds()
    assert answer.output.sum() == pytest.approx(1.0)
    ((width, batch, took),) = calls
    assert (width, batch, took) == (FULL, 1, answer.ended - answer.started)


def test_those_in_time_run_narrower_and_those_too_late_are_shed(engine: FakeEngine, started: Started) -> None:
    gate, batcher = Gate(engine), started()
    first = submit(batcher, 0)
    assert gate.reached.wait(20)
    late = [submit(batcher, 1, within=0.5) for _ in range(3)]
    later = submit(batcher, 1)
    time.sleep(0.01)
    gate.open()
    assert classes([first, later]) == [0, 1]
    for future in late:
        with pytest.raises(Refusal, match="overloaded") as refusal:
            future.result(20)
        assert (refusal.value.status, refusal.value.retry_after) == (429, 1)
    assert sum(batch for _, batch in engine.calls) == 2


def test_the_margin_makes_it_choose_narrower(started: Started, margin: Margin) -> None:
    """In service a call takes 600 times what the table says: 3 s at full width, 1.2 s at half."""
    batcher = started()
    assert submit(batcher, 0, within=2_000).result(20).width == FULL
    for _ in range(30):
        margin.call_took(milliseconds(), predicted=1.0, compute=600.0, around=0.0)
    time.sleep(0.05)  # an estimate holds for some milliseconds
    assert submit(batcher, 0, within=2_000).result(20).width == HALF


def test_the_margin_and_the_way_through_the_event_loop_count(
    engine: FakeEngine, started: Started, margin: Margin
) -> None:
    """A call takes 600 times what the table says: 600 ms at least; and an answer is a second on its way."""
    for _ in range(30):
        margin.call_took(milliseconds(), predicted=1.0, compute=600.0, around=0.0)
        margin.delivery_took(milliseconds(), 1_000.0)
    gate, batcher = Gate(engine), started((QUARTER,))
    now = milliseconds()
    submit(batcher, 0)
    assert gate.reached.wait(20)
    assert batcher.too_late(now + 3_000)
    assert not batcher.too_late(now + 4_000)
    gate.open()


def test_an_idle_server_tries_whom_only_the_margin_rules_out(started: Started, margin: Margin) -> None:
    """Else nothing would be measured while all are refused, and a disturbance would outlast itself by ten seconds."""
    batcher = started()
    for _ in range(30):
        margin.call_took(milliseconds(), predicted=1.0, compute=600.0, around=0.0)
    assert not batcher.too_late(milliseconds() + 300)
    assert not batcher.too_late(milliseconds() + 300, HALF)
    answer = submit(batcher, 3, within=300).result(20)
    assert (answer.width, answer.batch) == (QUARTER, 1)
    assert "tried" in answer.reason
    assert submit(batcher, 3, within=300, width=HALF).result(20).width == HALF
    assert isinstance(submit(batcher, 3, within=0.5).exception(20), Refusal)


def test_an_idle_server_tries_one_and_refuses_the_others(engine: FakeEngine, started: Started, margin: Margin) -> None:
    gate, batcher = Gate(engine), started()
    first = submit(batcher, 0)
    assert gate.reached.wait(20)
    for _ in range(30):
        margin.call_took(milliseconds(), predicted=1.0, compute=60_000.0, around=0.0)
    rest = [submit(batcher, n, within=5_000 + n) for n in range(1, 5)]
    time.sleep(0.05)  # an estimate holds for some milliseconds
    gate.open()
    assert classes([first, rest[-1]]) == [0, 4]
    assert [isinstance(future.exception(20), Refusal) for future in rest] == [True, True, True, False]


def test_admission_opens_again_soon_after_a_disturbance(engine: FakeEngine) -> None:
    """Half a second in which calls take 30 ms, at a target of 15; a second later everybody is answered again."""
    slow = True

    def disturb(images_BCHW: Tensor, width: Fraction) -> None:
        time.sleep((30 if slow else TABLE.row(width).latency(len(images_BCHW))) / 1000)

    engine.before = disturb
    batcher = Batcher(
        engine, TABLE, engine.widths, policy_of("deadline-slack"), Margin(TABLE, 0.95), lambda *call: None, shares
    )
    batcher.start()
    begin, refused = milliseconds(), []
    for n in range(150):
        due = begin + 20 * n
        time.sleep(max(0.0, due - milliseconds()) / 1000)
        slow = n < 25
        now = milliseconds()
        late = batcher.too_late(now + 15)
        future = None if late else batcher.submit(image(0), now, now + 15)
        refused.append(late or (n >= 25 and isinstance(future.exception(20), Refusal)))
    batcher.stop()
    assert sum(refused[75:]) < 0.2 * len(refused[75:])


def test_legal_widths_bind_the_policy_and_not_the_request(engine: FakeEngine, started: Started) -> None:
    batcher = started((HALF,))
    assert submit(batcher, 0).result(20).width == HALF
    assert submit(batcher, 0, width=QUARTER).result(20).width == QUARTER
    assert not batcher.too_late(milliseconds() + 50, FULL)
    assert batcher.too_late(milliseconds() + 1.5)
    assert batcher.too_late(milliseconds() + 4.5, FULL)


def test_the_call_that_runs_and_those_who_go_first_count(engine: FakeEngine, started: Started, margin: Margin) -> None:
    """In service a call takes 600 times what the table says: 3 s at full width, 1.8 s for eight at a quarter."""
    for _ in range(30):
        margin.call_took(milliseconds(), predicted=1.0, compute=600.0, around=0.0)
    gate, batcher = Gate(engine), started()
    now = milliseconds()
    submit(batcher, 0)
    assert gate.reached.wait(20)
    assert batcher.too_late(now + 3_500)
    assert not batcher.too_late(now + 5_000)
    for _ in range(15):
        batcher.submit(image(0), now, now + 6_000)
    assert batcher.too_late(now + 6_000)  # 3 + 2 * 1.8
    assert not batcher.too_late(now + 8_000)
    assert not batcher.too_late(now + 5_999)  # it would be the most urgent
    gate.open()


def test_lasting_overload(engine: FakeEngine) -> None:
    """Asked 200 a second where 89 can be answered, it answers nearly as many, in large batches.

    The calls take 30 to 780 ms, so that a pause of the machine is short beside them.
    """
    slow = [{"width": str(row.width), "top1": row.top1, "latency_ms": _times(row.latency_ms, 30)} for row in TABLE.rows]
    table = Profile.parse(slow)
    engine.before = lambda images_BCHW, width: time.sleep(table.row(width).latency(len(images_BCHW)) / 1000)
    batcher = Batcher(
        engine, table, engine.widths, policy_of("deadline-slack"), Margin(table, 0.95), lambda *call: None, shares
    )
    batcher.start()
    begin, futures = milliseconds(), []
    for n in range(800):
        due = begin + n / 0.2
        time.sleep(max(0.0, due - milliseconds()) / 1000)
        now = milliseconds()
        if not batcher.too_late(now + 900):
            futures.append((now, batcher.submit(image(0), now, now + 900)))
    seconds = (milliseconds() - begin) / 1000
    batcher.stop()
    answered = [(now, future.result()) for now, future in futures if future.exception() is None]
    in_time = [answer for now, answer in answered if answer.finished <= now + 900]
    assert len(in_time) > 0.5 * 89 * seconds
    assert len(in_time) > 0.8 * len(answered)
    assert sum(answer.batch for answer in in_time) > 5 * len(in_time)
    assert sum(answer.width == QUARTER for answer in in_time) > 0.7 * len(in_time)


def _times(latencies: Mapping[int, float], factor: float) -> dict[int, float]:
    return {batch: factor * latency for batch, latency in latencies.items()}


@pytest.mark.parametrize("kind", ["raises", "nan", "short"])
def test_an_error_of_the_engine_is_the_answer_to_that_batch_alone(
    kind: str, engine: FakeEngine, started: Started, caplog: pytest.LogCaptureFixture
) -> None:
    run = engine.run

    def broken(images_BCHW: Tensor, width: Fraction) -> Tensor:
        logits_BK = run(images_BCHW, width)
        if images_BCHW[0, 0, 0, 0] != 5:
            return logits_BK
        if kind == "raises":
            raise RuntimeError("out of memory")
        return logits_BK * torch.nan if kind == "nan" else logits_BK[1:]

    engine.run = broken  # type: ignore[method-assign]
    batcher = started()
    before = submit(batcher, 1)
    assert classes([before]) == [1]
    with pytest.raises(EngineFailed):
        submit(batcher, 5).result(20)
    assert "the engine failed at width 1 on 1 images" in caplog.text
    assert batcher.alive
    assert batcher.busy == 0.0
    assert classes([submit(batcher, 2)]) == [2]


def test_an_error_of_the_policy_fails_those_that_wait_and_no_more(
    engine: FakeEngine, started: Started, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = started()

    def broken(now: float) -> None:
        raise ZeroDivisionError("odd")

    with monkeypatch.context() as patch:
        patch.setattr(batcher._margin, "table", broken)
        with pytest.raises(EngineFailed, match="odd"):
            submit(batcher, 5).result(20)
    assert "the policy failed" in caplog.text
    assert classes([submit(batcher, 2)]) == [2]


def test_who_has_left_is_not_computed(engine: FakeEngine, started: Started) -> None:
    gate, batcher = Gate(engine), started()
    first = submit(batcher, 0)
    assert gate.reached.wait(20)
    left, stays = submit(batcher, 1), submit(batcher, 2)
    assert left.cancel()
    gate.open()
    assert classes([first, stays]) == [0, 2]
    assert sum(batch for _, batch in engine.calls) == 2


def test_stopping_answers_whoever_waits(engine: FakeEngine, started: Started) -> None:
    gate, batcher = Gate(engine), started()
    futures = [submit(batcher, n % 7) for n in range(20)]
    assert gate.reached.wait(20)
    assert batcher.busy > 0.0
    gate.open()
    batcher.stop()
    assert not batcher.alive
    assert [future.done() for future in futures] == [True] * 20
    assert classes(futures) == [n % 7 for n in range(20)]


def test_retry_after_is_the_time_of_the_queue(engine: FakeEngine, started: Started) -> None:
    gate, batcher = Gate(engine), started()
    submit(batcher, 0)
    assert gate.reached.wait(20)
    assert batcher.overloaded("odd").retry_after == 1
    for _ in range(4_000):  # 3 ms for eight
        submit(batcher, 0)
    refusal = batcher.overloaded("odd")
    assert refusal.retry_after == 2
    assert "try again in 2 s" in refusal.detail
    gate.open()
