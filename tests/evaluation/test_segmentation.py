"""mIoU against counting by hand, and windows over images of any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slicevit.data.masks import VOID
from slicevit.evaluation.segmentation import evaluate_masks, whole_logits


def one_hot(classes_BHW: Tensor, num_classes: int) -> Tensor:
    return 10 * torch.nn.functional.one_hot(classes_BHW, num_classes).permute(0, 3, 1, 2).float()


def test_unions_are_over_all_images_and_void_does_not_count() -> None:
    masks = [torch.tensor([[[0, 0], [1, VOID]]]), torch.tensor([[[1, 1], [1, 1]]])]
    answers = {"a": [[[0, 1], [1, 2]]], "b": [[[1, 1], [0, 2]]]}
    batches = [(torch.full((1, 3, 2, 2), float(place)), mask) for place, mask in enumerate(masks)]

    def predictor(images: Tensor) -> Tensor:
        return one_hot(torch.tensor(answers["ab"[int(images[0, 0, 0, 0])]]), 4)

    score = evaluate_masks({"p": predictor}, batches, (2, 2), "cpu", 4)["p"]
    # class 0: 1 right, 2 in masks, 2 answered; 1: 3 right, 5 in masks, 4 answered; 2: answered on one pixel that counts
    assert score.ious == pytest.approx((100 / 3, 50.0, 0.0, None))
    assert score.miou == pytest.approx((100 / 3 + 50) / 3)
    assert score.pixel_accuracy == pytest.approx(100 * 4 / 7)
    assert score.images == 2
    wrong, right = 10 + torch.log1p(3 * torch.tensor(-10.0).exp()), torch.log1p(3 * torch.tensor(-10.0).exp())
    assert score.loss == pytest.approx(float(3 * wrong + 4 * right) / 7, rel=1e-4)


def test_images_without_a_class_are_refused() -> None:
    void = (torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), VOID))
    for batches in ([], [void]):
        with pytest.raises(ValueError, match="no pixel with a class"):
            evaluate_masks({"p": lambda images: images[:, :2]}, batches, (2, 2), "cpu", 2)


@pytest.mark.parametrize("shape", [(8, 8), (8, 21), (21, 8), (30, 17), (3, 9), (2, 2)])
def test_windows_cover_the_image_and_are_averaged(shape: tuple[int, int]) -> None:
    """A function of each pixel alone is the same from windows as from the whole."""
    image = torch.randn(1, 2, *shape)
    seen: list[Tensor] = []

    def predictor(window: Tensor) -> Tensor:
        assert window.shape[2:] == (8, 8)
        seen.append(window)
        return window * 2

    torch.testing.assert_close(whole_logits(predictor, image, (8, 8), shape), image * 2)
    assert len(seen) == (1 if max(shape) <= 8 else len(seen))


def test_logits_come_at_the_size_of_the_mask() -> None:
    assert whole_logits(lambda window: window, torch.ones(1, 2, 4, 4), (4, 4), (7, 5)).shape == (1, 2, 7, 5)
