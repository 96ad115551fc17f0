"""Published checkpoints against an independent re-statement of what METHOD.md says of the published code.

`published_logits` uses plain torch functions on the file's own tensors. Each of its facts is a field of `Facts`, so
that a test can show that getting any one of them wrong would be seen.
"""

import argparse
import os
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import slicevit
from slicevit import cli
from slicevit.export.timm_folder import export_timm

GRID = "1/4:1:1/16"
WIDTHS = [Fraction(k, 16) for k in range(4, 17)]
IMG, PATCH, DIM, DEPTH, HEADS, CLASSES = 32, 16, 64, 3, 4, 10
SMALL: dict[str, Any] = {"img_size": IMG, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
DISTILLED, PLAIN = "deit_small_distilled_patch16_224", "deit_small_patch16_224"


# The published forward


@dataclass(frozen=True)
class Facts:
    flat_qkv: bool = True  # rows [:3d] or [-3d:] of the 3D rows
    full_scale: bool = True  # attention is scaled by the full head width
    eps: float = 1e-5  # of every LayerNorm
    mirrored: bool = True  # the smallest and the full width lead, those between trail
    layer_scale: bool = False  # whether it does anything
    averaged: bool = True  # the two heads' logits


@torch.no_grad()
def published_logits(
    weights: dict[str, Tensor], images_BCHW: Tensor, width: Fraction, heads: int, facts: Facts = Facts()
) -> Tensor:
    full = weights["patch_embed.proj.weight"].shape[0]
    d = int(width * full)
    trails = (width not in (WIDTHS[0], WIDTHS[-1])) == facts.mirrored and width != 1

    def take(tensor: Tensor, axis: int, count: int) -> Tensor:
        return tensor.narrow(axis, tensor.shape[axis] - count if trails else 0, count)

    def norm(x_BND: Tensor, name: str) -> Tensor:
        weight, bias = take(weights[f"{name}.weight"], 0, d), take(weights[f"{name}.bias"], 0, d)
        return F.layer_norm(x_BND, (d,), weight, bias, facts.eps)

    def linear(x_BND: Tensor, name: str, rows: int, columns: int) -> Tensor:
        weight = take(take(weights[f"{name}.weight"], 0, rows), 1, columns)
        return F.linear(x_BND, weight, take(weights[f"{name}.bias"], 0, rows))

    def qkv(x_BND: Tensor, name: str) -> Tensor:
        if facts.flat_qkv:
            return linear(x_BND, name, 3 * d, d)
        thirds = zip(weights[f"{name}.weight"].chunk(3), weights[f"{name}.bias"].chunk(3), strict=True)
        return torch.cat([F.linear(x_BND, take(take(w, 0, d), 1, d), take(b, 0, d)) for w, b in thirds], -1)

    def attention(x_BND: Tensor, name: str) -> Tensor:
        B, N, _ = x_BND.shape
        q, k, v = qkv(x_BND, f"{name}.qkv").reshape(B, N, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        scale = ((full if facts.full_scale else d) // heads) ** -0.5
        mixed_BHND = ((q @ k.transpose(-2, -1)) * scale).softmax(-1) @ v
        return linear(mixed_BHND.transpose(1, 2).reshape(B, N, d), f"{name}.proj", d, d)

    def mlp(x_BND: Tensor, name: str) -> Tensor:
        hidden = int(width * weights[f"{name}.fc1.weight"].shape[0])
        return linear(F.gelu(linear(x_BND, f"{name}.fc1", hidden, d)), f"{name}.fc2", d, hidden)

    def scaled(x_BND: Tensor, name: str) -> Tensor:
        return x_BND * take(weights[name], 0, d) if facts.layer_scale else x_BND

    kernel, bias = take(weights["patch_embed.proj.weight"], 0, d), take(weights["patch_embed.proj.bias"], 0, d)
    x = F.conv2d(images_BCHW, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    tokens = [take(weights[name], 2, d) for name in ("cls_token", "dist_token") if name in weights]
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], 1) + take(weights["pos_embed"], 2, d)
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for n in range(depth):
        x = x + scaled(attention(norm(x, f"blocks.{n}.norm1"), f"blocks.{n}.attn"), f"blocks.{n}.ls1.gamma")
        x = x + scaled(mlp(norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp"), f"blocks.{n}.ls2.gamma")
    x = norm(x, "norm")
    logits = F.linear(x[:, 0], take(weights["head.weight"], 1, d), weights["head.bias"])
    if "head_dist.weight" not in weights or not facts.averaged:
        return logits
    return (logits + F.linear(x[:, 1], take(weights["head_dist.weight"], 1, d), weights["head_dist.bias"])) / 2


# Files like the published ones


def make_weights(
    distilled: bool = True,
    dim: int = DIM,
    depth: int = DEPTH,
    img: int = IMG,
    patch: int = PATCH,
    classes: int = CLASSES,
    seed: int = 0,
    layer_scale: bool = False,
) -> dict[str, Tensor]:
    """timm 0.3's keys of DeiT. The residual stream is small, so that the norms' epsilon matters."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    tokens = (img // patch) ** 2 + 1 + distilled
    weights = {
        "cls_token": normal(1, 1, dim, std=0.005),
        "pos_embed": normal(1, tokens, dim, std=0.005),
        "patch_embed.proj.weight": normal(dim, 3, patch, patch, std=0.005 / (3 * patch**2) ** 0.5),
        "patch_embed.proj.bias": normal(dim, std=0.002),
    }
    if distilled:
        weights["dist_token"] = normal(1, 1, dim, std=0.005)
    for n in range(depth):
        block = f"blocks.{n}"
        for name in ("norm1", "norm2"):
            weights[f"{block}.{name}.weight"] = 1 + normal(dim, std=0.2)
            weights[f"{block}.{name}.bias"] = normal(dim, std=0.2)
        for name, rows, columns, std in (
            ("attn.qkv", 3 * dim, dim, 2.0),
            ("attn.proj", dim, dim, 0.005),
            ("mlp.fc1", 4 * dim, dim, 1.0),
            ("mlp.fc2", dim, 4 * dim, 0.005),
        ):
            weights[f"{block}.{name}.weight"] = normal(rows, columns, std=std / columns**0.5)
            weights[f"{block}.{name}.bias"] = normal(rows, std=0.1 * std)
        if layer_scale:
            for name in ("ls1", "ls2"):
                weights[f"{block}.{name}.gamma"] = 0.5 + normal(dim, std=0.1)
    weights["norm.weight"], weights["norm.bias"] = 1 + normal(dim, std=0.2), normal(dim, std=0.2)
    for head in ("head", "head_dist") if distilled else ("head",):
        weights[f"{head}.weight"] = normal(classes, dim, std=dim**-0.5)
        weights[f"{head}.bias"] = normal(classes, std=0.5)
    return weights


def write_file(path: Path, weights: dict[str, Tensor], **entries: Any) -> Path:
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in weights.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for parameter in parameters[:2]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    arguments = argparse.Namespace(
        model="deit_small_distilled_patch16_224",
        lr=2e-3,
        ratios=[0.25, 1.0],
        output_dir="/home/somebody/out",
        device="cuda",
        resume="",
        distillation_type="hard",
        drop_block=None,
        opt_betas=(0.9, 0.999),
        nested=argparse.Namespace(world_size=8),
    )
    content = {
        "model": weights,
        "model_ema": {name: tensor * 0.9 for name, tensor in weights.items()},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [1e-3], "t_initial": 100, "warmup_prefix": False, "metric": None},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "epoch": 3,
        "args": arguments,
    }
    torch.save(content | entries, path)
    return path


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, IMG, IMG, generator=torch.Generator().manual_seed(7))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def logits_of(model: Any, images: Tensor, width: Fraction) -> Tensor:
    with torch.no_grad():
        return model(images, width=width)


# The forward


@pytest.mark.parametrize("kind", ["distilled", "plain"])
def test_logits_at_every_width(kind: str, images: Tensor, tmp_path: Path) -> None:
    """Worst relative error in float32, of the largest logit: below 2e-6; in float64 below 1e-12."""
    weights = make_weights(kind == "distilled")
    file = write_file(tmp_path / "published.pth", weights)
    model = slicevit.load_scala_checkpoint(file, DISTILLED if kind == "distilled" else PLAIN, grid=GRID, **SMALL)
    assert list(model.widths) == WIDTHS
    assert not model.training
    errors = {
        w: relative_error(logits_of(model, images, w), published_logits(weights, images, w, HEADS)) for w in WIDTHS
    }
    print("float32", {str(width): f"{error:.1e}" for width, error in errors.items()})
    assert max(errors.values()) < 2e-6

    model.double()
    exact, images = {name: tensor.double() for name, tensor in weights.items()}, images.double()
    errors = {w: relative_error(logits_of(model, images, w), published_logits(exact, images, w, HEADS)) for w in WIDTHS}
    print("float64", {str(width): f"{error:.1e}" for width, error in errors.items()})
    assert max(errors.values()) < 1e-12


@pytest.mark.parametrize("kind", ["distilled", "plain"])
def test_subnet_and_to_timm_give_the_same(kind: str, images: Tensor, tmp_path: Path) -> None:
    weights = make_weights(kind == "distilled", seed=1)
    file = write_file(tmp_path / "published.pth", weights)
    model = slicevit.load_scala_checkpoint(file, DISTILLED if kind == "distilled" else PLAIN, grid=GRID, **SMALL)
    for width in WIDTHS:
        expected = published_logits(weights, images, width, HEADS)
        with torch.no_grad():
            assert relative_error(model.subnet(width)(images), expected) < 2e-6
            assert relative_error(model.to_timm(width).eval()(images), expected) < 2e-6


@pytest.mark.parametrize(
    ("change", "widths"),
    [
        ({"flat_qkv": False}, WIDTHS[:-1]),
        ({"full_scale": False}, WIDTHS[:-1]),
        ({"eps": 1e-6}, WIDTHS),
        ({"mirrored": False}, WIDTHS[:-1]),
        ({"layer_scale": True}, WIDTHS),
        ({"averaged": False}, WIDTHS),
    ],
    ids=["flat qkv", "scale", "eps", "ends", "LayerScale", "heads"],
)
def test_every_fact_would_be_seen(change: dict[str, Any], widths: list[Fraction], images: Tensor) -> None:
    """A wrong fact is far outside the tolerance of the tests above, at every width that it touches."""
    weights = make_weights(layer_scale=True)
    for width in widths:
        right = published_logits(weights, images, width, HEADS)
        wrong = published_logits(weights, images, width, HEADS, replace(Facts(), **change))
        assert relative_error(wrong, right) > 1e-3, f"{change} at {width}"


def test_a_grid_of_seven_widths(images: Tensor, tmp_path: Path) -> None:
    """Models trained with s = 1/4 at other granularities: the ends do not depend on the step."""
    weights = make_weights(seed=2)
    file = write_file(tmp_path / "published.pth", weights)
    for grid, count in (("1/4:1:1/8", 7), ("1/4:1:1/4", 4)):
        model = slicevit.load_scala_checkpoint(file, DISTILLED, grid=grid, **SMALL)
        assert len(model.widths) == count
        for width in model.widths:
            assert (
                relative_error(logits_of(model, images, width), published_logits(weights, images, width, HEADS)) < 2e-6
            )


def test_layer_scale_is_thrown_away(images: Tensor, tmp_path: Path) -> None:
    weights = make_weights(layer_scale=True)
    file = write_file(tmp_path / "published.pth", weights)
    model = slicevit.load_scala_checkpoint(file, DISTILLED, grid=GRID, **SMALL)
    assert not any("gamma" in name for name in model.state_dict())
    for width in WIDTHS:
        assert relative_error(logits_of(model, images, width), published_logits(weights, images, width, HEADS)) < 2e-6


# Files


def test_the_average_and_other_forms_of_a_file(images: Tensor, tmp_path: Path) -> None:
    weights = make_weights()
    averaged = {name: tensor * 0.9 for name, tensor in weights.items()}
    file = write_file(tmp_path / "published.pth", weights)
    model = slicevit.load_scala_checkpoint(file, DISTILLED, grid=GRID, weights="model_ema", **SMALL)
    width = Fraction(1, 2)
    expected = published_logits(averaged, images, width, HEADS)
    assert relative_error(logits_of(model, images, width), expected) < 2e-6

    parallel = {f"module.{name}": tensor for name, tensor in weights.items()}  # of DistributedDataParallel
    expected = published_logits(weights, images, width, HEADS)
    torch.save({"model": weights, "epoch": 3}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for path in (write_file(tmp_path / "parallel.pth", parallel), tmp_path / "old.pth"):
        model = slicevit.load_scala_checkpoint(path, DISTILLED, grid=GRID, **SMALL)
        assert relative_error(logits_of(model, images, width), expected) < 2e-6
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


class Settings:
    """Harmless, and still not what a published file holds."""


@pytest.mark.parametrize("place", ["entry", "namespace", "weights", "class"])
def test_arbitrary_objects_are_refused(place: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    weights: dict[str, Any] = make_weights()
    entries: dict[str, Any] = {
        "entry": {"extra": Bomb(mark)},
        "namespace": {"args": argparse.Namespace(model="x", hook=Bomb(mark))},
        "weights": {"model": weights | {"norm.bias": Bomb(mark)}},
        "class": {"args": Settings()},
    }[place]
    file = write_file(tmp_path / "published.pth", make_weights(), **entries)
    with pytest.raises(ValueError, match=r"published\.pth") as refused:
        slicevit.load_scala_checkpoint(file, DISTILLED, grid=GRID, **SMALL)
    assert "\n" not in str(refused.value)
    assert not mark.exists()


def refused(file: Path, *said: str, model: str = DISTILLED, **arguments: Any) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        slicevit.load_scala_checkpoint(file, model, **({"grid": GRID} | SMALL | arguments))
    message = str(error.value)
    assert "\n" not in message
    assert any(word in message for word in said), message


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    weights = make_weights()
    file = write_file(tmp_path / "published.pth", weights)
    refused(tmp_path / "nowhere.pth", "nowhere.pth")
    refused(tmp_path, tmp_path.name)
    refused(file, "published.pth", model=PLAIN)
    refused(write_file(tmp_path / "plain.pth", make_weights(distilled=False)), "plain.pth")
    refused(file, "published.pth", embed_dim=128)
    refused(file, "published.pth", depth=2)
    refused(file, "no_such_model", model="no_such_model")
    refused(file, "1/5", grid="1/5:1:1/5")
    refused(file, "weights", weights="model_of_another_kind")
    for missing in ("blocks.1.attn.qkv.bias", "pos_embed", "head_dist.bias"):
        less = {name: tensor for name, tensor in weights.items() if name != missing}
        refused(write_file(tmp_path / "less.pth", less), missing)
    refused(write_file(tmp_path / "more.pth", weights | {"blocks.0.attn.extra": torch.zeros(2)}), "blocks.0.attn.extra")
    whole = file.read_bytes()
    for kept in (0, 100, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.pth").write_bytes(whole[:kept])
        refused(tmp_path / "cut.pth", "cut.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    refused(tmp_path / "text.pth", "text.pth")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", "list.pth")
    torch.save({"model": {}, "epoch": 3}, tmp_path / "empty.pth")
    refused(tmp_path / "empty.pth", "empty.pth")


def test_a_missing_head_is_named(tmp_path: Path) -> None:
    less = {name: tensor for name, tensor in make_weights().items() if name != "head.weight"}
    refused(write_file(tmp_path / "less.pth", less), "head.weight")


# Saved, imported and exported


def test_a_saved_model_loads_with_the_same_logits(images: Tensor, tmp_path: Path) -> None:
    weights = make_weights(seed=3)
    model = slicevit.load_scala_checkpoint(write_file(tmp_path / "f.pth", weights), DISTILLED, grid=GRID, **SMALL)
    model.save_pretrained(tmp_path / "saved")
    loaded = slicevit.from_pretrained(tmp_path / "saved")
    assert list(loaded.widths) == WIDTHS
    for width in WIDTHS:
        assert torch.equal(logits_of(loaded, images, width), logits_of(model, images, width))


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distilled", "plain"])
def test_exports_to_timm(kind: str, images: Tensor, tmp_path: Path) -> None:
    """The scale is folded into q and the epsilon into what writes to the residual stream: a stock model of timm."""
    weights = make_weights(kind == "distilled", seed=4)
    file = write_file(tmp_path / "published.pth", weights)
    model = slicevit.load_scala_checkpoint(file, DISTILLED if kind == "distilled" else PLAIN, grid=GRID, **SMALL)
    model.save_pretrained(tmp_path / "saved")
    errors = {}
    for width in WIDTHS:
        out = tmp_path / f"timm-{width.numerator}-{width.denominator}"
        claimed = export_timm(tmp_path / "saved", out, str(width))
        alone = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        assert alone.norm.eps == 1e-6
        assert alone.blocks[0].attn.scale == pytest.approx((int(width * DIM) // HEADS) ** -0.5)
        with torch.no_grad():
            errors[width] = relative_error(alone(images), published_logits(weights, images, width, HEADS))
        assert 0 <= claimed < 1e-4
    print({str(width): f"{error:.1e}" for width, error in errors.items()})
    assert max(errors.values()) < 5e-6


@pytest.mark.slow
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole DeiT-Ti distilled of 1000 classes: import, reload, export, evaluate-ready."""
    name, heads = "deit_tiny_distilled_patch16_224", 3
    weights = make_weights(dim=192, depth=12, img=224, classes=1000, seed=5)
    file, out = write_file(tmp_path / "published.pth", weights), tmp_path / "imported"
    cli.main(["import", str(file), str(out), "--model", name, "--grid", GRID])
    assert str(out) in capsys.readouterr().out
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    model = slicevit.from_pretrained(out)
    assert list(model.widths) == WIDTHS
    for width in WIDTHS:
        expected = published_logits(weights, images, width, heads)
        assert relative_error(logits_of(model, images, width), expected) < 5e-6
    for width in (Fraction(1, 4), Fraction(9, 16), Fraction(1)):
        folder = tmp_path / f"timm-{width.numerator}-{width.denominator}"
        cli.main(["export", str(out), str(folder), "--to", "timm", "--width", str(width)])
        alone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.no_grad():
            assert relative_error(alone(images), published_logits(weights, images, width, heads)) < 2e-5
    full = timm.create_model(f"local-dir:{out}", pretrained=True)  # the saved folder itself is timm's at full width
    assert full.state_dict().keys() == weights.keys()


@pytest.mark.parametrize("fault", ["model", "cut", "missing", "grid"])
def test_the_command_line_refuses(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_file(tmp_path / "published.pth", make_weights()), tmp_path / "imported"
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    if fault == "missing":
        file.unlink()
    flags = {"model": ["--model", "deit_small_patch16_224"], "grid": ["--grid", "1/4:1:2/7"]}.get(fault, [])
    with pytest.raises(SystemExit) as stop:
        cli.main(["import", str(file), str(out), *flags])
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("slicevit: ")
    assert "\n" not in said
    assert not out.exists()
