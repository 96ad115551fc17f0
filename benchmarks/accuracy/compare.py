"""The paper's comparison end to end: every method under the same data, epochs, learning-rate search and seeds.

    python benchmarks/accuracy/compare.py --scale cpu --work runs/compare --jobs 2
    python benchmarks/accuracy/compare.py --scale gpu --data FOLDER --work runs/compare-gpu --jobs 1 --only main

Every run is a folder below --work: a run that is there is not trained again, one that was stopped goes on. The rows
of the main table are trained with seed 0 at every learning rate, and at a further one where the best is the lowest or
the highest; the best mean top-1 over 1/4, 1/2, 3/4, 1 gives the rate of the other seeds. The other rows take the rate
that Scala found on their grid (those of the method `rotated`, that of separate training), and seed 0. What a
row needs of others (their search, a teacher) is trained first. The table and the picture are written anew from
whatever is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from common_runs import Job, done, mean_top1, run_all, run_folder
from compare_rows import SCALES, Row, table_parts, table_rows
from compare_table import write_table

from slicevit.files import write_text
from slicevit.training.config import TrainConfig
from slicevit.training.methods import part_folder


class Comparison:
    """The runs of a comparison below `work`, by row, learning rate and seed; `plan` is what they share."""

    def __init__(self, work: Path, plan: dict[str, Any]):
        self.work, self.plan, self.scale = work, plan, SCALES[plan["scale"]]
        self.base = replace(self.scale.base(plan["data"]), epochs=plan["epochs"])
        self.rows = table_rows(self.scale, self.base, plan["epochs"])
        self.parts = table_parts(self.scale)
        self.rates: list[float] = plan["rates"]

    def folder(self, name: str, rate: float, seed: int) -> Path:
        """Where a run lies."""
        return run_folder(self.work, name, rate, seed)

    def search(self, name: str) -> dict[float, float | None]:
        """Mean top-1 of seed 0 by the learning rates of the row's search; None where not trained yet.

        Where the best rate is the lowest or the highest, the search goes on beyond it, `widen` times at most.
        """
        found = {rate: self.mean(name, rate) for rate in sorted(self.rates)}
        for _ in range(self.plan["widen"]):
            best = best_of(found)
            if best not in (min(found), max(found)):
                break
            further = best / 2 if best == min(found) else best * 2
            found = dict(sorted((found | {further: self.mean(name, further)}).items()))
        return found

    def mean(self, name: str, rate: float) -> float | None:
        """Mean top-1 of the run with seed 0."""
        folder = self.folder(name, rate, 0)
        return mean_top1(folder) if done(folder) else None

    def rate(self, name: str) -> float | None:
        """The best rate of the row's own search, else of the row that it takes it from; None while neither is done."""
        best = best_of(self.search(name))
        source = self.rows[name].rate_of
        return self.rate(source) if best is None and source else best

    def jobs(self, name: str, seeds: list[int] | None, search: bool) -> Iterator[Job]:
        """The runs of a row that can be made now, or those that it waits for."""
        row = self.rows[name]
        searched = row.rate_of is None or search
        needed = [row.rate_of] if not searched else []
        needed += ["separate"] if row.taught or row.tuned else []
        waiting = [other for other in needed if self.rate(other) is None]
        for other in waiting:
            yield from (self.job(other, rate, 0) for rate in self.search(other))
        if waiting:
            return
        if searched:
            yield from (self.job(name, rate, 0) for rate in self.search(name))
        rate = best_of(self.search(name)) if searched else self.rate(name)
        if rate is not None:
            default = self.scale.seeds[: None if searched else 1]
            yield from (self.job(name, rate, seed) for seed in seeds or default)

    def job(self, name: str, rate: float, seed: int) -> Job:
        """One run."""
        return Job(self.config(self.rows[name], rate, seed), self.folder(name, rate, seed))

    def config(self, row: Row, rate: float, seed: int) -> TrainConfig:
        """The scale's configuration with the row's changes."""
        config = replace(self.base, lr=rate, seed=seed, **row.changes)
        if not row.taught and not row.tuned:
            return config
        best = self.rate("separate")
        assert best is not None
        full = str(part_folder(self.folder("separate", best, 0), "1"))
        return replace(config, teacher=full) if row.taught else replace(config, init=full)


def best_of(search: dict[float, float | None]) -> float | None:
    """The best rate of a search; None while it is not done."""
    top1 = {rate: mean for rate, mean in search.items() if mean is not None}
    return max(top1, key=lambda rate: top1[rate]) if len(top1) == len(search) else None


def make_plan(args: argparse.Namespace) -> dict[str, Any]:
    """What all runs of --work share, as its first command said. Exits when this one says otherwise."""
    path = args.work / "comparison.json"
    given = {name: getattr(args, name) for name in ("scale", "epochs", "data", "rates", "widen")}
    given = {key: value for key, value in given.items() if value is not None}
    kept = json.loads(path.read_text()) if path.exists() else {}
    if other := [f"--{key} {kept[key]}" for key in given if key in kept and kept[key] != given[key]]:
        sys.exit(f"{args.work} holds runs with {', '.join(other)}: leave that out, or name another --work")
    scale = SCALES[(given | kept).get("scale", "cpu")]
    default = {"scale": "cpu", "epochs": scale.epochs, "data": scale.data, "rates": list(scale.rates), "widen": 1}
    plan = default | kept | given
    if plan["data"] is None:
        sys.exit(f"--scale {plan['scale']} needs --data FOLDER with train/ and val/ of class folders")
    args.work.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(plan) + "\n")
    return plan


def chosen(comparison: Comparison, only: list[str]) -> list[str]:
    """The rows that parts and rows in `only` name; every part, as the scale has them, without any."""
    names: list[str] = []
    for name in only or comparison.parts:
        if name == "main":
            names += comparison.scale.main
        elif name in comparison.parts:
            names += comparison.parts[name].rows
        elif name in comparison.rows:
            names.append(name)
        else:
            sys.exit(f"--only {name}: there are {', '.join([*comparison.parts, *comparison.rows])}")
    return list(dict.fromkeys(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/compare"))
    parser.add_argument("--scale", choices=SCALES, help="default: cpu")
    parser.add_argument("--data", help="folder of images, for another data set than the scale's")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="parts or rows; default: all parts")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; 0 only writes the table")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2 where a row has its own search, else 0")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates of the search")
    parser.add_argument("--widen", type=int, help="further rates where the best is at an end of the search; default: 1")
    parser.add_argument("--search", action="store_true", help="search the rate of every row")
    parser.add_argument("--epochs", type=float, help="fewer, to try the script")
    parser.add_argument("--out", type=Path, help="also write the JSON line there, and table and picture beside it")
    args = parser.parse_args()
    comparison = Comparison(args.work, make_plan(args))
    names = chosen(comparison, args.only)

    def ready() -> Iterator[Job]:
        for name in names:
            yield from comparison.jobs(name, args.seeds, args.search)

    failed = run_all(ready, args.jobs) if args.jobs else []
    write_table(comparison, args.out)
    if failed:
        sys.exit(f"failed: {', '.join(folder.name for folder in failed)}")


if __name__ == "__main__":
    main()
