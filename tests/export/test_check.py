"""The verdicts on an artefact: how far its logits may be off, and how much accuracy it may lose."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slicevit.evaluation.figures import MIOU
from slicevit.export.check import ROUNDING, Checked, Comparison

Predictor = Callable[[Tensor], Tensor]
IMAGES = torch.randn(20, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def compared(source: Predictor, artefact: Predictor, images: Tensor = IMAGES, size: int = 16) -> Comparison:
    """Over all images in batches of `size`; the right class is the source's, but for the first image."""
    comparison = Comparison(source, artefact)
    targets = source(images).argmax(1)
    targets[0] = source(images)[0].argmin()
    for batch, classes in zip(images.split(size), targets.split(size), strict=True):
        comparison.add(batch, classes)
    return comparison


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_allowed_difference_is_relative(scale: float) -> None:
    source: Predictor = lambda x: x.flatten(1) * scale  # noqa: E731
    largest = float(source(IMAGES).abs().max())
    parity = compared(source, lambda x: source(x) + 0.9e-4 * largest).exact("odd").parity
    assert parity.max_abs_error == pytest.approx(0.9e-4 * largest, rel=1e-2)
    assert parity.max_abs_logit == pytest.approx(largest)
    assert parity.tolerance == pytest.approx(1e-4 * largest)
    with pytest.raises(ValueError, match="off by"):
        compared(source, lambda x: source(x) + 1.1e-4 * largest).exact("odd")
    with pytest.raises(ValueError, match="off by"):  # at batch 1 alone
        compared(source, lambda x: source(x) * (1 + (len(x) == 1))).exact("odd")
    with pytest.raises(ValueError, match="off by"):  # in the last batch alone
        compared(source, lambda x: source(x) * (1 + (len(x) == 4))).exact("odd")


def test_agreement_is_counted() -> None:
    """A tie that falls the other way is within the tolerance, and is said."""
    images = torch.zeros(10, 2)
    images[:, 0] = 1.0
    images[:, 1] = 1.0 - 1e-6
    turned = compared(lambda x: x, lambda x: x.flip(1), images).exact("odd")
    assert turned.accuracy is None
    assert (turned.parity.agreement, turned.parity.images, turned.parity.batch_sizes) == (0.0, 10, (1, 10))


def flipped(count: int) -> Predictor:
    """The images' pixels as logits, the two largest exchanged where an image's index is below `count`."""
    where = {float(image.sum()): index for index, image in enumerate(IMAGES)}

    def predict(images: Tensor) -> Tensor:
        logits = images.flatten(1).clone()
        for image, row in zip(images, logits, strict=True):
            if where[float(image.sum())] < count:
                best = row.topk(2).indices
                row[best] = row[best.flip(0)]
        return logits

    return predict


def reduced(artefact: Predictor, max_loss: float = 5.0, precision: str = "int8") -> Checked:
    return compared(lambda x: x.flatten(1), artefact).reduced("odd", max_loss, precision)


def test_lost_accuracy_is_counted_in_points() -> None:
    same = reduced(lambda x: x.flatten(1) * 1.001, 0.0)
    assert same.accuracy is not None
    assert (same.accuracy.source, same.accuracy.artefact, same.accuracy.lost) == (95.0, 95.0, 0.0)
    assert same.parity.tolerance is None
    assert same.parity.agreement == 1.0
    some = reduced(flipped(4), 15.0)
    assert some.accuracy is not None
    assert some.accuracy.lost == pytest.approx(15.0)  # the first image was wrong before
    assert (some.accuracy.artefact, some.accuracy.max_loss) == (pytest.approx(80.0), 15.0)
    assert some.parity.agreement == pytest.approx(0.8)
    with pytest.raises(ValueError, match=r"top-1 falls from 95.00 to 80.00 on 20 images of odd.*--max-loss"):
        reduced(flipped(4), 14.9)


def test_a_gain_is_no_loss() -> None:
    source = flipped(3)
    comparison = Comparison(source, lambda x: x.flatten(1))
    comparison.add(IMAGES, IMAGES.flatten(1).argmax(1))
    accuracy = comparison.reduced("odd", 0.0, "int8").accuracy
    assert accuracy is not None
    assert accuracy.lost == pytest.approx(-15.0)


@pytest.mark.parametrize(("precision", "allowed"), ROUNDING.items())
def test_more_than_rounding(precision: str, allowed: float) -> None:
    """Whatever first classes they give."""
    near = reduced(lambda x: x.flatten(1) * (1 + 0.9 * allowed), precision=precision)
    assert near.parity.relative_error == pytest.approx(0.9 * allowed, rel=1e-4)
    with pytest.raises(ValueError, match=rf"off by .*% \(root mean square\), and {precision} explains {allowed:.0%}"):
        reduced(lambda x: x.flatten(1) * (1 + 1.1 * allowed), 100.0, precision)


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (lambda x: x.flatten(1) * float("nan"), "not finite"),
        (lambda x: x.flatten(1) / (len(x) > 4), "not finite"),
        (lambda x: x.flatten(1) * (1 + (len(x) == 1)), "an image alone and in a batch of 16"),
    ],
    ids=["nan", "infinite", "alone"],
)
def test_what_is_no_rounding(broken: Predictor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        reduced(broken, 100.0)


def test_pixels_are_compared_one_by_one() -> None:
    """Of logits (B, K, H, W); the figures are given, because no pixel alone has one."""
    logits = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    other = logits.clone()
    other[0, :, 0, 0] = logits[0, :, 0, 0].flip(0) if logits[0, :, 0, 0].argmax() != 1 else logits[0, [1, 0, 2], 0, 0]
    table = {float(image.sum()): place for place, image in enumerate(IMAGES)}
    predict = lambda which: lambda images: which[[table[float(image.sum())] for image in images]]  # noqa: E731
    comparison = Comparison(predict(logits), predict(other), MIOU)
    comparison.add(IMAGES[:4])
    with pytest.raises(ValueError, match="off by"):
        comparison.exact("odd")
    entries = comparison.reduced("odd", 5.0, "int8", (60.0, 58.5)).entries()
    assert entries["parity"]["pixel_agreement"] == 15 / 16
    assert entries["accuracy"] == {"miou_source": 60.0, "miou": 58.5, "lost": 1.5, "max_loss": 5.0}
    with pytest.raises(ValueError, match=r"mIoU falls from 60\.00 to 54\.00 on 4 windows of odd"):
        comparison.reduced("odd", 5.0, "int8", (60.0, 54.0))
