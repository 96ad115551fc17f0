"""Runs slicevit's command line on several ranks, each a fork of this process, which has imported it once.

One job a line on stdin, its outcome on stdout (see `run`). With `--plant JSON ARGUMENTS` it is one rank itself, for
torchrun to start. Unlike torchrun's agent it ends no rank because another
one died: what is left is as on a machine that has lost the other one. The helpers below are for a job's `plant`,
python that a rank runs before the command line: faults, and records of what a rank did.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from warm import warm_up

from slicevit import checkpoint, cli  # noqa: F401  # plants name them
from slicevit.data import TrainLoader
from slicevit.elastic import ElasticModel
from slicevit.training import keeper, loop, runs, trainee  # noqa: F401
from slicevit.training.loop import Run
from slicevit.training.ranks import SharedGradients
from slicevit.training.trainee import Trainee

# --- for plants -------------------------------------------------------------------------------------------


def before(owner: Any, name: str, nth: int, act: Callable[[], None]) -> None:
    """`act` inside the nth call of `owner.name`, before what it does."""
    real, calls = getattr(owner, name), itertools.count(1)

    def planted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == nth:
            act()
        return real(*args, **kwargs)

    setattr(owner, name, planted)


def after(owner: Any, name: str, nth: int, act: Callable[[], None]) -> None:
    """`act` inside the nth call of `owner.name`, after what it does."""
    real, calls = getattr(owner, name), itertools.count(1)

    def planted(*args: Any, **kwargs: Any) -> Any:
        value = real(*args, **kwargs)
        if next(calls) == nth:
            act()
        return value

    setattr(owner, name, planted)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def term() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop_launcher() -> None:
    """SIGTERM to torchrun, whose child a rank is."""
    os.kill(os.getppid(), signal.SIGTERM)


def lose_machine() -> None:
    """torchrun and its rank are gone at once."""
    os.kill(os.getppid(), signal.SIGKILL)
    die()


def slow(seconds: float) -> None:
    """Every step takes that much longer."""
    real = Run.train_step

    def train_step(self: Run, *args: Any) -> None:
        time.sleep(seconds)
        real(self, *args)

    Run.train_step = train_step  # type: ignore[method-assign]


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def memory_for(images: int) -> None:
    """A pass over more than `images` images ends as on a GPU without room for them."""
    real, real_gradients = ElasticModel.forward, trainee.accumulate_gradients

    def check(x: Tensor) -> None:
        if len(x) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def forward(self: ElasticModel, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            check(x)
        return real(self, x, *args, **kwargs)

    def gradients(model: ElasticModel, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        check(x)
        return real_gradients(model, x, *args, **kwargs)

    ElasticModel.forward = forward  # type: ignore[method-assign]
    trainee.accumulate_gradients = gradients


def nan_at(step: int) -> None:
    """The losses and gradients of `step` (from 0) are nan on this rank."""
    real, calls = trainee.accumulate_gradients, itertools.count()

    def poisoned(model: ElasticModel, *args: Any, **kwargs: Any) -> Any:
        losses = real(model, *args, **kwargs)
        if next(calls) == step:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
            losses = {width: loss * float("nan") for width, loss in losses.items()}
        return losses

    trainee.accumulate_gradients = poisoned


def batches_short_by(missing: int) -> None:
    """This rank's epochs end `missing` batches early."""
    real = TrainLoader.epoch

    def epoch(self: TrainLoader, number: int, start_step: int = 0) -> Any:
        return itertools.islice(real(self, number, start_step), self.steps_per_epoch - missing - start_step)

    TrainLoader.epoch = epoch  # type: ignore[method-assign]


class _Collectives(TorchDispatchMode):
    """Names and sizes of what is sent between ranks, whichever function of torch was called for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            self.seen.append((func._opname, sum(t.numel() for t in tensors)))
        return func(*args, **(kwargs or {}))


def record(folder: str, rank: int, collectives: bool = False) -> None:
    """Saves at the end of the run, for every step: widths, losses, backward passes, weights and, of several ranks, the
    gradients before and after the reduction. `collectives`: what was sent between ranks instead of the tensors."""
    steps: list[dict[str, Any]] = []
    passes = [0]
    real_step, real_backward, real_reduce = Trainee.train_step, Tensor.backward, SharedGradients.reduce

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        passes[0] += 1
        real_backward(self, *args, **kwargs)

    def reduce(self: SharedGradients, *args: Any) -> None:
        steps[-1]["own"] = self.flat[:-2].clone()
        real_reduce(self, *args)
        steps[-1]["shared"] = self.flat[:-2].clone()

    def train_step(self: Trainee, images: Tensor, *args: Any) -> None:
        passes[0] = 0
        widths = self.widths_of(self.step)
        steps.append({"step": self.step, "widths": [str(width) for width in widths], "images": len(images)})
        sums = dict(self.monitor.sums)
        if collectives:
            with _Collectives() as mode:
                real_step(self, images, *args)
            steps[-1]["sent"] = mode.seen
        else:
            real_step(self, images, *args)
        steps[-1]["losses"] = {str(w): float(self.monitor.sums[w] - sums.get(w, 0)) for w in widths}
        steps[-1]["backward"] = passes[0]
        steps[-1]["weights"] = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        inner = getattr(self.optimizer, "optim", self.optimizer)
        steps[-1]["moments"] = sum(moment["exp_avg"].numel() for moment in inner.state.values())
        steps[-1]["trained"] = sum(p.numel() for p in self.model.parameters())
        torch.save(steps, f"{folder}/rank{rank}.pt")

    Trainee.train_step = train_step  # type: ignore[method-assign]
    Tensor.backward = backward  # type: ignore[method-assign]
    if not collectives:
        SharedGradients.reduce = reduce  # type: ignore[method-assign]


# --- the driver -------------------------------------------------------------------------------------------


def rank_process(job: dict[str, Any], rank: int, port: int) -> None:
    os.setsid()
    if job["ranks"] > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    loop.LATENCY_SECONDS = 0.0
    runs.write_pictures = lambda *args, **kwargs: None  # type: ignore[assignment]
    status = 0
    try:
        if "folders" in job:  # one working directory a rank: its own disk
            os.chdir(job["folders"][rank])
        for who in ("all", str(rank)):
            exec(job.get("plant", {}).get(who, ""), globals() | {"RANK": rank})
        cli.main(job["argv"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """`ranks` processes with the command line `argv`; `plant` by rank or "all"; `folders`: each one's working
    directory.

    Answers with `status` and `text` of each; the status is None of one that was still running after `limit` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids: list[int] = []
    for rank in range(job["ranks"]):
        pid = os.fork()
        if not pid:
            rank_process(job, rank, port)
        pids.append(pid)
    statuses: list[int | None] = [None] * len(pids)
    left, end = set(range(len(pids))), time.monotonic() + job.get("limit", 60)
    while left and time.monotonic() < end:
        for rank in sorted(left):
            done, code = os.waitpid(pids[rank], os.WNOHANG)
            if done:
                statuses[rank] = os.waitstatus_to_exitcode(code)
                left.discard(rank)
        time.sleep(0.005)
    for rank in left:
        os.kill(pids[rank], signal.SIGKILL)
        os.waitpid(pids[rank], 0)
    texts = [Path(f"{job['log']}.{rank}").read_text(errors="replace") for rank in range(len(pids))]
    return {"status": statuses, "text": texts}


if __name__ == "__main__" and sys.argv[1:2] == ["--plant"]:  # a rank that torchrun started
    planted = json.loads(sys.argv[2])
    for who in ("all", os.environ.get("RANK", "0")):
        exec(planted.get(who, ""))
    cli.main(sys.argv[3:])
elif __name__ == "__main__":
    warm_up()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
