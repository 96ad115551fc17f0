"""What a training step costs, and how well it uses the device.

A step is four widths drawn as in training, optimizer included. Beside it, in the same run and in turns: one ordinary
timm step of the full width; four stock models' steps at the widths drawn; with `--published CLONE` the method's
published loop. With `--teacher` the step has a live teacher as large as the full width, whose forward pass counts as a
third of an ordinary step, and only the ordinary step is its measure. Every draw of a grid is a pair of middle widths;
the steps go round a list that holds every width equally often. The device's rate is that of a large matrix product in
the same type.
"""

import argparse
import math
import time
from contextlib import nullcontext
from fractions import Fraction
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import common
import published_loop
import timm
import torch
from torch._dynamo.utils import counters

import slicevit
from slicevit.compiling import allow_variants, compile_blocks
from slicevit.costs import model_input_size, width_costs
from slicevit.training.graphs import WARM_UP, Graphs
from slicevit.training.objectives import Objective
from slicevit.training.step import accumulate_gradients

OBJECTIVE = Objective()


class Bench:
    """The model, its stock counterparts and one batch on the device."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        kwargs = common.DEMO | {"embed_dim": 128} if args.small else {}
        self.model = slicevit.create_model(args.model, args.grid, **kwargs).to(self.device).train()
        self.kwargs = kwargs
        self.optimizer = self.adamw(self.model)
        self.graphs = Graphs(self.device) if args.cuda_graphs else None
        self.hold_gradients(self.model)
        self.images = torch.randn(args.batch, *model_input_size(self.model), device=self.device)
        self.targets = torch.randint(self.model.num_classes, (args.batch,), device=self.device)
        self.teacher = self.frozen() if args.teacher else None
        self.lesson = self.taught()
        self.macs = {width: width_costs(self.model, width).macs for width in self.model.widths}
        self.draws = draws(self.model.grid)
        self.separate: dict[Fraction, tuple[Any, Any]] = {}
        if args.compile:
            self.model.compile_blocks()
            allow_variants(2 * len(self.model.widths))

    def adamw(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=self.device.type == "cuda")

    def hold_gradients(self, model: torch.nn.Module) -> None:
        if self.graphs is not None:
            self.graphs.hold_gradients(model.parameters())

    def autocast(self) -> Any:
        return nullcontext() if self.args.amp == "off" else torch.autocast(self.device.type, torch.bfloat16)

    def stock(self, width: Fraction) -> tuple[Any, Any]:
        """A timm model of `width` and its optimizer."""
        if width not in self.separate:
            net = timm.create_model(self.args.model, **(self.kwargs | self.model.arguments(width)))
            net = net.to(self.device).train()
            if self.args.compile:
                compile_blocks(net, dynamic=False)
            self.hold_gradients(net)
            self.separate[width] = net, self.adamw(net)
        return self.separate[width]

    def frozen(self) -> torch.nn.Module:
        """A timm model of the full width that only answers."""
        net = timm.create_model(self.args.model, **self.kwargs)
        return net.to(self.device).eval().requires_grad_(False)

    def taught(self) -> torch.Tensor | None:
        """The teacher's logits (B, K), where there is one."""
        if self.teacher is None:
            return None
        with self.autocast(), torch.no_grad():
            return self.teacher(self.images)

    def accumulate(self, widths: tuple[Fraction, ...], lesson_BK: torch.Tensor | None) -> None:
        accumulate_gradients(
            self.model,
            self.images,
            self.targets,
            widths,
            OBJECTIVE,
            external_BK=lesson_BK,
            autocast=self.autocast,
            graphs=self.graphs,
        )

    def sliced_step(self, widths: tuple[Fraction, ...]) -> None:
        self.accumulate(widths, self.taught())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.graphs is None)

    def sliced_pass(self, width: Fraction) -> None:
        """Forward and backward of one width, on labels and what the teacher said."""
        self.accumulate((width,), self.lesson)

    def stock_steps(self, widths: tuple[Fraction, ...]) -> None:
        common.separate_step(map(self.stock, widths), self.images, self.targets, self.autocast, self.graphs)

    def timed(self, call: Any) -> float:
        """Milliseconds until the device is done."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return 1e3 * (time.perf_counter() - start)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self, call: Any) -> float | None:
        """GiB that the device held at most while `call` ran."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() / 2**30

    def device_rate(self) -> float:
        """Multiply-accumulates a second of a square matrix product in the type of the step."""
        size = 8192 if self.device.type == "cuda" else 1024
        kind = torch.bfloat16 if self.args.amp == "bf16" else torch.float32
        a = torch.randn(size, size, device=self.device, dtype=kind)
        return size**3 / (1e-3 * median(self.timed(lambda: a @ a) for _ in range(12)))


def draws(grid: slicevit.WidthGrid) -> list[tuple[Fraction, ...]]:
    """Steps that together hold each middle width of a half equally often, as Stable Sampling does on average."""
    between = list(grid)[1:-1]
    upper = [width for width in between if width > grid.midpoint]
    lower = [width for width in between if width <= grid.midpoint]
    pairs = list(product(upper, lower))
    if math.gcd(len(upper), len(lower)) == 1:  # a walk along the diagonal meets every pair once
        pairs = [(upper[i % len(upper)], lower[i % len(lower)]) for i in range(len(pairs))]
    return [(grid.largest, *pair, grid.smallest) for pair in pairs]


def measure(bench: Bench, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    full, timings = bench.model.grid.largest, {"sliced": {}, "separate": {}, "ordinary": {}, "published": {}}
    walk = [bench.draws[turn % len(bench.draws)] for turn in range(args.rounds)]
    published = published_loop.steps(args.published, args.model, bench.device) if args.published else None
    compiling = time.perf_counter()
    for widths in dict.fromkeys(walk):
        bench.sliced_step(widths)
    bench.wait()
    compiling = time.perf_counter() - compiling
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    for _ in range(WARM_UP):
        for widths in dict.fromkeys(walk):
            bench.sliced_step(widths)
        bench.stock_steps(tuple({width: None for widths in walk for width in widths}))
        bench.stock_steps((full,))
    if published:
        published(bench.images, bench.targets, 1)
    for turn, widths in enumerate(walk):
        calls = {
            "ordinary": lambda: bench.stock_steps((full,)),
            "sliced": lambda widths=widths: bench.sliced_step(widths),
            "separate": lambda widths=widths: bench.stock_steps(widths),
        }
        if published:
            calls["published"] = lambda: published(bench.images, bench.targets, 2)
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            timings[name].setdefault(widths, []).append(bench.timed(calls[name]))
    ms = {name: fmean(map(median, by_draw.values())) for name, by_draw in timings.items() if by_draw}
    macs = fmean(sum(bench.macs[width] for width in widths) for widths in walk) / bench.macs[full]
    macs += 1 / 3 if args.teacher else 0  # forward alone
    ratios = {"ordinary step": ms["sliced"] / ms["ordinary"], "four separate models": ms["sliced"] / ms["separate"]}
    figures = {
        "images a second": {"sliced": 1e3 * args.batch / ms["sliced"], "ordinary": 1e3 * args.batch / ms["ordinary"]},
        "ms a step": ms, "ratio": ratios, "ratio of MACs": macs,
        "first steps, seconds": compiling, "programs compiled": graphs, "fallbacks to eager": breaks,
    }  # fmt: skip
    checks = {
        "sliced against an ordinary step, by its share of MACs": (ratios["ordinary step"] / macs, 1.05),
    }
    if not args.teacher:
        checks["sliced against four separate models"] = (ratios["four separate models"], 0.95)
    if published:
        ratios["published loop"] = ms["sliced"] / (ms["published"] / 2)
        checks["sliced against the published loop"] = (ratios["published loop"], 0.5)
    return figures, checks


def utilisation(bench: Bench) -> dict[str, Any]:
    """Of every width: milliseconds forward and backward, and its share of the device's matrix rate (MFU)."""
    rate, rows = bench.device_rate(), {}
    for width in bench.model.widths:
        for _ in range(WARM_UP):
            bench.sliced_pass(width)
        ms = median(bench.timed(lambda width=width: bench.sliced_pass(width)) for _ in range(6))
        rows[width] = {"ms": ms, "mfu": 3 * bench.macs[width] * bench.args.batch / (1e-3 * ms) / rate}
    return {"device, 1e12 MACs a second": rate / 1e12, "widths": rows}


def main() -> None:
    parser = common.options(__doc__, rounds=60)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--grid", default="1/4:1:1/16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--amp", choices=("off", "bf16"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="compile each repeated block, on all sides")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay the passes, on all sides but the published")
    parser.add_argument("--small", action="store_true", help="28-pixel images and 128 channels, for a CPU")
    parser.add_argument("--published", type=Path, help="a clone of github.com/BeSpontaneous/Scala-pytorch")
    parser.add_argument("--teacher", action="store_true", help="with a live teacher, not beside --published")
    args = common.start(parser)
    if args.teacher and args.published:
        parser.error("--teacher and --published do not go together: the published step has no such teacher")
    bench = Bench(args)
    figures, checks = measure(bench, args)
    figures["utilisation"] = utilisation(bench)
    first = bench.draws[0]
    bench.separate.clear()  # what is held from here on is the sliced model's alone
    bench.graphs = None  # whose pool would count for every step
    bench.optimizer.zero_grad()
    memory = {
        "sliced": bench.peak(lambda: bench.sliced_step(first)),
        "full width alone": bench.peak(lambda: bench.sliced_step(first[:1])),
    }
    if memory["sliced"] is not None:
        figures["peak memory, GiB"] = memory
        checks["peak memory against the full width alone"] = (memory["sliced"] / memory["full width alone"], 1.15)
    common.finish(args, "cost of a training step and its use of the device", checks, figures)


if __name__ == "__main__":
    main()
