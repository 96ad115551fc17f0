"""What a segmenter answers at four widths, beside the images and their masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from slicevit.data.masks import VOID, MaskSet, eval_pair_transform
from slicevit.evaluation.segmentation import whole_logits
from slicevit.files import replacing
from slicevit.tasks.segment.config import SegmentConfig
from slicevit.tasks.segment.initial import modules_of

_SHOWN_WIDTHS, _SHOWN_IMAGES = 4, 4


def four(names: Sequence[str]) -> list[str]:
    """At most four of the widths, evenly spaced, the first and the last among them."""
    count = min(_SHOWN_WIDTHS, len(names))
    return [names[round(place * (len(names) - 1) / max(1, count - 1))] for place in range(count)]


def draw_predictions(folder: Path, config: SegmentConfig) -> Path:
    """predictions.png in the folder of a run that has ended: images of the evaluated split, evenly spaced.

    Raises ValueError when the run or its data cannot be read.
    """
    modules = modules_of(folder)
    chosen = four(list(modules))
    recipe = modules[chosen[0]][1]
    images = MaskSet(config.data, config.eval_split, config.num_classes, config.folders, recipe.in_chans)
    count = min(_SHOWN_IMAGES, len(images))
    titles = ("image", "mask", *chosen)
    figure = Figure(figsize=(2.2 * len(titles), 1.9 * count), layout="constrained")
    axes = figure.subplots(count, len(titles), squeeze=False)
    for row in range(count):
        image, mask = images.load(row * len(images) // count)
        pixels_CHW, truth_HW = eval_pair_transform(recipe.transform())(image, mask)
        panels = [np.asarray(image.convert("RGB")), coloured(truth_HW, config.num_classes)]
        for name in chosen:
            with torch.inference_mode():
                logits_1KHW = whole_logits(modules[name][0], pixels_CHW[None], recipe.size, (image.height, image.width))
            panels.append(coloured(logits_1KHW[0].argmax(0), config.num_classes))
        for axis, panel, title in zip(axes[row], panels, titles, strict=True):
            axis.imshow(panel, interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title)
    path = folder / "predictions.png"
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def coloured(classes_HW: Tensor, num_classes: int) -> np.ndarray:
    """(H, W, 3) in 0…255: a colour for each class, black for void."""
    few = num_classes <= 20
    places = np.arange(num_classes) if few else np.linspace(0, 1, num_classes)
    colours_K3 = matplotlib.colormaps["tab20" if few else "turbo"](places)[:, :3]
    table = np.concatenate([np.round(255 * colours_K3), np.zeros((1, 3))]).astype(np.uint8)
    classes = classes_HW.cpu().numpy()
    return table[np.where(classes == VOID, num_classes, classes)]
