"""An axis of unequal parts, and one whose channels timm rounds."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from slicevit import exactness
from slicevit.slicing import Rule, make_plan

HALF = Fraction(1, 2)
PARTS = Rule(parts=(0, (4, 8, 3), (2, 4, 3)))


@pytest.mark.parametrize(
    ("end", "rows"), [("leading", [0, 1, 4, 5, 6, 7, 12, 13, 14]), ("trailing", [2, 3, 8, 9, 10, 11, 12, 13, 14])]
)
def test_each_part_gives_its_own_end(end: str, rows: list[int]) -> None:
    full = torch.arange(15 * 6.0).reshape(15, 6)
    cut = make_plan({"p": (15, 6)}, {"p": (9, 3)}, {"p": PARTS}, HALF, end)["p"]  # type: ignore[arg-type]
    columns = slice(0, 3) if end == "leading" else slice(3, 6)
    assert torch.equal(cut(full), full[rows][:, columns])
    for window, part in zip(cut.windows(full), cut.parts_of(cut(full)), strict=True):
        assert torch.equal(window, part)
        assert window.untyped_storage().data_ptr() == full.untyped_storage().data_ptr()


def test_gradients_go_where_autograd_brings_them() -> None:
    cut = make_plan({"p": (15, 6)}, {"p": (9, 3)}, {"p": PARTS}, HALF, "leading")["p"]
    full, weights = torch.randn(15, 6, requires_grad=True), torch.randn(9, 3)
    (cut(full) * weights).sum().backward()
    other = full.detach().clone().requires_grad_()
    for window, part in cut.gradients(other, weights):
        window.add_(part)
    assert torch.equal(full.grad, other.grad)  # type: ignore[arg-type]


def test_parts_that_do_not_make_the_axis_are_refused() -> None:
    with pytest.raises(ValueError, match="p: its axis 0"):
        make_plan({"p": (16, 6)}, {"p": (9, 3)}, {"p": PARTS}, HALF, "leading")


def test_a_rounded_axis_gives_its_first_channels_and_cannot_grow() -> None:
    rounded = {"p": Rule(rounded=True)}
    full = torch.arange(10.0)
    assert torch.equal(make_plan({"p": (10,)}, {"p": (8,)}, rounded, HALF, "leading")["p"](full), full[:8])
    assert torch.equal(make_plan({"p": (10,)}, {"p": (8,)}, rounded, HALF, "trailing")["p"](full), full[2:])
    with pytest.raises(ValueError, match="cannot become 12"):
        make_plan({"p": (10,)}, {"p": (12,)}, rounded, HALF, "leading")
    with pytest.raises(ValueError, match="is not 1/2 of it"):
        make_plan({"p": (10,)}, {"p": (8,)}, {}, HALF, "leading")


@pytest.mark.parametrize("name", ["focalnet_tiny_srf", "levit_128s", "mambaout_femto"])
def test_a_training_step_gives_the_gradients_of_a_call(name: str, one_thread: None) -> None:
    model, images = exactness.small_model(name)
    model.eval()
    width = model.widths[0]
    model(images, width=width).square().sum().backward()
    expected = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    with model.backward_at(width) as narrow:
        narrow(images).square().sum().backward()
    for key, value in model.named_parameters():
        if key in expected:
            torch.testing.assert_close(
                value.grad, expected[key], rtol=1e-5, atol=1e-6 * float(expected[key].abs().max())
            )


def test_kept_attention_biases_follow_their_parameters(one_thread: None) -> None:
    """LeViT keeps its biases in eval mode; a call and a subnet after a change of the weights use the new ones."""
    model, images = exactness.small_model("levit_128s")
    width = model.widths[0]
    with torch.no_grad():
        model(images, width=width), model.subnet(width)(images)
        exactness.fill(model, seed=3)
        expected = model.to_timm(width)(images)
        assert torch.equal(model(images, width=width), expected)
        assert torch.equal(model.subnet(width)(images), expected)
