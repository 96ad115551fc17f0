"""What every benchmark shares: options, alternating rounds, medians, and the one JSON line that ends a run."""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch

import slicevit
from slicevit.training.graphs import Graphs
from slicevit.training.objectives import Objective

HERE = Path(__file__).resolve().parent
DEMO = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 96, "depth": 6, "num_heads": 4, "num_classes": 10}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def options(description: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options that every script takes; `rounds` is how many are timed by default."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds")
    parser.add_argument("--quick", action="store_true", help="three rounds of the smallest case: does it run?")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: this process alone, for a busy machine")
    parser.add_argument("--out", action="store_true", help="also write benchmarks/results/<script>-<date>.json")
    return parser


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed options, with threads and random numbers set."""
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.rounds = 3
    torch.manual_seed(0)
    return args


def alternate(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: str = "wall",
    warmup: int = 2,
    setup: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, float]:
    """Median milliseconds of each call: all of them once a round, each in every place of the order equally often.

    `setup` holds what runs, untimed, before a call.
    """
    now, setup = CLOCKS[clock], setup or {}
    timings: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warmup, rounds):
            names = list(calls)
            first = turn % len(names)
            for name in (names[first:] + names[:first])[:: -1 if turn // len(names) % 2 else 1]:
                setup.get(name, int)()
                begin = now()
                calls[name]()
                took = (now() - begin) * 1000
                if turn >= 0:
                    timings[name].append(took)
            if sys.stderr.isatty():
                print(f"\rround {turn + 1} of {rounds}", end="" if turn + 1 < rounds else "\n", file=sys.stderr)
    finally:
        gc.enable()
    return {name: median(values) for name, values in timings.items()}


def separate_step(
    models: Iterable[tuple[torch.nn.Module, torch.optim.Optimizer]],
    images: torch.Tensor,
    targets: torch.Tensor,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    graphs: Graphs | None = None,
) -> None:
    """A step of each model, widest first, with its optimizer: labels, and the KL to the logits of the one before."""
    lessons: tuple[torch.Tensor, ...] = ()
    for model, optimizer in models:
        call = partial(separate_pass, model, autocast)
        run = call if graphs is None else partial(graphs, (id(model), len(lessons)), call)
        lessons = run(images, targets, *lessons)
        optimizer.step()
        optimizer.zero_grad(set_to_none=graphs is None)


def separate_pass(
    model: torch.nn.Module,
    autocast: Callable[[], AbstractContextManager[object]],
    images: torch.Tensor,
    targets: torch.Tensor,
    *teacher: torch.Tensor,
) -> tuple[torch.Tensor]:
    """Gradients of a stock model's loss as of a step's widest or narrower width; its logits."""
    objective = Objective()
    with autocast():
        logits = model(images)
        loss = objective.narrow(logits, targets, *teacher, 1.0) if teacher else objective.full(logits, targets)
    loss.backward()
    return (logits.detach(),)


def rounded(value: Any, digits: int = 4) -> Any:
    """`value` with every float in it rounded, and every key a string."""
    if isinstance(value, dict):
        return {str(key): rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return round(value, digits) if isinstance(value, float) else value


def commit() -> str:
    """What was measured: git's word, or GIT_COMMIT of the environment where the files came without their history."""
    if given := os.environ.get("GIT_COMMIT"):
        return given

    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "src") else "")


def describe() -> dict[str, Any]:
    """Where and on what a measurement was taken."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": len(names) or None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "slicevit": slicevit.__version__,
    }


def finish(args: argparse.Namespace, claim: str, checks: Mapping[str, tuple[float, float]], figures: Any) -> None:
    """Print the JSON line that ends the run, and keep it with `--out`.

    checks: name -> (what was seen, the most it may be).
    """
    script = Path(sys.argv[0]).stem
    result = {
        "benchmark": script,
        "claim": claim,
        "passed": all(seen <= most for seen, most in checks.values()),
        "checks": {name: {"seen": seen, "at_most": most} for name, (seen, most) in checks.items()},
        "figures": figures,
        "options": {key: value for key, value in vars(args).items() if key != "out"},
        "machine": describe(),
    }
    line = json.dumps(rounded(result), default=str)
    if args.out:
        target = HERE / "results" / f"{script}-{result['machine']['date'][:10]}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(line + "\n")
        print(f"wrote {target}", file=sys.stderr)
    print(line)
