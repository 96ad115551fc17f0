"""A training run's configuration: one flat dataclass, saved whole in the run's config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, get_args

from slicevit.families import AttnScale, Heads, Layout, Scope
from slicevit.training.methods import METHODS, Draw, MethodName, Rewire, Transfer
from slicevit.training.objectives import Distillation, FeatureName, TeacherObjective
from slicevit.training.trackers import TrackerName
from slicevit.widths import Isolation, WidthGrid, parse_fraction


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on. Fields left None follow the method (see `slicevit.training.methods`)."""

    data: str = "fashion-mnist"
    """The bundled set ("fashion-mnist"), a folder with train/ and val/ of class folders, or a timm dataset string."""
    data_root: str | None = None
    """Where a timm dataset string finds or caches its files."""

    num_classes: int | None = None
    """Number of classes, where the data set does not say (WebDataset shards)."""

    model: str = "vit_tiny_patch16_224"
    """Any timm model of a registered family."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model, as key=value pairs: embed_dim=96 depth=6."""
    init: str = "scratch"
    """scratch, pretrained (timm's weights), a file of the model's weights, or a folder that slicevit saved, whose grid
    and slicing are the defaults."""
    rewire: Rewire | None = None
    """Put what matters first before narrower widths are trained: channels in another order (permute; --rewire alone
    says so), or the residual stream and the heads in another basis too (rotate)."""
    rewire_images: int = 256
    """Training images that importance is measured on."""
    grid: str = "1/4:1:1/16"
    """Legal widths, smallest:largest:step."""
    grid_change: str | None = None
    """Another step from a share of the run on, such as 1/8@70% (the paper's fast interpolation)."""

    method: MethodName = "scala"
    """Which algorithm trains the widths."""
    isolation: Isolation | None = None
    """Which widths take trailing channels: smallest (the paper's), b, c, off, mirror (the published code)."""
    transfer: Transfer | None = None
    """Who teaches a narrower width: the next larger one (PKT), the full one, the mean of all larger ones of the step
    (larger), or nobody (off)."""
    sampling: Draw | None = None
    """How the widths of a step are drawn: stable (SS), free, one, or full."""
    width_draws: int = 1
    """Equal parts of a process's images in a step, each of which draws its own widths: more widths a step, for the same
    work."""
    full_width_share: float = 1.0
    """Share of the draws that train the full width; the others leave it out, and cost less."""
    calibration: bool | None = None
    """Whether narrower widths learn from labels too (NC)."""
    layout: Layout = "per_head"
    """Which channels of q, k and v a narrow width takes: per_head, per_projection, flat."""
    attn_scale: AttnScale = "narrow"
    """Attention is scaled by the narrow head width, or by the full one as in the published code."""
    norm_eps: float | None = None
    """Epsilon of every LayerNorm; the model's own by default."""
    heads: Heads = "fixed"
    """Narrow widths keep the head count (fixed), or drop whole heads (scaled)."""
    scope: Scope | None = None
    """All channels scale with the width, or the MLPs' alone."""
    transfer_weight: float = 1.0
    """λ, the weight of the KL term."""
    transfer_ramp: float = 0.0
    """Share of the steps of narrower widths over which λ grows from 0 to its value."""
    full_width_first: float | None = None
    """Share of the run, at its start, that trains the full width alone; none by default where the weights come from
    --init. With --rewire the optimizer and the learning rate's schedule begin anew after it."""

    teacher: str | None = None
    """External teacher of the full width: a timm model (loaded with its weights) or a run's folder."""
    distillation: Distillation = "hard"
    """The teacher's best class (hard) or its distribution (soft)."""
    teacher_share: float = 0.5
    """Share of the teacher in the full width's loss."""
    teacher_size: int | None = None
    """Side of the images that the teacher sees, in pixels; its own by default."""
    teacher_objective: TeacherObjective = "logits"
    """What is learned from the teacher: its logits, beside labels, or its tokens alone, without labels (features)."""
    teacher_features: tuple[FeatureName, ...] = ("class", "feature", "patch")
    """Which tokens: the class token, it and all patch tokens (feature), the patch tokens of masked patches (patch)."""
    mask_share: float = 0.5
    """Share of an image's patches that the patch objective masks."""

    epochs: float = 20
    """Passes over the training images; a fraction is allowed."""
    batch_size: int = 128
    """Images a step, over all ranks."""
    lr: float = 2e-3
    """Highest learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up of the learning rate."""
    weight_decay: float = 0.05
    """AdamW's weight decay; none on biases, norms and what the model exempts."""
    layer_decay: float | None = None
    """Learning rate factor from block to block, for fine-tuning."""
    clip_grad: float | None = None
    """Largest norm of the gradient of a step."""
    drop_path: float = 0.0
    """Stochastic depth."""
    ema_decay: float = 0.0
    """Exponential moving average of the weights; 0 is off. With it, the average is what is evaluated and saved."""
    amp: Literal["off", "bf16"] = "off"
    """Autocast."""
    micro_batch: int | None = None
    """Images that a process computes at once, the rest of its share after them (gradient accumulation); 0 finds the
    most that fit the GPU's memory. Its whole share by default."""
    widths_per_rank: Literal["same", "own"] = "same"
    """On several ranks: all draw the same widths, or each its own."""
    shard_optimizer: bool = False
    """On several ranks: each keeps its share of the optimizer's state (ZeRO stage 1)."""
    compile: bool = False
    """torch.compile by repeated block, once a width."""
    cuda_graphs: bool = False
    """Launch each width's pass as one CUDA graph; nothing changes on a CPU."""
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass."""

    mixup: float = 0.0
    """Mixup alpha."""
    cutmix: float = 0.0
    """CutMix alpha."""
    smoothing: float = 0.0
    """Label smoothing."""
    crop: Literal["rrc", "pad", "center"] = "rrc"
    """Training crop: random area and ratio, padding and shift (small images), or the central one."""
    rrc_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the area of a random crop."""
    hflip: float = 0.5
    """Probability of a mirror image."""
    rand_augment: str = ""
    """timm's RandAugment string, such as rand-m9-mstd0.5-inc1."""
    color_jitter: float = 0.0
    """Strength of colour jitter."""
    random_erasing: float = 0.0
    """Probability of erasing a rectangle."""
    repeats: int = 1
    """Repeated augmentation: how often an image comes in an epoch."""
    max_bad_share: float = 0.01
    """Share of unreadable images above which the run stops."""

    eval_batch_size: int = 500
    """Images a step of evaluation."""
    statistics_images: int = 2048
    """Training images that BatchNorm statistics of every width are taken from, before each evaluation."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    save_every: int = 1
    """Epochs between checkpoints; a stop by signal and the last epoch always save one."""
    checkpoint_steps: int = 0
    """Steps between checkpoints, besides those of epochs; 0 is none."""
    workers: int = 0
    """Processes that load images."""
    in_memory: bool = False
    """Decode the training images once, keep them on the device, and augment them there in batches."""
    log_with: tuple[TrackerName, ...] = ("tensorboard",)
    """Where figures go besides metrics.csv: tensorboard, wandb, mlflow; none when left empty."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int = 0
    """CPU threads of torch; 0 leaves them as they are."""
    seed: int = 0
    """Everything random is drawn from it."""

    def __post_init__(self) -> None:
        WidthGrid.parse(self.grid)
        self.change()
        if self.method not in METHODS:
            raise ValueError(f"--method {self.method} is not one of {', '.join(METHODS)}")
        for name in (
            "epochs",
            "batch_size",
            "lr",
            "eval_batch_size",
            "eval_every",
            "save_every",
            "rewire_images",
            "width_draws",
            "full_width_share",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}")
        if self.statistics_images < 2:
            raise ValueError(f"--statistics-images must be above 1, got {self.statistics_images}")
        for name in (
            "warmup_epochs",
            "transfer_weight",
            "transfer_ramp",
            "workers",
            "seed",
            "micro_batch",
        ):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        for name in ("ema_decay", "drop_path", "smoothing", "full_width_first"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("teacher_share", "max_bad_share", "hflip", "random_erasing", "transfer_ramp", "full_width_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must lie in [0, 1], got {getattr(self, name)}")
        self._check_teacher()
        self._check_rewire()
        if self.cuda_graphs and (self.grad_checkpointing or not self.learns_labels):
            other = "--grad-checkpointing True" if self.grad_checkpointing else "--teacher-objective features"
            raise ValueError(f"--cuda-graphs does not go with {other}: leave one of them out")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"--batch-size must be even with --mixup or --cutmix, got {self.batch_size}")

    def _check_teacher(self) -> None:
        if self.teacher_objective not in get_args(TeacherObjective):
            known = " or ".join(get_args(TeacherObjective))
            raise ValueError(f"--teacher-objective {self.teacher_objective} is unknown: give {known}")
        if odd := [name for name in self.teacher_features if name not in get_args(FeatureName)]:
            raise ValueError(f"--teacher-features {odd[0]} is unknown: give some of {', '.join(get_args(FeatureName))}")
        if not self.learns_labels and not self.teacher:
            raise ValueError(
                "--teacher-objective features needs --teacher: a timm ViT such as vit_base_patch14_dinov2.lvd142m, or "
                "a run's folder"
            )
        if len(self.teacher_features) != len(set(self.teacher_features)):
            raise ValueError(f"--teacher-features {' '.join(self.teacher_features)}: give each objective once")
        if not self.teacher_features:
            raise ValueError(f"--teacher-features is empty: give some of {', '.join(get_args(FeatureName))}")
        if not 0 < self.mask_share < 1:
            raise ValueError(f"--mask-share must lie between 0 and 1, got {self.mask_share}")
        if self.teacher_size is not None and self.teacher_size < 1:
            raise ValueError(f"--teacher-size must be above 0, got {self.teacher_size}")

    def _check_rewire(self) -> None:
        if self.rewire not in (None, *get_args(Rewire)):
            raise ValueError(f"--rewire {self.rewire} is unknown: give permute or rotate")
        own = self.of_method()
        if own["rewire"] == "off":
            return
        flag, instead = self.rewire_flag()
        if self.init == "scratch" and not own["full_width_first"]:
            raise ValueError(
                f"{flag} needs trained weights: give --init pretrained, a run's folder or a file, or a share of the "
                "run that trains them, such as --full-width-first 0.667"
            )
        if (own["rewire"] == "rotate" or own["full_width_first"]) and not self.learns_labels:
            raise ValueError(f"{flag} does not go with --teacher-objective features, which trains no head: {instead}")
        if self.method == "separate":
            raise ValueError("--rewire is for a model that is sliced: --method separate trains each width alone")
        if self.layout != "per_head" or self.heads != "fixed":
            raise ValueError(
                f"{flag} goes with --layout per_head and --heads fixed, not {self.layout}, {self.heads}: {instead}"
            )

    def rewire_flag(self) -> tuple[str, str]:
        """The flag that asks for rewiring, and what to do without it."""
        if METHODS[self.method].rewire == self.rewire or self.rewire is None:
            return f"--method {self.method}", "give --method scala"
        return f"--rewire {self.rewire}", "leave it out"

    @property
    def learns_labels(self) -> bool:
        """Whether labels are part of the loss; without them a run learns from its teacher's tokens alone."""
        return self.teacher_objective == "logits"

    def rank_batch(self, ranks: int) -> int:
        """Images a step of one of `ranks` processes. Raises ValueError when they do not divide."""
        if self.batch_size % ranks:
            raise ValueError(f"--batch-size {self.batch_size} is not a multiple of {ranks} processes")
        if (self.mixup or self.cutmix) and self.batch_size // ranks % 2:
            raise ValueError(
                f"--batch-size {self.batch_size} over {ranks} processes must be even for each with --mixup or --cutmix"
            )
        if self.batch_size // ranks % self.width_draws:
            raise ValueError(
                f"--width-draws {self.width_draws} does not divide the {self.batch_size // ranks} images of a process "
                "in a step (--batch-size)"
            )
        return self.batch_size // ranks

    def change(self) -> tuple[WidthGrid, float] | None:
        """The grid of `grid_change` and the share of the run after which it comes. Raises ValueError."""
        if self.grid_change is None:
            return None
        step, _, share = self.grid_change.partition("@")
        if not share.endswith("%"):
            raise ValueError(f"--grid-change {self.grid_change}: write a step and a share of the run, such as 1/8@70%")
        old = WidthGrid.parse(self.grid)
        portion = parse_fraction(share[:-1]) / 100
        if not 0 < portion < 1:
            raise ValueError(f"--grid-change {self.grid_change}: the share must lie between 0% and 100%")
        return WidthGrid(old.smallest, old.largest, parse_fraction(step)), float(Fraction(portion))

    def resolved(self) -> TrainConfig:
        """The same with every field that follows the method filled in."""
        return dataclasses.replace(self, **self.of_method())

    def of_method(self) -> dict[str, Any]:
        """The fields that follow the method, as they are given or else as it has them."""
        method, narrower = METHODS[self.method], len(WidthGrid.parse(self.grid)) > 1
        own: dict[str, Any] = {
            "isolation": method.isolation,
            "transfer": method.transfer,
            "sampling": method.draw,
            "calibration": method.calibration,
            "scope": method.scope,
            "full_width_first": method.full_width_first if narrower and self.init == "scratch" else 0.0,
            "rewire": method.rewire if narrower else "off",
        }
        given = {name: getattr(self, name) for name in own}
        return own | {name: value for name, value in given.items() if value is not None}

    def slice_settings(self) -> dict[str, Any]:
        """The fields of `SliceSettings`, resolved."""
        resolved = self.resolved()
        names = ("layout", "isolation", "attn_scale", "norm_eps", "heads", "scope")
        return {name: getattr(resolved, name) for name in names}


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """A configuration from config.json. Raises ValueError naming what this version does not know."""
    values = renamed(values)
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(f"config.json has training fields that this version does not know: {', '.join(unknown)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return TrainConfig(**values)


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """`values` of an older config.json under today's names: epochs of the full width alone are a share of the run."""
    if "full_width_epochs" not in values:
        return values
    share = min(values["full_width_epochs"] / values["epochs"], 1 - 1e-9)  # it might be the whole run, or more
    return {name: value for name, value in values.items() if name != "full_width_epochs"} | {"full_width_first": share}
