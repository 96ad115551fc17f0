"""A segmentation run's configuration: one flat dataclass, saved whole in the run's config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from slicevit.data.masks import Layout as Folders
from slicevit.dense.segmenter import Decoder
from slicevit.families import Layout
from slicevit.training.config import TrainConfig, renamed
from slicevit.training.methods import SEPARATE, Draw, MethodName, Transfer
from slicevit.training.trackers import TrackerName
from slicevit.widths import Isolation


@dataclass(frozen=True)
class SegmentConfig:
    """Everything that a segmentation run depends on. Fields that `TrainConfig` has too mean the same."""

    data: str = ""
    """A folder of images and masks; see --folders."""
    folders: Folders = "masks"
    """How it is laid out: SPLIT/images and SPLIT/masks (masks), or images/training, annotations/training (ade20k)."""
    num_classes: int = 0
    """How many classes the masks have; other values in a mask are void, which neither teaches nor counts."""
    class_names: tuple[str, ...] = ()
    """What the classes are called, in the order of their numbers; exports and servers pass it on."""
    eval_split: Literal["val", "test"] = "val"
    """The split that mIoU is measured on."""
    size: tuple[int, int] = (512, 512)
    """Height and width of training's crops and of evaluation's windows, in pixels."""

    init: str = "scratch"
    """The backbone: scratch, pretrained (timm's weights), or a folder that slicevit saved."""
    model: str = "vit_tiny_patch16_224"
    """timm's name of the backbone, where --init is not a folder."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of that model, as key=value pairs."""
    decoder: Decoder = "fpn"
    """Semantic FPN (fpn), or Segmenter's transformer with a token for each class (mask-transformer)."""
    decoder_channels: int = 256
    """Channels of the decoder's feature pyramid, or of its tokens, at full width; a multiple of 8."""
    grid: str | None = None
    """Legal widths, smallest:largest:step. By default those of --init, or 1/4:1:1/16."""
    width: str | None = None
    """Cut this width of the backbone out and train it alone, under a decoder that is not sliced."""

    method: MethodName = "scala"
    """Which algorithm trains the widths; separate cuts each width out and trains it alone (the paper's way)."""
    isolation: Isolation | None = None
    """Which widths take trailing channels. By default as --init, or the method."""
    layout: Layout | None = None
    """Which channels of q, k and v a narrow width takes. By default as --init, or per_head."""
    transfer: Transfer | None = None
    """Who teaches a narrower width, pixel by pixel: the next larger one (PKT), the full one, or nobody (off)."""
    sampling: Draw | None = None
    """How the widths of a step are drawn: stable (SS), free, one, or full."""
    calibration: bool | None = None
    """Whether narrower widths learn from masks too (NC)."""
    transfer_weight: float = 1.0
    """λ, the weight of the KL term."""
    transfer_ramp: float = 0.0
    """Share of the run over which λ grows from 0 to its value."""
    full_width_first: float = 0.0
    """Share of the run, at its start, that trains the full width alone."""

    epochs: float = 100
    """Passes over the training images; a fraction is allowed."""
    batch_size: int = 16
    """Images a step, over all ranks."""
    lr: float = 5e-4
    """Highest learning rate."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up of the learning rate."""
    weight_decay: float = 1e-4
    """AdamW's weight decay; none on biases, norms and what the model exempts."""
    clip_grad: float | None = None
    """Largest norm of the gradient of a step."""
    drop_path: float = 0.0
    """Stochastic depth of the backbone."""
    ema_decay: float = 0.0
    """Exponential moving average of the weights; 0 is off. With it, the average is what is evaluated and saved."""
    amp: Literal["off", "bf16"] = "off"
    """Autocast."""
    micro_batch: int | None = None
    """Images that a process computes at once, the rest of its share after them; 0 finds the most that fit the GPU's
    memory. Such parts count by their images, whatever of them is void."""
    cuda_graphs: bool = False
    """Launch each width's pass as one CUDA graph; nothing changes on a CPU."""
    smoothing: float = 0.0
    """Label smoothing."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest size of a training image; at 1 its short side is the shorter of --size."""
    hflip: float = 0.5
    """Probability of a mirror image."""
    color_jitter: float = 0.0
    """Strength of colour jitter."""
    max_bad_share: float = 0.01
    """Share of unreadable images above which the run stops."""
    eval_every: int = 10
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
        if min(self.size) < 32:
            raise ValueError(f"--size must be 32 or more, got {self.size[0]} {self.size[1]}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"--scale must be above 0 and ascend, got {self.scale[0]} {self.scale[1]}")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"--class-names gives {len(self.class_names)} names for --num-classes {self.num_classes}")
        if self.decoder_channels < 8 or self.decoder_channels % 8:
            raise ValueError(f"--decoder-channels must be a multiple of 8, got {self.decoder_channels}")
        if self.decoder not in get_args(Decoder):
            raise ValueError(f"--decoder {self.decoder} is unknown: give {' or '.join(get_args(Decoder))}")
        if self.method == "rotated":
            raise ValueError("--method rotated is for classifiers: train one by it, and give its folder as --init")
        if self.width is not None and self.method != SEPARATE:
            raise ValueError("--width trains one width alone: give --method separate with it")
        self.training()

    @property
    def augmentation(self) -> dict[str, Any]:
        """What training does to an image, as fields of `MaskTransformConfig`."""
        return {name: getattr(self, name) for name in ("scale", "hflip", "color_jitter")}

    def training(self) -> TrainConfig:
        """What the training loop takes of it. Raises ValueError naming the flag that is wrong."""
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        shared: dict[str, Any] = {
            name: value for name, value in vars(self).items() if name in known and value is not None
        }
        return TrainConfig(**shared)


def from_dict(values: dict[str, Any]) -> SegmentConfig:
    """A configuration from config.json. Raises ValueError naming what this version does not know."""
    values = renamed(values)
    known = {field.name for field in dataclasses.fields(SegmentConfig)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"config.json has fields that this version does not know: {', '.join(unknown)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return SegmentConfig(**values)
