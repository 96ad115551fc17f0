import time

import pytest

from slicevit.evaluation.latency import measure_latency


def test_median_of_known_waits() -> None:
    waits = measure_latency({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.008)}, 0.05)
    assert 2 <= waits["short"] < waits["long"]
    assert waits["long"] >= 8


def test_calls_take_turns_after_the_warm_up() -> None:
    order: list[str] = []
    measure_latency({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0, warmup=2)
    assert order == ["a", "b"] * (2 + 3)


def test_an_outlier_does_not_move_the_median() -> None:
    calls = iter([0.0, 0.0, 0.4])
    assert measure_latency({"a": lambda: time.sleep(next(calls))}, seconds=0, warmup=0)["a"] < 100


def test_cuda_is_synchronised_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: events.append(device))
    measure_latency({"a": lambda: events.append("call")}, seconds=0, warmup=0, device="cuda:1")
    assert events == ["cuda:1", "call", "cuda:1"] * 3
