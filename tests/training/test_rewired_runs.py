"""Rewiring at the start of a run and in its middle: the full width stays, resumes as it is; bad input is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import slicevit
from slicevit import cli
from slicevit.training.keeper import Keeper
from slicevit.training.runs import read_train_config
from slicevit.training.trainee import Trainee

TINY = ["--model", "vit_tiny_patch16_224", "--model-args", "img_size=28", "patch_size=14", "in_chans=1", "embed_dim=16",
        "depth=2", "num_heads=2"]  # fmt: skip
COMMON = ["--crop", "pad", "--batch-size", "50", "--device", "cpu", "--threads", "1", "--workers", "0"]
SEEN = ["--data", "fashion-mnist?classes=0:2"]
STILL = ["--lr", "1e-12", "--min-lr", "0", "--weight-decay", "0", "--epochs", "0.02", "--rewire-images", "8"]
GRID = ["--grid", "1/4:1:1/4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, train_quickly: Callable[[list[str]], None]) -> Path:
    """An ordinary network, trained at full width alone."""
    run = tmp_path_factory.mktemp("base") / "run"
    alone = ["--method", "separate", "--grid", "1:1:1", "--epochs", "0.2"]
    train_quickly([*SEEN, *TINY, *COMMON, *alone, "--out", str(run)])
    return run


def logits(run: Path, width: str = "1") -> Tensor:
    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return slicevit.from_pretrained(run, grid="1/4:1:1/4")(images, width=width).detach()


@pytest.mark.parametrize("flags", [["--rewire"], ["--rewire", "rotate", "--ema-decay", "0.9"]])
def test_a_run_begins_with_the_same_full_width_and_other_narrow_ones(
    base: Path, tmp_path: Path, train_quickly: Callable[[list[str]], None], flags: list[str]
) -> None:
    train_quickly([*SEEN, *TINY, *COMMON, *GRID, *STILL, "--init", str(base), *flags, "--out", str(tmp_path / "run")])
    torch.testing.assert_close(logits(tmp_path / "run"), logits(base), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(tmp_path / "run", "1/2"), logits(base, "1/2"), atol=1e-4)
    how = "rotate" if "rotate" in flags else "permute"
    assert read_train_config(tmp_path / "run").rewire == how


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_is_not_rewired_again(
    base: Path, tmp_path: Path, train_quickly: Callable[[list[str]], None]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    rest = [*SEEN, *TINY, *COMMON, *GRID, "--epochs", "0.1", "--init", str(base), "--rewire", "--rewire-images", "8"]
    train_quickly([*rest, "--checkpoint-steps", "3", "--out", str(whole)])
    train_quickly([*rest, "--checkpoint-steps", "3", "--out", str(stopped)])
    state = torch.load(stopped / "checkpoint.pt", weights_only=True)
    shutil.rmtree(stopped)
    with pytest.MonkeyPatch.context() as patch:  # killed after the first checkpoint
        patch.setattr("slicevit.training.loop.Run._end_epoch", _killed)
        with pytest.raises(_Killed):
            train_quickly([*rest, "--checkpoint-steps", "3", "--out", str(stopped)])
    assert torch.load(stopped / "checkpoint.pt", weights_only=True)["step"] < state["step"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slicevit.training.rewired._rewired", lambda *args: pytest.fail("rewired again"))
        train_quickly(["--resume", str(stopped)])
    ends = [load_file(run / "model.safetensors") for run in (whole, stopped)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


ROTATED = ["--method", "rotated", "--epochs", "0.15", "--rewire-images", "8", "--warmup-epochs", "0.025", *GRID]


def test_the_method_rotated_trains_the_full_width_turns_it_and_begins_anew(
    tmp_path: Path, train_quickly: Callable[[list[str]], None]
) -> None:
    """12 steps: 8 of the full width, whose answers the rotation keeps, 4 of all widths; each with its own cosine."""
    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    steps: list[tuple[tuple[str, ...], float, dict[str, Tensor], dict[str, Tensor]]] = []
    train_step = Trainee.train_step

    def recorded(run: Trainee, *args: Any) -> None:
        def answers() -> dict[str, Tensor]:
            return {name: run.model(images, width=name).detach() for name in ("1/2", "1")}

        before, widths = answers(), tuple(map(str, run.widths_of(run.step)))
        train_step(run, *args)
        steps.append((widths, run.optimizer.param_groups[-1]["lr"], before, answers()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainee, "train_step", recorded)
        train_quickly([*SEEN, *TINY, *COMMON, *ROTATED, "--drop-path", "0", "--out", str(tmp_path / "run")])
    widths, rates, before, after = zip(*steps, strict=True)
    assert widths == (("1",),) * 8 + (("1", "3/4", "1/2", "1/4"),) * 4
    assert rates[8] == rates[0] < rates[2] > rates[7] < rates[10] > rates[11]
    torch.testing.assert_close(before[8]["1"], after[7]["1"], rtol=0, atol=1e-5)
    assert not torch.allclose(before[8]["1/2"], after[7]["1/2"], atol=1e-4)
    assert read_train_config(tmp_path / "run").rewire == "rotate"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("flags", [[], ["--ema-decay", "0.9"]])
def test_a_run_of_the_method_rotated_resumes_as_it_was(
    tmp_path: Path, train_quickly: Callable[[list[str]], None], flags: list[str]
) -> None:
    """Killed before the rotation, at its step, and after it."""
    rest = [*SEEN, *TINY, *COMMON, *ROTATED, *flags, "--checkpoint-steps", "1"]
    train_quickly([*rest, "--out", str(tmp_path / "whole")])
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    train_step = Trainee.train_step
    for end in (5, 8, 9):
        stopped = tmp_path / f"stopped-{end}"

        def until(run: Trainee, *args: Any, end: int = end) -> None:
            if run.step == end:
                raise _Killed
            train_step(run, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainee, "train_step", until)
            with pytest.raises(_Killed):
                train_quickly([*rest, "--out", str(stopped)])
        assert torch.load(stopped / "checkpoint.pt", weights_only=True)["step"] == end
        train_quickly(["--resume", str(stopped)])
        resumed = load_file(stopped / "model.safetensors")
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


SWIN = ["--model", "swin_tiny_patch4_window7_224", "--model-args", "img_size=28", "in_chans=1", "window_size=7",
        "embed_dim=16", "depths=[1,1]", "num_heads=[1,2]"]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "reason"),
    [(SWIN, "it covers plain ViTs"), ([*TINY, "qkv_bias=False"], "a layer behind a norm has no bias")],
    ids=["Swin", "no bias"],
)
def test_what_cannot_be_turned_fails_before_its_full_width_is_trained(
    model: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *SEEN, *model, *COMMON, *ROTATED, "--grid", "1/2:1:1/2", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"--method rotated: rewiring by rotation does not go with this model: {reason}" in said
    assert "give --method scala" in said
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverged_is_not_rotated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = ["--lr", "1e30", "--warmup-epochs", "0", "--epochs", "0.0375", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *SEEN, *TINY, *COMMON, *ROTATED, *wild])
    assert stop.value.code == 2
    assert "is not finite" in (said := capsys.readouterr().err)
    assert "lower --lr" in said


def test_the_average_is_what_is_rotated(tmp_path: Path, train_quickly: Callable[[list[str]], None]) -> None:
    """With a decay that keeps the first weights, all narrow widths would begin from other ones than were evaluated."""
    seen: list[tuple[Tensor, Tensor]] = []
    began = Trainee.begin_stage
    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))

    def recorded(run: Trainee) -> None:
        if run.rewired:
            run.model.eval()
            seen.append((run.model(images).detach(), run.ema.module.eval()(images).detach()))
            run.model.train()
        began(run)

    average: list[Tensor] = []

    def saved(keeper: Keeper) -> None:
        average.append(keeper.run.evaluated.eval()(images).detach())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainee, "begin_stage", recorded)
        patch.setattr(Keeper, "save", saved)
        train_quickly([*SEEN, *TINY, *COMMON, *ROTATED, "--ema-decay", "0.9", "--out", str(tmp_path / "run")])
    [(turned, copied)] = seen
    torch.testing.assert_close(turned, average[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(copied, average[0], rtol=0, atol=1e-5)


class _Killed(Exception):
    pass


def _killed(*args: object) -> None:
    raise _Killed


@pytest.mark.parametrize("classes", ["0:2", "5:8"])
def test_a_file_of_weights(
    base: Path, tmp_path: Path, train_quickly: Callable[[list[str]], None], classes: str
) -> None:
    """The head comes along where the classes are as many; else it is new, and the features are kept."""
    file = tmp_path / "weights.safetensors"
    shutil.copy(base / "model.safetensors", file)
    data = ["--data", f"fashion-mnist?classes={classes}"]
    train_quickly(
        [*data, *TINY, *COMMON, *GRID, *STILL, "--init", str(file), "--rewire", "--out", str(tmp_path / "run")]
    )
    if classes == "0:2":
        torch.testing.assert_close(logits(tmp_path / "run"), logits(base), rtol=0, atol=1e-5)
    else:
        assert logits(tmp_path / "run").shape == (3, 3)
    before, after = load_file(file)["pos_embed"], load_file(tmp_path / "run" / "model.safetensors")["pos_embed"]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after.sort(-1).values, before.sort(-1).values, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--rewire"], "--rewire permute needs trained weights: give --init pretrained"),
        (["--rewire", "sideways", "--init", "pretrained"], "--rewire"),
        (["--rewire", "--init", "pretrained", "--layout", "flat"], "--layout per_head"),
        (["--method", "rotated", "--layout", "flat"], "--method rotated goes with --layout per_head"),
        (["--method", "rotated", "--full-width-first", "0"], "--method rotated needs trained weights"),
        (["--method", "rotated", "--full-width-first", "1"], "--full-width-first must lie in [0, 1)"),
        (["--method", "rotated", "--epochs", "0.0125"], "1 of 1 steps, and both the full width and all widths need"),
        (["--method", "rotated", "--full-width-first", "0.01", "--epochs", "0.1"], "is 0 of 8 steps"),
        (
            ["--method", "rotated", "--teacher-objective", "features", "--teacher", "vit_tiny_patch16_224"],
            "--method rotated does not go with --teacher-objective features, which trains no head: give --method scala",
        ),
        (["--rewire", "--init", "pretrained", "--method", "separate"], "--method separate trains each width alone"),
        (["--rewire-images", "0"], "--rewire-images must be above 0"),
    ],
)
def test_what_does_not_go_is_refused(flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *SEEN, *TINY, *COMMON, *GRID, *flags])
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_model_or_file_that_does_not_go_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rotate = ["--rewire", "rotate", "--rewire-images", "2", "--init", str(base), "--isolation", "mirror"]
    text = tmp_path / "weights.pth"
    text.write_text(json.dumps({}))
    other = tmp_path / "other.safetensors"
    shutil.copy(base / "model.safetensors", other)
    cases = [
        ([*TINY, *rotate], "--rewire rotate: rewiring by rotation does not go with this model: isolation='mirror'"),
        ([*TINY, "--rewire", "--init", str(text)], "weights.pth is no file of weights"),
        ([*TINY, "patch_size=7", "--rewire", "--init", str(other)], "holds the weights of another model than --model"),
    ]
    for flags, reason in cases:
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", *SEEN, *COMMON, *GRID, *flags, "--out", str(tmp_path / "run")])
        assert stop.value.code == 2
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "run" / "model.safetensors").exists()
