"""A server without HTTP: admits, decodes, queues, answers, counts.

Times are milliseconds on the batcher's clock.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from functools import partial

import torch
from PIL import Image

from slicevit.checkpoint import SEGMENTATION
from slicevit.runtime.profile import Profile
from slicevit.serving.batcher import Answer, Batcher, milliseconds, together
from slicevit.serving.choice import policy_of
from slicevit.serving.intake import Intake, Prepared
from slicevit.serving.live import Live
from slicevit.serving.margin import Margin
from slicevit.serving.metrics import Metrics
from slicevit.serving.refusal import EngineFailed, Refusal
from slicevit.serving.runs import Runs
from slicevit.serving.schemas import Model, Status, WidthRow
from slicevit.serving.settings import Settings
from slicevit.serving.tasks import TASKS, Response
from slicevit.version import __version__

STUCK_MS = 60_000.0  # a call that takes longer than this never ends
_WARM_UP_MS = 250.0


class Service:
    """Serves an engine under `Settings`, with the measured table.

    Attributes:
        settings: what was given.
        task: what is asked here.
        slo_ms: the target now.
        metrics: for /metrics.
        held: requests admitted and not yet answered.
        draining: whether new requests are refused because the server is about to end.

    Raises:
        ValueError: a table that names widths which the engine has not, a floor that no width reaches, a fixed width
            that is not legal, or a target below what the fastest legal width takes; the message names the flag.
    """

    def __init__(self, engine: Runs, table: Profile, settings: Settings):
        self.settings = settings
        self._engine, self._table = engine, table
        if missing := [row.width for row in table.rows if row.width not in engine.widths]:
            raise ValueError(
                f"the table has width {missing[0]}, the model has not: measure it again (slicevit profile)"
            )
        legal = _legal(table, settings)
        self.task = TASKS[engine.task](engine)
        self._intake = Intake(self.task, table, legal, settings, milliseconds)
        self.slo_ms = self._intake.checked_slo(settings.slo_ms, "--slo-ms")
        self._started = milliseconds()
        self._margin = Margin(table, settings.quantile)
        self.metrics = Metrics(
            queue=lambda: len(self._batcher),
            held=lambda: self.held,
            slo=lambda: self.slo_ms / 1000,
            margin=lambda: self._margin.ratio(milliseconds()),
            facts={
                "version": __version__,
                "architecture": engine.architecture,
                "engine": engine.name,
                "device": engine.device,
            },
        )
        policy = policy_of(settings.policy, settings.budget_ms, settings.headroom)
        widths = [row.width for row in legal.rows]
        self._batcher = Batcher(
            engine, table, widths, policy, self._margin, self.metrics.called, self.task.outputs, milliseconds
        )
        self._live = Live(table, self._started)
        self._decoders = ThreadPoolExecutor(settings.decoders, "slicevit-decode")
        self.held, self.draining, self._running = 0, False, False

    def start(self) -> None:
        """Ready every width, run each at batch 1 and where that is quick at the other batch sizes, begin to answer.

        What is there by then is frozen until `stop`: a collection of Python's garbage that walked over all of it, some
        600,000 objects with OpenVINO, would hold every request for 0.2 s.

        Raises what the engine raises.
        """
        _, height, width = self._engine.input_size
        image_CHW = self._engine.transform(Image.new("RGB", (width, height)))
        for row in self._table.rows:
            self._engine.ready(row.width)
            for batch in {1, *(batch for batch, took in row.latency_ms.items() if took < _WARM_UP_MS)}:
                self._engine.run(torch.stack([image_CHW] * batch), row.width)
        gc.collect()
        gc.freeze()
        self._batcher.start()
        self._running = True

    def stop(self) -> None:
        """Answer whoever waits, then end the threads."""
        self.draining = True
        self._decoders.shutdown()
        self._batcher.stop()
        gc.unfreeze()

    async def ready(self) -> bool:
        """Whether requests are taken."""
        return self._open

    async def healthy(self) -> bool:
        """Whether the thread that computes lives, and its call is not stuck."""
        return self._batcher.alive and self._batcher.busy < STUCK_MS

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold a place of the queue. Raises Refusal: 503 when not ready, 429 when all places are taken."""
        if not self._open:
            raise Refusal(503, "the server takes no requests: it is starting or about to end", 1)
        if self.held >= self.settings.max_queue:
            self._shed("full")
            raise self._batcher.overloaded(f"it holds {self.held} requests")
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    async def respond(self, body: bytes, content_type: str) -> Response:
        """The answer to a request whose body came just now. Raises as `answer`."""
        return (await self.answer(body, content_type))[0]

    async def answer(self, body: bytes, content_type: str) -> tuple[Response, float]:
        """The same, and within how many milliseconds of its coming the answer was due.

        Raises:
            Refusal: 400, 413, 415 or 422 for what is wrong with it; 429 when it cannot be answered in time.
            EngineFailed: the engine raised on its batch.
        """
        arrival = milliseconds()
        prepare = partial(self._intake.prepare, body, content_type, arrival, self.slo_ms, self._admit)
        try:
            made = await asyncio.get_running_loop().run_in_executor(self._decoders, prepare)
            answers = await self._computed(made, arrival)
        except Refusal as refusal:
            if refusal.status == 429:
                self._shed("late")
            raise
        except EngineFailed:
            self.metrics.failed()
            self._live.missed(milliseconds(), shed=False)
            raise
        answer = together(answers)
        course = {
            "width": str(answer.width),
            "batch": answer.batch,
            "decode_ms": made.decoded - arrival,
            "queue_ms": answer.started - made.decoded,
            "compute_ms": answer.ended - answer.started,
            "reason": answer.reason,
        }
        response = await self.task.answer(made.image, [each.output for each in answers], made.options, course)
        self._count(arrival, made, answer)
        return response, made.deadline - arrival

    async def _computed(self, made: Prepared, arrival: float) -> list[Answer]:
        """What the engine says of all windows of an image, which the policy sees as so many requests."""
        inputs = made.image.inputs
        if len(inputs) > 1:
            self._admit(made.deadline, made.width, len(inputs))
        waiting = [self._batcher.submit(each, arrival, made.deadline, made.width) for each in inputs]
        try:
            return await asyncio.gather(*map(asyncio.wrap_future, waiting))
        finally:
            for each in waiting:
                each.cancel()  # of a request that is refused, what has not begun yet

    def model(self) -> Model:
        """What is served."""
        engine, frontier = self._engine, {row.width for row in self._table.frontier().rows}
        rows = [
            WidthRow(
                width=str(row.width),
                top1=row.top1,
                latency_ms={str(batch): took for batch, took in sorted(row.latency_ms.items())},
                on_frontier=row.width in frontier,
            )
            for row in self._table.rows
        ]
        return Model(
            task=SEGMENTATION if engine.task == SEGMENTATION else "classification",
            figure=engine.figure.name,
            architecture=engine.architecture,
            engine=engine.name,
            device=engine.device,
            input_size=list(engine.input_size),
            num_classes=engine.num_classes,
            label_names=None if engine.label_names is None else list(engine.label_names),
            widths=rows,
        )

    async def status(self) -> Status:
        """The last ten seconds."""
        now = milliseconds()
        return Status(
            slo_ms=self.slo_ms,
            min_top1=self.settings.min_top1,
            queue=len(self._batcher),
            uptime_s=(now - self._started) / 1000,
            **asdict(self._live.figures(now)),
        )

    async def change_slo(self, body: bytes) -> Status:
        """Another target, from JSON, for the requests that come from now on. Raises Refusal (400 or 422)."""
        self.slo_ms = self._intake.new_slo(body)
        return await self.status()

    async def metrics_text(self) -> bytes:
        """For Prometheus."""
        return self.metrics.text()

    def requested(self, path: str, status: int) -> None:
        """An HTTP request got its answer."""
        self.metrics.requested(path, status)

    @property
    def _open(self) -> bool:
        return self._running and not self.draining

    def _admit(self, deadline: float, width: Fraction | None, count: int = 1) -> None:
        """Raises Refusal when it is too late already, so that nobody decodes, or computes `count` images, in vain."""
        if self._batcher.too_late(deadline, width, count):
            raise self._batcher.overloaded("no answer in time")

    def _shed(self, reason: str) -> None:
        self.metrics.shed(reason)
        self._live.missed(milliseconds(), shed=True)

    def _count(self, arrival: float, made: Prepared, answer: Answer) -> None:
        now = milliseconds()
        self._margin.delivery_took(now, now - answer.finished)
        self._live.answered(now, now - arrival, now <= made.deadline, answer.width)
        self.metrics.answered(
            width=answer.width,
            top1=self._table.row(answer.width).top1,
            in_time=now <= made.deadline,
            latency=now - arrival,
            decode=made.decoded - arrival,
            queued=answer.started - made.decoded,
        )


def _legal(table: Profile, settings: Settings) -> Profile:
    floor, best = settings.min_top1, max(table.rows, key=lambda row: row.top1)
    if floor is not None and floor > best.top1:
        raise ValueError(
            f"--min-top1 {floor / 100:g}: the most accurate width is {best.width} with {best.top1 / 100:.4g}, so give "
            "no more than that"
        )
    legal = table.within(min_top1=floor)
    return legal if settings.width is None else Profile((legal.row(settings.width),))
