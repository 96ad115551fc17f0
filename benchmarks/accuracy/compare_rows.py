"""What `compare.py` compares: two scales, the rows of the table, and the parts that they stand in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from slicevit.published import PUBLISHED
from slicevit.training.config import TrainConfig
from slicevit.training.presets import preset
from slicevit.training.recipes import X4, X7, X13


@dataclass(frozen=True)
class Scale:
    """The size of a comparison.

    base: the configuration that every run shares, X = 13, on a data set.
    data: the default data set; None where it must be given.
    epochs: of every run. rates: learning rates of the search. seeds: of the rows that search.
    main: the rows that `--only main` trains.
    head_args: model arguments under which a quarter of the heads is whole; empty where it already is.
    """

    base: Callable[[str], TrainConfig]
    data: str | None
    epochs: float
    rates: tuple[float, ...]
    main: tuple[str, ...]
    head_args: dict[str, Any]
    seeds: tuple[int, ...] = (0, 1, 2)


def _cpu(data: str) -> TrainConfig:
    """A small ViT with 16 patches; its heads are 16 wide, so that 1/16 is one channel of each."""
    return TrainConfig(
        data=data,
        model="vit_tiny_patch16_224",
        model_args={
            "img_size": 28,
            "patch_size": 7,
            "in_chans": 1,
            "embed_dim": 64,
            "depth": 6,
            "num_heads": 4,
        },
        grid=X13,
        crop="pad",
        eval_every=10_000,
        in_memory=True,
        cuda_graphs=True,
        threads=1,
    )


def _gpu(data: str) -> TrainConfig:
    """DeiT-S with patches of 8 on images of 64 pixels, DeiT's augmentation for every row."""
    return replace(preset("tiny-imagenet-paper"), data=data, grid=X13, eval_every=10_000, save_every=10)


_MAIN = ("separate", "separate-teacher", "usnet", "usnet-teacher", "autoformer", "matformer", "scala-x13", "scala-x4")
_CPU_MAIN = ("separate", "separate-teacher", "usnet", "scala-x13", "scala-x4")

SCALES = {
    "cpu": Scale(_cpu, "fashion-mnist", 12, (1e-3, 2e-3, 4e-3), _CPU_MAIN, {}),
    "gpu": Scale(_gpu, None, 100, (5e-4, 1e-3, 2e-3), _MAIN, {"num_heads": 8}),
}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    changes: what it changes in the scale's configuration.
    rate_of: the row whose learning rate it takes; None where it has a search of its own. Rows of the method
        `rotated` take that of separate training.
    taught: by the separately trained full width of seed 0. tuned: starts from that width's weights.
    """

    title: str
    changes: dict[str, Any]
    rate_of: str | None = None
    taught: bool = False
    tuned: bool = False


def table_rows(scale: Scale, base: TrainConfig, epochs: float) -> dict[str, Row]:
    """Every row by its name, which its run folders bear."""

    def one(title: str, **changes: Any) -> Row:
        return Row(title, changes, "scala-x13")

    def coarse(title: str, **changes: Any) -> Row:
        return Row(title, {"grid": X4} | changes, "scala-x4")

    def rotated(title: str, **changes: Any) -> Row:
        return Row(title, {"method": "rotated"} | changes, "separate")

    heads = {"model_args": base.model_args | scale.head_args}
    separate = {"method": "separate", "grid": X4}
    rows = {
        "separate": Row("separate training", separate),
        "separate-teacher": Row("separate + teacher", separate, taught=True),
        "usnet": Row("US-Net", {"method": "usnet"}),
        "usnet-teacher": Row("US-Net + teacher", {"method": "usnet"}, taught=True),
        "autoformer": Row("AutoFormer by width", {"method": "autoformer"}),
        "matformer": Row("MatFormer", {"method": "matformer"}),
        "scala-x13": Row("Scala, X = 13", {}),
        "scala-x4": Row("Scala, X = 4", {"grid": X4}),
        "no-ia": one("no IA (isolation off)", isolation="off"),
        "no-pkt": one("no PKT (the full width teaches)", transfer="full"),
        "no-ss": one("no SS (free sampling)", sampling="free"),
        "no-nc": one("no NC (no labels)", calibration=False),
        "ia-b": one("IA, alternative b", isolation="b"),
        "ia-c": one("IA, alternative c", isolation="c"),
        "per-projection": one("layout per_projection", layout="per_projection"),
        "flat": one("layout flat", layout="flat"),
        "published": one("the published slicing", **PUBLISHED),
        "full-scale": one("attention scale of the full width", attn_scale="full"),
        "heads-scaled": coarse("whole heads dropped, X = 4", heads="scaled", **heads),
        "x4-to-x13": one("X = 4, X = 13 from 70 %", grid=X4, grid_change="1/16@70%"),
        "x13-to-x4": coarse("X = 13, X = 4 from 70 %", grid=X13, grid_change="1/4@70%"),
        "scala-x7": one("Scala, X = 7", grid=X7),
        "fine-tuned": replace(one("from the trained full width"), tuned=True),
        "weight": one("λ = 0.5", transfer_weight=0.5),
        "ramp": one("λ grows over half of the run", transfer_ramp=0.5),
        "warm-up": one("full width alone for a tenth", full_width_first=0.1),
        "teacher": replace(one("external teacher"), taught=True),
        "xavier": one("Xavier initialisation", model_args=base.model_args | {"weight_init": "jax"}),
        "larger": one("all larger widths teach", transfer="larger"),
        "draws-2": one("two draws of widths a step", width_draws=2),
        "draws-4": one("four draws of widths a step", width_draws=4),
        "half-full": one("full width in half of the steps, as much work", full_width_share=0.5, epochs=epochs * 4 / 3),
        "rotated": rotated("rotated, as much work", epochs=epochs * 1.5),
        "rotated-70": rotated("rotated, 0.7 of the work", epochs=epochs * 1.045),
        "rotated-isolated": rotated("rotated, the smallest isolated", epochs=epochs * 1.5, isolation="smallest"),
        "rotated-not": rotated("the same, not rotated, one cosine", epochs=epochs * 1.5, rewire="off"),
    }
    if scale.head_args:
        rows["heads-fixed"] = coarse("all heads kept, X = 4", **heads)
    return rows


@dataclass(frozen=True)
class Part:
    """A section of the table: its rows, and the rows that differences are taken from."""

    title: str
    rows: tuple[str, ...]
    references: tuple[str, ...] = ("separate", "scala-x13")


def table_parts(scale: Scale) -> dict[str, Part]:
    """The sections by the name that `--only` takes."""
    kept = ("heads-fixed",) if scale.head_args else ("scala-x4",)
    return {
        "main": Part("The paper's table", _MAIN),
        "ablation": Part("Ablation", ("no-ia", "no-pkt", "no-ss", "no-nc", "ia-b", "ia-c")),
        "layouts": Part("Layouts and attention scale", ("per-projection", "flat", "full-scale", "published")),
        "heads": Part("Head count against head width", (*kept, "heads-scaled"), ("separate", "scala-x13", *kept)),
        "interpolation": Part("A grid that changes", ("x4-to-x13", "x13-to-x4"), ("separate", "scala-x13", "scala-x4")),
        "unseen": Part("Widths that were not trained", ("scala-x4", "scala-x7")),
        "fine-tuning": Part("Fine-tuning", ("fine-tuned",)),
        "leads": Part(
            "Leads",
            ("weight", "ramp", "warm-up", "teacher", "no-ia", "xavier", "larger", "draws-2", "draws-4", "half-full"),
        ),
        "full-width-first": Part("The full width first", ("rotated", "rotated-70", "rotated-isolated", "rotated-not")),
    }
