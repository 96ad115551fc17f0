"""Open-loop benchmark of `slicevit serve`: elastic widths against every fixed one, on three committed traces.

    python benchmarks/serving.py RUN --work runs/serving --out

The server runs on one core, the load generator on another; nothing else may run. Rates are multiples of the capacity of
the fixed full width, which is measured first. The first round measures every system on every trace. The later ones,
in another order, measure elastic, the narrowest and the full width, the widest fixed one that kept the target, and the
next wider one. Figures are medians over the rounds. What was measured is kept below --work: a stopped command goes on
when it is given again, and measures again the runs in which the load generator was late.
Ends with one JSON line; --out writes benchmarks/results/serving.json and .png as well.
The parts are in serving/.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from serving.bench import Bench
from serving.figures import ATTAINED, middle, sentences, verdict
from serving.picture import draw
from serving.traces import Trace, read_traces

from slicevit.files import write_text
from slicevit.runtime.engine import ENGINES

Runs = dict[str, dict[str, list[dict[str, Any]]]]  # by trace, by system: a dictionary of figures a round


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a JSON file holds, made first if it is not there."""
    if not path.exists():
        write_text(path, json.dumps(make()) + "\n")
    return dict(json.loads(path.read_text()))


def settled(file: Path) -> bool:
    """Whether a run was measured, and the load generator was in time."""
    return file.exists() and bool(json.loads(file.read_text())["valid"])


def measure(bench: Bench, traces: list[Trace], widths: list[str], capacity: float, rounds: int, work: Path) -> Runs:
    """All rounds."""
    runs: Runs = {trace.name: {} for trace in traces}
    systems = [*widths, "elastic"]
    for turn in range(rounds):
        first = turn * len(systems) // rounds
        for system in systems[first:] + systems[:first]:
            files = {trace: work / f"round{turn + 1}-{trace.name}-{system.replace('/', '-')}.json" for trace in traces}
            if missing := {trace: file for trace, file in files.items() if not settled(file)}:
                with bench.server(system) as server:
                    for trace, file in missing.items():
                        write_text(file, json.dumps(bench.replay(server, trace, capacity)) + "\n")
            for trace, file in files.items():
                found = json.loads(file.read_text())
                runs[trace.name].setdefault(system, []).append(found)
                say(f"round {turn + 1}, {trace.name}, {system}", found)
        systems = [*contenders(runs, widths), "elastic"]
    return runs


def contenders(runs: Runs, widths: list[str]) -> list[str]:
    """The fixed widths that are measured again, by their first round."""
    again = {widths[0], widths[-1]}
    for systems in runs.values():
        keep = [index for index, width in enumerate(widths) if systems[width][0]["attainment"] >= ATTAINED]
        again.update(widths[max(keep, default=0) :][:2])
    return [width for width in widths if width in again]


def say(what: str, found: dict[str, Any]) -> None:
    accuracy = ""
    if found["answered"]:
        accuracy = f"top-1 {found['top1_of_answered']:.2f} %, p99 {found['p99_ms']:.0f} ms, "
    print(
        f"{what}: {100 * found['attainment']:.2f} % of {found['requests']} in time, {accuracy}"
        f"{100 * found['shed']:.2f} % shed, sent within {found['lag_ms']:.1f} ms",
        file=sys.stderr,
        flush=True,
    )


def of_traces(traces: list[Trace], runs: Runs, widths: list[str], capacity: float) -> dict[str, Any]:
    """The figures of the JSON line, by trace."""
    found = {}
    for trace in traces:
        systems = {system: middle(runs[trace.name][system]) for system in [*widths, "elastic"]}
        rate = capacity * trace.rate(np.linspace(0, trace.seconds, 10_000, endpoint=False))
        found[trace.name] = {
            "trace": vars(trace),
            "rate_rps": {"mean": float(rate.mean()), "most": float(rate.max())},
            "systems": systems,
            "verdict": verdict(systems, widths),
            "series": runs[trace.name]["elastic"][0]["series"],
        }
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run of slicevit train, its data where it was")
    parser.add_argument("--work", type=Path, default=Path("runs/serving"), help="where measured runs are kept")
    parser.add_argument("--engine", choices=ENGINES, default="openvino")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--traces", nargs="+", help="some of those in benchmarks/serving/traces; default: all")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--load-core", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="4 s of each trace, 3 widths, 1 round: does it run?")
    parser.add_argument("--out", action="store_true", help="also write benchmarks/results/serving.json and .png")
    return parser.parse_args()


def main() -> None:
    args = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server ends too
    torch.set_num_threads(1)
    traces = read_traces(args.traces)
    if args.quick:
        traces, args.rounds = [trace.cut(4.0) for trace in traces], 1
    targets = {trace.target_ms for trace in traces}
    assert len(targets) == 1, "a server has one target"
    plan = {"run": str(args.run), "engine": args.engine, "traces": [vars(trace) for trace in traces]}
    if kept(args.work / "plan.json", lambda: plan) != json.loads(json.dumps(plan)):
        sys.exit(f"{args.work} holds what was measured of another run, engine or traces: give another --work")
    with tempfile.TemporaryDirectory(prefix="slicevit-serving-") as folder:
        bench = Bench(args, targets.pop(), Path(folder))
        if not (args.work / "capacity.json").exists():
            bench.profile(0.2 if args.quick else 1.0)
        found = kept(args.work / "capacity.json", lambda: bench.capacity(2.0 if args.quick else 15.0))
        widths = [row["width"] for row in found["model"]["widths"]]
        if args.quick:
            widths = [widths[0], widths[len(widths) // 2], widths[-1]]
        runs = measure(bench, traces, widths, found["capacity_rps"], args.rounds, args.work)
    shown = of_traces(traces, runs, widths, found["capacity_rps"])
    verdicts = [of_trace["verdict"] for of_trace in shown.values()]
    result = {
        "benchmark": "serving",
        "claim": "elastic widths keep a target that the full width misses, with more accuracy than a narrow one has",
        "passed": found["conditions"]["held"] and any(v["attains"] and v["gains"] and v["valid"] for v in verdicts),
        **found,
        "widths": widths,
        "figures": shown,
        "options": {key: value for key, value in vars(args).items() if key != "out"},
        "machine": common.describe(),
    }
    line = json.dumps(common.rounded(result), default=str)
    for place in [args.work] + ([common.HERE / "results"] if args.out else []):
        write_text(place / "serving.json", line + "\n")
        draw(result, place / "serving.png")
        print(f"wrote {place / 'serving.json'} and .png", file=sys.stderr)
    print("\n".join(sentences(result)), file=sys.stderr)
    print(line)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
