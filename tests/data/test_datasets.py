"""Opening data sets by name."""

import importlib.util
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slicevit import cli
from slicevit.data import (
    ImageSet,
    StreamSet,
    TrainLoader,
    TransformConfig,
    UnreadableImageError,
    eval_batches,
    eval_transform,
    open_dataset,
    train_transform,
)

NATURAL_ORDER = ["class1", "class2", "class10"]


def needs(module: str):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"needs {module}")


@pytest.mark.parametrize("val_name", ["val", "validation", "test"])
def test_folder(make_folder, val_name):
    folder = make_folder(per_class=3, val_name=val_name)
    for split, name in (("train", "train"), ("val", val_name)):
        dataset = open_dataset(str(folder), split)
        assert isinstance(dataset, ImageSet)
        assert len(dataset) == 9
        assert dataset.classes == NATURAL_ORDER
        assert dataset.num_classes == 3
        for index in range(9):
            path = Path(dataset.name(index))
            image, target = dataset.load(index)
            assert path.parts[-3:-1] == (name, NATURAL_ORDER[target])
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(path)))


@pytest.mark.parametrize(("in_chans", "mode"), [(1, "L"), (3, "RGB")])
def test_gray_and_rgb(make_folder, in_chans, mode):
    folder = make_folder(per_class=1)
    palette = Image.open(folder / "train/class1/2_0.jpg").convert("P")
    palette.save(folder / "train/class1/palette.png")
    for spec in ("fashion-mnist", str(folder)):
        dataset = open_dataset(spec, "train", in_chans=in_chans)
        assert {dataset.load(index)[0].mode for index in range(3)} == {mode}


def test_class_order_of_names_that_timm_holds_equal(make_folder):
    folder = make_folder(per_class=1)
    for split in ("train", "val"):
        shutil.copytree(folder / split / "class2", folder / split / "Class2")
    assert open_dataset(str(folder), "train").classes == ["class1", "Class2", "class2", "class10"]


def test_pickles_small_and_the_same(make_folder):
    dataset = open_dataset(str(make_folder(per_class=50)), "train")
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 150 * 200 + 2000  # 150 paths
    copy = pickle.loads(pickled)
    assert copy.name(149) == dataset.name(149)
    assert copy.load(149)[1] == dataset.load(149)[1]


def test_unreadable_image_is_named_with_the_reason(make_folder):
    folder = make_folder()
    path = folder / "train/class1/2_1.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnreadableImageError, match=r"class1/2_1\.jpg .*truncated"):
        open_dataset(str(folder), "train").load(1)


def test_other_classes_in_val_are_refused(make_folder):
    folder = make_folder()
    (folder / "val/class2").rename(folder / "val/dog")
    with pytest.raises(ValueError, match=r"train.* and .*val .*only in train: class2; only in val: dog") as caught:
        open_dataset(str(folder), "val")
    assert str(folder / "train") in str(caught.value)
    assert str(folder / "val") in str(caught.value)


def test_bad_specs_say_what_to_do(make_folder, tmp_path):
    folder = make_folder()
    with pytest.raises(ValueError, match=r"--data /no/such: no such folder .*fashion-mnist"):
        open_dataset("/no/such", "train")
    with pytest.raises(ValueError, match=r"split must be 'train' or 'val', not 'test'"):
        open_dataset(str(folder), "test")
    with pytest.raises(ValueError, match=r"--in-chans 4"):
        open_dataset(str(folder), "train", in_chans=4)
    shutil.rmtree(folder / "val")
    with pytest.raises(ValueError, match=r"no val/ or validation/ or test/ in"):
        open_dataset(str(folder), "val")
    (folder / "val").mkdir()
    with pytest.raises(ValueError, match=r"no class folders in"):
        open_dataset(str(folder), "val")
    with pytest.raises(ValueError, match=r"no train/ in"):
        open_dataset(str(folder / "train"), "train")
    for path in (folder / "train").rglob("*.jpg"):
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(ValueError, match=r"no images in .*\.png"):
        open_dataset(str(folder), "train")


@pytest.mark.parametrize(
    ("spec", "package"),
    [
        ("hfds/x", "datasets"),
        ("hfids/x", "datasets"),
        ("wds/x", "webdataset"),
        ("tfds/x", "tensorflow-datasets"),
    ],
)
def test_missing_package(monkeypatch, spec, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"--data {spec} needs .* pip install .*{package}"):
        open_dataset(spec, "train")


def test_torchvision_folder(make_folder):
    """torchvision's own reader, through timm: its classes are in plain order."""
    folder = make_folder(per_class=2)
    dataset = open_dataset("torch/image_folder", "val", root=str(folder), in_chans=1)
    assert isinstance(dataset, ImageSet)
    assert dataset.classes == ["class1", "class10", "class2"]
    assert len(dataset) == 6
    image, target = dataset.load(5)
    assert (image.mode, image.size, target) == ("L", (20, 16), 2)
    assert dataset.name(5) == "torch/image_folder val image 5"


def test_what_timm_cannot_open(tmp_path):
    with pytest.raises(ValueError, match=r"--data torch/cifar10: .*not found.*--data-root"):
        open_dataset("torch/cifar10", "train", root=str(tmp_path))
    with pytest.raises(ValueError, match=r"--data torch/nonesuch: .*Unknown torchvision dataset nonesuch"):
        open_dataset("torch/nonesuch", "train", root=str(tmp_path))


@needs("datasets")
@pytest.mark.filterwarnings("ignore")
def test_hugging_face_data_set(make_folder, tmp_path):
    folder = make_folder(per_class=2, val_name="test")
    dataset = open_dataset(f"hfds/{folder}", "val", root=str(tmp_path / "cache"), in_chans=1)
    assert isinstance(dataset, ImageSet)
    assert dataset.classes is not None
    assert sorted(dataset.classes) == sorted(NATURAL_ORDER)
    assert len(dataset) == 6
    image, target = pickle.loads(pickle.dumps(dataset)).load(3)
    assert (image.mode, image.size) == ("L", (20, 16))
    assert 0 <= target < 3
    with pytest.raises(ValueError, match="nonesuch"):
        open_dataset(f"hfds/{folder}?val=nonesuch", "val", root=str(tmp_path / "cache"))


def write_shards(folder: Path, shards: int) -> None:
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            for k in range(8):
                picture = io.BytesIO()
                Image.new("RGB", (8, 8), (shard * 100 + k, 0, 0)).save(picture, "png")
                for suffix, content in (("png", picture.getvalue()), ("cls", str(k).encode())):
                    entry = tarfile.TarInfo(f"{shard}{k}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


@pytest.mark.extra
@needs("webdataset")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", ["cut short", "no archive", "missing"])
def test_a_shard_that_is_corrupt_or_missing_is_named_and_left_out(fault, tmp_path, caplog):
    write_shards(tmp_path, 3)
    bad = tmp_path / "train-1.tar"
    content = bad.read_bytes()
    bad.unlink()
    if fault != "missing":
        bad.write_bytes(content[: len(content) // 2] if fault == "cut short" else b"junk" * 4000)
    dataset = open_dataset(f"wds/{tmp_path}?train=train-{{0..2}}.tar|24", "train")
    config = TransformConfig(img_size=(8, 8), in_chans=3, mean=(0, 0, 0), std=(1, 1, 1), crop="center", hflip=0.0)
    train = TrainLoader(dataset, train_transform(config), 4, seed=0)
    reds = {round(255 * red) for images, _ in train.epoch(0) for red in images[:, 0, 0, 0].tolist()}
    assert len(list(train.epoch(0))) == train.steps_per_epoch == 6
    assert {red for red in reds if red < 100 or red >= 200} <= {*range(8), *range(200, 208)}
    assert len([red for red in reds if 100 <= red < 200]) < (8 if fault == "cut short" else 1)
    assert "train-1.tar" in caplog.text


@pytest.mark.extra
@needs("webdataset")
@pytest.mark.filterwarnings("ignore")
def test_a_stream_that_lost_images_is_not_scored(tmp_path, caplog):
    write_shards(tmp_path, 3)
    last = tmp_path / "train-2.tar"
    last.write_bytes(last.read_bytes()[:-10240])
    dataset = open_dataset(f"wds/{tmp_path}?val=train-{{0..2}}.tar|24", "val")
    assert isinstance(dataset, StreamSet)
    assert "cut short or no archive: train-2.tar" in caplog.text
    config = TransformConfig(img_size=(8, 8), in_chans=3, mean=(0, 0, 0), std=(1, 1, 1), crop="center", hflip=0.0)
    images = sum(len(targets) for _, targets in eval_batches(dataset, eval_transform(config), 4))
    assert 16 < images < 24
    with pytest.raises(ValueError, match=rf"{24 - images} of the 24 images of its val split did not come.*1.00% allow"):
        dataset.check_complete(images, 0.01)
    dataset.check_complete(images, 0.5)
    assert f"{24 - images} of its 24 val images did not come" in caplog.text
    caplog.clear()
    dataset.check_complete(24, 0.0)
    assert not caplog.text


@pytest.mark.extra
@needs("webdataset")
@pytest.mark.filterwarnings("ignore")
def test_a_run_whose_test_images_are_lost_says_so_and_goes_on_when_they_are_back(tmp_path, train_quickly, capsys):
    write_shards(tmp_path, 3)
    run, shard = tmp_path / "run", tmp_path / "train-1.tar"
    content = shard.read_bytes()
    model = ["--model", "vit_tiny_patch16_224", "--model-args", "img_size=8", "patch_size=4", "embed_dim=16", "depth=1",
             "num_heads=2", "--num-classes", "8", "--batch-size", "4", "--epochs", "1"]  # fmt: skip
    data = f"wds/{tmp_path}?train=train-{{0..2}}.tar|24&val=train-{{0..2}}.tar|24"
    shard.unlink()
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--data", data, *model, "--grid", "1/2:1:1/2", "--out", str(run)])
    assert stop.value.code == 2
    assert "8 of the 24 images of its val split did not come" in capsys.readouterr().err
    shard.write_bytes(content)
    train_quickly(["--resume", str(run)])
    assert (run / "results.json").exists()
    shard.unlink()
    with pytest.raises(SystemExit):
        cli.main(["eval", str(run)])
    assert "8 of the 24 images of its val split did not come" in capsys.readouterr().err


@needs("webdataset")
@pytest.mark.filterwarnings("ignore")
def test_webdataset(tmp_path):
    write_shards(tmp_path, 2)
    shards = [f"train-{shard}.tar" for shard in range(2)]
    split = {"name": "train", "num_samples": 16, "filenames": shards, "shard_lengths": [8, 8]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    dataset = open_dataset(f"wds/{tmp_path}", "train")
    assert isinstance(dataset, StreamSet)
    assert len(dataset) == 16
    reds = [image.getpixel((0, 0))[0] for image, _ in dataset.open()]
    assert reds == [*range(8), *range(100, 108)]
    named = open_dataset(f"wds/{tmp_path}?train=train-{{0..1}}.tar|16", "train")
    assert len(named) == 16
