"""Images with masks: layouts, void, pairs that go through the same crop, what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slicevit.data import TrainLoader, UnreadableImageError
from slicevit.data.masks import VOID, MaskSet, MaskTransformConfig, eval_pair_transform, train_pair_transform


def write_pair(folder: Path, images: str, masks: str, values: np.ndarray, mode: str = "L") -> None:
    """An image whose brightness is ten times the mask's value."""
    for part in (images, masks):
        (folder / part).mkdir(parents=True, exist_ok=True)
    number = len(list((folder / images).iterdir()))
    Image.fromarray((10 * values).astype(np.uint8)).convert("RGB").save(folder / images / f"{number}.png")
    mask = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        mask.putpalette(list(range(256)) * 3)
    (mask.convert("RGB") if mode == "RGB" else mask).save(folder / masks / f"{number}.png")


VALUES = np.arange(48).reshape(6, 8) % 5


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_values_beyond_the_classes_are_void(tmp_path: Path, mode: str) -> None:
    write_pair(tmp_path, "train/images", "train/masks", VALUES, mode)
    data = MaskSet(tmp_path, "train", 4)
    image, mask = data.load(0)
    assert (len(data), image.mode, mask.size) == (1, "RGB", (8, 6))
    assert np.array_equal(np.asarray(mask), np.where(VALUES == 4, 255, VALUES))


def test_ade20k_counts_from_one_and_zero_is_void(tmp_path: Path) -> None:
    write_pair(tmp_path, "images/training", "annotations/training", VALUES)
    write_pair(tmp_path, "images/validation", "annotations/validation", VALUES)
    assert len(MaskSet(tmp_path, "val", 4, "ade20k")) == 1
    mask = np.asarray(MaskSet(tmp_path, "train", 4, "ade20k").load(0)[1])
    assert np.array_equal(mask, np.where(VALUES == 0, 255, VALUES - 1))


def config(size: tuple[int, int], **options: object) -> MaskTransformConfig:
    return MaskTransformConfig(size, 3, (0.0,) * 3, (1.0,) * 3, **options)  # type: ignore[arg-type]


def test_an_image_and_its_mask_are_cropped_and_mirrored_alike(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for _ in range(4):
        write_pair(tmp_path, "train/images", "train/masks", draw.integers(0, 25, (9, 12)))
    transform = train_pair_transform(config((6, 12), scale=(1.5, 1.5)))  # scaled back to 9 x 12, cropped to 6 x 12
    transform = pickle.loads(pickle.dumps(transform))  # as on its way into a worker process
    loader = TrainLoader(MaskSet(tmp_path, "train", 20), transform, 4, seed=0)
    (images_BCHW, masks_BHW), (again, _) = (next(loader.epoch(epoch)) for epoch in (0, 1))
    assert images_BCHW.shape == (4, 3, 6, 12)
    assert masks_BHW.shape == (4, 6, 12)
    values = (images_BCHW[:, 0] * 25.5).round().long()
    assert torch.equal(masks_BHW, values.where(values < 20, VOID))
    assert not torch.equal(images_BCHW, again)
    assert torch.equal(images_BCHW, next(loader.epoch(0))[0])


def test_beyond_the_edge_of_a_small_image_all_is_void() -> None:
    values = np.ones((4, 4), np.uint8)
    transform = train_pair_transform(config((4, 8), scale=(1.0, 1.0)))
    _, mask_HW = transform(Image.fromarray(values).convert("RGB"), Image.fromarray(values))
    assert mask_HW.shape == (4, 8)
    assert sorted(mask_HW.unique().tolist()) == [VOID, 1]
    assert int((mask_HW == 1).sum()) >= 12


def test_evaluation_scales_the_image_and_leaves_the_mask() -> None:
    values = np.full((10, 20), 7, np.uint8)
    image_CHW, mask_HW = eval_pair_transform(config((5, 8)))(
        Image.fromarray(values).convert("RGB"), Image.fromarray(values)
    )
    assert image_CHW.shape == (3, 5, 10)
    assert mask_HW.shape == (10, 20)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images is no folder; the layout masks keeps val there"):
        MaskSet(tmp_path, "val", 4)
    write_pair(tmp_path, "train/images", "train/masks", VALUES)
    (tmp_path / "train/masks/0.png").rename(tmp_path / "train/masks/1.png")
    with pytest.raises(ValueError, match=r"0\.png has no mask .*masks/0\.png"):
        MaskSet(tmp_path, "train", 4)
    (tmp_path / "train/images/0.png").unlink()
    with pytest.raises(ValueError, match="holds no images"):
        MaskSet(tmp_path, "train", 4)


def test_a_mask_in_colours_or_of_another_size_is_unreadable(tmp_path: Path) -> None:
    write_pair(tmp_path, "train/images", "train/masks", VALUES, "RGB")
    write_pair(tmp_path, "train/images", "train/masks", VALUES)
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(tmp_path / "train/masks/1.png")
    data = MaskSet(tmp_path, "train", 4)
    with pytest.raises(UnreadableImageError, match=r"0\.png has the mode RGB"):
        data.load(0)
    with pytest.raises(UnreadableImageError, match="its mask is 3 x 3 pixels"):
        data.load(1)
