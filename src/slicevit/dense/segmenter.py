"""`Segmenter`: a timm backbone under a decoder, which an `ElasticModel` slices like any other model.

Legend of axis names: B images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, Literal, TypeAlias

import timm
from torch import Tensor, nn

from slicevit import constructors, skeletons
from slicevit.dense.mask_transformer import STRUCTURE, MaskTransformer
from slicevit.dense.semantic_fpn import STRIDES, SemanticFpn, resized
from slicevit.families import Family, Heads, Scope, family_of
from slicevit.fusing import Structure
from slicevit.widths import channels as channels_at

Arguments = dict[str, Any]
Decoder: TypeAlias = Literal["fpn", "mask-transformer"]
_STRIDE = 16


class Segmenter(nn.Module):
    """Logits of every pixel, from feature maps of a timm model.

    To Semantic FPN (fpn) a hierarchical backbone gives the last map of each of its sizes. One whose maps have a single
    size (a ViT) gives four, of evenly spaced blocks, normalised by its last norm and resized to a pyramid. To the mask
    transformer goes one map: of a ViT the last, normalised, of a hierarchical backbone that of 16 pixels.

    Args:
        backbone: timm's name of the model.
        backbone_args: keyword arguments of `timm.create_model`.
        changes: what its class gets otherwise: the arguments of a narrow backbone.
        size: (height, width) of the images.
        channels: of the decoder's pyramid, or its tokens.
        num_classes: K.
        decoder: fpn or mask-transformer.
        heads: of the mask transformer.

    Attributes:
        image_shape: (C, H, W) of the images.

    Raises ValueError when the backbone gives no feature maps.
    """

    def __init__(
        self,
        backbone: str,
        backbone_args: Arguments,
        changes: Arguments,
        size: tuple[int, int],
        channels: int,
        num_classes: int,
        decoder: Decoder = "fpn",
        heads: int = 1,
    ):
        super().__init__()
        made: Any = build_backbone(backbone, backbone_args, changes)[0]
        self.backbone = made
        self.num_classes, self.size = num_classes, tuple(size)
        self.embed_dim = int(made.num_features)
        self.image_shape = (channels_of(made), *self.size)
        self.indices, self.single = picked_levels(made)
        self.pyramid = decoder == "fpn"
        if not self.pyramid:
            self.indices = [self.indices[-1] if self.single else _coarsest_of(self.indices, made.feature_info)]
        inputs = [int(made.feature_info[index]["num_chs"]) for index in self.indices]
        self.decoder: nn.Module = (
            SemanticFpn(inputs, channels, num_classes)
            if self.pyramid
            else MaskTransformer(inputs[0], channels, heads, num_classes)
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        strides = STRIDES if self.single and self.pyramid else None
        features = feature_maps(self.backbone, images_BCHW, self.indices, self.single, strides)
        return resized(self.decoder(features), images_BCHW.shape[2:])

    def no_weight_decay(self) -> set[str]:
        """The parameters that timm exempts from weight decay."""
        exempt = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {*(f"backbone.{name}" for name in exempt), "decoder.classes"}


def feature_maps(
    backbone: Any, images_BCHW: Tensor, indices: Sequence[int], single: bool, strides: Sequence[int] | None = None
) -> list[Tensor]:
    """These of a timm model's intermediate maps, normalised where they have a `single` size, and brought to `strides`.

    `indices` may name a map twice, where a model has fewer blocks than levels.
    """
    wanted = sorted(set(indices))
    maps = backbone.forward_intermediates(
        images_BCHW, indices=wanted, norm=single, output_fmt="NCHW", intermediates_only=True
    )
    features = [maps[wanted.index(index)] for index in indices]
    if strides is None:
        return features
    sides = images_BCHW.shape[2:]
    return [
        resized(level, [max(1, side // stride) for side in sides])
        for level, stride in zip(features, strides, strict=True)
    ]


def picked_levels(backbone: Any) -> tuple[list[int], bool]:
    """(which of a timm model's intermediate maps make the pyramid, whether all have a single size).

    Raises ValueError when it has too few, or does not say.
    """
    info = getattr(backbone, "feature_info", None)
    name = type(backbone).__name__
    if not hasattr(backbone, "forward_intermediates") or not isinstance(info, list) or not info:
        raise ValueError(f"a {name} gives no feature maps (forward_intermediates), so that no decoder can stand on it")
    last = {int(level["reduction"]): place for place, level in enumerate(info)}
    if len(last) > 1:
        return [last[stride] for stride in sorted(last)][-len(STRIDES) :], False
    count = len(STRIDES)
    return [max(0, (place + 1) * len(info) // count - 1) for place in range(count)], True


def _coarsest_of(indices: list[int], info: list[dict[str, Any]]) -> int:
    """The last of the maps, finest first, of a stride of `_STRIDE` pixels or less; the first where none has."""
    return [index for index in indices if int(info[index]["reduction"]) <= _STRIDE or index == indices[0]][-1]


def build_backbone(name: str, arguments: Arguments, changes: Arguments) -> tuple[nn.Module, Arguments]:
    """(timm's model without its head, what its class was given), its class having got `changes` as well."""
    make = partial(timm.create_model, name, **(arguments | {"num_classes": 0}))
    return constructors.construct(make, backbone_class(name, arguments), changes)


_CLASSES: dict[str, type[nn.Module]] = {}


def backbone_class(name: str, arguments: Arguments) -> type[nn.Module]:
    """The class of timm's model `name`. Raises ValueError when it cannot be built so."""
    if name not in _CLASSES:
        make = partial(timm.create_model, name, **(arguments | {"num_classes": 0}))
        _CLASSES[name] = type(skeletons.build_on_meta(make))
    return _CLASSES[name]


@dataclass(frozen=True)
class DenseFamily(Family):
    """How a model of a backbone and a decoder is sliced: the backbone as its own family says, and the decoder.

    `inner` is the backbone's family, and `path` its name within the model.
    """

    inner: Family = field(default_factory=lambda: Family(frozenset()))
    path: str = "backbone"

    def arguments(
        self, model: Any, given: Callable[[str], Any], width: Fraction, heads: Heads, scope: Scope
    ) -> Arguments:
        """The arguments of the model at `width`. Raises ValueError where channels are not whole."""
        if given("changes"):
            raise ValueError("a model on a width that was cut out has no narrower ones")
        built = arguments_of(given("backbone"), given("backbone_args"))
        backbone = model.get_submodule(self.path)
        changes = self.inner.arguments(backbone, partial(constructors.value_of, built), width, heads, scope)
        decoder = given("channels") if scope == "mlp" else channels_at(width, given("channels"))
        return {"changes": changes, "channels": decoder}


def arguments_of(name: str, arguments: Arguments) -> Arguments:
    """What the class of a timm model is given, defaults too."""
    given: Arguments = {}

    def build() -> nn.Module:
        module, built = build_backbone(name, arguments, {})
        given.update(built)
        return module

    skeletons.build_on_meta(build)
    return given


def segmenter_family(backbone: nn.Module) -> DenseFamily:
    """The family of segmenters over models such as `backbone`. Raises ValueError when it has none itself."""
    return dense_family(Segmenter, backbone, "backbone", STRUCTURE)


def dense_family(
    kind: type[nn.Module], backbone: nn.Module, path: str, structure: Structure | None = None
) -> DenseFamily:
    """The family of models of class `kind` over such a `backbone`, which lies at `path`; `structure` is the decoder's.

    Raises ValueError when the backbone has no family.
    """
    inner = family_of(backbone)
    return DenseFamily(
        frozenset({kind.__name__}),
        structure={**inner.structure, **(structure or {})},
        check=None if inner.check is None else partial(_check_backbone, inner.check, path),
        rounded=inner.rounded,
        inner=inner,
        path=path,
    )


def _check_backbone(check: Callable[[nn.Module], str | None], path: str, narrow: nn.Module) -> str | None:
    return check(narrow.get_submodule(path))


def channels_of(backbone: nn.Module) -> int:
    """The channels of the images that a timm model takes."""
    return next(parameter.shape[1] for parameter in backbone.parameters() if parameter.ndim == 4)
