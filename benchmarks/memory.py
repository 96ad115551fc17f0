"""Resident memory of a DeiT-B that serves several widths: 1.35x with any one bound, 2.7x with all X = 13.

Counts the bytes of distinct storages that the model and its bound subnets hold, and the growth of the process's
resident set since before the model was made. Releasing must give back what binding took.
"""

import ctypes
import gc
import os
from collections.abc import Iterable
from pathlib import Path

import common
import timm
import torch

import slicevit
from slicevit.skeletons import own_parameters


def held(modules: Iterable[torch.nn.Module]) -> int:
    """Bytes of the distinct storages behind the parameters and buffers of `modules`."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
                if not tensor.is_meta}  # fmt: skip
    return sum(storages.values())


def resident() -> int:
    """Bytes of the resident set, free heap handed back to the system first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = common.options(__doc__, rounds=1)
    parser.add_argument("--model", default="deit_base_patch16_224")
    parser.add_argument("--grid", default="1/4:1:1/16")
    args = common.start(parser)
    if args.quick:
        args.model = "deit_tiny_patch16_224"

    slicevit.create_model("deit_tiny_patch16_224", args.grid).subnet("1/4")  # libraries are in place
    timm.create_model(args.model).eval()(torch.zeros(1, 3, 224, 224))  # and what a pass of a stock model leaves
    before = resident()
    model = slicevit.create_model(args.model, args.grid).eval()
    images = torch.zeros(1, *model.pretrained_cfg["input_size"])
    full = held([model])
    grown = {"full": resident() - before}
    one, one_resident = {}, {}
    with torch.inference_mode():
        for width in model.widths[::-1]:  # what a released subnet's own objects keep comes on top of the narrower ones
            subnet = model.subnet(width)
            subnet(images)
            one[width] = held([model, subnet]) / full
            one_resident[width] = (resident() - before) / full
            model.release(width)
        grown["each released"] = resident() - before
        subnets = [model.subnet(width) for width in model.widths]
        for subnet in subnets:
            subnet(images)
        bound = held([model, *subnets]) / full
        grown["all bound"] = resident() - before
        model.release()
        released = held([model, *subnets]) / full
        grown["released"] = resident() - before
    separate = sum(
        parameter.numel() * parameter.element_size()
        for width in model.widths
        for _, _, parameter in own_parameters(model.skeleton(width).module)
    )
    kept = (grown["released"] - grown["each released"]) / (grown["all bound"] - grown["each released"])
    resident_ratio = {name: bytes_ / full for name, bytes_ in grown.items()}
    figures = {
        "full, bytes": full,
        "storages, one bound": one,
        "resident set, one bound": one_resident,
        "storages, all bound": bound,
        "storages, released": released,
        "resident set": resident_ratio,
        "separate models (their parameters)": separate / full,
    }
    checks = {
        "any one bound, storages": (max(one.values()), 1.35),
        "any one bound, resident": (max(one_resident.values()), 1.35),
        "all bound, storages": (bound, 2.7),
        "all bound, resident": (resident_ratio["all bound"], 2.7),
        "released, storages": (released, 1.0),
        "kept after release, share of what was bound": (kept, 0.05),
    }
    common.finish(args, f"resident memory of {args.model}, against its full width alone", checks, figures)


if __name__ == "__main__":
    main()
