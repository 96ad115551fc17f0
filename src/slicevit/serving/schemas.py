"""What goes over the wire, as OpenAPI shows it. Times are milliseconds, accuracies per cent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from slicevit.serving.settings import MAX_DEADLINE_MS

WIDTH_PATTERN = r"^([0-9]{1,4}/[0-9]{1,4}|[0-9](\.[0-9]{1,8})?)$"
Milliseconds = Annotated[float, Field(gt=0, le=MAX_DEADLINE_MS, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Options(BaseModel):
    """What may come with an image, whatever is asked of it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    deadline_ms: Milliseconds | None = Field(None, description="Answer within so many milliseconds; else the target.")
    width: str | None = Field(
        None,
        max_length=16,
        pattern=WIDTH_PATTERN,
        description='Answer at this width, such as "1/2"; else the policy\'s.',
    )


class ClassifyOptions(Options):
    """What may come with an image to be classified."""

    top_k: int | None = Field(None, ge=1, description="How many labels; 5 unless told, at most one a class.")


class InJson(BaseModel):
    """An image in base64."""

    image: str = Field(description="The image file in base64.", json_schema_extra={"contentEncoding": "base64"})


class InForm(BaseModel):
    """An image as a form field; here it is only described."""

    image: bytes = Field(description="The image file.")


class ImageInJson(InJson, ClassifyOptions):
    """An image to be classified, in base64."""


class ImageInForm(InForm, ClassifyOptions):
    """An image to be classified, as a form field."""


class SceneInJson(InJson, Options):
    """An image to be segmented, in base64."""


class SceneInForm(InForm, Options):
    """An image to be segmented, as a form field."""


@dataclass(frozen=True)
class Question:
    """What may be sent to a route: the options beside an image, and both together in JSON and in a form."""

    options: type[Options]
    in_json: type[ImageInJson] | type[SceneInJson]
    in_form: type[ImageInForm] | type[SceneInForm]

    @property
    def fields(self) -> str:
        """The names of the fields, for messages."""
        return ", ".join(("image", *self.options.model_fields))


CLASSIFY = Question(ClassifyOptions, ImageInJson, ImageInForm)
SEGMENT = Question(Options, SceneInJson, SceneInForm)


class SloChange(BaseModel):
    """A new target."""

    model_config = ConfigDict(extra="forbid", strict=True)

    slo_ms: Milliseconds


class Label(BaseModel):
    """One class, and how probable it is."""

    label: str
    index: int
    probability: Share


class ClassShare(BaseModel):
    """One class, and its share of the pixels."""

    label: str
    index: int
    share: Share


class Course(BaseModel):
    """How an answer came about."""

    width: str = Field(description="The width that answered; of several windows the narrowest.")
    batch: int = Field(description="How many images, or windows, were computed together.")
    decode_ms: float = Field(description="From the last byte of the request until the image was decoded.")
    queue_ms: float = Field(description="From then until the computation began.")
    compute_ms: float = Field(description="Of the computation of the batch; of several windows until the last ended.")
    reason: str = Field(description="Why this width.")


class Classified(Course):
    """The answer to an image that was to be classified."""

    labels: list[Label] = Field(description="Most probable first.")


class Segmented(Course):
    """The answer to an image that was to be segmented."""

    mask: str = Field(
        description="A PNG in base64, in shades of gray: a pixel's value is the index of its class.",
        json_schema_extra={"contentEncoding": "base64", "contentMediaType": "image/png"},
    )
    size: list[int] = Field(description="Height and width of the mask, which are the image's.")
    windows: int = Field(description="Of how many windows it was computed.")
    classes: list[ClassShare] = Field(description="The classes that are there, the largest first.")


class WidthRow(BaseModel):
    """What a width scores and costs on this machine."""

    width: str
    top1: float
    latency_ms: dict[str, float] = Field(description="Batch size to the measured latency of a call.")
    on_frontier: bool = Field(description="Whether no other width is at least as accurate and as fast.")


class Model(BaseModel):
    """What is served."""

    task: Literal["classification", "segmentation"]
    figure: str = Field(description="What `top1` is of every width, here and elsewhere: top-1 or mIoU, in per cent.")
    architecture: str
    engine: str
    device: str
    input_size: list[int] = Field(description="Channels, height, width; of a segmenter those of a window.")
    num_classes: int
    label_names: list[str] | None
    widths: list[WidthRow]


class Status(BaseModel):
    """The last ten seconds."""

    slo_ms: float = Field(description="The target for requests that bring no deadline.")
    min_top1: float | None = Field(description="The floor of the policy.")
    queue: int = Field(description="How many wait to be computed.")
    requests_per_s: float = Field(description="Answered requests.")
    p50_ms: float | None = Field(description="Latency of what was answered, in the server; null when idle.")
    p99_ms: float | None
    attainment: Share | None = Field(
        description="Share of the valid requests that were answered in time; those shed were not. Null when idle."
    )
    widths: dict[str, Share] = Field(description="Share of the answers that each width gave.")
    top1: float | None = Field(description="Mean accuracy of the widths that answered; null when idle.")
    shed_per_s: float = Field(description="Requests refused with 429.")
    uptime_s: float


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str


class State(BaseModel):
    """Whether the server lives, or takes requests."""

    status: str
