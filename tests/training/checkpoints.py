"""What is in a run's checkpoint, so that two can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def read_checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoint.pt", weights_only=True)


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Everything in a checkpoint by its place, tensors as (dtype, shape, bytes)."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in leaves(value, f"{path}/{key!r}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, value in enumerate(tree) for k, v in leaves(value, f"{path}/{i}").items()}
    if isinstance(tree, torch.Tensor):
        return {path: (tree.dtype, tuple(tree.shape), tree.contiguous().numpy().tobytes())}
    return {path: tree}
