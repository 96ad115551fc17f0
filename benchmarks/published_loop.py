"""The method's published training loop, run as it is from a clone of its repository, for `train_throughput.py`."""

import contextlib
import importlib
import io
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch


def steps(clone: Path, model_name: str, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor, int], None]:
    """A function that runs so many of the published steps on one batch: X = 13, KL to the next larger width.

    Raises SystemExit when `clone` is no clone of github.com/BeSpontaneous/Scala-pytorch.
    """
    if not (clone / "engine_scala.py").exists():
        sys.exit(f"--published {clone}: no engine_scala.py there; clone github.com/BeSpontaneous/Scala-pytorch")
    sys.path.insert(0, str(clone))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = importlib.import_module("engine_scala")
        models = importlib.import_module("models_scala")
    engine.random = SimpleNamespace(randint=lambda low, high: random.randint(int(low), int(high)))  # it gives floats
    model = getattr(models, f"{model_name}_scala")(num_classes=1000).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    if device.type != "cuda":
        torch.cuda.synchronize = lambda *args: None  # which the loop calls, and which fails without a GPU
    cross_entropy = torch.nn.CrossEntropyLoss()

    def run(images: torch.Tensor, targets: torch.Tensor, count: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.train_one_epoch(
                0, "none", 1.0, 1.0, 0.25, 0.0625, "one_hot", "soft", "PKT", "cls_token", model,
                lambda samples, outputs, labels: cross_entropy(outputs, labels), [(images, targets)] * count,
                optimizer, device, 1, scaler, args=SimpleNamespace(cosub=False, bce_loss=False),
            )  # fmt: skip

    return run
