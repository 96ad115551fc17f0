"""Loaders: the same batches whatever the workers and interruptions, and what happens to unreadable images."""

import gc
import logging
import multiprocessing
import os
import random
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from slicevit.data import (
    BUNDLED,
    ImageSet,
    StreamSet,
    TrainLoader,
    TransformConfig,
    eval_batches,
    eval_transform,
    open_dataset,
    train_transform,
)

CFG = TransformConfig(
    img_size=(16, 20),
    in_chans=3,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    crop="pad",
    rand_augment="rand-m9-mstd0.5-inc1",
    random_erasing=0.5,
)


def loader(spec: Any, batch_size: int = 4, seed: int = 0, **options: Any) -> TrainLoader:
    return TrainLoader(open_dataset(str(spec), "train"), train_transform(CFG), batch_size, seed, **options)


def same(batches: Iterable, others: Iterable) -> bool:
    pairs = list(zip(batches, others, strict=True))
    assert pairs
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


class Numbered(ImageSet):
    """Images that say their index in their only pixel; `bad` ones cannot be read."""

    def __init__(self, images: int, bad: tuple[int, ...] = ()):
        super().__init__("numbered", "train", 3, None, images)
        self._images = images
        self._bad_indices = bad

    def __len__(self) -> int:
        return self._images

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if index in self._bad_indices:
            raise OSError("broken")
        return Image.new("RGB", (1, 1)), index


def no_transform(image: Image.Image) -> torch.Tensor:
    return torch.zeros(3, 1, 1)


def draw_of_each_generator(image: Image.Image) -> torch.Tensor:
    return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()]).reshape(3, 1, 1)


def process_state(image: Image.Image) -> torch.Tensor:
    assert get_worker_info() is not None
    ignores_interrupts = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return torch.tensor([torch.get_num_threads(), ignores_interrupts, os.getpid()]).reshape(3, 1, 1).double()


def numbered(images: int, batch_size: int, bad: tuple[int, ...] = (), **options: Any) -> TrainLoader:
    return TrainLoader(Numbered(images, bad), no_transform, batch_size, seed=1, **options)


def targets(batches: Iterable) -> list[int]:
    return [target for _, batch in batches for target in batch.tolist()]


def test_batches(make_folder):
    train = loader(make_folder(per_class=5))
    assert train.steps_per_epoch == 3
    batches = list(train.epoch(0))
    assert len(batches) == 3
    for images, classes in batches:
        assert images.shape == (4, 3, 16, 20)
        assert images.dtype == torch.float32
        assert classes.shape == (4,)
        assert classes.dtype == torch.int64


def test_same_batches_for_any_workers_and_when_resumed(make_folder):
    folder = make_folder(per_class=10)
    whole = list(loader(folder).epoch(3))
    assert same(whole, loader(folder).epoch(3))
    assert same(whole, loader(folder, workers=2).epoch(3))
    assert same(whole[5:], loader(folder).epoch(3, start_step=5))
    assert same(whole[5:], loader(folder, workers=2).epoch(3, start_step=5))
    assert list(loader(folder).epoch(3, start_step=7)) == []
    assert not same(whole, loader(folder).epoch(4))
    assert not same(whole, loader(folder, seed=1).epoch(3))


def test_nothing_is_loaded_of_the_skipped_part():
    class Recording(Numbered):
        loaded = 0

        def _read(self, index: int) -> tuple[Image.Image, int]:
            Recording.loaded += 1
            return super()._read(index)

    train = TrainLoader(Recording(40), no_transform, 4, seed=0)
    assert len(list(train.epoch(0, start_step=8))) == 2
    assert Recording.loaded == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_generators_are_untouched(make_folder, workers):
    train = loader(make_folder(), workers=workers)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for _ in train.epoch(0):
        assert (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        ) == before
    list(eval_batches(train.dataset, eval_transform(CFG), 4, workers))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_the_callers_generators_do_not_matter(make_folder):
    folder = make_folder()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    first = list(loader(folder).epoch(0))
    assert same(first, loader(folder).epoch(0))


def test_an_epoch_is_a_permutation_which_changes():
    train = numbered(images=60, batch_size=6)
    first, second = targets(train.epoch(0)), targets(train.epoch(1))
    assert sorted(first) == sorted(second) == list(range(60))
    assert first != second
    assert first != list(range(60))


def test_ranks_share_one_permutation():
    whole = targets(numbered(images=26, batch_size=8).epoch(0))
    parts = [targets(numbered(26, 4, rank=rank, world_size=2).epoch(0)) for rank in range(2)]
    assert whole[0::2] == parts[0]
    assert whole[1::2] == parts[1]
    assert numbered(26, 4, world_size=2).steps_per_epoch == 3


def test_repeats():
    """Thirty places hold ten images three times each, and each time the augmentation differs."""
    train = TrainLoader(Numbered(30), draw_of_each_generator, 6, seed=0, repeats=3)
    batches = list(train.epoch(0))
    assert len(batches) == train.steps_per_epoch == 5
    shown = targets(batches)
    assert sorted(shown.count(index) for index in set(shown)) == [3] * 10
    draws = torch.cat([images for images, _ in batches]).flatten(1)
    for generator in range(3):
        assert len(set(draws[:, generator].tolist())) == 30


def test_augmentation_depends_on_the_image_not_on_its_place():
    """The same image, met at another step of another world, is augmented alike; in another epoch, unlike."""

    def draws(epoch: int, batch_size: int, **options: Any) -> dict[int, list[float]]:
        train = TrainLoader(Numbered(24), draw_of_each_generator, batch_size, seed=5, **options)
        return {
            index: image.flatten().tolist()
            for images, classes in train.epoch(epoch)
            for image, index in zip(images, classes.tolist(), strict=True)
        }

    assert draws(0, 4) == draws(0, 6)
    assert draws(0, 4) == {**draws(0, 4, rank=0, world_size=2), **draws(0, 4, rank=1, world_size=2)}
    assert not {tuple(draw) for draw in draws(0, 4).values()} & {tuple(draw) for draw in draws(1, 4).values()}


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_and_replaced(caplog, workers):
    train = numbered(images=200, batch_size=20, bad=(7, 8), workers=workers, max_bad_share=0.01)
    with caplog.at_level(logging.WARNING, logger="slicevit"):
        shown = targets(train.epoch(0))
    assert sorted(shown) == sorted([*range(7), 9, 9, *range(9, 200)])
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "numbered train image 7 (broken)" in text
    assert "numbered train image 8 (broken)" in text
    assert "replaced by the next readable image" in text
    caplog.clear()
    list(train.epoch(1))
    assert not caplog.records  # each is named once


def test_replacements_are_the_same_for_any_workers_and_when_resumed(make_folder):
    folder = make_folder(per_class=10)
    truncate(folder / "train/class1/2_3.jpg")
    (folder / "train/class10/1_0.jpg").write_text("no image")
    whole = list(loader(folder, max_bad_share=0.1).epoch(0))
    assert same(whole, loader(folder, max_bad_share=0.1, workers=2).epoch(0))
    for step in range(1, 7):
        assert same(whole[step:], loader(folder, max_bad_share=0.1).epoch(0, start_step=step))


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images(make_folder, workers, capfd):
    folder = make_folder(per_class=10)
    for path in sorted((folder / "train").rglob("*_[0-3].jpg")):
        truncate(path)
    with pytest.raises(ValueError, match=r"4 or more of its 30 images .*13\.33%, above the 10\.00%") as caught:
        list(loader(folder, max_bad_share=0.1, workers=workers, batch_size=2).epoch(0))
    assert str(caught.value).count(".jpg (") == 3
    assert "Restore or delete these files, or raise --max-bad-share" in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_every_image_unreadable():
    with pytest.raises(ValueError, match=r"1 or more of its 8 images"):
        list(numbered(images=8, batch_size=4, bad=tuple(range(8))).epoch(0))
    with pytest.raises(ValueError, match=r"4 or more of its 8 images"):
        list(eval_batches(Numbered(8, tuple(range(8))), no_transform, 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_batches(caplog, workers):
    dataset = Numbered(103, bad=(40, 102))
    batches = list(eval_batches(dataset, no_transform, 17, workers, max_bad_share=0.02))
    assert [len(batch) for _, batch in batches] == [17, 17, 16, 17, 17, 17]
    assert targets(batches) == [index for index in range(103) if index not in (40, 102)]
    assert "numbered train image 40 (broken)" in caplog.text
    assert "left out" in caplog.text


def test_bundled_set_through_the_loader():
    cfg = TransformConfig((28, 28), 1, (0.5,), (0.5,), crop="pad")
    train = TrainLoader(open_dataset(BUNDLED, "train", in_chans=1), train_transform(cfg), 64, seed=0)
    assert train.steps_per_epoch == 312
    images, classes = next(train.epoch(0))
    assert images.shape == (64, 1, 28, 28)
    assert -1 <= images.min() < images.max() <= 1
    assert len(classes.unique()) > 5


def test_workers_ignore_interrupts_and_use_one_thread():
    train = TrainLoader(Numbered(16), process_state, 4, seed=0, workers=2)
    states = torch.cat([images for images, _ in train.epoch(0)]).flatten(1)
    assert states[:, 0].unique().tolist() == [1]
    assert states[:, 1].unique().tolist() == [1]
    assert len(states[:, 2].unique()) == 2


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("how", ["close", "drop", "error"])
def test_no_worker_outlives_its_epoch(how, kind):
    dataset = Numbered(400) if kind == "map" else _Stream(400)
    train = TrainLoader(dataset, no_transform, 4, seed=0, workers=2)
    batches = train.epoch(0)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    if how == "close":
        batches.close()  # type: ignore[attr-defined]
    elif how == "drop":
        del batches
        gc.collect()
    else:
        with pytest.raises(RuntimeError, match="the consumer's"):
            batches.throw(RuntimeError("the consumer's"))  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_a_set_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"--data numbered has 7 training images, fewer than a batch of 4 x 2"):
        numbered(images=7, batch_size=4, world_size=2)


class _Source:
    """Like timm's iterable data sets: an order that depends on the epoch, shared out to the workers."""

    def __init__(self, images: int, epoch: int):
        self._order = torch.randperm(images, generator=torch.Generator().manual_seed(epoch)).tolist()

    def __iter__(self):
        worker = get_worker_info()
        for index in self._order[worker.id :: worker.num_workers] if worker else self._order:
            yield Image.new("RGB", (1, 1)), index


class _Stream(StreamSet):
    def __init__(self, images: int):
        self.spec = "wds/fake"
        self._length = images

    def open(self, *, training=False, seed=0, epoch=0, batch_size=1, workers=0):
        return _Source(self._length, epoch)


@pytest.mark.parametrize("workers", [0, 2])
def test_streams(workers):
    train = TrainLoader(_Stream(43), draw_of_each_generator, 4, seed=0, workers=workers)
    assert train.steps_per_epoch == 10
    whole = list(train.epoch(0))
    assert [len(batch) for _, batch in whole] == [4] * 10
    assert len(set(targets(whole))) == 40
    assert same(whole, train.epoch(0))
    for step in (1, 4, 9):
        assert same(whole[step:], train.epoch(0, start_step=step))
    assert not same(whole, train.epoch(1))
    assert sorted(targets(eval_batches(_Stream(43), no_transform, 4, workers))) == list(range(43))
    with pytest.raises(ValueError, match="leave repeats at 1"):
        TrainLoader(_Stream(43), no_transform, 4, seed=0, repeats=2)


class _ShortStream(_Stream):
    """Says that it has three times the images that it gives, as a rank's share of uneven or missing shards does."""

    def open(self, **options: Any) -> _Source:
        return _Source(self._length // 3, options["epoch"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_ends_early_is_read_again(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    train = TrainLoader(_ShortStream(60), draw_of_each_generator, 4, seed=0, workers=workers)
    whole = list(train.epoch(0))
    assert [len(batch) for _, batch in whole] == [4] * 15
    assert len(set(targets(whole[:4]))) == 16
    assert set(targets(whole)) == set(range(20))
    assert "it is read again" in caplog.text
    assert not same(whole[:4], whole[5:9])
    for step in (1, 5, 9, 14):
        assert same(whole[step:], train.epoch(0, start_step=step))


def test_a_stream_without_a_whole_batch_is_refused() -> None:
    train = TrainLoader(_ShortStream(9), no_transform, 4, seed=0)
    with pytest.raises(ValueError, match=r"gave process 0 of 1 no batch of 4: make more shards"):
        next(iter(train.epoch(0)))


def truncate(path: Path) -> None:
    """Leaves a JPEG with a sound header and without its last pixels."""
    path.write_bytes(path.read_bytes()[:-100])
