"""A detection run's configuration: one flat dataclass, saved whole in the run's config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from slicevit.data.boxes import BoxTransformConfig
from slicevit.data.boxes import Layout as Folders
from slicevit.families import Layout
from slicevit.training.config import TrainConfig
from slicevit.training.methods import Draw
from slicevit.training.trackers import TrackerName
from slicevit.widths import Isolation

_STRIDE = 32


@dataclass(frozen=True)
class DetectConfig:
    """Everything that a detection run depends on. Fields that `TrainConfig` has too mean the same."""

    data: str = ""
    """A folder of images and COCO's annotations; see --folders."""
    folders: Folders = "coco"
    """How it is laid out: SPLIT/ and annotations/instances_SPLIT.json (coco), or SPLIT2017/ and so on (coco2017)."""
    eval_split: Literal["val", "test"] = "val"
    """The split that mAP is measured on."""
    size: tuple[int, int] = (512, 512)
    """Height and width that images are resized to, whatever their shape; multiples of 32."""

    init: str = "scratch"
    """The backbone: scratch, pretrained (timm's weights), or a folder that slicevit saved."""
    model: str = "vit_tiny_patch16_224"
    """timm's name of the backbone, where --init is not a folder."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of that model, as key=value pairs."""
    channels: int = 256
    """Channels of the feature pyramid and of the heads, at full width."""
    convolutions: int = 4
    """Convolutions of each head."""
    grid: str | None = None
    """Legal widths, smallest:largest:step. By default those of --init, or 1/4:1:1/16."""
    isolation: Isolation | None = None
    """Which widths take trailing channels. By default as --init, or smallest."""
    layout: Layout | None = None
    """Which channels of q, k and v a narrow width takes. By default as --init, or per_head."""
    sampling: Draw = "stable"
    """How the widths of a step are drawn: stable (SS), free, one, or full."""

    epochs: float = 12
    """Passes over the training images; a fraction is allowed."""
    batch_size: int = 16
    """Images a step, over all ranks."""
    lr: float = 2e-4
    """Highest learning rate."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 0.5
    """Epochs of linear warm-up of the learning rate."""
    weight_decay: float = 1e-4
    """AdamW's weight decay; none on biases, norms and what the model exempts."""
    clip_grad: float | None = 1.0
    """Largest norm of the gradient of a step."""
    drop_path: float = 0.0
    """Stochastic depth of the backbone."""
    ema_decay: float = 0.0
    """Exponential moving average of the weights; 0 is off. With it, the average is what is evaluated and saved."""
    amp: Literal["off", "bf16"] = "off"
    """Autocast."""
    hflip: float = 0.5
    """Probability of a mirror image."""
    color_jitter: float = 0.0
    """Strength of colour jitter."""
    max_bad_share: float = 0.01
    """Share of unreadable images above which the run stops."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    checkpoint_steps: int = 0
    """Steps between checkpoints, besides one an epoch; 0 is none."""
    workers: int = 0
    """Processes that load images."""
    log_with: tuple[TrackerName, ...] = ("tensorboard",)
    """Where figures go besides metrics.csv: tensorboard, wandb, mlflow; none when left empty."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int = 0
    """CPU threads of torch; 0 leaves them as they are."""
    seed: int = 0
    """Everything random is drawn from it."""

    def __post_init__(self) -> None:
        if min(self.size) < _STRIDE or any(side % _STRIDE for side in self.size):
            raise ValueError(f"--size must be multiples of {_STRIDE}, got {self.size[0]} {self.size[1]}")
        for name in ("channels", "convolutions"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be above 0, got {getattr(self, name)}")
        self.training()

    @property
    def method(self) -> str:
        """How the widths are trained: there is one way."""
        return "labels"

    @property
    def augmentation(self) -> BoxTransformConfig:
        """What training does to an image."""
        return BoxTransformConfig(self.size, self.hflip, self.color_jitter)

    def training(self) -> TrainConfig:
        """What the training loop takes of it. Raises ValueError naming the flag that is wrong."""
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        shared: dict[str, Any] = {
            name: value for name, value in vars(self).items() if name in known and value is not None
        }
        return TrainConfig(**shared, transfer="off")


def from_dict(values: dict[str, Any]) -> DetectConfig:
    """A configuration from config.json. Raises ValueError naming what this version does not know."""
    known = {field.name for field in dataclasses.fields(DetectConfig)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"config.json has fields that this version does not know: {', '.join(unknown)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return DetectConfig(**values)
