"""Latency of named calls, taken in turns so that a drifting clock treats all of them alike."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


def measure_latency(
    calls: Mapping[str, Callable[[], object]],
    seconds: float = 1.0,
    warmup: int = 3,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Time every call once a round, round after round, and take the median.

    Gradients are the caller's affair: wrap the run in `torch.inference_mode()` to time inference.

    Args:
        calls: name -> what to time, without arguments.
        seconds: time to spend, on average, on each call; at least three rounds are timed.
        warmup: rounds that are run but not timed.
        device: what the calls run on; on a CUDA device each timing waits for the device.

    Returns:
        Name -> median milliseconds.
    """
    on_cuda = device is not None and torch.device(device).type == "cuda"
    timings: dict[str, list[float]] = {name: [] for name in calls}

    def timed(call: Callable[[], object]) -> float:
        if on_cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if on_cuda:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1000

    for _ in range(warmup):
        for call in calls.values():
            timed(call)
    end = time.perf_counter() + seconds * len(calls)
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        for name, call in calls.items():
            timings[name].append(timed(call))
        rounds += 1
    return {name: median(values) for name, values in timings.items()}
