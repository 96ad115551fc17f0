"""mAP of detections that are right, shifted, doubled or absent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slicevit.evaluation.detection import Detect, evaluate_boxes, require_coco

TRUTH = torch.tensor([[[0.0, 0, 0, 20, 20, 0], [1, 30, 30, 50, 50, 0], [-1, -1, -1, -1, -1, -1]]])
IMAGES = torch.zeros(1, 3, 64, 64)


def says(*boxes: tuple[float, ...], labels: tuple[int, ...] = (0, 1)) -> Detect:
    def detect(images_BCHW: Tensor) -> list[dict[str, Tensor]]:
        scores = torch.linspace(0.9, 0.5, len(boxes))
        return [{"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels), "scores": scores}]

    return detect


def test_of_known_detections() -> None:
    pytest.importorskip("pycocotools")
    both = ((0.0, 0, 20, 20), (30.0, 30, 50, 50))
    shifted = ((0.0, 0, 20, 14), (30.0, 30, 50, 44))  # an overlap of 0.7: right at 5 of the 10 thresholds
    detectors = {
        "right": says(*both),
        "shifted": says(*shifted),
        "half": says(both[0], labels=(0,)),
        "others": says(*both, labels=(1, 0)),
    }
    scores = evaluate_boxes(detectors, [(IMAGES, TRUTH)], "cpu")
    assert (scores["right"].map, scores["right"].map50, scores["right"].images) == (100, 100, 1)
    assert (scores["shifted"].map, scores["shifted"].map50) == (pytest.approx(50), 100)
    assert (scores["half"].map, scores["half"].map50) == (50, 50)
    assert scores["others"].map50 == 0


def test_data_without_boxes() -> None:
    pytest.importorskip("pycocotools")
    with pytest.raises(ValueError, match="--data has no image with a box"):
        evaluate_boxes({"a": says()}, [], "cpu")


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'mAP needs pycocotools, .*: pip install "slicevit\[detect\]"'):
        require_coco()
