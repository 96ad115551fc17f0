"""`torch.compile` by repeated block: the blocks of a stack are one program, so a width is compiled once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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


def compile_blocks(module: nn.Module, **options: Any) -> None:
    """Compile every repeated block of `module` in place; `options` are those of torch.compile."""
    for block in repeated_blocks(module):
        block.compile(**options)


def allow_variants(widths: int) -> None:
    """Let torch keep a program for each of `widths` widths, for training and evaluation, with and without gradients."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * widths)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 64 * widths)
