"""(c) The mean step over all width draws costs at X = 25 at most 1.10x of what it costs at X = 4.

Whole training steps of both grids alternate. The m1 and m2 of the fine grid go round their ranges, 12 and 11 long,
and the time of each width is taken inside the step, from its forward pass to the next width's. As m1 and m2 are
drawn independently and uniformly, the mean over all draws is exactly full + smallest + mean over m2 + mean over m1
+ optimizer, each the median of its rounds.
"""

from collections import defaultdict
from contextlib import nullcontext
from fractions import Fraction
from statistics import fmean, median

import common
import torch

import slicevit
from slicevit.training.objectives import Objective
from slicevit.training.step import accumulate_gradients

CASES = {
    "deit": ("deit_small_patch16_224", {}, 2),
    "small": ("vit_tiny_patch16_224", common.DEMO | {"embed_dim": 128, "num_heads": 4}, 64),
}
OBJECTIVE = Objective()


class Stepper:
    """Runs training steps on one grid and notes what each width, and the optimizer, took."""

    def __init__(self, name: str, grid: str, kwargs: dict[str, object], batch: int, clock: str):
        self.model = slicevit.create_model(name, grid, **kwargs).train()
        self.now = common.CLOCKS[clock]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.05)
        shape = (kwargs["in_chans"], kwargs["img_size"], kwargs["img_size"]) if kwargs else (3, 224, 224)
        self.images = torch.randn(batch, *shape)
        self.targets = torch.randint(self.model.num_classes, (batch,))
        grid_, between = self.model.grid, self.model.widths[1:-1]
        self.upper = [width for width in between if width > grid_.midpoint]
        self.lower = [width for width in between if width <= grid_.midpoint]
        self.timings: dict[Fraction | str, list[float]] = defaultdict(list)
        self.turn = 0

    def step(self) -> None:
        m2, m1 = self.upper[self.turn % len(self.upper)], self.lower[self.turn % len(self.lower)]
        widths = (self.model.grid.largest, m2, m1, self.model.grid.smallest)
        stamps: list[float] = []

        def stamp() -> nullcontext[None]:  # the step enters `autocast` once for each width
            stamps.append(self.now())
            return nullcontext()

        accumulate_gradients(self.model, self.images, self.targets, widths, OBJECTIVE, autocast=stamp)
        stamps.append(self.now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        stamps.append(self.now())
        for part, begin, end in zip((*widths, "optimizer"), stamps, stamps[1:], strict=False):
            self.timings[part].append((end - begin) * 1000)
        self.turn += 1

    def mean_step(self) -> dict[str, float]:
        """Milliseconds of each part of the mean step over all draws, and of the whole."""
        took = {part: median(values) for part, values in self.timings.items()}
        parts = {
            "full": took[self.model.grid.largest],
            "m2": fmean(took[width] for width in self.upper),
            "m1": fmean(took[width] for width in self.lower),
            "smallest": took[self.model.grid.smallest],
            "optimizer": took["optimizer"],
        }
        return parts | {"step": sum(parts.values())}


def main() -> None:
    parser = common.options(__doc__, rounds=120)
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--batch", type=int, help="images a step; default: deit 2, small 64")
    args = common.start(parser)
    if args.quick:
        args.rounds = 12

    figures, checks = {}, {}
    for case in args.case:
        name, kwargs, batch = CASES[case]
        batch = args.batch or (1 if args.quick else batch)
        steppers = {x: Stepper(name, grid, kwargs, batch, args.clock) for x, grid in (
            (4, "1/4:1:1/4"), (25, "1/4:1:1/32"),
        )}  # fmt: skip
        assert {x: len(stepper.model.widths) for x, stepper in steppers.items()} == {4: 4, 25: 25}
        for stepper in steppers.values():  # warm-up
            stepper.step()
            stepper.timings.clear()
        common.alternate({str(x): stepper.step for x, stepper in steppers.items()}, args.rounds, args.clock, warmup=0)
        parts = {x: stepper.mean_step() for x, stepper in steppers.items()}
        ratio = parts[25]["step"] / parts[4]["step"]
        per_width = {width: median(values) for width, values in sorted(
            item for item in steppers[25].timings.items() if item[0] != "optimizer"
        )}  # fmt: skip
        figures[f"{case}, batch {batch}"] = {"ms of the mean step": parts, "ratio": ratio, "ms by width": per_width}
        checks[f"{case}, batch {batch}"] = (ratio, 1.10)
    common.finish(args, "the mean step over all width draws at X = 25, against X = 4", checks, figures)


if __name__ == "__main__":
    main()
