"""Losses over pixels against those of a classifier whose images are the pixels."""

from __future__ import annotations

import pytest
import torch

from slicevit.training.objectives import Objective
from slicevit.training.pixels import VOID, PixelObjective, by_pixel, pixel_loss


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 3, 4, generator=random)
    return student, teacher, torch.randint(5, (2, 3, 4), generator=random)


@pytest.mark.parametrize("calibration", [True, False])
@pytest.mark.parametrize("transfer", ["next", "full", "off"])
def test_a_pixel_counts_as_an_image_does(transfer: str, calibration: bool) -> None:
    student, teacher, targets = drawn()
    settings = {"transfer": transfer, "calibration": calibration, "smoothing": 0.1}
    pixels, images = PixelObjective(**settings), Objective(**settings)  # type: ignore[arg-type]
    flat = by_pixel(student), targets.flatten()
    torch.testing.assert_close(pixels.full(student, targets, None), images.full(*flat, None))
    torch.testing.assert_close(
        pixels.narrow(student, targets, teacher, 0.5), images.narrow(*flat, by_pixel(teacher), 0.5)
    )


def test_void_pixels_have_no_labels_but_are_taught() -> None:
    student, teacher, targets = drawn()
    half = targets.clone()
    half[1] = VOID
    torch.testing.assert_close(pixel_loss(student, half), pixel_loss(student[:1], targets[:1]))
    torch.testing.assert_close(pixel_loss(student, half, 0.1), pixel_loss(student[:1], targets[:1], 0.1))
    nothing = torch.full_like(targets, VOID)
    assert float(pixel_loss(student, nothing)) == 0.0
    objective = PixelObjective()
    assert float(objective.narrow(student, nothing, teacher, 1.0)) > 0.1


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher, targets = drawn()
    student.requires_grad_()
    teacher.requires_grad_()
    PixelObjective().narrow(student, targets, teacher, 1.0).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_teacher_of_images_is_refused() -> None:
    student, _, targets = drawn()
    with pytest.raises(ValueError, match="no answers for pixels"):
        PixelObjective().full(student, targets, torch.zeros(2, 5))
