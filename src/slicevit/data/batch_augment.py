"""Augmentation of whole batches on the device, with a draw of its own for every image.

Legend of axis names: B images of a batch, C channels, H height, W width; G images of a batch that share an operation,
O pixels of a resized side, I of the side before, T attempts at a box.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as vision

from .loader import _generator, _hash64, _restored_randomness
from .transforms import TransformConfig

Size = tuple[int, int]  # height, width
Draw = tuple[str, tuple[float, ...]]  # an operation and its numbers

# timm's settings of its random crop and erasing
_CROP_RATIO = (3 / 4, 4 / 3)
_ERASED_SCALE = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)
_ATTEMPTS = 10

_BLUR_REACH = 8  # pixels; the strongest blur has a deviation of 2


def put(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for what the device has yet to do."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class BatchAugmentation:
    """From stored images_BCHW, uint8, to augmented and normalised ones, float32, of `img_size`; see `MemoryLoader`.

    What is drawn depends on the numbers in the call alone, and all but the noise of erasing not on the device.
    """

    def __init__(self, config: TransformConfig, device: torch.device):
        self._config = config
        self._device = device
        self._mean_C11 = torch.tensor(config.mean, device=device).view(-1, 1, 1)
        self._std_C11 = torch.tensor(config.std, device=device).view(-1, 1, 1)
        self._noise = torch.Generator(device)
        if config.rand_augment:
            self._operations = {**_OPERATIONS, "Affine": self._affine}
            self._rand_augment = rand_augment_transform(config.rand_augment)
            for op in self._rand_augment.ops:
                op.aug_fn = partial(_record, op.name, config.img_size)

    def __call__(self, images_BCHW: Tensor, *numbers: int) -> Tensor:
        config, draw = self._config, _generator(*numbers)
        if config.crop == "rrc":
            images_BCHW = self._random_resized_crop(images_BCHW, draw)
        elif config.crop == "pad":
            images_BCHW = self._shift(images_BCHW, draw)
        mirrored_B = put(torch.rand(len(images_BCHW), generator=draw) < config.hflip, self._device)
        images_BCHW = torch.where(_B111(mirrored_B), images_BCHW.flip(-1), images_BCHW)
        if config.rand_augment:
            images_BCHW = self._randomly_augmented(images_BCHW, draw, _hash64(*numbers))
        if config.color_jitter:
            images_BCHW = self._jittered(images_BCHW, draw)
        images_BCHW = (images_BCHW.float() / 255 - self._mean_C11) / self._std_C11
        if config.random_erasing:
            self._noise.manual_seed(_hash64(*numbers) >> 1)
            images_BCHW = self._erased(images_BCHW, draw)
        return images_BCHW

    def _random_resized_crop(self, images_BCHW: Tensor, draw: torch.Generator) -> Tensor:
        height, width = images_BCHW.shape[-2:]
        boxes_4B, found_B = _draw_boxes(
            len(images_BCHW), (height, width), self._config.scale, _CROP_RATIO, (height, width), draw
        )
        central_41 = torch.tensor(_central_box(height, width)).view(4, 1)
        top_B, left_B, height_B, width_B = put(torch.where(found_B, boxes_4B, central_41), self._device).float()
        out_height, out_width = self._config.img_size
        rows_BOI = _resize_weights(top_B, height_B, height, out_height, self._config.interpolation)
        columns_BOI = _resize_weights(left_B, width_B, width, out_width, self._config.interpolation)
        return _weighted(images_BCHW, rows_BOI, columns_BOI)

    def _shift(self, images_BCHW: Tensor, draw: torch.Generator) -> Tensor:
        """A random crop of the images with a black border of `pad` pixels."""
        (count, channels, height, width), pad = images_BCHW.shape, self._config.pad
        top_B, left_B = put(torch.randint(2 * pad + 1, (2, count), generator=draw), self._device)
        rows_BH = top_B[:, None] + torch.arange(height, device=self._device)
        columns_BW = left_B[:, None] + torch.arange(width, device=self._device)
        image_B111 = torch.arange(count, device=self._device).view(-1, 1, 1, 1)
        channel_C11 = torch.arange(channels, device=self._device).view(-1, 1, 1)
        padded_BCHW = functional.pad(images_BCHW, (pad,) * 4)
        return padded_BCHW[image_B111, channel_C11, rows_BH[:, None, :, None], columns_BW[:, None, None]]

    def _randomly_augmented(self, images_BCHW: Tensor, draw: torch.Generator, seed: int) -> Tensor:
        """RandAugment: timm draws for each image, and images that drew the same operation go through it together."""
        groups: dict[tuple[int, str], list[tuple[float, ...]]] = defaultdict(list)
        for image, drawn in enumerate(self._draw_operations(len(images_BCHW), draw, seed)):
            for layer, (name, values) in enumerate(drawn):
                groups[layer, name].append((image, *values, *(0.0,) * (6 - len(values))))
        if not groups:
            return images_BCHW
        ordered = sorted(groups.items())
        table = put(torch.tensor([row for _, rows in ordered for row in rows]), self._device)
        for ((_, name), _), part in zip(ordered, table.split([len(rows) for _, rows in ordered]), strict=True):
            index_G = part[:, 0].long()
            images_BCHW[index_G] = self._operations[name](images_BCHW[index_G], part[:, 1:])
        return images_BCHW

    def _draw_operations(self, count: int, draw: torch.Generator, seed: int) -> list[list[Draw]]:
        """What timm's RandAugment would do to each image, in this order."""
        timms = self._rand_augment
        weights = torch.ones(len(timms.ops)) if timms.choice_weights is None else torch.tensor(timms.choice_weights)
        chosen = torch.multinomial(
            weights.expand(count, -1), timms.num_layers, replacement=timms.choice_weights is None, generator=draw
        )
        drawn: list[list[Draw]] = [[] for _ in range(count)]
        with _restored_randomness():
            random.seed(seed)
            for image, ops in enumerate(chosen.tolist()):
                for op in ops:
                    drawn[image] = timms.ops[op](drawn[image])
        return drawn

    def _affine(self, images_GCHW: Tensor, values_GK: Tensor) -> Tensor:
        """Each pixel (x, y) from (a x + b y + c, d x + e y + f); the mean colour where this lies outside."""
        height, width = images_GCHW.shape[-2:]
        a, b, c, d, e, f = (value.view(-1, 1, 1) for value in values_GK.unbind(1))
        x_W = torch.arange(width, device=self._device) + 0.5
        y_H1 = (torch.arange(height, device=self._device) + 0.5)[:, None]
        x_GHW, y_GHW = a * x_W + b * y_H1 + c, d * x_W + e * y_H1 + f
        grid_GHW2 = torch.stack([2 * x_GHW / width - 1, 2 * y_GHW / height - 1], dim=-1)
        mode = self._config.interpolation if self._config.interpolation in ("nearest", "bilinear") else "bicubic"
        moved_GCHW = functional.grid_sample(
            images_GCHW.float(), grid_GHW2, mode, padding_mode="border", align_corners=False
        )
        inside_GHW = (x_GHW >= 0) & (x_GHW < width) & (y_GHW >= 0) & (y_GHW < height)
        return _to_levels(torch.where(inside_GHW[:, None], moved_GCHW, 255 * self._mean_C11))

    def _jittered(self, images_BCHW: Tensor, draw: torch.Generator) -> Tensor:
        """Brightness, contrast and saturation by a factor each, in an order of each image's own."""
        count, strength = len(images_BCHW), self._config.color_jitter
        order_B3 = torch.rand(count, 3, generator=draw).argsort(1)
        lowest = max(0.0, 1 - strength)
        factors_B3 = lowest + (1 + strength - lowest) * torch.rand(count, 3, generator=draw)
        drawn_32B = put(torch.stack([order_B3.float(), factors_B3]), self._device).permute(2, 0, 1)
        for kind_B, factor_B in drawn_32B:
            gray_B1HW = _gray(images_BCHW)
            colour_or_contrast = torch.where(_B111(kind_B) == 1, _rounded_mean(gray_B1HW), gray_B1HW.float())
            other_B1HW = torch.where(_B111(kind_B) == 0, 0.0, colour_or_contrast)
            images_BCHW = _blend(other_B1HW, images_BCHW, _B111(factor_B))
        return images_BCHW

    def _erased(self, images_BCHW: Tensor, draw: torch.Generator) -> Tensor:
        count, channels, height, width = images_BCHW.shape
        largest = (height - 1, width - 1)
        boxes_4B, found_B = _draw_boxes(count, (height, width), _ERASED_SCALE, _ERASED_RATIO, largest, draw)
        erased_B = found_B & (torch.rand(count, generator=draw) < self._config.random_erasing)
        top_B, left_B, height_B, width_B = put(boxes_4B * erased_B, self._device)
        rows_BH = _between(top_B, height_B, height)
        columns_BW = _between(left_B, width_B, width)
        noise = torch.zeros((), device=self._device)
        if self._config.erasing_mode != "const":
            shape = images_BCHW.shape if self._config.erasing_mode == "pixel" else (count, channels, 1, 1)
            noise = torch.randn(shape, generator=self._noise, device=self._device)
        return torch.where((rows_BH[:, :, None] & columns_BW[:, None])[:, None], noise, images_BCHW)


def _draw_boxes(
    count: int, size: Size, scale: tuple[float, float], ratio: tuple[float, float], largest: Size, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Boxes of a random share of the area and aspect ratio, at a random place, as timm draws them.

    Returns:
        top, left, height and width of each, (4, B), and whether one of the attempts was at most `largest`, (B,).
    """
    height, width = size
    area_BT, ratio_BT = torch.rand(2, count, _ATTEMPTS, generator=draw, dtype=torch.float64)
    area_BT = height * width * (scale[0] + (scale[1] - scale[0]) * area_BT)
    ratio_BT = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * ratio_BT)
    heights_BT = (area_BT / ratio_BT).sqrt().round().clamp(min=1)
    widths_BT = (area_BT * ratio_BT).sqrt().round().clamp(min=1)
    fits_BT = (heights_BT <= largest[0]) & (widths_BT <= largest[1])
    first_B1 = fits_BT.int().argmax(1, keepdim=True)
    height_B, width_B = (sides_BT.gather(1, first_B1)[:, 0] for sides_BT in (heights_BT, widths_BT))
    place_2B = torch.rand(2, count, generator=draw, dtype=torch.float64)
    top_B, left_B = (place_2B[0] * (height - height_B + 1)).floor(), (place_2B[1] * (width - width_B + 1)).floor()
    return torch.stack([top_B, left_B, height_B, width_B]).long(), fits_BT.any(1)


def _central_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the crop that timm takes where no attempt fits."""
    box_height = min(height, round(width / _CROP_RATIO[0]))
    box_width = min(width, round(height * _CROP_RATIO[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _resize_weights(start_B: Tensor, length_B: Tensor, size: int, out_size: int, interpolation: str) -> Tensor:
    """By how much each pixel of a side counts in each pixel of its part (start, length) resized to `out_size`.

    These are Pillow's weights, with its antialiasing, for a part that is cropped before it is resized. (B, O, I).
    """
    pixels_I = torch.arange(size, device=start_B.device)
    out_O = torch.arange(out_size, device=start_B.device) + 0.5
    scale_B1 = (length_B / out_size)[:, None]
    centres_BO1 = (start_B[:, None] + out_O * scale_B1)[..., None]
    if interpolation == "nearest":
        return (pixels_I == centres_BO1.floor()).float()
    distance_BOI = (pixels_I + 0.5 - centres_BO1) / scale_B1.clamp(min=1)[..., None]
    weights_BOI = _FILTERS[interpolation](distance_BOI) * _between(start_B, length_B, size)[:, None]
    return weights_BOI / weights_BOI.sum(-1, keepdim=True)


def _bicubic(x: Tensor) -> Tensor:
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far) * (x < 2)


# Pillow's filters, at a distance from their centre
_FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "bilinear": lambda x: (1 - x.abs()).clamp(min=0),
    "bicubic": _bicubic,
    "box": lambda x: ((x > -0.5) & (x <= 0.5)).float(),
    "hamming": lambda x: torch.sinc(x) * (0.54 + 0.46 * torch.cos(math.pi * x)) * (x.abs() < 1),
    "lanczos": lambda x: torch.sinc(x) * torch.sinc(x / 3) * (x.abs() < 3),
}


def _record(name: str, size: Size, drawn: list[Draw], level: float = 0.0, **unused: Any) -> list[Draw]:
    """In place of an operation of timm's RandAugment: notes the operation and the level drawn for it."""
    name = name.removesuffix("Increasing")
    height, width = size
    if name == "Rotate":
        cos, sin = math.cos(math.radians(level)), math.sin(math.radians(level))
        x, y = width / 2, height / 2
        return [*drawn, ("Affine", (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))]
    moves = {
        "ShearX": (1.0, level, 0.0, 0.0, 1.0, 0.0),
        "ShearY": (1.0, 0.0, 0.0, level, 1.0, 0.0),
        "TranslateXRel": (1.0, 0.0, level * width, 0.0, 1.0, 0.0),
        "TranslateYRel": (1.0, 0.0, 0.0, 0.0, 1.0, level * height),
    }
    if name in moves:
        return [*drawn, ("Affine", moves[name])]
    if name == "Desaturate":
        return [*drawn, ("Color", (1 - level,))]
    return [*drawn, (name, (level,))]


def _posterize(images_GCHW: Tensor, values_GK: Tensor) -> Tensor:
    """Keeps this many bits, and at least one, as `train_transform` does."""
    dropped_G = 8 - values_GK[:, 0].clamp(min=1, max=8)
    return images_GCHW & _B111(256 - torch.exp2(dropped_G)).to(torch.uint8)


def _solarize(images_GCHW: Tensor, values_GK: Tensor) -> Tensor:
    return torch.where(images_GCHW < _B111(values_GK[:, 0]), images_GCHW, 255 - images_GCHW)


def _solarize_add(images_GCHW: Tensor, values_GK: Tensor) -> Tensor:
    """Adds to the levels below 128; timm's addend is at most 128."""
    return torch.where(images_GCHW < 128, images_GCHW + _B111(values_GK[:, 0]).to(torch.uint8), images_GCHW)


def _color(images_GCHW: Tensor, values_GK: Tensor) -> Tensor:
    return _blend(_gray(images_GCHW), images_GCHW, _B111(values_GK[:, 0]))


def _contrast(images_GCHW: Tensor, values_GK: Tensor) -> Tensor:
    return _blend(_rounded_mean(_gray(images_GCHW)), images_GCHW, _B111(values_GK[:, 0]))


def _brightness(images_GCHW: Tensor, values_GK: Tensor) -> Tensor:
    return _to_levels(images_GCHW * _B111(values_GK[:, 0]), truncated=True)


def _sharpness(images_GCHW: Tensor, values_GK: Tensor) -> Tensor:
    """Towards or away from Pillow's SMOOTH (all neighbours 1, the centre 5), which leaves the border as it is."""
    smooth_GCHW = images_GCHW.float()
    inner = smooth_GCHW[..., 1:-1, 1:-1]
    inner.copy_(((9 * functional.avg_pool2d(smooth_GCHW, 3, stride=1) + 4 * inner) / 13).round())
    return _blend(smooth_GCHW, images_GCHW, _B111(values_GK[:, 0]))


def _gaussian_blur(images_GCHW: Tensor, values_GK: Tensor) -> Tensor:
    """The border goes on beyond it, as in Pillow."""
    rows_GOI, columns_GOI = (_blur_weights(values_GK[:, 0], side) for side in images_GCHW.shape[-2:])
    beyond_GCHW = functional.pad(images_GCHW.float(), (_BLUR_REACH,) * 4, mode="replicate")
    return _weighted(beyond_GCHW, rows_GOI, columns_GOI)


_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": lambda images_GCHW, _: vision.autocontrast(images_GCHW),
    "Equalize": lambda images_GCHW, _: vision.equalize(images_GCHW),
    "Invert": lambda images_GCHW, _: vision.invert(images_GCHW),
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "GaussianBlur": _gaussian_blur,
}


def _B111(values_B: Tensor) -> Tensor:
    return values_B.view(-1, 1, 1, 1)


def _between(start_B: Tensor, length_B: Tensor, size: int) -> Tensor:
    """Which pixels of a side lie in a part of it, (B, I)."""
    pixels_I = torch.arange(size, device=start_B.device)
    return (pixels_I >= start_B[:, None]) & (pixels_I < (start_B + length_B)[:, None])


def _weighted(images_BCHW: Tensor, rows_BOI: Tensor, columns_BOI: Tensor) -> Tensor:
    """Weighted sums of pixels along each row, then each column, rounded to levels each time, as Pillow does."""
    narrowed_BCHO = _to_levels(images_BCHW.float() @ columns_BOI[:, None].mT)
    return _to_levels(rows_BOI[:, None] @ narrowed_BCHO.float())


def _blur_weights(sigma_G: Tensor, size: int) -> Tensor:
    """By how much each pixel of a side and beyond counts in each of the side, (G, O, I)."""
    pixels_I = torch.arange(-_BLUR_REACH, size + _BLUR_REACH, device=sigma_G.device)
    distance_OI = pixels_I - torch.arange(size, device=sigma_G.device)[:, None]
    return torch.softmax(-((distance_OI / sigma_G[:, None, None]) ** 2) / 2, dim=-1)


def _gray(images_BCHW: Tensor) -> Tensor:
    """Pillow's gray levels, (B, 1, H, W)."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    red_BHW, green_BHW, blue_BHW = images_BCHW.int().unbind(1)
    return ((19595 * red_BHW + 38470 * green_BHW + 7471 * blue_BHW + 2**15) >> 16)[:, None]


def _rounded_mean(gray_B1HW: Tensor) -> Tensor:
    return (gray_B1HW.float().mean((1, 2, 3), keepdim=True) + 0.5).floor()


def _blend(other: Tensor, images_BCHW: Tensor, share_B111: Tensor) -> Tensor:
    """This share of the images and the rest of the other, as Pillow blends: beyond 1 away from it."""
    other = other.float()
    return _to_levels(other + share_B111 * (images_BCHW - other), truncated=True)


def _to_levels(values: Tensor, truncated: bool = False) -> Tensor:
    return (values if truncated else values.round()).clamp(0, 255).to(torch.uint8)
