"""Images in memory: the same images as the per-image path, each augmented by a draw of its own."""

import logging
import math
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, AugmentOp, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor
from torchvision import transforms

from slicevit.data import (
    BUNDLED,
    ImageSet,
    StreamSet,
    TrainLoader,
    TransformConfig,
    batch_augment,
    eval_transform,
    open_dataset,
    train_transform,
)
from slicevit.data import memory as memory_module
from slicevit.data.batch_augment import BatchAugmentation
from slicevit.data.memory import MemoryLoader
from slicevit.data.transforms import INTERPOLATIONS
from slicevit.training.config import TrainConfig
from slicevit.training.trainee import Trainee

BLACK, WHITE = -2.0, 2.0  # as `config` normalises


def config(in_chans: int = 3, **fields: Any) -> TransformConfig:
    fields = {"img_size": (16, 20), "crop": "center", "crop_pct": 1.0, "hflip": 0.0} | fields
    return TransformConfig(in_chans=in_chans, mean=(0.5,) * in_chans, std=(0.25,) * in_chans, **fields)


EVERYTHING = config(crop="rrc", hflip=0.5, rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.3, random_erasing=0.5)


class Pictures(ImageSet):
    """Given images, whose class is their index; `bad` ones cannot be read."""

    def __init__(self, images: list[Image.Image], bad: tuple[int, ...] = ()):
        super().__init__("pictures", "train", {"L": 1, "RGB": 3}[images[0].mode], None, len(images))
        self._images = images
        self._bad_indices = bad

    def __len__(self) -> int:
        return len(self._images)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if index in self._bad_indices:
            raise OSError("broken")
        return self._images[index], index


def noise(height: int = 16, width: int = 20, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth noise, as photographs are: a small image of noise, enlarged."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def pictures(count: int, bad: tuple[int, ...] = (), **size: Any) -> Pictures:
    return Pictures([noise(seed=seed, **size) for seed in range(count)], bad)


def copies(image: Image.Image, count: int, cfg: TransformConfig, seed: int = 0) -> Tensor:
    """One batch of `count` times the same image."""
    images, _ = next(MemoryLoader(Pictures([image] * count), cfg, count, seed).epoch(0))
    return images


def levels(images: Tensor) -> Tensor:
    """Of images that `config` normalised."""
    return (images * 0.25 + 0.5) * 255


def as_tensor(image: Image.Image) -> Tensor:
    return transforms.PILToTensor()(image)


def same(batches: Iterable, others: Iterable) -> bool:
    pairs = list(zip(batches, others, strict=True))
    assert pairs
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def targets(batches: Iterable) -> list[int]:
    return [target for _, batch in batches for target in batch.tolist()]


@pytest.mark.parametrize("cfg", [config(crop_pct=0.8), config(crop="pad", pad=0), config(img_size=(9, 9))])
def test_without_augmentation_batches_are_those_of_the_per_image_path(make_folder, cfg):
    """To 1e-6: both divide, subtract and divide the same 8-bit pixels in float32."""
    dataset = open_dataset(str(make_folder(per_class=9)), "train")
    train = TrainLoader(dataset, train_transform(cfg), 4, seed=3)
    memory = MemoryLoader(dataset, cfg, 4, seed=3)
    assert memory.steps_per_epoch == train.steps_per_epoch == 6
    for epoch in (0, 1):
        for (images, classes), (expected, same_classes) in zip(memory.epoch(epoch), train.epoch(epoch), strict=True):
            assert images.dtype == torch.float32
            assert classes.dtype == torch.int64
            assert torch.equal(classes, same_classes)
            torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)


def test_gray_images_of_the_bundled_set():
    cfg = TransformConfig((28, 28), 1, (0.5,), (0.5,), crop="pad")
    bundled = open_dataset(BUNDLED, "train", in_chans=1)
    dataset = Pictures([bundled.load(index)[0] for index in range(32)])
    images, _ = next(MemoryLoader(dataset, cfg, 32, seed=0).epoch(0))
    assert images.shape == (32, 1, 28, 28)
    assert images.min() == -1
    assert images.max() <= 1


def test_same_batches_for_any_workers_and_when_resumed():
    dataset = pictures(150)
    whole = list(MemoryLoader(dataset, EVERYTHING, 20, seed=1).epoch(3))
    assert len(whole) == 7
    for workers in (0, 2):
        again = MemoryLoader(dataset, EVERYTHING, 20, seed=1, workers=workers)
        assert same(whole[5:], again.epoch(3, start_step=5))
        assert same(whole, again.epoch(3))
    assert list(again.epoch(3, start_step=7)) == []
    assert not same(whole, again.epoch(4))
    assert not same(whole, MemoryLoader(dataset, EVERYTHING, 20, seed=2).epoch(3))


def test_the_callers_generators_neither_change_nor_matter():
    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    batches = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = states()
        train = MemoryLoader(pictures(24), EVERYTHING, 8, seed=0)
        batches.append([])
        for batch in train.epoch(0):
            batches[-1].append(batch)
            assert states() == before
    assert same(*batches)


@pytest.mark.parametrize(
    ("field", "least"),
    [
        ({"crop": "rrc"}, 60),
        ({"crop": "pad", "pad": 4}, 35),
        ({"hflip": 0.5}, 2),
        ({"random_erasing": 1.0}, 60),
        ({"random_erasing": 1.0, "erasing_mode": "const"}, 55),
        ({"color_jitter": 0.4}, 60),
        ({"rand_augment": "rand-m9-mstd0.5-inc1"}, 25),
    ],
)
def test_each_image_of_a_batch_has_its_own_draw(field, least):
    """Of 64 copies of one image at least this many are different."""
    images = copies(noise(), 64, config(**field))
    assert len(images.flatten(1).unique(dim=0)) >= least
    assert images.isfinite().all()
    is_noisy = "random_erasing" in field and "erasing_mode" not in field
    assert is_noisy or images.abs().max() <= WHITE + 1e-6


def test_ranks_share_one_permutation():
    dataset = pictures(26)
    whole = list(MemoryLoader(dataset, config(), 8, seed=0).epoch(0))
    parts = [list(MemoryLoader(dataset, config(), 4, seed=0, rank=r, world_size=2).epoch(0)) for r in range(2)]
    for (images, classes), even, odd in zip(whole, *parts, strict=True):
        assert not set(even[1].tolist()) & set(odd[1].tolist())
        assert torch.equal(classes[0::2], even[1])
        assert torch.equal(classes[1::2], odd[1])
        assert torch.equal(images[0::2], even[0])
        assert torch.equal(images[1::2], odd[0])
    augmented = [next(MemoryLoader(dataset, EVERYTHING, 4, 0, rank=r, world_size=2).epoch(0))[0] for r in range(2)]
    assert not torch.equal(*augmented)


def test_repeats_are_those_of_the_train_loader():
    dataset, cfg = pictures(30), config(crop="rrc")
    batches = list(MemoryLoader(dataset, cfg, 6, seed=0, repeats=3).epoch(0))
    assert targets(batches) == targets(TrainLoader(dataset, train_transform(cfg), 6, seed=0, repeats=3).epoch(0))
    shown = torch.cat([images for images, _ in batches]).flatten(1)
    assert len(shown.unique(dim=0)) == 30


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_those_of_the_train_loader(caplog, workers):
    dataset = pictures(200, bad=(7, 8, 199))
    options: dict[str, Any] = {"batch_size": 20, "seed": 1, "max_bad_share": 0.02}
    expected = targets(TrainLoader(dataset, train_transform(config()), **options).epoch(0))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="slicevit"):
        memory = MemoryLoader(dataset, config(), workers=workers, **options)
    text = "\n".join(record.getMessage() for record in caplog.records)
    for index in (7, 8, 199):
        assert text.count(f"pictures train image {index} (broken)") == 1
    assert "replaced by the next readable image" in text
    caplog.clear()
    assert targets(memory.epoch(0)) == expected
    assert sorted(expected) == sorted([0, *range(7), 9, 9, *range(9, 199)])
    assert not caplog.records


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images(workers, capfd):
    with pytest.raises(ValueError, match=r"2 or more of its 100 images .*2\.00%, above the 1\.00%.*--max-bad-share"):
        MemoryLoader(pictures(100, bad=(3, 5)), config(crop="rrc"), 10, seed=0, workers=workers)
    assert "Traceback" not in capfd.readouterr().err


def test_streams_are_refused():
    class Stream(StreamSet):
        def __init__(self) -> None:
            self.spec = "wds/fake"

    with pytest.raises(ValueError, match=r"--in-memory: --data wds/fake is a stream.*leave --in-memory out"):
        MemoryLoader(Stream(), config(), 4, seed=0)


def test_a_set_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"--data pictures has 7 training images, fewer than a batch of 4 x 2"):
        MemoryLoader(pictures(7), config(), 4, seed=0, world_size=2)


def test_a_set_that_does_not_fit_is_refused(monkeypatch):
    dataset = pictures(8)
    images = {"bytes": 8 * 3 * 16 * 20}
    monkeypatch.setattr(memory_module, "_free_bytes", lambda device: images["bytes"])
    MemoryLoader(dataset, config(), 4, seed=0)
    images["bytes"] -= 1
    with pytest.raises(ValueError, match=r"--in-memory: .*0\.00 GiB \(8 images of 3 x 16 x 20\).* free on cpu: leave"):
        MemoryLoader(dataset, config(), 4, seed=0)


def test_free_memory_is_plausible():
    assert 2**20 < memory_module._free_bytes(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("sizes", "stored"),
    [
        ([(32, 40)] * 80, (32, 40)),
        ([(32, 41)] * 80, (16, 20)),
        ([(8, 8)] * 80, (8, 8)),
        ([(8, 8), (16, 20)] * 40, (16, 20)),
        ([(16, 16)] * 79 + [(20, 16)], (16, 20)),
    ],
    ids=["one", "larger", "smaller", "two", "last"],
)
def test_stored_size_of_random_crops(sizes, stored, workers):
    """Images keep one common size up to twice `img_size`; the odd one may be the last."""
    dataset = Pictures([noise(*size) for size in sizes])
    train = MemoryLoader(dataset, config(crop="rrc"), 16, seed=0, workers=workers)
    assert train._images_NCHW.shape == (80, 3, *stored)
    assert train._images_NCHW.dtype == torch.uint8
    assert next(train.epoch(0))[0].shape == (16, 3, 16, 20)
    assert targets([(None, train._targets_N)]) == list(range(80))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_random_crops_are_pillows(monkeypatch, interpolation, mode):
    """Boxes of any size, resized as Pillow resizes the cropped image: to 2 of 255 levels, as both round twice.

    The filter "box" may count a pixel whose centre lies just on its edge, or not.
    """
    image = noise(40, 40, mode=mode)
    cfg = config({"L": 1, "RGB": 3}[mode], img_size=(24, 32), crop="rrc", interpolation=interpolation)
    boxes = [(0, 0, 40, 40), (3, 5, 31, 17), (30, 0, 10, 40), (39, 39, 1, 1), (7, 1, 24, 32), (0, 35, 9, 5)]
    found = torch.tensor(boxes).T, torch.ones(len(boxes), dtype=torch.bool)
    monkeypatch.setattr(batch_augment, "_draw_boxes", lambda *arguments: found)
    images = levels(copies(image, len(boxes), cfg))
    for got, (top, left, height, width) in zip(images, boxes, strict=True):
        box = image.crop((left, top, left + width, top + height))
        expected = as_tensor(box.resize((32, 24), str_to_pil_interp(interpolation)))
        off = (got - expected).abs() > (0.01 if interpolation == "nearest" else 2.01)
        assert off.float().mean() <= (0.1 if interpolation == "box" else 0)


@pytest.mark.parametrize("size", [(64, 64), (30, 64), (64, 20)])
def test_random_crops_are_drawn_as_timm_does(size):
    """Area share within the scale, and the means of area, ratio and place as timm's within five standard errors."""
    height, width = size
    scale, ratio, count = (0.08, 1.0), (3 / 4, 4 / 3), 4000
    boxes, found = batch_augment._draw_boxes(count, size, scale, ratio, size, torch.Generator().manual_seed(0))
    boxes = torch.where(found, boxes, torch.tensor(batch_augment._central_box(*size)).view(4, 1))
    random.seed(0)
    image = Image.new("L", (width, height))
    timms = torch.tensor([RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(count)]).T
    for got, expected in ((boxes, timms), (timms, boxes)):
        top, left, box_height, box_width = got
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + box_height <= height).all()
        assert (left + box_width <= width).all()
        share = box_height * box_width / (height * width)
        assert share.min() > 0.07
        assert share.max() <= 1
        for side in range(4):
            error = 5 * math.sqrt(2 * expected[side].double().var() / count)
            assert abs(got[side].double().mean() - expected[side].double().mean()) <= max(error, 1e-9)
        error = 5 * math.sqrt(2 * share.var() / count)
        assert abs(share.mean() - (expected[2] * expected[3] / (height * width)).float().mean()) <= error


def test_random_crops_keep_to_the_scale():
    """The rows and columns of a crop can be told from its pixels, and its area with them."""
    row, column = np.mgrid[0:64, 0:64].astype(np.uint8)
    image = Image.fromarray(np.stack([row * 4, column * 4, row * 0], axis=-1))
    images = levels(copies(image, 300, config(img_size=(64, 64), crop="rrc", scale=(0.3, 0.6))))
    height = (images[:, 0, -8, 0] - images[:, 0, 8, 0]) / 4 / 48 * 64
    width = (images[:, 1, 0, -8] - images[:, 1, 0, 8]) / 4 / 48 * 64
    share = height * width / 64**2
    assert 0.27 < share.min() < 0.33
    assert 0.57 < share.max() < 0.63
    assert abs(share.mean() - 0.45) < 0.03
    assert 0.71 < (width / height).min() < 0.8
    assert 1.25 < (width / height).max() < 1.4


def test_pad_crop_shifts_by_at_most_pad():
    """A single white pixel moves by up to `pad` each way, and every shift comes up; what comes in is black."""
    pixels = np.zeros((28, 28), np.uint8)
    pixels[14, 14] = 255
    images = copies(Image.fromarray(pixels), 400, config(1, img_size=(28, 28), crop="pad", pad=2))
    places = {tuple(place) for place in (images[:, 0] > 0).nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in range(12, 17) for column in range(12, 17)}
    images = copies(Image.new("L", (28, 28), 255), 200, config(1, img_size=(28, 28), crop="pad", pad=2))
    assert set(images.unique().tolist()) == {BLACK, WHITE}
    assert (images[:, :, 2:-2, 2:-2] == WHITE).all()
    assert (images[:, :, :2].flatten(1) == BLACK).any(1).float().mean() > 0.3


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_hflip(probability):
    image = noise()
    images = levels(copies(image, 1000, config(hflip=probability)))
    upright, mirrored = as_tensor(image).float(), as_tensor(image).flip(-1).float()
    flipped = [torch.allclose(got, mirrored, atol=0.01) for got in images]
    assert all(torch.allclose(got, upright, atol=0.01) for got, flip in zip(images, flipped, strict=True) if not flip)
    assert abs(np.mean(flipped) - probability) < (0.07 if 0 < probability < 1 else 1e-9)


@pytest.mark.parametrize("erasing_mode", ["pixel", "rand", "const"])
def test_erasing(erasing_mode):
    """One rectangle in a share of the images, as large as timm's, and nothing else."""
    count, probability = 1000, 0.4
    cfg = config(img_size=(32, 48), random_erasing=probability, erasing_mode=erasing_mode)
    images = copies(Image.new("RGB", (48, 32), (255, 255, 255)), count, cfg)
    erased = (images != WHITE).all(1)
    shares = []
    for got, mask in zip(images, erased, strict=True):
        if not mask.any():
            continue
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        inside = got[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert mask.sum() == len(rows) * len(columns) == inside[0].numel()
        values = len(inside.unique())
        assert (
            values > 0.9 * inside.numel()
            if erasing_mode == "pixel"
            else values == {"rand": 3, "const": 1}[erasing_mode]
        )
        shares.append(mask.float().mean().item())
    assert abs(len(shares) / count - probability) < 0.08
    assert min(shares) > 0.015
    assert max(shares) < 0.37
    random.seed(0)
    timms = RandomErasing(1.0, mode="const", device="cpu")
    expected = [(timms(torch.ones(1, 32, 48)) == 0).float().mean().item() for _ in range(count)]
    assert abs(np.mean(shares) - np.mean(expected)) < 5 * np.std(expected) * math.sqrt(1 / len(shares) + 1 / count)
    if erasing_mode == "pixel":
        drawn = images[erased[:, None].expand_as(images)]
        assert abs(drawn.mean()) < 0.02
        assert abs(drawn.std() - 1) < 0.02


def test_color_jitter():
    """Brightness, contrast and saturation by up to a strength, each image in its own order; its extremes are met."""
    gray = Image.new("RGB", (20, 16), (100, 100, 100))
    images = levels(copies(gray, 500, config(color_jitter=0.4)))
    assert len({tuple(image.unique().tolist()) for image in images}) > 60
    assert 59 <= images.min() <= 64
    assert 136 <= images.max() <= 141
    red = Image.new("RGB", (20, 16), (150, 100, 100))
    spread = levels(copies(red, 500, config(color_jitter=0.4)))[..., 0, 0]
    spread = spread[:, 0] - spread[:, 1]
    assert 8 < spread.min() < 25  # 50 x 0.6 ** 3 is 11
    assert 90 < spread.max() < 140  # 50 x 1.4 ** 3 is 137
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4)
    torch.manual_seed(0)
    expected = torch.stack([as_tensor(jitter(red)).float()[:, 0, 0] for _ in range(500)])
    expected = expected[:, 0] - expected[:, 1]
    assert abs(spread.mean() - expected.mean()) < 5 * expected.std() * math.sqrt(2 / 500)
    assert abs(spread.std() / expected.std() - 1) < 0.2


EVERY_OPERATION = sorted(
    {
        op.name
        for text in ("rand-inc0", "rand-inc1", "rand-t3a", "rand-tweights")
        for op in rand_augment_transform(text).ops
    }
)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", EVERY_OPERATION)
def test_each_operation_of_rand_augment_is_timms(monkeypatch, name, mode):
    """At levels from 0 to 10, each image of a batch with its own: to 2 of 255 levels, the blur to 5."""
    in_chans = {"L": 1, "RGB": 3}[mode]
    cfg = config(in_chans, img_size=(30, 36), interpolation="bilinear", rand_augment="rand-m9")
    augmentation = BatchAugmentation(cfg, torch.device("cpu"))
    image, size, drawn, expected = noise(30, 36, mode=mode), cfg.img_size, [], []
    random.seed(0)
    hparams = {"img_mean": (128,) * in_chans, "interpolation": Image.Resampling.BILINEAR}
    for magnitude in (0, 0.7, 2.5, 5, 7.3, 9, 10):
        level_of = LEVEL_TO_ARG[name]
        level = level_of(magnitude, {}) if level_of else ()
        if name.startswith("Posterize"):
            level = (max(1, level[0]),)
        drawn.append(batch_augment._record(name, size, [], *level))
        expected.append(as_tensor(AugmentOp(name, hparams=hparams).aug_fn(image, *level, **_pillow(hparams))))
    monkeypatch.setattr(augmentation, "_draw_operations", lambda *arguments: drawn)
    stored = as_tensor(image).expand(len(drawn), -1, -1, -1).contiguous()
    got = levels(augmentation(stored, 0))
    error = (got - torch.stack(expected)).abs()
    assert error.max() <= (5 if name == "GaussianBlur" else 2.01)
    assert error.mean() < 1
    assert name in ("Color", "ColorIncreasing", "Desaturate") or (got[0] - got[-1]).abs().max() > 0 or not level


def _pillow(hparams: dict[str, Any]) -> dict[str, Any]:
    return {
        "fillcolor": hparams["img_mean"] if len(hparams["img_mean"]) > 1 else 128,
        "resample": hparams["interpolation"],
    }


@pytest.mark.parametrize(
    "text",
    ["rand-m9-mstd0.5-inc1", "rand-m5-n3-p1", "rand-m12-mmax20-mstd101", "rand-n2-p0.8-tweights", "rand-m0-t3aw-inc1"],
)
def test_rand_augment_is_drawn_as_timm_does(text):
    """How often each operation comes and its mean level are timm's, within five standard errors."""
    cfg, count = config(rand_augment=text), 3000
    augmentation = BatchAugmentation(cfg, torch.device("cpu"))
    drawn = augmentation._draw_operations(count, torch.Generator().manual_seed(0), 0)
    timms = augmentation._rand_augment
    random.seed(1)
    np.random.seed(1)
    expected = [timms([]) for _ in range(count)]

    def summary(draws: list) -> dict[str, tuple[int, float, float]]:
        levels_of: dict[str, list[float]] = {}
        for name, values in (operation for one in draws for operation in one):
            levels_of.setdefault(name, []).append(values[2] if len(values) > 1 else values[0])
        return {name: (len(found), np.mean(found), np.std(found)) for name, found in levels_of.items()}

    ours, theirs = summary(drawn), summary(expected)
    assert sum(n for n, _, _ in theirs.values()) > 1000
    for name in ours.keys() | theirs.keys():
        n, mean, std = ours.get(name, (0, 0.0, 0.0))
        m, other_mean, _ = theirs.get(name, (0, 0.0, 0.0))
        assert abs(n - m) <= 5 * math.sqrt(n + m)
        assert abs(mean - other_mean) <= 5 * std * math.sqrt(1 / max(n, 1) + 1 / max(m, 1)) + 1e-6 or n < 30


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-m10-n5-p1-inc1", "rand-m0-n5-p1", "rand-t3a-mstd0.5"])
def test_rand_augment_takes_every_level(in_chans, text):
    mode = {1: "L", 3: "RGB"}[in_chans]
    images = copies(noise(mode=mode), 200, config(in_chans, rand_augment=text, interpolation="lanczos"))
    assert images.isfinite().all()
    assert images.abs().max() <= 2 + 1e-6


def test_each_channel_is_normalised_by_its_own():
    cfg = TransformConfig((16, 20), 3, (0.1, 0.2, 0.3), (0.5, 0.25, 0.125), crop="center", crop_pct=1.0, hflip=0.0)
    image = noise()
    torch.testing.assert_close(copies(image, 2, cfg)[1], eval_transform(cfg)(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_flag_chooses_the_loader(make_folder, in_memory):
    settings: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    run = TrainConfig(
        str(make_folder()), model_args=settings, grid="1/2:1:1/2", batch_size=6, in_memory=in_memory, device="cpu"
    )
    trainee = Trainee(run)
    assert isinstance(trainee.loader, MemoryLoader) == in_memory
    trainee.train_step(*next(trainee.loader.epoch(0)))
    assert trainee.step == 1
    assert trainee.bad_step() is None
