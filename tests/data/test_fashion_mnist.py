"""The bundled part of Fashion-MNIST."""

from pathlib import Path

import numpy as np
import pytest

import slicevit.data
from slicevit.data import BUNDLED, ImageSet, open_dataset

FOLDER = Path(slicevit.data.__file__).parent / "fashion"


def images_and_targets(split: str) -> tuple[np.ndarray, np.ndarray]:
    dataset = open_dataset(BUNDLED, split, in_chans=1)
    assert isinstance(dataset, ImageSet)
    samples = [dataset.load(index) for index in range(len(dataset))]
    return np.stack([np.asarray(image) for image, _ in samples]), np.array([target for _, target in samples])


@pytest.fixture(scope="module")
def train() -> tuple[np.ndarray, np.ndarray]:
    return images_and_targets("train")


@pytest.fixture(scope="module")
def val() -> tuple[np.ndarray, np.ndarray]:
    return images_and_targets("val")


def test_sizes_and_balance(train, val):
    assert train[0].shape == (20_000, 28, 28)
    assert val[0].shape == (5_000, 28, 28)
    assert np.bincount(train[1]).tolist() == [2000] * 10
    assert np.bincount(val[1]).tolist() == [500] * 10


def test_no_image_twice_nor_in_both_splits(train, val):
    train_images = {image.tobytes() for image in train[0]}
    val_images = {image.tobytes() for image in val[0]}
    assert len(train_images) == 20_000
    assert len(val_images) == 5_000
    assert not train_images & val_images


def test_images_belong_to_their_labels(train, val):
    """The nearest class mean gets two thirds of Fashion-MNIST right; with shifted labels, a tenth."""
    means = np.stack([train[0][train[1] == c].mean(0).ravel() for c in range(10)])
    pixels = val[0].reshape(len(val[0]), -1).astype(np.float64)
    distances = (pixels**2).sum(1)[:, None] - 2 * pixels @ means.T + (means**2).sum(1)
    assert (distances.argmin(1) == val[1]).mean() > 0.6


def test_classes_in_order(train):
    dataset = open_dataset(BUNDLED, "train")
    assert dataset.num_classes == 10
    assert dataset.classes is not None
    assert dataset.classes[0] == "T-shirt/top"
    assert dataset.classes[9] == "Ankle boot"
    trousers = train[0][train[1] == 1].mean(0)
    bags = train[0][train[1] == 8].mean(0)
    assert trousers[:, :4].mean() < 5 < bags[14:, :4].mean()  # bags are wide, trousers are not


def test_packaged_files():
    """The wheel stays below 10 MB, and the licence travels with the images."""
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 9_500_000
    assert "Zalando SE" in (FOLDER / "LICENSE").read_text()
    assert "Permission is hereby granted, free of charge" in (FOLDER / "LICENSE").read_text()
    assert "cut_fashion_mnist.py" in (FOLDER / "README.md").read_text()
