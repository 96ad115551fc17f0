"""What a server answers, by what its model is for: how an image becomes what the engine computes, and that an answer.

Legend of axis names: B images or windows of a batch, K classes, C channels; h, w of a window; H, W of an image.
"""

from __future__ import annotations

import asyncio
import base64
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from slicevit.checkpoint import SEGMENTATION
from slicevit.evaluation.segmentation import class_map, cut_windows, joined
from slicevit.serving.refusal import Refusal
from slicevit.serving.runs import Runs
from slicevit.serving.schemas import (
    CLASSIFY,
    SEGMENT,
    Classified,
    ClassifyOptions,
    ClassShare,
    Label,
    Options,
    Question,
    Segmented,
)

_TOP_K = 5
MOST_LOGITS = 2**28  # numbers of an image's logits: 1 GiB
Response = Classified | Segmented


@dataclass(frozen=True)
class Decoded:
    """An image as the engine takes it.

    Attributes:
        inputs: tensors (C, h, w), each computed in some batch.
        size: (height, width) of the image that was sent.
        scaled: that of the image of which the inputs are windows.
    """

    inputs: tuple[Tensor, ...]
    size: tuple[int, int]
    scaled: tuple[int, int]


class Task(ABC):
    """What is asked of an engine for one task, and how it is answered.

    Attributes:
        path, summary: of the route.
        question: what may be sent.
        response: what comes back.
    """

    path: ClassVar[str]
    summary: ClassVar[str]
    question: ClassVar[Question]
    response: ClassVar[type[Classified | Segmented]]

    def __init__(self, engine: Runs):
        self.engine = engine

    @property
    def hints(self) -> dict[str, str]:
        """Legal values of the fields that other tasks have not, for messages."""
        return {}

    def wrong(self, options: Options) -> str | None:
        """A sentence on an option that the model cannot keep, if there is one."""
        return None

    @abstractmethod
    def decoded(self, image: Image.Image) -> Decoded:
        """What the engine computes of an image; in a thread that decodes."""

    @abstractmethod
    def outputs(self, logits: Tensor) -> Tensor:
        """Of a batch's logits what the answers are made of; in the thread that computes."""

    @abstractmethod
    async def answer(
        self, image: Decoded, outputs: Sequence[Tensor], options: Options, course: Mapping[str, Any]
    ) -> Response:
        """The answer, from the outputs of `image.inputs`; `course` are its fields that say how it came about."""


class Classification(Task):
    """Labels of an image."""

    path, summary = "/v1/classify", "Classify an image"
    question, response = CLASSIFY, Classified

    @property
    def hints(self) -> dict[str, str]:
        """That of top_k."""
        return {"top_k": f"give a whole number from 1 to {self.engine.num_classes}, the number of classes"}

    def wrong(self, options: Options) -> str | None:
        """More labels than there are classes."""
        assert isinstance(options, ClassifyOptions)
        return f"top_k: {self.hints['top_k']}" if (options.top_k or 0) > self.engine.num_classes else None

    def decoded(self, image: Image.Image) -> Decoded:
        """One tensor, of the size that the model takes."""
        image_CHW = self.engine.transform(image)
        size = (image_CHW.shape[1], image_CHW.shape[2])
        return Decoded((image_CHW,), (image.height, image.width), size)

    def outputs(self, logits: Tensor) -> Tensor:
        """Probabilities (B, K)."""
        return logits.softmax(1)

    async def answer(
        self, image: Decoded, outputs: Sequence[Tensor], options: Options, course: Mapping[str, Any]
    ) -> Classified:
        """The most probable labels."""
        assert isinstance(options, ClassifyOptions)
        (probabilities_K,) = outputs
        best = probabilities_K.topk(options.top_k or min(_TOP_K, self.engine.num_classes))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        labels = [Label(label=label_of(self.engine, k), index=k, probability=p) for k, p in pairs]
        return Classified(labels=labels, **course)


class Segmentation(Task):
    """A class for every pixel: the windows of an image, computed as evaluation does, are put together again."""

    path, summary = "/v1/segment", "The class of every pixel of an image"
    question, response = SEGMENT, Segmented

    @property
    def _window(self) -> tuple[int, int]:
        return self.engine.input_size[1], self.engine.input_size[2]

    def decoded(self, image: Image.Image) -> Decoded:
        """Its windows. Raises Refusal: 413 for one so long and thin that its logits would fill the memory."""
        image_CHW = self.engine.transform(image)
        height, width = image_CHW.shape[1:]
        if self.engine.num_classes * height * width > MOST_LOGITS:
            raise Refusal(
                413,
                f"image: {width} x {height} pixels, as the model takes it, with {self.engine.num_classes} classes are "
                "too much for one answer: send it in parts that are less long and thin",
            )
        windows = tuple(window_1Chw[0] for window_1Chw in cut_windows(image_CHW[None], self._window))
        return Decoded(windows, (image.height, image.width), (image_CHW.shape[1], image_CHW.shape[2]))

    def outputs(self, logits: Tensor) -> Tensor:
        """Logits (B, K, h, w)."""
        return logits

    async def answer(
        self, image: Decoded, outputs: Sequence[Tensor], options: Options, course: Mapping[str, Any]
    ) -> Segmented:
        """The mask, of the size of the image that was sent; drawn in another thread."""
        return await asyncio.to_thread(self._mask, image, outputs, course)

    def _mask(self, image: Decoded, outputs: Sequence[Tensor], course: Mapping[str, Any]) -> Segmented:
        logits_1KHW = joined((logits_Khw[None] for logits_Khw in outputs), image.scaled, self._window)
        mask = Image.fromarray(class_map(logits_1KHW, image.size)[0].byte().numpy())
        file = BytesIO()
        mask.save(file, "PNG")
        pixels = Counter({index: count for index, count in enumerate(mask.histogram()) if count})
        shares = [
            ClassShare(label=label_of(self.engine, index), index=index, share=count / pixels.total())
            for index, count in pixels.most_common()
        ]
        encoded = base64.b64encode(file.getvalue()).decode()
        return Segmented(mask=encoded, size=list(image.size), windows=len(outputs), classes=shares, **course)


def label_of(engine: Runs, index: int) -> str:
    """The name of a class, or its number."""
    return engine.label_names[index] if engine.label_names else str(index)


TASKS: dict[str | None, type[Task]] = {None: Classification, SEGMENTATION: Segmentation}
