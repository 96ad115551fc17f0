"""Learning a foundation teacher's tokens: the projections, the objectives and the gradients of a step."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from foundation import STUDENT_ARGS, foundation_config, save_teacher
from torch._dynamo.utils import counters
from torch.nn import functional as F

import slicevit
from slicevit.checkpoint import from_pretrained
from slicevit.data import TransformConfig
from slicevit.training.distiller import Distiller, paint_over, student_tokens
from slicevit.training.feature_step import accumulate_feature_gradients
from slicevit.training.objectives import Objective
from slicevit.training.projections import Projection
from slicevit.training.ranks import Ranks
from slicevit.training.teacher import TokenTeacher

CPU = torch.device("cpu")
WIDTHS = tuple(Fraction(k, 4) for k in (4, 3, 2, 1))
PREPARED = TransformConfig((16, 16), 3, mean=(0.5,) * 3, std=(0.5,) * 3)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "run")


def make(
    teacher: Path, model: str = "vit_tiny_patch16_224", **settings: Any
) -> tuple[slicevit.ElasticModel, Distiller]:
    """A student without classes, and what it learns with; `settings` of the configuration."""
    config = foundation_config(Path("unread"), teacher, **settings)
    torch.manual_seed(0)
    student = slicevit.create_model(model, config.grid, num_classes=0, **config.model_args).train()
    return student, Distiller(config, student, PREPARED, CPU)


# --- projections -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "cut"), [("leading", slice(0, 4)), ("trailing", slice(12, 16))])
def test_a_projection_is_cut_with_the_width(end: Any, cut: slice) -> None:
    torch.manual_seed(0)
    full = Projection(16, 5)
    with torch.no_grad():
        full.norm.weight.uniform_()
        full.norm.bias.uniform_()
    narrow = Projection(4, 5)
    narrow.load_state_dict(
        {
            "norm.weight": full.norm.weight[cut],
            "norm.bias": full.norm.bias[cut],
            "map.weight": full.map.weight[:, cut],
            "map.bias": full.map.bias,
        }
    )
    tokens = torch.randn(3, 7, 4)
    torch.testing.assert_close(full(tokens, end), narrow.map(narrow.norm(tokens)))
    full(tokens, end).sum().backward()
    assert full.map.weight.grad is not None
    assert full.map.weight.grad[:, cut].any()
    full.map.weight.grad[:, cut] = 0
    assert not full.map.weight.grad.any()  # the other widths' columns are not touched


# --- the teacher -----------------------------------------------------------------------------------------


def test_the_teacher_sees_its_own_size_mean_and_std(teacher: Path) -> None:
    tokens = TokenTeacher(str(teacher), PREPARED, CPU)
    images = torch.rand(2, 3, 16, 16)
    class_BD, patches_BND = tokens((images - 0.5) / 0.5, (2, 2))
    net = from_pretrained(teacher)
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    assert mean.flatten().tolist() != [0.5] * 3
    resized = F.interpolate((images - mean) / std, size=(28, 28), mode="bicubic", antialias=True)
    with torch.no_grad():
        features = net.forward_features(resized)
    assert features.shape == (2, 1 + 4 + 4, 24)  # class, registers, patches
    torch.testing.assert_close(class_BD, features[:, 0])
    torch.testing.assert_close(patches_BND, features[:, 5:])


def test_patch_tokens_are_interpolated_to_the_students_grid(teacher: Path) -> None:
    tokens = TokenTeacher(str(teacher), PREPARED, CPU, img_size=42)
    assert tokens.grid == (3, 3)
    images = torch.rand(2, 3, 16, 16)
    own, finer = tokens(images, (3, 3))[1], tokens(images, (6, 6))[1]
    expected = F.interpolate(own.transpose(1, 2).view(2, 24, 3, 3), size=(6, 6), mode="bilinear", antialias=True)
    torch.testing.assert_close(finer, expected.flatten(2).transpose(1, 2))
    assert tokens(images, (2, 2))[1].shape == (2, 4, 24)


# --- masks -----------------------------------------------------------------------------------------------


def test_masks_are_those_of_one_rank_on_any_number(teacher: Path) -> None:
    _, distiller = make(teacher, mask_share=0.25)
    alone = distiller.draw_masks(3, 8, Ranks(0, 1, CPU))
    assert alone.shape == (8, 4)  # a quarter of 16 patches
    assert all(len(set(row)) == 4 for row in alone.tolist())
    assert not torch.equal(alone, distiller.draw_masks(4, 8, Ranks(0, 1, CPU)))
    for rank in (0, 1):
        assert torch.equal(distiller.draw_masks(3, 4, Ranks(rank, 2, CPU)), alone[rank::2])


def test_masked_patches_are_painted_over() -> None:
    images = torch.ones(1, 3, 8, 8)
    painted = paint_over(images, torch.tensor([[1, 6]]), (2, 4))  # patches of 4 x 2 pixels
    expected = torch.ones(8, 8)
    expected[:4, 2:4] = 0
    expected[4:, 4:6] = 0
    assert torch.equal(painted[0], expected.expand(3, 8, 8))


# --- the step --------------------------------------------------------------------------------------------


def by_hand(
    student: slicevit.ElasticModel, distiller: Distiller, images: torch.Tensor, masked: torch.Tensor, how: Objective
) -> dict[Fraction, torch.Tensor]:
    """The losses of a step's widths by their definitions, backward through autograd's views."""
    class_BD, patches_BND = distiller.teacher(images, (4, 4))
    painted = paint_over(images, masked, (4, 4))
    rows = torch.arange(len(images))[:, None]
    losses, larger = {}, None
    for width in WIDTHS:
        end: Any = "trailing" if width == WIDTHS[-1] else "leading"
        features, hidden = (student.forward_features(seen, width=width) for seen in (images, painted))
        project = distiller.projections
        class_token = project["class"](features[:, 0], end)
        every = torch.cat([class_token[:, None], project["feature"](features[:, 1:], end)], 1)
        patch = project["patch"](hidden[:, 1:][rows, masked], end)
        said = (class_token, every, patch)
        taught = (class_BD, torch.cat([class_BD[:, None], patches_BND], 1), patches_BND[rows, masked])

        def error(goal: tuple[torch.Tensor, ...], said: tuple[torch.Tensor, ...] = said) -> torch.Tensor:
            return sum(((a - b.detach()) ** 2).mean() for a, b in zip(said, goal, strict=True))  # type: ignore[return-value]

        if larger is None or how.transfer == "off":
            loss = error(taught)
        else:
            loss = 0.5 * error(larger) + (error(taught) if how.calibration else 0.0)
        loss.backward()
        losses[width] = loss.detach()
        if larger is None or how.transfer == "next":
            larger = said
        elif how.transfer == "larger":
            n = len(losses)
            larger = tuple((n - 1) / n * mean + a.detach() / n for mean, a in zip(larger, said, strict=True))
    return losses


@pytest.mark.parametrize("how", [Objective(), Objective("full", False), Objective("larger"), Objective("off")], ids=str)
def test_a_step_is_that_of_the_definitions(how: Objective, teacher: Path) -> None:
    student, distiller = make(teacher)
    images, masked = torch.randn(4, 3, 16, 16), distiller.draw_masks(0, 4, Ranks(0, 1, CPU))
    trained = [*student.named_parameters(), *distiller.projections.named_parameters()]
    expected = by_hand(student, distiller, images, masked, how)
    gradients = {name: parameter.grad for name, parameter in trained}
    for _, parameter in trained:
        parameter.grad = None
    losses = accumulate_feature_gradients(student, distiller, images, masked, WIDTHS, how, transfer_weight=0.5)
    assert losses.keys() == expected.keys()
    for width, loss in losses.items():
        torch.testing.assert_close(loss, expected[width])
    for name, parameter in trained:
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)


@pytest.mark.parametrize("names", [("class",), ("feature",), ("patch",), ("class", "patch")], ids=" ".join)
def test_objectives_alone(names: tuple[Any, ...], teacher: Path) -> None:
    student, distiller = make(teacher, teacher_features=names)
    needed = {*names, *(("class",) if "feature" in names else ())}
    assert set(distiller.projections) == needed
    images, masked = torch.randn(2, 3, 16, 16), distiller.draw_masks(0, 2, Ranks(0, 1, CPU))
    accumulate_feature_gradients(student, distiller, images, masked, WIDTHS, Objective())
    assert all(parameter.grad is not None for parameter in distiller.projections.parameters())
    fits = distiller.evaluate(student, WIDTHS, [(images, torch.zeros(2))], Ranks(0, 1, CPU))  # type: ignore[list-item]
    assert set(fits) == {"1/4", "1/2", "3/4", "1"}
    assert all(fit.images == 2 and fit.loss > 0 and -1 <= fit.cosine <= 1 for fit in fits.values())


def test_parts_of_a_batch_add_up(teacher: Path) -> None:
    student, distiller = make(teacher)
    images, masked = torch.randn(6, 3, 16, 16), distiller.draw_masks(0, 6, Ranks(0, 1, CPU))
    trained = [*student.parameters(), *distiller.projections.parameters()]
    how = Objective("off")
    accumulate_feature_gradients(student, distiller, images, masked, WIDTHS, how)
    whole = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    for part in (slice(0, 4), slice(4, 6)):
        share = len(images[part]) / 6
        accumulate_feature_gradients(student, distiller, images[part], masked[part], WIDTHS, how, share=share)
    for gradient, parameter in zip(whole, trained, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


# dynamo looks at .grad of activations and hides the warning itself, which warnings as errors forestall
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_give_the_same_gradients(teacher: Path) -> None:
    """Both passes, over images as they are and masked ones, run one program a width."""
    torch._dynamo.reset()
    counters.clear()
    gradients = []
    for compiled in (False, True):
        student, distiller = make(teacher)
        if compiled:
            student.compile_blocks(backend="aot_eager")  # a break in the graph is an error
        torch.manual_seed(1)
        images, masked = torch.randn(2, 3, 16, 16), distiller.draw_masks(0, 2, Ranks(0, 1, CPU))
        accumulate_feature_gradients(student, distiller, images, masked, WIDTHS, Objective())
        gradients.append([parameter.grad for parameter in student.parameters()])
    assert counters["stats"]["unique_graphs"] == len(WIDTHS)
    torch._dynamo.reset()
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, other)


STUDENTS: dict[str, tuple[dict[str, Any], int]] = {
    "deit_tiny_distilled_patch16_224": (STUDENT_ARGS, 16),  # two prefix tokens
    "vit_tiny_patch16_224": (STUDENT_ARGS | {"global_pool": "avg", "class_token": False}, 16),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4},
        16,
    ),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_other_students(name: str, teacher: Path) -> None:
    args, patches = STUDENTS[name]
    student, distiller = make(teacher, name, model_args=args, grid="1/2:1:1/2")
    assert math.prod(distiller.grid) == patches
    size = args["img_size"]
    images, masked = torch.randn(2, 3, size, size), distiller.draw_masks(0, 2, Ranks(0, 1, CPU))
    pooled, tokens = student_tokens(student.to_timm("1/2"), images)
    assert pooled.shape[1] == tokens.shape[2] == distiller.projections["patch"].map.in_features // 2
    losses = accumulate_feature_gradients(student, distiller, images, masked, student.widths[::-1], Objective())
    assert all(loss.isfinite() for loss in losses.values())
