"""The check of an artefact against the model that it was cut from, on real images.

Legend of axis names: B images of a batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from slicevit.evaluation.figures import TOP1, Figure

TOLERANCE = 1e-4
APART = 0.1
ROUNDING = {"fp16": 0.05, "bf16": 0.2, "int8": 0.5}
BATCH = 16

Predictor = Callable[[Tensor], Tensor]  # images_BCHW to logits_BK, or logits_BKHW


@dataclass(frozen=True)
class Parity:
    """How far an artefact is from the model that it was cut from.

    Attributes:
        data: the data set of the images.
        images: how many there were; of a segmenter, windows.
        batch_sizes: at which it ran.
        max_abs_error: the largest difference of a logit, over all of them.
        max_abs_logit: the source's largest logit.
        tolerance: the largest difference that is allowed; None for a reduced precision.
        relative_error: root mean square of the differences, as a share of that of the source's logits.
        agreement: share of the images, or of the pixels, whose first class is the same.
    """

    data: str
    images: int
    batch_sizes: tuple[int, ...]
    max_abs_error: float
    max_abs_logit: float
    tolerance: float | None
    relative_error: float
    agreement: float


@dataclass(frozen=True)
class Accuracy:
    """What a reduced precision costs, on the images of the check.

    Attributes:
        source, artefact: the figure of the model and of the artefact, in per cent.
        lost: their difference, in points.
        max_loss: the largest that is allowed.
    """

    source: float
    artefact: float
    lost: float
    max_loss: float


@dataclass(frozen=True)
class Checked:
    """The check of one artefact; `accuracy`, in terms of `figure`, is there for a reduced precision alone."""

    parity: Parity
    figure: Figure
    accuracy: Accuracy | None = None

    def entries(self) -> dict[str, Any]:
        """What a manifest says of it."""
        parity = asdict(self.parity)
        parity[f"{self.figure.answer.replace('-', '')}_agreement"] = parity.pop("agreement")
        if self.accuracy is None:
            return {"parity": parity}
        accuracy = asdict(self.accuracy)
        scores = {f"{self.figure.column}_source": accuracy.pop("source"), self.figure.column: accuracy.pop("artefact")}
        return {"parity": parity, "accuracy": scores | accuracy}


class Comparison:
    """An artefact and its source, compared batch by batch; the first batch goes through the artefact singly too.

    Args:
        source, artefact: from images (B, C, H, W) to float32 logits (B, K), or those of every pixel (B, K, H, W).
        figure: what a reduced precision is judged by.
    """

    def __init__(self, source: Predictor, artefact: Predictor, figure: Figure = TOP1):
        self.source, self.artefact, self._figure = source, artefact, figure
        self._images = self._batch = self._agree = self._answers = 0
        self._hits = [0, 0]
        self._error = self._scale = self._apart = torch.zeros(())
        self._squares = torch.zeros(2, dtype=torch.float64)  # of the differences, and of the source's logits

    @torch.inference_mode()
    def add(self, images_BCHW: Tensor, targets_B: Tensor | None = None) -> None:
        """Run both on a batch; its classes, where there are some, say how accurate both are."""
        expected_BK, got_BK = self.source(images_BCHW), self.artefact(images_BCHW)
        largest = [(got_BK - expected_BK).abs().max()]
        if not self._images:
            alone_BK = torch.cat([self.artefact(image_1CHW) for image_1CHW in images_BCHW.split(1)])
            self._batch, self._apart = len(images_BCHW), (alone_BK - got_BK).abs().max()
            largest.append((alone_BK - expected_BK).abs().max())
        self._error = torch.stack([self._error, *largest]).max()  # of a nan nan
        self._scale = torch.maximum(self._scale, expected_BK.abs().max())
        self._squares += torch.stack(
            [(got_BK - expected_BK).double().square().sum(), expected_BK.double().square().sum()]
        )
        best_B, source_best_B = got_BK.argmax(1), expected_BK.argmax(1)
        self._agree += int((best_B == source_best_B).sum())
        self._answers += best_B.numel()
        if targets_B is not None:
            self._hits[0] += int((source_best_B == targets_B).sum())
            self._hits[1] += int((best_B == targets_B).sum())
        self._images += len(images_BCHW)

    def exact(self, data: str) -> Checked:
        """The verdict on an artefact in float32, from images of `data`.

        The tolerance is 1e-4 of the source's largest logit. Float32 sums taken in another order differ by about 1e-6
        of it; weights in float16 by about 5e-4, and arithmetic in bfloat16 by 1e-2, so that neither passes for
        float32.

        Raises ValueError when a logit is off by more.
        """
        tolerance = TOLERANCE * float(self._scale)
        if not float(self._error) <= tolerance:
            raise ValueError(f"its logits are off by {float(self._error):.1e}, and {tolerance:.1e} is allowed")
        return Checked(self._parity(data, tolerance), self._figure)

    def reduced(self, data: str, max_loss: float, precision: str, scores: tuple[float, float] | None = None) -> Checked:
        """The verdict on an artefact in a reduced `precision` (a key of `ROUNDING`), from labelled images of `data`.

        `scores` are the figures of source and artefact, where they are not the share of the right classes.

        Rounding may fall otherwise for an image alone than in a batch; a tenth of the largest logit is no rounding.
        Over all images rounding adds up to a share of the logits, by far the smaller one for the most bits.

        Raises ValueError when the figure falls by more than `max_loss` points, logits are no numbers, or further off
        than rounding, or an image alone gets other logits than in a batch.
        """
        if not bool(self._error.isfinite()):
            raise ValueError("its logits are not finite")
        if not self._relative_error() <= ROUNDING[precision]:
            raise ValueError(
                f"its logits are off by {self._relative_error():.1%} (root mean square), and {precision} explains "
                f"{ROUNDING[precision]:.0%}"
            )
        if not self._apart <= APART * self._scale:
            raise ValueError(
                f"its logits for an image alone and in a batch of {self._batch} differ by {float(self._apart):.1e}"
            )
        before, after = scores or (100 * hits / self._images for hits in self._hits)
        if before - after > max_loss:
            raise ValueError(
                f"{self._figure.name} falls from {before:.2f} to {after:.2f} on {self._images} {self._figure.unit} of "
                f"{data}, and a loss of {max_loss:g} points is allowed (--max-loss)"
            )
        accuracy = Accuracy(before, after, before - after, max_loss)
        return Checked(self._parity(data, None), self._figure, accuracy)

    def _relative_error(self) -> float:
        off, scale = self._squares.sqrt().tolist()
        return float(off / scale) if scale else float(off > 0)

    def _parity(self, data: str, tolerance: float | None) -> Parity:
        return Parity(
            data=data,
            images=self._images,
            batch_sizes=(1, self._batch),
            max_abs_error=float(self._error),
            max_abs_logit=float(self._scale),
            tolerance=tolerance,
            relative_error=self._relative_error(),
            agreement=self._agree / self._answers,
        )
