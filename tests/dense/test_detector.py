"""A detector's slices: bitwise those of torchvision's FCOS of that width, holding the slices of the weights."""

from __future__ import annotations

from collections import OrderedDict
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import slicevit
from slicevit.costs import width_costs
from slicevit.dense.detector import DetectorRecipe, build_detector
from slicevit.dense.semantic_fpn import group_norm
from slicevit.elastic import ElasticModel

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE, CLASSES, CHANNELS, GRID = (64, 96), 3, 32, "1/4:1:1/4"
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
BACKBONES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": SIZE, "embed_dim": 32, "depth": 4, "num_heads": 2},
    "pvt_v2_b0": {"embed_dims": (32, 32, 64, 64), "num_heads": (1, 2, 2, 4), "depths": (1, 1, 1, 1)},
}


def detector(name: str) -> ElasticModel:
    torch.manual_seed(0)
    settings = {"layout": "per_head", "isolation": "smallest"}
    recipe = DetectorRecipe(name, BACKBONES[name], SIZE, CHANNELS, 2, CLASSES, GRID, settings, 3, MEAN, STD)
    model = build_detector(recipe).eval()
    with torch.no_grad():  # else every score is the head's prior, below what is answered
        model.head.classification_head.cls_logits.bias.zero_()
    return model


def images() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=draw) for size in ((64, 96), (50, 40))]


class Features(nn.Module):
    """Written out for these two backbones alone, after torchvision's guide to a detector's backbone."""

    out_channels: int

    def __init__(self, body: Any, channels: int):
        super().__init__()
        self.body, self.out_channels, self.plain = body, channels, hasattr(body, "blocks")
        inputs = [body.num_features] * 3 if self.plain else [info["num_chs"] for info in body.feature_info[1:]]
        self.pyramid = FeaturePyramidNetwork(inputs, channels, LastLevelP6P7(channels, channels), group_norm)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.body.forward_intermediates(images, indices=[1, 2, 3], norm=self.plain, intermediates_only=True)
        if self.plain:
            sizes = [(images.shape[2] // stride, images.shape[3] // stride) for stride in (8, 16, 32)]
            maps = [
                each if each.shape[2:] == size else nn.functional.interpolate(each, size, mode="bilinear")
                for each, size in zip(maps, sizes, strict=True)
            ]
        return self.pyramid(OrderedDict(zip("012", maps, strict=True)))


def stock(name: str, width: Fraction) -> FCOS:
    """torchvision's FCOS at this width, with weights of its own."""
    body = slicevit.create_model(name, GRID, num_classes=0, **BACKBONES[name]).to_timm(width)
    channels = int(CHANNELS * width)
    head = FCOSHead(32, 1, CLASSES)
    head.classification_head = FCOSClassificationHead(channels, 1, CLASSES, 2, norm_layer=group_norm)
    head.regression_head = FCOSRegressionHead(channels, 1, 2, norm_layer=group_norm)
    options = {"image_mean": list(MEAN), "image_std": list(STD), "score_thresh": 0.05, "fixed_size": SIZE[::-1]}
    return FCOS(Features(body, channels), CLASSES, head=head, **options).eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_a_slice_is_torchvisions_detector_of_that_width(name: str) -> None:
    model = detector(name)
    body = slicevit.create_model(name, GRID, num_classes=0, **BACKBONES[name])
    full = model.state_dict()
    body.load_state_dict({key: full[f"backbone.body.{key}"] for key in body.state_dict()})
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 30.0, 36.0]]), "labels": torch.tensor([2])}] * 2
    for width in model.widths:
        narrow = stock(name, width)
        inside = {f"backbone.body.{key}": value for key, value in body.to_timm(width).state_dict().items()}
        for key, tensor in narrow.state_dict().items():
            if key in inside:
                tensor.copy_(inside[key])
                continue
            ends = [slice(-size, None) if width == Fraction(1, 4) else slice(size) for size in tensor.shape]
            tensor.copy_(full[key][tuple(ends)])  # every axis of pyramid and heads takes one end of the channels
        with torch.inference_mode():
            expected, got = narrow(images()), model(images(), width)
            bound = model.subnet(width)(images())
        for theirs, mine, lent in zip(expected, got, bound, strict=True):
            assert len(theirs["scores"])
            assert all(torch.equal(theirs[field], mine[field]) for field in ("boxes", "labels", "scores"))
            assert all(torch.equal(theirs[field], lent[field]) for field in ("boxes", "labels", "scores"))
        losses, theirs = (module.train()(images(), targets) for module in (model.to_timm(width), narrow))
        assert losses.keys() == theirs.keys() == {"classification", "bbox_regression", "bbox_ctrness"}
        assert all(torch.equal(losses[field], theirs[field]) for field in losses)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_training_step_reaches_every_parameter_that_a_narrow_one_uses(name: str) -> None:
    model = detector(name).train()
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 30.0, 36.0]]), "labels": torch.tensor([1])}]
    with model.backward_at("1/2") as net:
        sum(net(images()[:1], targets).values()).backward()
    reached = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    assert reached.keys() >= {"backbone.pyramid.extra_blocks.p7.weight", "head.regression_head.bbox_ctrness.weight"}
    weight = reached["head.classification_head.conv.0.weight"]
    assert weight[:16, :16].abs().sum() > 0
    assert weight[16:].abs().sum() == weight[:, 16:].abs().sum() == 0


def test_costs_count_pyramid_and_heads() -> None:
    model = detector("pvt_v2_b0")
    costs = [width_costs(model, width) for width in model.widths]
    assert [cost.channels for cost in costs] == [16, 32, 48, 64]
    assert costs[-1].params == sum(parameter.numel() for parameter in model.parameters())
    assert [cost.macs for cost in costs] == sorted({cost.macs for cost in costs})


def test_weight_decay_spares_what_the_backbone_exempts() -> None:
    assert "backbone.body.pos_embed" in detector("vit_tiny_patch16_224").no_weight_decay()
