"""CUDA graphs of the passes of a training step: recorded once a width, launched as one from then on.

A narrow width computes for less time than the host takes to launch its kernels one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

WARM_UP = 2  # calls before a recording, in which blocks compile and libraries set themselves up

Tensors: TypeAlias = tuple[Tensor, ...]


class Graphs:
    """Calls that a CUDA device replays.

    A call is known by its key and the shapes and types of its tensors. It may add to gradients in place, and draw
    random numbers on the device, which follow `torch.manual_seed` as they do without a graph. All recordings share
    one pool of memory, so that together they hold what the largest of them needs.

    On another `device` than CUDA every call is just made.
    """

    def __init__(self, device: torch.device):
        self._active = device.type == "cuda"
        self._seen: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, _Recording] = {}
        if self._active:
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    def hold_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make the gradients that calls add to. They must stay where they are: set them to zero in place."""
        for parameter in parameters:
            if self._active and parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def __call__(self, key: Hashable, call: Callable[..., Tensors], *tensors: Tensor) -> Tensors:
        """What `call(*tensors)` returns: tensors, which the next call of the same key overwrites."""
        if not self._active:
            return call(*tensors)
        key = (key, *((tensor.shape, tensor.dtype) for tensor in tensors))
        if key in self._recorded:
            return self._recorded[key].replay(tensors)
        results = self._beside(call, tensors)
        self._seen[key] += 1
        if self._seen[key] == WARM_UP:
            self._recorded[key] = _Recording(call, tensors, results, self._stream, self._pool)
        return results

    def _beside(self, call: Callable[..., Tensors], tensors: Tensors) -> Tensors:
        """The call, on the stream that records: what is made at first calls belongs there."""
        outer = torch.cuda.current_stream()
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            results = call(*tensors)
        outer.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(self._stream)
        for result in results:
            result.record_stream(outer)
        return results


class _Recording:
    """One graph, the tensors that it reads and those that it writes.

    These lie outside of the pool, whose memory other graphs write over. `results` are like those of the call.
    Recording computes nothing.
    """

    def __init__(
        self,
        call: Callable[..., Tensors],
        tensors: Tensors,
        results: Tensors,
        stream: torch.cuda.Stream,
        pool: Any,
    ):
        self._inputs = [tensor.clone() for tensor in tensors]
        self._results = tuple(torch.empty_like(result) for result in results)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            for kept, result in zip(self._results, call(*self._inputs), strict=True):
                kept.copy_(result)

    def replay(self, tensors: Tensors) -> Tensors:
        torch._foreach_copy_(self._inputs, list(tensors))
        self._graph.replay()
        return self._results
