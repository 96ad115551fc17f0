"""(a) Inference through a subnet costs what a stock timm model of that width costs: at most 1.02x.

`bound` calls a subnet that the caller holds; `asked` calls `model.subnet(width)(images)` every time. Outputs are
compared bitwise first, so that both sides do the same work.
"""

from functools import partial

import common
import timm
import torch

import slicevit


def main() -> None:
    parser = common.options(__doc__, rounds=40)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--grid", default="1/4:1:1/4")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    args = common.start(parser)
    if args.quick:
        args.batch = [1]

    model = slicevit.create_model(args.model, args.grid).eval()
    stock = {}
    for width in model.widths:
        stock[width] = timm.create_model(args.model, **model.arguments(width)).eval()
        stock[width].load_state_dict(model.to_timm(width).state_dict())

    figures, checks = {}, {}
    with torch.inference_mode():
        for batch in args.batch:
            images = torch.randn(batch, *model.pretrained_cfg["input_size"])
            for width in model.widths:
                subnet = model.subnet(width)
                assert torch.equal(subnet(images), stock[width](images)), "the subnet computes something else"
                calls = {
                    "stock": partial(stock[width], images),
                    "bound": partial(subnet, images),
                    "asked": lambda width=width, images=images: model.subnet(width)(images),
                }
                took = common.alternate(calls, args.rounds, args.clock)
                ratios = {name: took[name] / took["stock"] for name in ("bound", "asked")}
                figures[f"batch {batch}, width {width}"] = {"ms": took, "ratio": ratios}
                checks |= {f"batch {batch}, width {width}, {name}": (ratios[name], 1.02) for name in ratios}
    common.finish(args, "inference through a subnet, against a stock timm model of that width", checks, figures)


if __name__ == "__main__":
    main()
