"""COCO's layout read, boxes moved with their images, and targets of equal size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from slicevit.data import TrainLoader, eval_batches
from slicevit.data.boxes import (
    NOTHING,
    BoxSet,
    BoxTransformConfig,
    eval_box_transform,
    targets_of,
    train_box_transform,
)


def write(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda found: None, name: str = "train") -> Path:
    """Two images of 40 x 20 pixels: one with two boxes and a crowd, one with none."""
    (folder / name).mkdir(parents=True)
    for file in ("a.png", "b.png"):
        Image.new("RGB", (40, 20), (255, 0, 0)).save(folder / name / file)
    box = {"image_id": 5, "iscrowd": 0}
    found: dict[str, Any] = {
        "images": [{"id": 5, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}],
        "categories": [{"id": 30, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            box | {"category_id": 30, "bbox": [4, 2, 16, 8]},
            box | {"category_id": 2, "bbox": [0, 0, 0.2, 5]},
            box | {"category_id": 2, "bbox": [20, 10, 20, 10], "iscrowd": 1},
        ],
    }
    change(found)
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(found))
    return folder


def test_what_is_read(tmp_path: Path) -> None:
    images = BoxSet(write(tmp_path), "train")
    assert (len(images), images.num_classes, images.classes) == (2, 2, ["dog", "cat"])
    image, boxes = images.load(0)
    assert image.size == (40, 20)
    assert boxes.corners_N4.tolist() == [[4, 2, 20, 10], [0, 0, pytest.approx(0.2), 5], [20, 10, 40, 20]]
    assert (boxes.classes_N.tolist(), boxes.crowd_N.tolist(), boxes.size) == ([1, 0, 0], [False, False, True], 3)
    assert images.load(1)[1].corners_N4.shape == (0, 4)
    assert len(BoxSet(write(tmp_path / "2017", name="train2017"), "train", "coco2017")) == 2


def test_boxes_move_with_their_image(tmp_path: Path) -> None:
    images = BoxSet(write(tmp_path), "train")
    pixels_CHW, targets = train_box_transform(BoxTransformConfig((64, 64), hflip=1.0))(*images.load(0))
    assert pixels_CHW.shape == (3, 64, 64)
    assert float(pixels_CHW[0].min()) == 1.0
    cat = pytest.approx([1, 64 - 32.0, 6.4, 64 - 6.4, 32.0, 0], abs=1e-4)
    assert targets.tolist() == [cat, pytest.approx([0, 0, 32, 32, 64, 1], abs=1e-4), [NOTHING] * 6]
    (image_1CHW, targets_1N6), (_, nothing_1N6) = eval_batches(images, eval_box_transform(), 1)
    assert image_1CHW.shape == (1, 3, 20, 40)
    (taught,), (counted,) = targets_of(targets_1N6), targets_of(targets_1N6, crowds=True)
    assert (taught["boxes"].tolist(), taught["labels"].tolist()) == ([[4, 2, 20, 10]], [1])
    assert counted["iscrowd"].tolist() == [0, 1]
    assert targets_of(nothing_1N6)[0]["boxes"].shape == (0, 4)


def test_batches_are_tensors(tmp_path: Path) -> None:
    loader = TrainLoader(BoxSet(write(tmp_path), "train"), train_box_transform(BoxTransformConfig((32, 32))), 2, 0)
    ((images_BCHW, targets_BN6),) = loader.epoch(0)
    assert (images_BCHW.shape, targets_BN6.shape, targets_BN6.dtype) == ((2, 3, 32, 32), (2, 3, 6), torch.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.pop("categories"), r"not as COCO's \(KeyError\('categories'\)\)"),
        (
            lambda found: found["annotations"][0].update(category_id=4),
            r"category_id 4 of annotation \S+ is not in its lists",
        ),
        (
            lambda found: found["annotations"][0].update(image_id="0"),
            "image_id '0' of annotation .* is not in its lists",
        ),
        (lambda found: found["annotations"].clear(), "has no boxes"),
        (lambda found: found["annotations"][0].update(bbox=[1, 2, 3]), "not as COCO's"),
        (lambda found: found.update(images=[], annotations=[]), "names no images"),
    ],
)
def test_broken_annotations(change: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        BoxSet(write(tmp_path, change), "train")


def test_what_is_missing(tmp_path: Path) -> None:
    folder = write(tmp_path)
    with pytest.raises(ValueError, match="val is no folder; the layout coco keeps val there"):
        BoxSet(folder, "val")
    (folder / "val").mkdir()
    with pytest.raises(ValueError, match=r"there is no .*instances_val\.json, which says where the boxes are"):
        BoxSet(folder, "val")
    with pytest.raises(ValueError, match="--folders voc is unknown: give coco or coco2017"):
        BoxSet(folder, "train", "voc")  # type: ignore[arg-type]
