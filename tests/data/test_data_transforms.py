"""Transforms: what comes out, and that each setting does what it says."""

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from slicevit.data import TransformConfig, eval_transform, train_transform

MODES = {1: "L", 3: "RGB"}


def config(in_chans: int = 3, **fields: Any) -> TransformConfig:
    fields.setdefault("img_size", (28, 28))
    return TransformConfig(in_chans=in_chans, mean=(0.5,) * in_chans, std=(0.25,) * in_chans, **fields)


def noise_image(width: int, height: int, in_chans: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(MODES[in_chans])


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("crop", ["rrc", "pad", "center"])
@pytest.mark.parametrize("size", [(28, 28), (40, 33), (9, 50)])
def test_shape_and_type(in_chans, crop, size):
    cfg = config(in_chans, crop=crop, img_size=(28, 24), color_jitter=0.3, random_erasing=0.5)
    image = noise_image(*size, in_chans)
    for transform in (train_transform(cfg), eval_transform(cfg)):
        for _ in range(5):
            tensor = transform(image)
            assert tensor.shape == (in_chans, 28, 24)
            assert tensor.dtype == torch.float32
            assert tensor.isfinite().all()


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("rand_augment", ["rand-m9-mstd0.5-inc1", "rand-m10-n5-p1-inc1", "rand-m0-n5-p1"])
def test_rand_augment_takes_every_level(in_chans, rand_augment):
    """Pillow 13 refuses the 0 bits that timm's posterize asks for at the strongest level."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    transform = train_transform(config(in_chans, crop="pad", rand_augment=rand_augment))
    image = noise_image(28, 28, in_chans)
    assert all(transform(image).isfinite().all() for _ in range(300))


def test_eval_normalises_and_does_not_move_pixels():
    image = noise_image(28, 28, 3)
    expected = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - 0.5) / 0.25
    for cfg in (config(crop="pad"), config(crop="center", crop_pct=1.0)):
        assert torch.allclose(eval_transform(cfg)(image), expected, atol=1e-6)


def test_eval_crop_pct():
    """A bright border of a tenth is cut away by crop_pct 0.8, and kept whole by "pad"."""
    pixels = np.full((100, 100), 255, np.uint8)
    pixels[10:90, 10:90] = 0
    image = Image.fromarray(pixels)
    black, white = -2.0, 2.0
    cropped = eval_transform(config(1, crop="center", crop_pct=0.7))(image)
    assert (cropped == black).all()
    assert eval_transform(config(1, crop="pad", crop_pct=0.7))(image).max() == white


def test_pad_crop_shifts_by_at_most_pad():
    """A single white pixel moves by up to `pad` each way, and every shift comes up."""
    pixels = np.zeros((28, 28), np.uint8)
    pixels[14, 14] = 255
    transform = train_transform(config(1, crop="pad", pad=2, hflip=0.0))
    torch.manual_seed(0)
    places = {tuple((transform(Image.fromarray(pixels))[0] > 0).nonzero()[0].tolist()) for _ in range(400)}
    assert places == {(row, column) for row in range(12, 17) for column in range(12, 17)}


def test_pad_crop_resizes_the_whole_image_first():
    """A quarter of the height stays a quarter, in training and in evaluation."""
    cfg = config(1, crop="pad", pad=0, hflip=0.0)
    image = Image.new("L", (56, 112))
    image.paste(255, (0, 0, 56, 28))
    for transform in (train_transform(cfg), eval_transform(cfg)):
        tensor = transform(image)[0]
        assert (tensor[:5] > 1.9).all()
        assert (tensor[9:] < -1.9).all()


def test_hflip():
    pixels = np.tile(np.arange(28, dtype=np.uint8), (28, 1))
    for probability, expected in ((0.0, {False}), (1.0, {True}), (0.5, {False, True})):
        transform = train_transform(config(1, crop="pad", pad=0, hflip=probability))
        flipped = {
            bool(row[0, 0, 0] > row[0, 0, -1]) for row in (transform(Image.fromarray(pixels)) for _ in range(40))
        }
        assert flipped == expected


def test_color_jitter_and_erasing_change_the_image():
    image = noise_image(28, 28, 3)
    plain = config(crop="pad", pad=0, hflip=0.0)
    assert torch.equal(train_transform(plain)(image), eval_transform(plain)(image))
    for field in ({"color_jitter": 0.4}, {"random_erasing": 1.0}):
        changed = train_transform(config(crop="pad", pad=0, hflip=0.0, **field))(image)
        assert not torch.equal(changed, eval_transform(plain)(image))


def test_transforms_pickle():
    cfg = config(rand_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25, color_jitter=0.1)
    for transform in (train_transform(cfg), eval_transform(cfg)):
        assert pickle.loads(pickle.dumps(transform))(noise_image(30, 30, 3)).shape == (3, 28, 28)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": (0.5,)}, "mean has 1 and std 3 values: give 3 of each"),
        ({"interpolation": "cubic"}, "interpolation 'cubic': give one of .*bicubic"),
        ({"crop": "random"}, "crop 'random': give one of rrc, pad, center"),
        ({"crop_pct": 0.0}, "crop_pct is 0.0"),
        ({"rand_augment": "m9"}, "rand_augment 'm9': give a string such as"),
    ],
)
def test_bad_settings(fields, message):
    good: dict[str, Any] = {"img_size": (28, 28), "in_chans": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match=message):
        TransformConfig(**{**good, **fields})
