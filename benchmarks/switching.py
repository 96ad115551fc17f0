"""(d) Alternating two bound widths costs at most 1.01x of staying on each; binding at most 25 % of a pass.

`switch` runs two widths in turn, `stay` the same number of passes of one and then of the other. `bind` is
`model.subnet(width)` after `model.release(width)`, its skeleton built, against that width's own batch-1 pass.
"""

from functools import partial
from itertools import combinations

import common
import torch

import slicevit


def run(subnets: list[torch.nn.Module], images: torch.Tensor) -> None:
    for subnet in subnets:
        subnet(images)


def main() -> None:
    parser = common.options(__doc__, rounds=30)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--grid", default="1/4:1:1/4")
    parser.add_argument("--passes", type=int, default=6, help="passes of each of the two widths a round")
    args = common.start(parser)

    model = slicevit.create_model(args.model, args.grid).eval()
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    widths = model.widths[:2] if args.quick else model.widths
    figures, checks = {"switching": {}, "binding": {}}, {}
    with torch.inference_mode():
        for pair in combinations(widths, 2):
            one, other = map(model.subnet, pair)
            calls = {
                "stay": partial(run, [one] * args.passes + [other] * args.passes, images),
                "switch": partial(run, [one, other] * args.passes, images),
            }
            took = common.alternate(calls, args.rounds, args.clock)
            name, ratio = f"{pair[0]} and {pair[1]}", took["switch"] / took["stay"]
            figures["switching"][name] = {"ms": took, "ratio": ratio}
            checks[f"switching {name}"] = (ratio, 1.01)
        for width in widths:
            subnet = model.subnet(width)
            took = common.alternate(
                {"pass": partial(subnet, images), "bind": partial(model.subnet, width)},
                args.rounds,
                args.clock,
                setup={"pass": partial(model.subnet, width), "bind": partial(model.release, width)},
            )
            ratio = took["bind"] / took["pass"]
            figures["binding"][width] = {"ms": took, "ratio": ratio}
            checks[f"binding {width}"] = (ratio, 0.25)
    common.finish(args, "switching between bound widths, and binding one", checks, figures)


if __name__ == "__main__":
    main()
