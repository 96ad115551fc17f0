"""Folders of clips: which frames stand for a clip, and what is wrong with one."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.extra
pytest.importorskip("av", reason='needs PyAV: pip install "slicevit[video]"')

from clip_files import write_clip  # noqa: E402

from slicevit.data import UnreadableImageError, open_dataset  # noqa: E402
from slicevit.data.clips import ClipSet  # noqa: E402


def numbered(count: int, base: int = 0) -> list[Image.Image]:
    """Frames whose red says which they are."""
    return [Image.new("RGB", (16, 16), (base + number, 0, 0)) for number in range(count)]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Two classes; clips of 20, 3 and 9 frames to train on, one of 8 to validate."""
    for split, name, count, base in (("train", "b", 20, 0), ("train", "b", 3, 100), ("train", "a", 9, 200),
                                     ("val", "a", 8, 50), ("val", "b", 8, 70)):  # fmt: skip
        write_clip(tmp_path / split / name / f"{count}-{base}.mkv", numbered(count, base))
    return tmp_path


def opened(spec: str, split: str = "train", in_chans: int = 3) -> ClipSet:
    dataset = open_dataset(spec, split, in_chans=in_chans)
    assert isinstance(dataset, ClipSet)
    return dataset


def reds(dataset: ClipSet) -> list[int]:
    return [dataset.load(index)[0].getpixel((0, 0))[0] for index in range(len(dataset))]  # type: ignore[index]


def test_the_frames_are_those_in_the_middle_of_equal_parts(clips: Path) -> None:
    dataset = opened(f"clips:{clips}?frames=4")
    assert (len(dataset), dataset.frames, dataset.classes) == (12, 4, ["a", "b"])
    assert reds(dataset) == [201, 203, 205, 207, 2, 7, 12, 17, 100, 101, 101, 102]
    assert dataset.targets().tolist() == [0] * 4 + [1] * 8
    assert [dataset.load(index)[1] for index in (3, 4, 11)] == [0, 1, 1]
    assert Path(dataset.name(11)).name == "3-100.mkv"
    assert len(opened(f"clips:{clips}", "val")) == 2 * 8


def test_gray_frames_some_classes_and_another_order(clips: Path) -> None:
    gray = opened(f"clips:{clips}?frames=2", in_chans=1)
    assert gray.load(0)[0].mode == "L"
    some = open_dataset(f"clips:{clips}?frames=2&classes=b", "train")
    assert (len(some), some.frames, some.classes) == (4, 2, ["b"])
    again = pickle.loads(pickle.dumps(gray))
    assert [again.load(index)[0].tobytes() for index in (5, 0, 3)] == [
        gray.load(index)[0].tobytes() for index in (5, 0, 3)
    ]


def test_a_clip_is_decoded_once_for_its_frames(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import slicevit.data.clips as module

    decoded, real = [], module._decoded

    def counting(path: str, frames: int, mode: str) -> list[Image.Image]:
        decoded.append(path)
        return real(path, frames, mode)

    monkeypatch.setattr(module, "_decoded", counting)
    reds(opened(f"clips:{clips}"))
    assert len(decoded) == len(set(decoded)) == 3


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9")])
def test_usual_formats(name: str, codec: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), (40 * number, 0, 0)) for number in range(6)]
    for split in ("train", "val"):
        write_clip(tmp_path / split / "a" / name, frames, codec)
    found = reds(opened(f"clips:{tmp_path}?frames=3"))
    assert found == pytest.approx([40, 120, 200], abs=25)


def test_what_cannot_be_decoded_is_unreadable_and_named(clips: Path) -> None:
    broken = clips / "train" / "a" / "9-200.mkv"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(UnreadableImageError, match=r"9-200\.mkv"):
        opened(f"clips:{clips}").load(0)


@pytest.fixture
def ucf101(tmp_path: Path) -> Path:
    """As its authors lay it out; fold 2 is not there."""
    for name in ("Archery/v_Archery_g01_c01", "Archery/v_Archery_g08_c01", "Bowling/v_Bowling_g08_c02"):
        write_clip(tmp_path / "UCF-101" / f"{name}.avi", numbered(8), "mpeg4")
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n2 Bowling\n")
    (lists / "trainlist01.txt").write_text("Archery/v_Archery_g08_c01.avi 1\nBowling/v_Bowling_g08_c02.avi 2\n")
    (lists / "testlist01.txt").write_text("Archery/v_Archery_g01_c01.avi\n")
    return tmp_path


def test_ucf101_as_its_lists_say(ucf101: Path) -> None:
    train, val = opened(f"ucf101:{ucf101}?frames=2"), opened(f"ucf101:{ucf101}?frames=2&fold=1", "val")
    assert (len(train), len(val), train.classes) == (4, 2, ["Archery", "Bowling"])
    assert train.targets().tolist() == [0, 0, 1, 1]
    assert Path(val.name(0)).name == "v_Archery_g01_c01.avi"
    with pytest.raises(ValueError, match="does not hold UCF101's lists"):
        open_dataset(f"ucf101:{ucf101}?fold=2", "train")
    (ucf101 / "UCF-101" / "Bowling" / "v_Bowling_g08_c02.avi").unlink()
    with pytest.raises(ValueError, match=r"names Bowling/v_Bowling_g08_c02\.avi"):
        open_dataset(f"ucf101:{ucf101}", "train")


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?frames=0", "frames=0 is no whole number above 0"),
        ("?frames=", "frames= is no whole number"),
        ("?frame=3", "frame is none of frames"),
        ("?fold=1", "fold is none of frames"),
    ],
)
def test_what_follows_the_question_mark(query: str, said: str, clips: Path) -> None:
    with pytest.raises(ValueError, match=said):
        open_dataset(f"clips:{clips}{query}", "train")


def test_folders_that_are_not_there(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        open_dataset("clips:/nowhere", "train")
    for clip in (clips / "val").rglob("*.mkv"):
        clip.rename(clip.with_suffix(".txt"))
    with pytest.raises(ValueError, match=r"put files ending in \.avi"):
        open_dataset(f"clips:{clips}", "val")
