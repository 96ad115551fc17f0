"""Frame-averaged probes of video clips, made of real images in motion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from probing import WIDTHS, Probe

pytestmark = pytest.mark.extra
pytest.importorskip("av", reason='needs PyAV: pip install "slicevit[video]"')

from clip_files import in_motion, write_clip  # noqa: E402

import slicevit  # noqa: E402
from slicevit.checkpoint import read_config  # noqa: E402
from slicevit.data import eval_config, eval_transform, open_dataset  # noqa: E402
from slicevit.evaluation.probe import extract  # noqa: E402
from slicevit.evaluation.probe.extract import pooled  # noqa: E402

COUNTS = {"train": 10, "val": 4}  # clips a class


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trousers, bags and ankle boots that move through the picture."""
    folder = tmp_path_factory.mktemp("clips")
    for split, count in COUNTS.items():
        images = open_dataset("fashion-mnist?classes=Trouser,Bag,Ankle boot", split, in_chans=1)
        made = dict.fromkeys(range(3), 0)
        for index in range(len(images)):
            image, label = images.load(index)  # type: ignore[union-attr]
            if made[label] < count:
                made[label] += 1
                name = ("trouser", "bag", "boot")[label]
                write_clip(folder / split / name / f"{index}.mkv", in_motion(image, 12, 24, start=index % 5))
    return folder


@pytest.fixture
def probe_clips(probe: Probe, clips: Path) -> Probe:
    return Probe(probe.run, f"clips:{clips}?frames=4", probe.out, probe._capsys)  # type: ignore[arg-type]


def test_features_of_a_clip_are_the_mean_over_its_frames(probe_clips: Probe, clips: Path) -> None:
    lines = probe_clips()
    assert any("features, train: 0/120" in line for line in lines)
    kept = probe_clips.kept("val")
    assert kept["targets"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    model = slicevit.from_pretrained(probe_clips.run)
    prepare = eval_transform(eval_config(read_config(probe_clips.run)[0]))
    frames = open_dataset(f"clips:{clips}?frames=4", "val", in_chans=1)
    images_BCHW = torch.stack([prepare(frames.load(index)[0]) for index in range(20, 24)])  # type: ignore[union-attr]
    for width in WIDTHS:
        with torch.inference_mode():
            expected_D = pooled(model.subnet(width), images_BCHW).mean(0)
        torch.testing.assert_close(kept[width][5], expected_D, rtol=1e-5, atol=1e-6)


def test_the_heads_tell_the_classes_apart(probe_clips: Probe) -> None:
    """A random backbone is enough for these; a constant answer would have 33 %."""
    probe_clips("--steps", "400", "--rates", "1", "10")
    rows = probe_clips.rows()
    assert {row["train_images"] for row in rows} == {30}
    assert {row["classes"] for row in rows} == {3}
    assert max(row["top1"] for row in rows if row["width"] == "1") > 60
    probe_clips("--knn", "--neighbours", "5")
    assert max(row["top1"] for row in probe_clips.rows("knn")) > 60


def test_a_stopped_extraction_goes_on_and_gives_the_same(
    probe_clips: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Probe(probe_clips.run, probe_clips.data, tmp_path / "whole", probe_clips._capsys)
    whole()
    with monkeypatch.context() as patch:
        calls, real = [], extract.pooled

        def failing(*given: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 40:
                raise ValueError("the disk is on fire")
            return real(*given)  # type: ignore[arg-type]

        patch.setattr(extract, "pooled", failing)
        assert "on fire" in probe_clips.refused()
    probe_clips()
    for split in COUNTS:
        ours, theirs = probe_clips.kept(split), whole.kept(split)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_broken_clip_is_left_out(probe_clips: Probe, clips: Path, tmp_path: Path) -> None:
    import shutil

    mine = Path(shutil.copytree(clips, tmp_path / "mine"))
    broken = sorted((mine / "train" / "bag").iterdir())[0]
    broken.write_bytes(b"no clip")
    data = f"clips:{mine}?frames=4"
    assert "1 or more of its 30 clips cannot be read" in probe_clips.refused(data=data)
    probe_clips("--max-bad-share", "0.1", data=data)
    assert {row["train_images"] for row in probe_clips.rows()} == {29}
