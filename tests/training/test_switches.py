"""Each switch of the method changes loss and gradients exactly as its equation says (METHOD.md, issue 2 point 3).

The expectation is computed from stock timm models, filled by an index map stated here, and plain torch in float64;
slicevit is asked for nothing but the answer.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F

import slicevit
from slicevit import WidthGrid
from slicevit.training import runs
from slicevit.training.config import TrainConfig
from slicevit.training.loop import Run
from slicevit.training.objectives import Objective
from slicevit.training.ranks import join
from slicevit.training.sampling import draw_widths, leave_out_full
from slicevit.training.setup import Mixer, build_optimizer, transform_config
from slicevit.training.step import accumulate_gradients
from slicevit.training.teacher import Teacher

PLAIN, DISTILLED = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
HEADS = 2
KWARGS: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 16, "num_heads": HEADS, "num_classes": 5}
S, M1, M2, FULL = (Fraction(k, 4) for k in range(1, 5))
STEP = (FULL, M2, M1, S)
GRID = "1/4:1:1/4"
Losses = dict[Fraction, torch.Tensor]
Grads = dict[str, torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


# --- by hand ---------------------------------------------------------------------------------------------


def index_of(name: str, full: torch.Size, narrow: torch.Size, trailing: bool) -> tuple[torch.Tensor, ...]:
    """Where the elements of a ViT's narrow parameter lie in the full one, layout `per_head`."""
    blocks = {
        "attn.qkv.weight": {0: 3 * HEADS},
        "attn.qkv.bias": {0: 3 * HEADS},
        "attn.proj.weight": {1: HEADS},
    }.get(name.split(".", 2)[-1], {})
    index = []
    for axis, (big, small) in enumerate(zip(full, narrow, strict=True)):
        count = blocks.get(axis, 1)
        b, s = big // count, small // count
        start = b - s if trailing else 0
        index.append(torch.cat([torch.arange(k * b + start, k * b + start + s) for k in range(count)]))
    return torch.meshgrid(*index, indexing="ij")


class Hand:
    """The full network as a state dict, and what a step does to it by the equations."""

    def __init__(self, model: slicevit.ElasticModel, name: str, scope: str = "all", **kwargs: Any):
        self.full = {key: value.detach().clone() for key, value in model.state_dict().items()}
        self.name, self.scope, self.kwargs = name, scope, KWARGS | kwargs
        self.grads = {key: torch.zeros_like(value) for key, value in self.full.items()}

    def narrow(self, width: Fraction, trailing: bool) -> tuple[nn.Module, dict[str, tuple[torch.Tensor, ...]]]:
        own = {"embed_dim": int(self.kwargs["embed_dim"] * width)} if self.scope == "all" else {}
        own |= {"mlp_ratio": float(4 * width)} if self.scope == "mlp" else {}
        net = timm.create_model(self.name, **self.kwargs | own).to(self.full["head.weight"].dtype).train()
        if self.name == DISTILLED:
            net.set_distilled_training(True)
        shapes = {key: value.shape for key, value in net.state_dict().items()}
        index = {key: index_of(key, self.full[key].shape, shape, trailing) for key, shape in shapes.items()}
        net.load_state_dict({key: self.full[key][at] for key, at in index.items()})
        return net, index

    def step(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        widths: tuple[Fraction, ...],
        loss_of: Callable[..., torch.Tensor],
        trailing: Callable[[Fraction], bool] = lambda width: width == S,
    ) -> tuple[Losses, Grads]:
        """`loss_of(width, (class, distilled) logits, targets, earlier logits by width)`, gradients summed."""
        losses: Losses = {}
        earlier: dict[Fraction, torch.Tensor] = {}
        grads = {key: torch.zeros_like(value) for key, value in self.full.items()}
        for width in widths:
            net, index = self.narrow(width, trailing(width))
            out = net(images)
            heads = out if isinstance(out, tuple) else (out, out)
            loss = loss_of(width, heads, targets, earlier)
            loss.backward()
            losses[width], earlier[width] = loss.detach(), heads[1].detach()
            for key, parameter in net.named_parameters():
                if parameter.grad is not None:
                    grads[key][index[key]] += parameter.grad
        return losses, grads


def ce(logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy with indices or shares, written out."""
    shares = F.one_hot(targets, logits.shape[1]).to(logits) if targets.ndim == 1 else targets
    shares = (1 - smoothing) * shares + smoothing / logits.shape[1]
    return -(shares * logits.log_softmax(1)).sum(1).mean()


def kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) at temperature 1, the teacher detached."""
    p = teacher.detach().softmax(1)
    return (p * (p.log() - student.log_softmax(1))).sum(1).mean()


def scala(weight: float = 1.0, calibration: bool = True, transfer: str = "next") -> Callable[..., torch.Tensor]:
    def loss(width: Fraction, heads: Any, targets: torch.Tensor, earlier: dict[Fraction, torch.Tensor]) -> Any:
        if not earlier:
            return (
                ce(heads[0], targets) if heads[0] is heads[1] else (ce(heads[0], targets) + ce(heads[1], targets)) / 2
            )
        if transfer == "off":
            return ce(heads[0], targets)
        if transfer == "larger":
            teacher = torch.stack([logits.softmax(1) for logits in earlier.values()]).mean(0).log()
        else:
            teacher = earlier[min(earlier)] if transfer == "next" else earlier[FULL]
        taught = kl(teacher, heads[1])
        return (ce(heads[0], targets) if calibration else 0.0) + weight * taught

    return loss


def make(name: str = PLAIN, **settings: Any) -> tuple[slicevit.ElasticModel, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = slicevit.create_model(name, grid=GRID, **KWARGS | settings).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if name == DISTILLED:
        model.set_distilled_training(True)
    return model, torch.randn(6, 3, 32, 32).double(), torch.tensor([0, 1, 2, 3, 4, 0])


def asked(
    model: slicevit.ElasticModel, images: Any, targets: Any, objective: Objective, widths: Any = STEP, **options: Any
) -> tuple[Losses, Grads]:
    model.zero_grad(set_to_none=True)
    losses = accumulate_gradients(model, images, targets, widths, objective, **options)
    assert not any(loss.requires_grad for loss in losses.values())
    return losses, {key: p.grad if p.grad is not None else torch.zeros_like(p) for key, p in model.named_parameters()}


def assert_equal(got: tuple[Losses, Grads], expected: tuple[Losses, Grads]) -> None:
    assert list(got[0]) == list(expected[0])
    for width, loss in expected[0].items():
        torch.testing.assert_close(got[0][width], loss, rtol=1e-10, atol=1e-12)
    for key, gradient in expected[1].items():
        torch.testing.assert_close(
            got[1][key], gradient, rtol=1e-8, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}"
        )


def differ(a: tuple[Losses, Grads], b: tuple[Losses, Grads]) -> set[Fraction]:
    """The widths whose loss differs; gradients must differ too wherever a loss does."""
    changed = {width for width in a[0] if not torch.isclose(a[0][width], b[0][width], rtol=1e-6)}
    assert any(not torch.allclose(a[1][key], b[1][key], rtol=1e-6, atol=1e-9) for key in a[1])
    return changed


# --- Isolated Activation ---------------------------------------------------------------------------------

ENDS: dict[str, set[Fraction]] = {"smallest": {S}, "b": {S, M1}, "c": {S, M2}, "off": set(), "mirror": {M1, M2}}


@pytest.mark.parametrize("isolation", ENDS)
def test_isolated_activation(isolation: str) -> None:
    model, images, targets = make(isolation=isolation)
    expected = Hand(model, PLAIN).step(images, targets, STEP, scala(), lambda width: width in ENDS[isolation])
    got = asked(model, images, targets, Objective())
    assert_equal(got, expected)
    if isolation != "off":
        other, _, _ = make(isolation="off")
        changed = differ(got, asked(other, images, targets, Objective()))
        assert changed >= ENDS[isolation]
        assert FULL not in changed


def test_the_smallest_width_leaves_the_channels_of_the_others_alone() -> None:
    model, images, targets = make()
    _, grads = asked(model, images, targets, Objective(), (S,))
    for key in ("norm.weight", "pos_embed", "blocks.0.mlp.fc2.bias"):
        assert not grads[key][..., :12].any()
        assert grads[key][..., 12:].any()


# --- transfer, calibration, λ ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [PLAIN, DISTILLED])
@pytest.mark.parametrize(
    ("transfer", "calibration"),
    [(t, c) for t in ("next", "full", "larger") for c in (True, False)] + [("off", True)],
)
def test_progressive_knowledge_transfer_and_noise_calibration(transfer: str, calibration: bool, name: str) -> None:
    """One head serves for both; of two, the class token's gets CE and the distillation token's KL."""
    model, images, targets = make(name)
    expected = Hand(model, name).step(images, targets, STEP, scala(1.0, calibration, transfer))
    assert_equal(asked(model, images, targets, Objective(transfer, calibration)), expected)


def test_who_teaches_whom() -> None:
    """PKT and the full network differ where the next larger width is not the full one."""
    model, images, targets = make()
    with_pkt = asked(model, images, targets, Objective("next"))
    assert differ(with_pkt, asked(model, images, targets, Objective("full"))) == {M1, S}
    assert differ(with_pkt, asked(model, images, targets, Objective("larger"))) == {M1, S}
    assert differ(with_pkt, asked(model, images, targets, Objective("off"))) == {M2, M1, S}
    assert differ(with_pkt, asked(model, images, targets, Objective("next", calibration=False))) == {M2, M1, S}


def test_no_gradient_goes_through_a_teacher() -> None:
    """The gradients of a step are those of each width alone with its teacher's logits as constants."""
    model, images, targets = make()
    _, together = asked(model, images, targets, Objective(calibration=False))
    apart = {key: torch.zeros_like(value) for key, value in together.items()}
    logits = {width: model(images, width=width).detach() for width in STEP}
    for width, teacher in zip(STEP, (None, *STEP), strict=False):
        model.zero_grad(set_to_none=True)
        out = model(images, width=width)
        (ce(out, targets) if teacher is None else kl(logits[teacher], out)).backward()
        for key, parameter in model.named_parameters():
            apart[key] += parameter.grad
    for key, gradient in together.items():
        torch.testing.assert_close(gradient, apart[key], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", [PLAIN, DISTILLED])
@pytest.mark.parametrize("weight", [0.0, 0.3, 2.5])
def test_lambda_weighs_the_kl_term(weight: float, name: str) -> None:
    model, images, targets = make(name)
    expected = Hand(model, name).step(images, targets, STEP, scala(weight))
    assert_equal(asked(model, images, targets, Objective(), transfer_weight=weight), expected)


def test_two_heads_part_the_labels_from_the_teacher() -> None:
    model, images, targets = make(DISTILLED)
    _, grads = asked(model, images, targets, Objective(calibration=False), (FULL, S))
    with_labels = asked(model, images, targets, Objective(), (FULL, S))[1]
    assert torch.equal(grads["head_dist.weight"], with_labels["head_dist.weight"])
    assert not torch.equal(grads["head.weight"], with_labels["head.weight"])
    model.eval()
    out = model(images, width=S)  # at inference the two heads are averaged
    net, _ = Hand(model, DISTILLED).narrow(S, trailing=True)
    pair = net(images)
    torch.testing.assert_close(out, (pair[0] + pair[1]) / 2)


# --- labels and the external teacher ---------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_labels(smoothing: float, mixed: bool) -> None:
    """Smoothing applies to class indices; the shares that Mixup makes are smoothed by Mixup already."""
    model, images, targets = make()
    shares = torch.randn(6, 5).double().softmax(1)
    used, own = (shares, 0.0) if mixed else (targets, smoothing)

    def loss(width: Fraction, heads: Any, labels: torch.Tensor, earlier: Any) -> torch.Tensor:
        labelled = ce(heads[0], labels, own)
        return labelled if width == FULL else labelled + kl(earlier[min(earlier)], heads[1])

    expected = Hand(model, PLAIN).step(images, used, STEP, loss)
    assert_equal(asked(model, images, used, Objective(smoothing=smoothing)), expected)


@pytest.mark.parametrize("share", [0.5, 0.2, 1.0])
@pytest.mark.parametrize("how", ["hard", "soft"])
@pytest.mark.parametrize("name", [PLAIN, DISTILLED])
def test_the_external_teacher_teaches_the_full_width(name: str, how: str, share: float) -> None:
    model, images, targets = make(name)
    external = 2 * torch.randn(6, 5).double()
    narrower = scala()

    def loss(width: Fraction, heads: Any, labels: torch.Tensor, earlier: Any) -> torch.Tensor:
        if width < FULL:
            return narrower(width, heads, labels, earlier)
        taught = ce(heads[1], external.argmax(1)) if how == "hard" else kl(external, heads[1])
        return (1 - share) * ce(heads[0], labels) + share * taught

    objective = Objective(distillation=how, teacher_share=share)
    expected = Hand(model, name).step(images, targets, STEP, loss)
    got = asked(model, images, targets, objective, external_BK=external)
    assert_equal(got, expected)
    assert differ(got, asked(model, images, targets, objective)) == {FULL}


# --- Stable Sampling -------------------------------------------------------------------------------------


def uniform(counts: Counter[Any], options: list[Any]) -> None:
    """Every option is drawn and nothing else; Pearson's statistic is below its 99.99 % point, about."""
    assert set(counts) == set(options)
    if len(options) == 1:
        return
    each = sum(counts.values()) / len(options)
    statistic = sum((counts[option] - each) ** 2 / each for option in options)
    freedom = len(options) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 8


@pytest.mark.parametrize("text", [GRID, "1/4:1:1/8", "1/4:1:1/16", "1/4:1:1/32", "1/2:1:1/16", "1/8:1:1/8"])
def test_stable_sampling(text: str) -> None:
    grid = WidthGrid.parse(text)
    s, middle = grid.smallest, (grid.smallest + 1) / 2
    draws = [draw_widths(grid, "stable", 0, step) for step in range(2000)]
    assert all(len(draw) == 4 and draw[0] == 1 and draw[3] == s for draw in draws)
    uniform(Counter(draw[2] for draw in draws), [w for w in grid if s < w <= middle])
    uniform(Counter(draw[1] for draw in draws), [w for w in grid if middle < w < 1])
    pairs = Counter((draw[1], draw[2]) for draw in draws)  # drawn independently of each other
    uniform(pairs, [(a, b) for a in grid if middle < a < 1 for b in grid if s < b <= middle])


@pytest.mark.parametrize("text", ["1/4:1:1/8", "1/4:1:1/16"])
def test_free_sampling(text: str) -> None:
    grid = WidthGrid.parse(text)
    between = list(grid)[1:-1]
    draws = [draw_widths(grid, "free", 0, step) for step in range(2000)]
    assert all(draw[0] == 1 and draw[-1] == grid.smallest and len(draw) == 4 for draw in draws)
    assert all(draw[1] > draw[2] for draw in draws)
    uniform(Counter(width for draw in draws for width in draw[1:3]), between)
    uniform(Counter(draw[1:3] for draw in draws), [(a, b) for a in between for b in between if a > b])


def test_one_and_full() -> None:
    grid = WidthGrid.parse("1/4:1:1/8")
    draws = [draw_widths(grid, "one", 0, step) for step in range(2000)]
    assert all(len(draw) == 1 for draw in draws)
    uniform(Counter(draw[0] for draw in draws), list(grid))
    assert {draw_widths(grid, "full", 0, step) for step in range(50)} == {(Fraction(1),)}


@pytest.mark.parametrize("draw", ["stable", "free", "one"])
def test_draws_depend_on_seed_and_step_alone(draw: Any) -> None:
    grid = WidthGrid.parse("1/4:1:1/32")
    first = [draw_widths(grid, draw, 3, step) for step in range(200)]
    torch.manual_seed(9)
    np.random.seed(9)
    state = torch.get_rng_state()
    assert [draw_widths(grid, draw, 3, step) for step in reversed(range(200))] == first[::-1]
    assert torch.equal(torch.get_rng_state(), state)
    assert [draw_widths(grid, draw, 4, step) for step in range(200)] != first
    assert [draw_widths(grid, draw, 3, step + 1) for step in range(200)] != first


@pytest.mark.parametrize("text", ["1:1:1", "1/2:1:1/2", "1/2:1:1/4"])
@pytest.mark.parametrize("draw", ["stable", "free"])
def test_grids_with_few_widths_give_fewer(text: str, draw: Any) -> None:
    """The published code crashes on an empty range; each legal width is visited here."""
    grid = WidthGrid.parse(text)
    for step in range(20):
        widths = draw_widths(grid, draw, 0, step)
        assert set(widths) == set(grid)
        assert list(widths) == sorted(widths, reverse=True)


# --- whole runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for c in range(2):
            (folder / split / f"c{c}").mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"c{c}" / f"{k}.png")
    return folder


@pytest.fixture(autouse=True)
def _short_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slicevit.training.loop.LATENCY_SECONDS", 0.01)


RUN_KWARGS = {key: value for key, value in KWARGS.items() if key != "num_classes"} | {"depth": 1, "qkv_bias": False}


def config_of(data: Path, **changes: Any) -> TrainConfig:
    """Four steps an epoch, a constant learning rate; no q/k/v bias, whose gradient is all noise to AdamW."""
    base = TrainConfig(
        data=str(data),
        model=PLAIN,
        model_args=dict(RUN_KWARGS),
        grid=GRID,
        epochs=1,
        batch_size=4,
        lr=1e-2,
        min_lr=1e-2,
        warmup_epochs=0,
        eval_every=100,
        threads=1,
        device="cpu",
        seed=5,
    )
    return replace(base, **changes)


def quiet() -> Console:
    return Console(quiet=True)


def train_by_hand(
    run: Run,
    loss_of: Callable[[int], Callable[..., torch.Tensor]],
    widths_of: Callable[[int], tuple[Fraction, ...]],
    trailing: Callable[[Fraction], bool],
    scope: str = "all",
) -> tuple[nn.Module, ModelEmaV3 | None]:
    """timm's AdamW on a stock full model, each step's gradients by the equations, on the run's own batches.

    The run's `width_draws` parts of a step follow one another in `widths_of`.
    """
    config = run.config
    full = timm.create_model(PLAIN, **RUN_KWARGS, num_classes=2).train()
    full.load_state_dict(run.model.state_dict())
    optimizer = create_optimizer_v2(full, opt="adamw", lr=config.lr, weight_decay=config.weight_decay)
    ema = ModelEmaV3(full, decay=run.ema.decay, use_warmup=run.ema.use_warmup) if run.ema is not None else None
    step = 0
    for epoch in range(int(config.epochs)):
        for images, targets in run.loader.epoch(epoch):
            hand, parts = Hand(full, PLAIN, scope, **RUN_KWARGS, num_classes=2), config.width_draws
            optimizer.zero_grad()
            for draw, chunk in enumerate(zip(images.chunk(parts), targets.chunk(parts), strict=True)):
                _, grads = hand.step(*chunk, widths_of(step * parts + draw), loss_of(step), trailing)
                for key, parameter in full.named_parameters():
                    part = grads[key] / parts
                    parameter.grad = part if parameter.grad is None else parameter.grad + part
            optimizer.step()
            if ema is not None:
                ema.update(full, step)
            step += 1
    return full, ema


def assert_weights(
    got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> None:
    assert got.keys() == expected.keys()
    moved = 0.0
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")
        moved = max(moved, float((value - start[key]).abs().max()))
    assert moved > 0.02, "nothing was trained, so nothing is proved"


def checked_run(
    config: TrainConfig,
    folder: Path,
    loss_of: Callable[[int], Callable[..., torch.Tensor]] = lambda step: scala(),
    widths_of: Callable[[int], tuple[Fraction, ...]] | None = None,
    trailing: Callable[[Fraction], bool] = lambda width: width == S,
    scope: str = "all",
) -> Run:
    run = Run(config, folder, quiet())
    start = copy.deepcopy(run.model.state_dict())
    grid = WidthGrid.parse(config.grid)
    draws = widths_of or (lambda step: draw_widths(grid, "stable", config.seed, step))
    full, ema = train_by_hand(run, loss_of, draws, trailing, scope)
    run.train()
    assert_weights(run.model.state_dict(), full.state_dict(), start)
    if ema is not None:
        assert_weights(run.ema.module.state_dict(), ema.module.state_dict(), start)
        assert_weights(load_file(folder / "model.safetensors"), ema.module.state_dict(), start)
    return run


def test_scala(data: Path, tmp_path: Path) -> None:
    checked_run(config_of(data), tmp_path)


def test_parts_of_a_step_that_draw_their_own_widths(data: Path, tmp_path: Path) -> None:
    """Each part's gradients are those of a step of its own, in the mean over the parts."""
    config = config_of(data, width_draws=2, grid="1/4:1:1/8", epochs=2)
    grid = WidthGrid.parse(config.grid)
    draws = [draw_widths(grid, "stable", config.seed, step, part) for step in range(8) for part in range(2)]
    assert any(a != b for a, b in zip(draws[::2], draws[1::2], strict=True))
    checked_run(config, tmp_path, widths_of=draws.__getitem__)


def test_draws_that_leave_out_the_full_width(data: Path, tmp_path: Path) -> None:
    """What is then widest learns from labels alone, and teaches the next."""
    config = config_of(data, full_width_share=0.5, grid="1/4:1:1/8", epochs=2)
    grid = WidthGrid.parse(config.grid)
    draws = [draw_widths(grid, "stable", config.seed, step) for step in range(8)]
    draws = [leave_out_full(widths, 0.5, config.seed, step) for step, widths in enumerate(draws)]
    assert {len(widths) for widths in draws} == {3, 4}
    checked_run(config, tmp_path, widths_of=draws.__getitem__)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_share_of_draws_with_the_full_width(share: float) -> None:
    step = draw_widths(WidthGrid.parse(GRID), "stable", 0, 0)
    draws = [leave_out_full(step, share, 0, k) for k in range(2000)]
    assert set(draws) <= {step, step[1:]}
    assert sum(widths == step for widths in draws) / 2000 == pytest.approx(share, abs=0.05)
    assert leave_out_full((FULL,), 0.01, 0, 0) == (FULL,)  # alone it stays


@pytest.mark.parametrize("settings", [{"width_draws": 0}, {"full_width_share": 0.0}, {"full_width_share": 1.5}])
def test_what_no_step_can_draw_is_refused(settings: dict[str, Any], data: Path) -> None:
    name = f"--{next(iter(settings)).replace('_', '-')}"
    with pytest.raises(ValueError, match=f"{name} must"):
        config_of(data, **settings)


def test_parts_must_be_equal(data: Path) -> None:
    with pytest.raises(ValueError, match=r"--width-draws 3 does not divide the 4 images .*--batch-size"):
        config_of(data, width_draws=3).rank_batch(1)


def test_usnet(data: Path, tmp_path: Path) -> None:
    """The sandwich rule with free draws; narrower widths learn from the full one alone; no isolation."""
    config = config_of(data, method="usnet", grid="1/4:1:1/8")
    grid = WidthGrid.parse(config.grid)
    checked_run(
        config,
        tmp_path,
        lambda step: scala(1.0, calibration=False, transfer="full"),
        lambda step: draw_widths(grid, "free", config.seed, step),
        trailing=lambda width: False,
    )


@pytest.mark.parametrize("method", ["autoformer", "matformer"])
def test_one_random_width_a_step(method: Any, data: Path, tmp_path: Path) -> None:
    config = config_of(data, method=method, epochs=2)
    grid = WidthGrid.parse(GRID)

    def labels_alone(width: Fraction, heads: Any, targets: torch.Tensor, earlier: Any) -> torch.Tensor:
        return ce(heads[0], targets)

    checked_run(
        config,
        tmp_path,
        lambda step: labels_alone,
        lambda step: draw_widths(grid, "one", config.seed, step),
        trailing=lambda width: False,
        scope="mlp" if method == "matformer" else "all",
    )


@pytest.fixture(scope="module")
def separate(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("separate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slicevit.training.loop.LATENCY_SECONDS", 0.01)
        runs.start(config_of(data, method="separate", grid="1/2:1:1/2"), folder, quiet())
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("width", ["1/2", "1"])
def test_separate_trains_a_stock_model_of_each_width_alone(width: str, separate: Path, data: Path) -> None:
    """From the seed: timm's own initialisation of the narrow model, then cross-entropy alone, for as many epochs."""
    config = config_of(data)
    channels = int(16 * Fraction(width))
    part = separate / "separate" / width.replace("/", "-")
    torch.manual_seed(config.seed)
    net = timm.create_model(PLAIN, **RUN_KWARGS | {"embed_dim": channels}, num_classes=2).train()
    start = copy.deepcopy(net.state_dict())
    optimizer = create_optimizer_v2(net, opt="adamw", lr=config.lr, weight_decay=config.weight_decay)
    loader = Run(replace(config, model_args=RUN_KWARGS | {"embed_dim": channels}, grid="1:1:1"), part, quiet()).loader
    for images, targets in loader.epoch(0):
        optimizer.zero_grad()
        ce(net(images), targets).backward()
        optimizer.step()
    assert_weights(load_file(part / "model.safetensors"), net.state_dict(), start)
    rows = {row["width"]: row for row in json.loads((separate / "results.json").read_text())}
    assert set(rows) == {"1/2", "1"}
    assert rows[width]["channels"] == channels
    assert rows[width]["method"] == "separate"


@pytest.mark.parametrize("how", ["hard", "soft"])
def test_a_separate_runs_full_width_teaches(how: Any, separate: Path, data: Path, tmp_path: Path) -> None:
    teacher = timm.create_model(f"local-dir:{separate / 'separate' / '1'}", pretrained=True).eval()
    run = Run(config_of(data, teacher=str(separate), distillation=how), tmp_path, quiet())
    images, _ = next(iter(run.loader.epoch(0)))
    torch.testing.assert_close(run.teacher(images), teacher(images))
    batches = iter([x for x, _ in run.loader.epoch(0)])

    def loss_of(step: int) -> Callable[..., torch.Tensor]:
        external = teacher(next(batches)).detach()

        def loss(width: Fraction, heads: Any, targets: torch.Tensor, earlier: Any) -> torch.Tensor:
            if width < FULL:
                return scala()(width, heads, targets, earlier)
            taught = ce(heads[1], external.argmax(1)) if how == "hard" else kl(external, heads[1])
            return (ce(heads[0], targets) + taught) / 2

        return loss

    checked_run(run.config, tmp_path, loss_of)


def test_a_teacher_sees_the_images_in_its_own_normalisation_and_size(tmp_path: Path, data: Path) -> None:
    torch.manual_seed(1)
    model = slicevit.create_model(PLAIN, grid=GRID, **KWARGS | {"img_size": 48}).eval()
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    from slicevit.checkpoint import save_pretrained

    save_pretrained(model, tmp_path, data_config={"input_size": (3, 48, 48), "mean": mean, "std": std})
    student = transform_config(config_of(data), make()[0])
    teacher = Teacher(str(tmp_path), student, 5, torch.device("cpu"))
    pixels = torch.rand(2, 3, 32, 32)
    column = lambda values: torch.tensor(values).view(1, 3, 1, 1)  # noqa: E731
    seen = (pixels - column(student.mean)) / column(student.std)
    own = (pixels - column(mean)) / column(std)
    own = F.interpolate(own, size=(48, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher(seen), model(own), rtol=1e-4, atol=1e-5)
    assert not teacher(seen).requires_grad
    with pytest.raises(ValueError, match=r"--teacher.*5.*4"):
        Teacher(str(tmp_path), student, 4, torch.device("cpu"))


def test_warm_up_epochs_train_the_full_width_alone(data: Path, tmp_path: Path) -> None:
    config = config_of(data, epochs=2, full_width_first=0.5)
    grid = WidthGrid.parse(GRID)
    run = checked_run(
        config, tmp_path, widths_of=lambda step: (FULL,) if step < 4 else draw_widths(grid, "stable", 5, step)
    )
    assert [run.widths_of(step) == (FULL,) for step in range(8)] == [True] * 4 + [False] * 4


def test_ema_is_timms_and_is_what_is_saved(data: Path, tmp_path: Path) -> None:
    run = checked_run(config_of(data, ema_decay=0.7, epochs=2), tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert run.ema.decay == 0.7
    assert not torch.allclose(saved["norm.weight"], run.model.state_dict()["norm.weight"], atol=1e-5)
    for width in run.model.widths:  # and every width of it is the average's slice
        assert torch.isfinite(run.evaluated(torch.randn(1, 3, 32, 32), width=width)).all()


def test_the_grid_changes_mid_run(data: Path, tmp_path: Path) -> None:
    """The paper's fast interpolation: X = 4 for the first half, X = 7 for the rest."""
    config = config_of(data, epochs=2, grid_change="1/8@50%", ema_decay=0.5)
    old, new = WidthGrid.parse(GRID), WidthGrid.parse("1/4:1:1/8")
    run = checked_run(
        config, tmp_path, widths_of=lambda step: draw_widths(old if step < 4 else new, "stable", config.seed, step)
    )
    assert run.model.grid == run.evaluated.grid == new
    assert slicevit.from_pretrained(tmp_path).grid == new


def test_a_grid_change_that_cannot_be_sliced_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    """A head width of 8 has no thirty-seconds: said at the start, not after 70 % of the run."""
    with pytest.raises(ValueError, match="1/32"):
        Run(config_of(data, grid_change="1/32@70%"), tmp_path, quiet())


def test_lambda_grows_over_its_share_of_the_run(data: Path, tmp_path: Path) -> None:
    config = config_of(data, epochs=2, transfer_weight=3.0, transfer_ramp=0.5)
    weights = [3.0 * min(1.0, step / 4) for step in range(8)]
    run = Run(config, tmp_path, quiet())
    got = []
    for step in range(8):
        run.step = step
        got.append(run.transfer_weight())
    assert got == pytest.approx(weights)
    checked_run(config, tmp_path, lambda step: scala(weights[step]))


@pytest.mark.parametrize(
    ("changes", "loss", "draw", "trailing"),
    [
        ({"isolation": "off"}, scala(), "stable", set()),
        ({"isolation": "b"}, scala(), "stable", {S, M1}),
        ({"isolation": "c"}, scala(), "stable", {S, M2}),
        ({"transfer": "full"}, scala(transfer="full"), "stable", {S}),
        ({"calibration": False}, scala(calibration=False), "stable", {S}),
        ({"sampling": "free", "grid": "1/4:1:1/8"}, scala(), "free", {S}),
    ],
    ids=["no_IA", "IA_b", "IA_c", "no_PKT", "no_NC", "no_SS"],
)
def test_the_ablation_table_is_one_switch_each(
    changes: dict[str, Any], loss: Any, draw: Any, trailing: set[Fraction], data: Path, tmp_path: Path
) -> None:
    config = config_of(data, **changes)
    grid = WidthGrid.parse(config.grid)
    draws = lambda step: draw_widths(grid, draw, config.seed, step)  # noqa: E731
    checked_run(config, tmp_path, lambda step: loss, draws, lambda width: width in trailing)


# --- DeiT's recipe ---------------------------------------------------------------------------------------


def test_mixup_is_timms(data: Path) -> None:
    config = config_of(data, mixup=0.8, cutmix=1.0, smoothing=0.1)
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    np.random.seed(3)
    got = Mixer(config, 5)(images.clone(), targets)
    np.random.seed(3)
    mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    expected = mixup(images.clone(), targets)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    plain = Mixer(config_of(data), 5)(images, targets)
    assert plain[0] is images
    assert plain[1] is targets


def test_the_optimizer_is_timms_adamw_with_its_exemptions(data: Path) -> None:
    model, stock = make()[0], timm.create_model(PLAIN, **KWARGS)
    for decay in (None, 0.7):
        ours = build_optimizer(config_of(data, weight_decay=0.05, layer_decay=decay), model, join("cpu"))
        theirs = create_optimizer_v2(stock, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=decay)
        assert type(ours) is type(theirs)
        names = [{id(p): name for name, p in net.named_parameters()} for net in (model, stock)]
        for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert [names[0][id(p)] for p in a["params"]] == [names[1][id(p)] for p in b["params"]]
            assert (a["weight_decay"], a.get("lr_scale")) == (b["weight_decay"], b.get("lr_scale"))


def test_drop_path_reaches_every_width(data: Path, tmp_path: Path) -> None:
    run = Run(config_of(data, drop_path=0.5, model_args=RUN_KWARGS | {"depth": 3}), tmp_path, quiet())
    images = torch.randn(4, 3, 32, 32)
    for width in run.model.widths:
        assert not torch.equal(run.model(images, width=width), run.model(images, width=width))


def test_gradients_are_clipped_over_all_widths_at_once(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """One reduction and one clip a step, after the last width."""
    norms = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda p, n, *a, **k: norms.append(n) or clip(list(p), n, *a, **k))
    Run(config_of(data, clip_grad=0.5), tmp_path, quiet()).train()
    assert norms == [0.5] * 4
