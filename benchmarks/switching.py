"""(d) Alternating two bound widths costs at most 1.01x of alternating two models; binding at most 25 % of a pass.

Passes run in the order A A B B A A B B …: every other pass comes after one of the same width (`stay`), the ones
between after one of the other width (`switch`), so that both see the same machine. Two models in turn also push
each other's weights out of the caches: `stock` is what two separate timm models of those widths lose by it. `bind` is
`model.subnet(width)` after `model.release(width)`, its skeleton built, against that width's own batch-1 pass.
"""

from functools import partial
from itertools import combinations
from statistics import median

import common
import torch

import slicevit

Pair = tuple[torch.nn.Module, torch.nn.Module]


def passes(pairs: dict[str, Pair], images: torch.Tensor, rounds: int, clock: str) -> dict[str, dict[str, float]]:
    """Milliseconds of a pass of both of a pair, each the median of its own, after the same and after the other."""
    now = common.CLOCKS[clock]
    timings = {name: {"switch": ([], []), "stay": ([], [])} for name in pairs}
    for round_ in range(rounds):
        for name, pair in pairs.items():
            pair[1](images)
            for _ in range(2):
                for index, net in enumerate(pair):
                    for kind in ("switch", "stay"):
                        start = now()
                        net(images)
                        if round_:
                            timings[name][kind][index].append(1e3 * (now() - start))
    return {name: {kind: sum(map(median, both)) for kind, both in kinds.items()} for name, kinds in timings.items()}


def main() -> None:
    parser = common.options(__doc__, rounds=60)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--grid", default="1/4:1:1/4")
    args = common.start(parser)

    model = slicevit.create_model(args.model, args.grid).eval()
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    widths = model.widths[:2] if args.quick else model.widths
    stock = {width: model.to_timm(width).eval() for width in widths}
    figures, checks = {"switching": {}, "binding": {}}, {}
    with torch.inference_mode():
        for pair in combinations(widths, 2):
            pairs = {"bound": tuple(map(model.subnet, pair)), "stock": tuple(map(stock.__getitem__, pair))}
            took = passes(pairs, images, args.rounds, args.clock)
            ratio = {kind: ms["switch"] / ms["stay"] for kind, ms in took.items()}
            name = f"{pair[0]} and {pair[1]}"
            figures["switching"][name] = {"ms": took, "ratio": ratio}
            checks[f"switching {name}"] = (ratio["bound"] / ratio["stock"], 1.01)
        for width in widths:
            subnet = model.subnet(width)
            took = common.alternate(
                {"pass": partial(subnet, images), "bind": partial(model.subnet, width)},
                args.rounds // 2,
                args.clock,
                setup={"pass": partial(model.subnet, width), "bind": partial(model.release, width)},
            )
            ratio = took["bind"] / took["pass"]
            figures["binding"][width] = {"ms": took, "ratio": ratio}
            checks[f"binding {width}"] = (ratio, 0.25)
    common.finish(args, "switching between bound widths, and binding one", checks, figures)


if __name__ == "__main__":
    main()
