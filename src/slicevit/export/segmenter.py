"""A saved segmenter as exports and engines take it: its modules compute windows of an image.

Legend of axis names: B windows of a batch, C channels, h, w of a window; H, W of an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from slicevit.checkpoint import SEGMENTATION
from slicevit.data import BUNDLED, Transform, open_dataset
from slicevit.data.masks import Layout, MaskSet, eval_image_transform, eval_pair_transform, pair_folders
from slicevit.dense.saved import Recipe, load_segmenter, read_segmenter
from slicevit.evaluation.figures import MIOU
from slicevit.evaluation.segmentation import OVERLAP, cut_windows, evaluate_masks
from slicevit.export.check import BATCH, Checked, Comparison
from slicevit.export.images import CALIBRATING, CHECKED, Calibration, Images, folder_images
from slicevit.export.opened import Opened, Options, Say

_MOST_LOGITS = 2**26  # numbers of a batch's logits while an artefact is checked: 256 MiB


@dataclass(frozen=True)
class OpenedSegmenter(Opened):
    """A model of `slicevit segment`; `config` is the "slicevit" part of its config.json."""

    task = SEGMENTATION
    figure = MIOU
    recipe: Recipe

    @property
    def window(self) -> tuple[int, int]:
        """(h, w), in pixels."""
        return self.recipe.size

    @cached_property
    def _transform(self) -> Transform:
        return eval_image_transform(self.recipe.transform())

    def transform(self, image: Image.Image) -> Tensor:
        """(C, H, W), its shorter side being that of the window."""
        return self._transform(image)

    def preprocessing(self) -> dict[str, Any]:
        """How windows come of an image, and what is in them."""
        return {
            "input_size": list(self.input_size),
            "mean": list(self.recipe.mean),
            "std": list(self.recipe.std),
            "interpolation": "bilinear",
            "short_side": min(self.window),
            "window_overlap": float(OVERLAP),
            "decoder": self.recipe.decoder,
        }

    @property
    def _layout(self) -> Layout:
        layout: Layout = self.config["training"].get("folders", "masks")
        return layout

    def _masks(self, spec: str, split: str) -> MaskSet:
        return MaskSet(spec, split, self.num_classes, self._layout, self.recipe.in_chans)

    def images(self, options: Options) -> Images:
        """Of the images that training was scored on; in float32 the bundled ones where these cannot be opened."""
        if options.data_root:
            raise ValueError("--data-root is for timm dataset strings: a segmenter's --data is a folder")
        spec = options.data or self.config["training"].get("data")
        count = options.images or (CHECKED if options.precision == "fp32" else None)
        try:
            if not spec:
                raise ValueError("--data: name a folder of images and masks")
            masks = self._masks(spec, self.config["training"].get("eval_split", "val"))
        except ValueError:
            if options.data or options.precision != "fp32":
                raise
            bundled = open_dataset(BUNDLED, "val", in_chans=self.recipe.in_chans)
            return Images(BUNDLED, min(CHECKED, count or CHECKED), bundled, self.transform)
        return Images(spec, min(count or len(masks), len(masks)), masks, eval_pair_transform(self.recipe.transform()))

    def calibration(self, images: Images, options: Options) -> Calibration:
        """A window of each of up to 256 training images, or of a folder's."""
        spec = options.calibrate or images.name
        if options.calibrate and not all(part.is_dir() for part in pair_folders(spec, "train", self._layout)):
            return Calibration(spec, folder_images(spec, self._first_window, self.recipe.in_chans))
        try:
            masks = self._masks(spec, "train")
        except ValueError as error:
            raise ValueError(str(error).replace("--data", "--calibrate", bool(options.calibrate))) from None
        training = Images(spec, min(CALIBRATING, len(masks)), masks, eval_pair_transform(self.recipe.transform()))
        windows = [cut_windows(image_1CHW, self.window)[0] for image_1CHW, _ in training.batches(1)]
        return Calibration(spec, torch.cat(windows))

    def _first_window(self, image: Image.Image) -> Tensor:
        return cut_windows(self.transform(image)[None], self.window)[0][0]

    def check(
        self, comparison: Comparison, images: Images, largest_batch: int | None, options: Options, say: Say
    ) -> Checked:
        """By the logits of windows and, in a reduced precision, mIoU."""
        batch = max(2, min(largest_batch or BATCH, BATCH, _MOST_LOGITS // (self.num_classes * math.prod(self.window))))
        for windows_BChw in self._windows(images, batch, say):
            comparison.add(windows_BChw)
        if options.precision == "fp32":
            return comparison.exact(images.name)
        calls = {"source": comparison.source, "artefact": comparison.artefact}
        scores = evaluate_masks(calls, images.batches(1), self.window, "cpu", self.num_classes)
        figures = (scores["source"].miou, scores["artefact"].miou)
        return comparison.reduced(images.name, options.max_loss, options.precision, figures)

    def _windows(self, images: Images, size: int, say: Say) -> Iterator[Tensor]:
        """The windows of all images, `size` at a time."""
        waiting: list[Tensor] = []
        for done, (image_1CHW, _) in enumerate(images.batches(1), 1):
            waiting += cut_windows(image_1CHW, self.window)
            while len(waiting) >= size:
                yield torch.cat(waiting[:size])
                waiting = waiting[size:]
            say(done, images.count)
        if waiting:
            yield torch.cat(waiting)


def open_segmenter(run: str | Path) -> OpenedSegmenter:
    """The segmenter in a folder. Raises ValueError when there is none."""
    model, recipe = load_segmenter(run)
    return OpenedSegmenter(
        run=run,
        model=model,
        config=read_segmenter(Path(run)),
        architecture=recipe.backbone,
        input_size=(recipe.in_chans, *recipe.size),
        num_classes=recipe.num_classes,
        label_names=recipe.class_names or None,
        recipe=recipe,
    )
