"""`torch.compile` by repeated block: the blocks of a stack are one program, so a width is compiled once."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of every innermost stack: the children, all of one class, of a Sequential or ModuleList.

    A ViT's `blocks`; the blocks of every stage of a Swin or PVT.
    """
    stacks = {name: owner for name, owner in module.named_modules() if _is_stack(owner)}
    innermost = [name for name in stacks if not any(other.startswith(f"{name}.") for other in stacks)]
    return [block for name in innermost for block in stacks[name].children()]


def _is_stack(module: nn.Module) -> bool:
    children = list(module.children())
    if not isinstance(module, (nn.Sequential, nn.ModuleList)) or not children:
        return False
    return len({type(child) for child in children}) == 1 and any(True for _ in children[0].parameters())


class _DropPath(DropPath):
    """timm's stochastic depth with its rate in a tensor. A number would be a constant of the program: one a block."""

    keep: Tensor

    def __init__(self, rate: float, scale_by_keep: bool):
        super().__init__(rate, scale_by_keep)
        self.register_buffer("keep", torch.tensor(1 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.bernoulli(self.keep.expand(len(x), *[1] * (x.ndim - 1)))
        return x * (kept / self.keep if self.scale_by_keep else kept).to(x.dtype)


def _share_drop_paths(blocks: list[nn.Module], device: torch.device) -> None:
    """Let blocks differ in tensors alone: timm's first has no stochastic depth, the others a rate of their own."""
    paths = {name: part for block in blocks for name, part in block.named_modules() if isinstance(part, DropPath)}
    for block in blocks:
        for name, like in paths.items():
            owner, _, child = name.rpartition(".")
            part = getattr(block.get_submodule(owner), child, None)
            if isinstance(part, (DropPath, nn.Identity)):
                rate = float(part.drop_prob or 0.0) if isinstance(part, DropPath) else 0.0
                setattr(block.get_submodule(owner), child, _DropPath(rate, like.scale_by_keep).to(device))


def compile_blocks(module: nn.Module, **options: Any) -> None:
    """Compile every repeated block of `module` in place; `options` are those of torch.compile.

    Stochastic depth draws as timm's does, but other numbers.
    """
    blocks = repeated_blocks(module)
    devices = [parameter.device for parameter in module.parameters() if not parameter.is_meta]
    _share_drop_paths(blocks, devices[0] if devices else torch.device("cpu"))
    for block in blocks:
        block.compile(**options)


def allow_variants(widths: int) -> None:
    """Let torch keep a program for each of `widths` widths, for training and evaluation, with and without gradients."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * widths)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 64 * widths)
