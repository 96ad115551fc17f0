"""`Detector`: torchvision's FCOS over a timm backbone, which an `ElasticModel` slices like any other model.

FCOS is that of Tian et al. (arXiv 1904.01355), with levels P3 to P7 and four convolutions a head. Its norms are group
norms over the same number of channels at every width, as in `semantic_fpn`.

Legend of axis names: B images, C channels, H height, W width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS, FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from slicevit.checkpoint import DETECTION
from slicevit.dense.saved import as_tuple, load
from slicevit.dense.segmenter import (
    Arguments,
    build_backbone,
    channels_of,
    dense_family,
    feature_maps,
    picked_levels,
)
from slicevit.dense.semantic_fpn import STRIDES, group_norm
from slicevit.elastic import ElasticModel

_STRIDES = STRIDES[1:]
_GROUPS = 32  # of its norms
_LEAST_SCORE = 0.05  # as torchvision's other detectors; FCOS's own 0.2 leaves out what mAP counts


class PyramidFeatures(nn.Module):
    """A timm model's feature maps as torchvision's detectors take them: by name, finest first, of equal channels.

    Args:
        body: the timm model, without its head.
        channels: of the pyramid.

    Attributes:
        out_channels: the same.

    Raises ValueError when the model gives no feature maps, or fewer than three sizes of them.
    """

    def __init__(self, body: Any, channels: int):
        super().__init__()
        self.body, self.out_channels = body, channels
        indices, self.single = picked_levels(body)
        self.indices = indices[-len(_STRIDES) :]
        if len(self.indices) < len(_STRIDES):
            raise ValueError(f"a {type(body).__name__} has maps of {len(self.indices)} sizes: a detector needs three")
        inputs = [int(body.feature_info[index]["num_chs"]) for index in self.indices]
        top = LastLevelP6P7(channels, channels)
        self.pyramid = FeaturePyramidNetwork(inputs, channels, extra_blocks=top, norm_layer=group_norm)

    def forward(self, images_BCHW: Tensor) -> OrderedDict[str, Tensor]:
        """Five levels, with strides of 8 to 128 pixels."""
        strides = _STRIDES if self.single else None
        features = feature_maps(self.body, images_BCHW, self.indices, self.single, strides)
        levels: OrderedDict[str, Tensor] = self.pyramid(
            OrderedDict((str(place), level) for place, level in enumerate(features))
        )
        return levels


def fcos_head(channels: int, num_classes: int, convolutions: int) -> FCOSHead:
    """torchvision's heads, with norms that a narrow width has too; `FCOSHead` itself has norms of 32 groups."""
    head = FCOSHead(_GROUPS, 1, num_classes, num_convs=0)
    head.classification_head = FCOSClassificationHead(channels, 1, num_classes, convolutions, norm_layer=group_norm)
    head.regression_head = FCOSRegressionHead(channels, 1, convolutions, norm_layer=group_norm)
    return head


class Detector(FCOS):
    """torchvision's FCOS, forward and losses included, built from plain arguments.

    It takes a list of images (C, H, W) in 0…1 of any size, or a batch of them, which it normalises and resizes to
    `size`. In train mode it takes targets as well and gives losses by name; in eval mode boxes, labels and scores.

    Args:
        backbone: timm's name of the model.
        backbone_args: keyword arguments of `timm.create_model`.
        changes: what its class gets otherwise: the arguments of a narrow backbone.
        size: (height, width) that images are resized to, whatever their shape; multiples of 32.
        channels: of the pyramid and the heads.
        num_classes: classes, numbered from 0.
        convolutions: of each head.
        mean: of the images' channels.
        std: of the images' channels.

    Attributes:
        image_shape: (C, H, W) of the images as the backbone sees them.
    """

    def __init__(
        self,
        backbone: str,
        backbone_args: Arguments,
        changes: Arguments,
        size: tuple[int, int],
        channels: int,
        num_classes: int,
        convolutions: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        body: Any = build_backbone(backbone, backbone_args, changes)[0]
        super().__init__(
            PyramidFeatures(body, channels),
            num_classes,
            image_mean=list(mean),
            image_std=list(std),
            head=fcos_head(channels, num_classes, convolutions),
            score_thresh=_LEAST_SCORE,
            fixed_size=(size[1], size[0]),
        )
        self.num_classes, self.embed_dim = num_classes, int(body.num_features)
        self.image_shape = (channels_of(body), *size)

    def raw(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """What the heads say of every place of the pyramid, before boxes are picked, of images of `image_shape`."""
        answers: dict[str, Tensor] = self.head(list(self.backbone(images_BCHW).values()))
        return answers

    def no_weight_decay(self) -> set[str]:
        """The parameters that timm exempts from weight decay."""
        body: Any = self.backbone.body
        exempt = body.no_weight_decay() if hasattr(body, "no_weight_decay") else ()
        return {f"backbone.body.{name}" for name in exempt}


@dataclass(frozen=True)
class DetectorRecipe:
    """What rebuilds a detector; the fields that `slicevit.dense.saved.Recipe` has too mean the same.

    Attributes:
        convolutions: of each head.
        class_names: in the order of the labels.
    """

    backbone: str
    backbone_args: Arguments
    size: tuple[int, int]
    channels: int
    convolutions: int
    num_classes: int
    grid: str
    settings: dict[str, Any]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()


def build_detector(recipe: DetectorRecipe) -> ElasticModel:
    """The detector that `recipe` describes, with fresh weights. Raises ValueError when it cannot be sliced so."""
    arguments: Arguments = {
        "backbone": recipe.backbone,
        "backbone_args": {key: as_tuple(value) for key, value in recipe.backbone_args.items()},
        "changes": {},
        "size": recipe.size,
        "channels": recipe.channels,
        "num_classes": recipe.num_classes,
        "convolutions": recipe.convolutions,
        "mean": recipe.mean,
        "std": recipe.std,
    }
    module = Detector(**arguments)
    body: Any = module.backbone.body
    family = dense_family(Detector, body, "backbone.body")
    return ElasticModel(module, recipe.grid, arguments, family, **recipe.settings)


def load_detector(folder: str | Path) -> tuple[ElasticModel, DetectorRecipe]:
    """The detector that a run of `slicevit detect` saved, in eval mode, and what rebuilds it.

    Raises ValueError when it is none, or its files are missing, broken or do not fit together.
    """
    return load(Path(folder), DETECTION, DetectorRecipe, build_detector)
