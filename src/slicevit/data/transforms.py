"""From PIL images to normalised tensors, for training and evaluation, of timm's and torchvision's parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image
from timm.data.auto_augment import RandAugment, posterize
from timm.data.transforms import ResizeKeepRatio, str_to_interp_mode
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torch import Tensor
from torchvision import transforms

Transform = Callable[[Image.Image], Tensor]
PairTransform = Callable[[Image.Image, Any], tuple[Tensor, Tensor]]  # of an image and its mask, or boxes
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class TransformConfig:
    """What happens to an image on its way to the model.

    Attributes:
        img_size: (height, width) of the tensors, in pixels.
        in_chans: channels of the tensors, 1 or 3; the images must have as many.
        mean, std: of each channel, on a scale where black is 0 and white is 1.
        interpolation: of every resize, one of `INTERPOLATIONS`.
        crop: training's crop. "rrc": a random area and aspect ratio. "pad", for small images: resize to
            img_size where it differs (without keeping the aspect ratio), pad with black, crop at random;
            evaluation then sees the whole image. "center": the same crop as evaluation's.
        crop_pct: the share of the resized image's side that the central crop keeps; not used by "pad".
        pad: pixels added to each side by "pad".
        scale: the smallest and largest share of the image's area that "rrc" takes.
        hflip: probability of a mirror image.
        rand_augment: timm's RandAugment string, such as "rand-m9-mstd0.5-inc1"; empty for none.
        color_jitter: strength of the jitter of brightness, contrast and saturation, also beside rand_augment.
        random_erasing: probability that a rectangle is erased.
        erasing_mode: with what: "pixel" (noise), "rand" (one random colour) or "const" (the mean colour).

    Raises:
        ValueError: if a field is outside what is said here.
    """

    img_size: tuple[int, int]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.9
    crop: Literal["rrc", "pad", "center"] = "rrc"
    pad: int = 2
    scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    rand_augment: str = ""
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    erasing_mode: Literal["pixel", "rand", "const"] = "pixel"

    def __post_init__(self) -> None:
        if len(self.mean) != self.in_chans or len(self.std) != self.in_chans:
            raise ValueError(f"mean has {len(self.mean)} and std {len(self.std)} values: give {self.in_chans} of each.")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r}: give one of {', '.join(INTERPOLATIONS)}.")
        if self.crop not in ("rrc", "pad", "center"):
            raise ValueError(f"crop {self.crop!r}: give one of rrc, pad, center.")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}: give a share above 0 and at most 1.")
        if self.rand_augment and not self.rand_augment.startswith("rand-"):
            raise ValueError(f"rand_augment {self.rand_augment!r}: give a string such as 'rand-m9-mstd0.5-inc1'.")


def train_transform(cfg: TransformConfig) -> Transform:
    """A callable from a PIL image to a float32 tensor (C, H, W).

    It draws from the global generators of python, numpy and torch.
    """
    crop_and_flip, augment, finish = transforms_imagenet_train(
        cfg.img_size,
        scale=cfg.scale,
        hflip=cfg.hflip,
        auto_augment=cfg.rand_augment or None,
        color_jitter=cfg.color_jitter or None,  # type: ignore[arg-type]  # None is timm's "none"
        force_color_jitter=True,
        interpolation=cfg.interpolation,
        mean=cfg.mean,
        std=cfg.std,
        re_prob=cfg.random_erasing,
        re_mode=cfg.erasing_mode,
        separate=True,
    )
    if cfg.rand_augment:
        _leave_posterize_one_bit(augment.transforms[0])
    if cfg.crop == "rrc":
        return transforms.Compose([crop_and_flip, augment, finish])
    crop = _pad_crop(cfg) if cfg.crop == "pad" else _center_crop(cfg)
    return transforms.Compose([*crop, transforms.RandomHorizontalFlip(cfg.hflip), augment, finish])


def eval_transform(cfg: TransformConfig) -> Transform:
    """A callable from a PIL image to a float32 tensor (C, H, W), without chance."""
    told = preprocessing(cfg)
    del told["input_size"]
    return transforms_imagenet_eval(cfg.img_size, **told)


def preprocessing(cfg: TransformConfig) -> dict[str, Any]:
    """Arguments of timm.data.create_transform, which builds the transform that the model was evaluated with."""
    whole_image = cfg.crop == "pad"
    return {
        "input_size": [cfg.in_chans, *cfg.img_size],
        "mean": list(cfg.mean),
        "std": list(cfg.std),
        "interpolation": cfg.interpolation,
        "crop_pct": 1.0 if whole_image else cfg.crop_pct,
        "crop_mode": "squash" if whole_image else "center",
    }


def eval_config(config: dict[str, Any]) -> TransformConfig:
    """The evaluation transform that a saved model's config.json describes."""
    cfg = config["pretrained_cfg"]
    channels, height, width = cfg["input_size"]
    crop = config.get("slicevit", {}).get("training", {}).get("crop", "rrc")
    return TransformConfig(
        img_size=(height, width),
        in_chans=channels,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg["interpolation"],
        crop_pct=cfg["crop_pct"],
        crop=crop,
    )


def _pad_crop(cfg: TransformConfig) -> list[Callable]:
    resize = transforms.Resize(cfg.img_size, str_to_interp_mode(cfg.interpolation))
    return [resize, transforms.RandomCrop(cfg.img_size, padding=cfg.pad)]


def _center_crop(cfg: TransformConfig) -> list[Callable]:
    resized = tuple(math.floor(side / cfg.crop_pct) for side in cfg.img_size)
    return [ResizeKeepRatio(resized, interpolation=cfg.interpolation), transforms.CenterCrop(cfg.img_size)]


def _leave_posterize_one_bit(rand_augment: RandAugment) -> None:
    """timm's strongest "posterize" asks for 0 bits, which Pillow 13 refuses and older ones paint black."""
    for op in rand_augment.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **unused: Any) -> Image.Image:
    return posterize(image, max(1, bits_to_keep))
