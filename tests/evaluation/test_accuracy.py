import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slicevit.evaluation.accuracy import correct_per_image, evaluate


def batches_of(logits_NK: Tensor, targets_N: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches whose "images" are the logits, so that a predictor can be written down."""
    return list(zip(logits_NK.split(size), targets_N.split(size), strict=True))


def test_hand_computed() -> None:
    ranks = torch.arange(7.0)
    logits = torch.stack([ranks, ranks, ranks, ranks])
    targets = torch.tensor([6, 2, 1, 6])  # best; fifth best; sixth best; best
    scores = evaluate({"as is": lambda x: x, "reversed": lambda x: -x}, batches_of(logits, targets, 3), "cpu", 7)
    assert scores["as is"].top1 == 50
    assert scores["as is"].top5 == 75
    assert scores["reversed"].top1 == 0
    assert scores["reversed"].top5 == 50
    assert scores["as is"].images == 4
    total = math.log(sum(math.exp(rank) for rank in range(7)))
    assert scores["as is"].loss == pytest.approx(total - (6 + 2 + 1 + 6) / 4, rel=1e-6)


def test_fewer_than_five_classes_counts_them_all() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    score = evaluate({"a": lambda x: x}, batches_of(logits, torch.tensor([0, 2]), 2), "cpu", 3)["a"]
    assert (score.top1, score.top5) == (50, 100)


def test_one_pass_and_progress() -> None:
    passes = []

    def once() -> Iterator[tuple[Tensor, Tensor]]:
        passes.append(1)
        yield from batches_of(torch.randn(10, 6), torch.arange(10) % 6, 4)

    seen: list[int] = []
    scores = evaluate({"a": lambda x: x, "b": lambda x: x}, once(), "cpu", 6, seen.append)
    assert passes == [1]
    assert seen == [4, 4, 2]
    assert scores["a"] == scores["b"]


def test_predictors_run_in_inference_mode() -> None:
    weight = torch.ones(3, 3, requires_grad=True)
    modes = []

    def predictor(x: Tensor) -> Tensor:
        modes.append(torch.is_inference_mode_enabled())
        return x @ weight

    data = batches_of(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), 2)
    evaluate({"a": predictor}, data, "cpu", 3)
    correct_per_image(predictor, data, "cpu")
    assert all(modes)


def test_the_host_never_waits_between_batches() -> None:
    """No tensor is read on the host before the data is used up."""
    finished = False

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            assert finished or func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal finished
        yield from batches_of(torch.randn(6, 8), torch.arange(6), 2)
        finished = True

    with NoReads():
        assert evaluate({"a": lambda x: x}, data(), "cpu", 8)["a"].images == 6


def test_correct_per_image_keeps_the_order_and_agrees_with_evaluate() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(50, 4, generator=generator), torch.randint(4, (50,), generator=generator)
    data = batches_of(logits, targets, 7)
    correct = correct_per_image(lambda x: x, data, "cpu")
    assert correct.dtype == torch.bool
    assert correct.tolist() == (logits.argmax(1) == targets).tolist()
    assert 100 * correct.float().mean().item() == pytest.approx(evaluate({"a": lambda x: x}, data, "cpu", 4)["a"].top1)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no images"):
        evaluate({"a": lambda x: x}, [], "cpu", 3)
    with pytest.raises(ValueError, match="no images"):
        correct_per_image(lambda x: x, [], "cpu")
    with pytest.raises(ValueError, match=r"'narrow'.*num_classes is 10"):
        evaluate({"narrow": lambda x: x}, [(torch.randn(2, 3), torch.tensor([0, 1]))], "cpu", 10)
