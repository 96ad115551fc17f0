"""A saved model for the tests of the engine: small, with random weights."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import slicevit
from slicevit.checkpoint import save_pretrained
from slicevit.elastic import ElasticModel

SIZE, CLASSES = (1, 16, 16), 5
WIDTHS = ("1/4", "1/2", "3/4", "1")
LABELS = ("a", "b", "c", "d", "e")


def make(**settings: Any) -> slicevit.ElasticModel:
    """A ViT of one block whose grid has the widths 1/4, 1/2, 3/4, 1, in eval mode."""
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 8, "in_chans": 1, "embed_dim": 32, "depth": 1, "num_heads": 2}
    name = settings.pop("name", "vit_tiny_patch16_224")
    model = slicevit.create_model(name, "1/4:1:1/4", num_classes=CLASSES, **(small | settings)).eval()
    with torch.no_grad():  # biases start at zero, where a wrong one would not be seen
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(folder: Path, **settings: Any) -> Path:
    """That model in a folder."""
    save_pretrained(make(**settings), folder, label_names=list(LABELS))
    return folder


def images(count: int, seed: int = 0) -> torch.Tensor:
    """`count` random images (B, 1, 16, 16)."""
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(seed))


def expected(run: Path, images_BCHW: torch.Tensor, width: str) -> torch.Tensor:
    """What the saved model itself answers."""
    with torch.inference_mode():
        logits_BK: torch.Tensor = _opened(run, (run / "model.safetensors").stat().st_mtime_ns)(images_BCHW, width=width)
    return logits_BK


@lru_cache(maxsize=4)
def _opened(run: Path, written_ns: int) -> ElasticModel:
    return slicevit.from_pretrained(run)
