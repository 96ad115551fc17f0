"""`slicevit export` of a segmenter: what its files compute, what is said of it, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import Refused, export, manifest_of, needing, predictor
from mask_files import CLASSES, SIZE, WIDTHS, save_segmenter, write_pairs
from PIL import Image

from slicevit.cli.export import _cuts
from slicevit.dense.saved import load_segmenter
from slicevit.evaluation.segmentation import cut_windows, joined
from slicevit.export.formats import TARGETS
from slicevit.export.opened import Options
from slicevit.export.opening import open_model

pytestmark = pytest.mark.usefixtures("one_thread")
DENSE = [needing(name, target.packages) for name, target in TARGETS.items() if target.dense]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), {"train": 6, "test": 18})


@pytest.fixture(scope="module")
def segmenter(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_segmenter(tmp_path_factory.mktemp("segmenters") / "tiny", pairs)


@pytest.mark.parametrize("to", DENSE)
def test_the_files_answer_as_the_segmenter_at_any_batch_size(
    to: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = "mask-transformer" if to == "torch-export" else "fpn"  # which a later test writes in that format
    segmenter = save_segmenter(tmp_path / "run", pairs, decoder=decoder)
    export(segmenter, tmp_path / "out", "--width", "1/2", "--to", to)
    said = capsys.readouterr().out
    model, predict = load_segmenter(segmenter)[0], predictor(tmp_path / "out")
    for batch in (1, 3):
        windows_BChw = torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            expected = model(windows_BChw, width="1/2").numpy()
        got = predict(windows_BChw.numpy())
        assert (got.shape, got.dtype) == ((batch, CLASSES, *SIZE), np.float32)
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    written = manifest_of(tmp_path / "out")
    assert (written["task"], written["format"], written["width"], written["channels"]) == ("segmentation", to, "1/2", 8)
    parity = written["parity"]
    assert (parity["data"], parity["images"], parity["batch_sizes"]) == (str(pairs), 36, [1, 16])
    assert parity["max_abs_error"] <= parity["tolerance"]
    assert parity["pixel_agreement"] == pytest.approx(1.0, abs=1e-3)
    assert "top1_agreement" not in parity
    assert f"{to} at width 1/2; largest logit error" in said
    assert f"pixel agreement 100.0% on 36 windows of {pairs}" in said


def test_an_image_goes_through_the_manifest_alone_as_through_the_segmenter(segmenter: Path, tmp_path: Path) -> None:
    """Of an image that is longer than the window, by the guide's recipe."""
    export(segmenter, tmp_path / "out", "--width", "all", "--to", "torch-export")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1", "1-2"]
    manifest = manifest_of(tmp_path / "out" / "1")
    assert (manifest["num_classes"], manifest["label_names"]) == (CLASSES, ["sky", "sea", "land"])
    assert (manifest["input_size"], manifest["short_side"], manifest["decoder"]) == ([3, *SIZE], 64, "fpn")
    assert manifest["window_overlap"] == pytest.approx(1 / 3)
    opened = open_model(segmenter)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 300, 3), np.uint8))
    pixels = torch.from_numpy(np.asarray(image.resize((200, 64), Image.Resampling.BILINEAR)) / 255).float()
    mean, std = (torch.tensor(manifest[name]) for name in ("mean", "std"))
    by_hand_CHW = ((pixels - mean) / std).permute(2, 0, 1)
    torch.testing.assert_close(opened.prepared(image), by_hand_CHW, atol=0.02, rtol=0)  # of rounding to whole bytes
    windows = cut_windows(by_hand_CHW[None], SIZE)
    assert [float(window[0, 0, 0, 0]) for window in windows] == [
        float(by_hand_CHW[0, 0, left]) for left in (0, 34, 68, 102, 136)
    ]
    predict = predictor(tmp_path / "out" / "1")
    logits_1KHW = joined((torch.from_numpy(predict(window.numpy())) for window in windows), (64, 200), SIZE)
    assert logits_1KHW.shape == (1, CLASSES, 64, 200)


@pytest.mark.parametrize("to", [needing("onnx", TARGETS["onnx"].packages)])
def test_a_reduced_precision_says_the_miou_that_it_loses(
    to: str, segmenter: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(segmenter, tmp_path / "out", "--width", "1", "--to", to, "--quantize", "int8", "--max-loss", "100")
    said, written = capsys.readouterr().out, manifest_of(tmp_path / "out")
    accuracy = written["accuracy"]
    assert accuracy["lost"] == pytest.approx(accuracy["miou_source"] - accuracy["miou"])
    assert f"at width 1; mIoU {accuracy['miou_source']:.2f} -> {accuracy['miou']:.2f}" in said
    assert written["calibration"] == {"data": str(pairs), "images": 6}


def test_widths_that_were_trained_alone(pairs: Path, tmp_path: Path) -> None:
    run = save_segmenter(tmp_path / "alone", pairs)
    for width in WIDTHS:
        save_segmenter(run / "separate" / width.replace("/", "-"), pairs)
    assert [(cut.run.name, cut.width, cut.name, cut.folder) for cut in _cuts(run, "all")] == [
        ("1-2", "1", "1/2", "1-2"),
        ("1", "1", "1", "1"),
    ]
    with pytest.raises(ValueError, match=f"trained each width alone.*such as {run / 'separate' / '1'}$"):
        open_model(run)


def test_images_that_are_gone_are_replaced_unless_they_are_asked_for(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    opened = open_model(save_segmenter(tmp_path / "run", tmp_path / "gone"))
    images = opened.images(Options())
    assert (images.name, images.count) == ("fashion-mnist", 64)
    assert next(iter(images.batches(1)))[0].shape == (1, 3, 64, 64)
    for options in (Options(data=gone), Options(precision="bf16")):
        with pytest.raises(ValueError, match="test/images is no folder"):
            opened.images(options)


def test_int8_takes_its_ranges_from_a_folder_too(segmenter: Path, pairs: Path, tmp_path: Path) -> None:
    opened = open_model(segmenter)
    options = Options(precision="int8", calibrate=str(pairs / "test" / "images"))
    assert opened.calibration(opened.images(options), options).images_NCHW.shape == (18, 3, *SIZE)
    classes = tmp_path / "train" / "cats"
    classes.mkdir(parents=True)
    Image.new("RGB", (80, 70)).save(classes / "a.png")
    options = Options(precision="int8", calibrate=str(tmp_path))
    assert opened.calibration(opened.images(options), options).images_NCHW.shape == (1, 3, *SIZE)
    options = Options(precision="int8", calibrate=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"^--calibrate .*gone: there is no such folder"):
        opened.calibration(opened.images(options), options)
    unpaired = write_pairs(tmp_path / "unpaired", {"train": 2})  # masks are no images to calibrate on
    next((unpaired / "train" / "masks").iterdir()).unlink()
    options = Options(precision="int8", calibrate=str(unpaired))
    with pytest.raises(ValueError, match=r"^--calibrate .* has no mask "):
        opened.calibration(opened.images(options), options)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--to", "timm"), "--to timm holds classifiers alone, and "),
        (("--to", "executorch"), "is a segmenter: give --to onnx, openvino, torch-export"),
        (("--to", "torch-export", "--width", "1/4"), "--width 1/4: "),
        (("--to", "torch-export", "--data", "x", "--data-root", "y"), "--data-root is for timm dataset strings"),
    ],
)
def test_refusals(flags: tuple[str, ...], said: str, segmenter: Path, tmp_path: Path, refused: Refused) -> None:
    given: tuple[Any, ...] = flags if "--width" in flags else (*flags, "--width", "1/2")
    if "executorch" in flags:
        pytest.importorskip("executorch")
    assert said in refused(segmenter, tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()
