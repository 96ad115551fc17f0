"""How much longer a call takes in service than the measured table says.

Times are milliseconds.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import replace

from slicevit.runtime.profile import Profile

HORIZON_MS = 10_000.0  # what is older says nothing about now
_MOST = 512  # samples kept
_FRESH_MS = 20.0  # for which the estimates are not made again
_FEWEST = 20  # with less, the table stands in for those that are missing


class _Recent:
    """The samples of the last ten seconds, 512 at most, oldest first."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, tuple[float, ...]]] = deque(maxlen=_MOST)

    def add(self, now: float, *sample: float) -> None:
        self._samples.append((now, sample))

    def since(self, now: float) -> list[tuple[float, ...]]:
        """Those that still say something; the others are dropped."""
        while self._samples and self._samples[0][0] < now - HORIZON_MS:
            self._samples.popleft()
        return [sample for _, sample in self._samples]


def _quantile(values: list[float], share: float, prior: float) -> float:
    """At least `prior`, which also stands in for the samples that are missing to twenty; the lower of two."""
    ordered = sorted([prior] * (_FEWEST - len(values)) + values)
    return max(prior, ordered[math.floor(share * (len(ordered) - 1))])


class Margin:
    """Running estimates of what the table leaves out; from any thread.

    Of the last ten seconds (at most 512 samples each):

    - the ratio of a call's measured to its predicted latency, the median, at least 1: a slower clock, another load of
      the memory; it grows with the width;
    - the milliseconds of a call beyond that: what is around the engine's call (deciding, stacking the batch, softmax),
      and what interrupted it. They are the same for every width, so that a machine that others use costs a narrow
      width no more of a deadline than a wide one. The quantile of their sum;
    - the milliseconds from a call's end until the event loop has the answer, twice: a request waited about as long for
      the loop before anybody saw it. The quantile.

    One call that hangs does not count: with less than 20 samples the missing ones are the table itself, and the
    quantile leaves out the highest.

    Args:
        table: the measured table.
        quantile: the share of the calls that the estimate is to cover.
    """

    def __init__(self, table: Profile, quantile: float):
        self._table, self._quantile = table, quantile
        self._lock = threading.Lock()
        self._calls, self._deliveries = _Recent(), _Recent()
        self._made, self._ratio, self._excess, self._delivery = -math.inf, 1.0, 0.0, 0.0
        self._scaled = (1.0, 0.0, table)

    def call_took(self, now: float, predicted: float, compute: float, around: float) -> None:
        """A call ended: the table's latency of it, what the engine took, and what the batcher took besides."""
        with self._lock:
            self._calls.add(now, predicted, compute, around)

    def delivery_took(self, now: float, took: float) -> None:
        """An answer reached the event loop so long after its call."""
        with self._lock:
            self._deliveries.add(now, took)

    def ratio(self, now: float) -> float:
        """Measured over predicted latency of a call, at least 1."""
        with self._lock:
            self._renew(now)
            return self._ratio

    def event_loop(self, now: float) -> float:
        """Milliseconds that the event loop takes of a deadline."""
        with self._lock:
            self._renew(now)
            return 2 * self._delivery

    def table(self, now: float) -> Profile:
        """The table with every latency times the ratio, and the milliseconds beyond it added.

        In steps of 2 % and 0.1 ms, always upwards, so that it is not built anew for every call.
        """
        with self._lock:
            self._renew(now)
            ratio = math.ceil(self._ratio * 50 - 1e-9) / 50
            excess = math.ceil(self._excess * 10 - 1e-9) / 10
            if (ratio, excess) != self._scaled[:2]:
                self._scaled = (ratio, excess, _scaled(self._table, ratio, excess))
            return self._scaled[2]

    def _renew(self, now: float) -> None:
        if now - self._made < _FRESH_MS:
            return
        calls = self._calls.since(now)
        ratio = _quantile([compute / predicted for predicted, compute, _ in calls], 0.5, 1.0)
        beyond = [compute + around - ratio * predicted for predicted, compute, around in calls]
        took = [each for (each,) in self._deliveries.since(now)]
        self._made, self._ratio = now, ratio
        self._excess, self._delivery = _quantile(beyond, self._quantile, 0.0), _quantile(took, self._quantile, 0.0)


def _scaled(table: Profile, ratio: float, excess: float) -> Profile:
    return Profile(
        tuple(
            replace(row, latency_ms={batch: took * ratio + excess for batch, took in row.latency_ms.items()})
            for row in table.rows
        )
    )
