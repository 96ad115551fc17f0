"""A saved classifier as exports and engines take it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from slicevit.checkpoint import from_pretrained, read_config
from slicevit.costs import model_input_size
from slicevit.data import Transform, TransformConfig, eval_config, eval_transform, preprocessing
from slicevit.evaluation.figures import TOP1
from slicevit.export.check import BATCH, Checked, Comparison
from slicevit.export.images import Calibration, Images, calibration_images, check_images, labelled_images, own_data
from slicevit.export.opened import Opened, Options, Say


@dataclass(frozen=True)
class Classifier(Opened):
    """A model of `slicevit train`, or of `save_pretrained`."""

    task = None
    figure = TOP1
    transform_config: TransformConfig

    @cached_property
    def _transform(self) -> Transform:
        return eval_transform(self.transform_config)

    def transform(self, image: Image.Image) -> Tensor:
        """As timm evaluates it."""
        return self._transform(image)

    def preprocessing(self) -> dict[str, Any]:
        """Arguments of timm.data.create_transform."""
        return preprocessing(self.transform_config)

    def _data(self, options: Options) -> tuple[str | None, str | None]:
        return (options.data, options.data_root) if options.data else own_data(self.config)

    def images(self, options: Options) -> Images:
        """Of the validation images; those that are to say what a precision loses have classes."""
        spec, root = self._data(options)
        if options.precision == "fp32":
            return check_images(spec, root, self.transform_config, options.images, bool(options.data))
        return labelled_images(spec, root, self.transform_config, options.images, self.num_classes)

    def calibration(self, images: Images, options: Options) -> Calibration:
        """Of the training images."""
        if options.calibrate:
            return calibration_images(options.calibrate, options.data_root, self.transform_config)
        return calibration_images(images.name, self._data(options)[1], self.transform_config)

    def check(
        self, comparison: Comparison, images: Images, largest_batch: int | None, options: Options, say: Say
    ) -> Checked:
        """By logits and, in a reduced precision, top-1."""
        done = 0
        for images_BCHW, targets_B in images.batches(min(BATCH, largest_batch or BATCH)):
            comparison.add(images_BCHW, targets_B)
            done += len(targets_B)
            say(done, images.count)
        if options.precision == "fp32":
            return comparison.exact(images.name)
        return comparison.reduced(images.name, options.max_loss, options.precision)


def open_classifier(run: str | Path) -> Classifier:
    """The classifier in a folder or Hub repository. Raises ValueError when there is none."""
    config, _ = read_config(run)
    model = from_pretrained(run)
    transform = replace(eval_config(config), img_size=model_input_size(model)[1:])
    return Classifier(
        run=run,
        model=model,
        config=config,
        architecture=config["architecture"],
        input_size=(transform.in_chans, *transform.img_size),
        num_classes=model.num_classes,
        label_names=tuple(config.get("label_names") or ()) or None,
        transform_config=transform,
    )
