"""Plans are pure: shapes and rules in, index sets out. Expectations are index lists written here."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slicevit.slicing import Blocks, Rule, make_plan


def axis_index(full: int, narrow: int, blocks: tuple[int, ...], trailing: bool) -> torch.Tensor:
    """Positions on an axis that `blocks` equal blocks make up, each giving its leading or trailing part."""
    count = math.prod(blocks)
    big, small = full // count, narrow // count
    start = big - small if trailing else 0
    return torch.cat([torch.arange(k * big + start, k * big + start + small) for k in range(count)])


def take(full: torch.Tensor, index: list[torch.Tensor]) -> torch.Tensor:
    return full[torch.meshgrid(*index, indexing="ij")]


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """A width, an end and a parameter of one to four axes, plain, structured or not scaled."""
    denominator = draw(st.integers(2, 6))
    width = Fraction(draw(st.integers(1, denominator - 1)), denominator)
    axes: list[tuple[int, int, tuple[int, ...]]] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["still", "plain", "blocks"]))
        blocks = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))) if kind == "blocks" else ()
        unit = width.denominator * draw(st.integers(1, 2))
        full = math.prod(blocks) * unit
        axes.append((full, full if kind == "still" else int(full * width), blocks))
    return {"width": width, "end": draw(st.sampled_from(["leading", "trailing"])), "axes": axes}


def planned(drawn: dict[str, Any]) -> tuple[Any, tuple[int, ...], list[torch.Tensor]]:
    full_shape = tuple(full for full, _, _ in drawn["axes"])
    narrow_shape = tuple(narrow for _, narrow, _ in drawn["axes"])
    rule = Rule({axis: Blocks(blocks, blocks) for axis, (_, _, blocks) in enumerate(drawn["axes"]) if blocks})
    plan = make_plan({"p": full_shape}, {"p": narrow_shape}, {"p": rule}, drawn["width"], drawn["end"])
    index = [axis_index(*axis, trailing=drawn["end"] == "trailing") for axis in drawn["axes"]]
    return plan["p"], full_shape, index


@given(drawn=parameters())
def test_a_plan_takes_exactly_the_elements_of_the_index_map(drawn: dict[str, Any]) -> None:
    cut, shape, index = planned(drawn)
    full = torch.arange(math.prod(shape)).view(shape)
    assert torch.equal(cut(full), take(full, index))


@given(drawn=parameters())
def test_gradients_go_back_to_those_elements_and_no_other(drawn: dict[str, Any]) -> None:
    cut, shape, index = planned(drawn)
    full = torch.zeros(shape, requires_grad=True)
    narrow = cut(full)
    weights = 1.0 + torch.arange(narrow.numel()).view(narrow.shape)
    (narrow * weights).sum().backward()
    expected = torch.zeros(shape)
    expected[torch.meshgrid(*index, indexing="ij")] = weights
    assert torch.equal(full.grad, expected)


@given(drawn=parameters())
def test_plain_axes_are_views(drawn: dict[str, Any]) -> None:
    cut, shape, _ = planned(drawn | {"axes": [(full, narrow, ()) for full, narrow, _ in drawn["axes"]]})
    full = torch.zeros(shape)
    narrow = cut(full)
    assert narrow.untyped_storage().data_ptr() == full.untyped_storage().data_ptr()
    full += 1  # what is written into the full network is there in the narrow one
    assert bool((narrow == 1).all())


@given(drawn=parameters())
def test_leading_and_trailing_of_two_halves_are_the_whole(drawn: dict[str, Any]) -> None:
    axes = [(2 * math.prod(blocks or (1,)), math.prod(blocks or (1,)), blocks) for _, _, blocks in drawn["axes"][:1]]
    parts = []
    for end in ("leading", "trailing"):
        cut, shape, _ = planned({"width": Fraction(1, 2), "end": end, "axes": axes})
        parts.append(cut(torch.arange(math.prod(shape)).view(shape)))
    assert sorted(torch.cat(parts).tolist()) == list(range(math.prod(shape)))


def test_q_k_and_v_come_from_the_full_q_k_and_v_head_by_head() -> None:
    """Two heads of width 4, half of them: written out."""
    rule = {"qkv": Rule({0: Blocks((3, 2), (3, 2))})}
    rows = torch.arange(24)
    leading = make_plan({"qkv": (24,)}, {"qkv": (12,)}, rule, Fraction(1, 2), "leading")["qkv"](rows)
    assert leading.tolist() == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21]
    trailing = make_plan({"qkv": (24,)}, {"qkv": (12,)}, rule, Fraction(1, 2), "trailing")["qkv"](rows)
    assert trailing.tolist() == [2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23]


def test_whole_heads_are_dropped_where_the_block_count_shrinks() -> None:
    rule = {"qkv": Rule({0: Blocks((3, 4), (3, 2))})}
    rows = torch.arange(24)
    plan = make_plan({"qkv": (24,)}, {"qkv": (12,)}, rule, Fraction(1, 2), "leading")
    assert plan["qkv"](rows).tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]


def test_a_gain_multiplies_the_query_rows_alone() -> None:
    rule = {"qkv": Rule({0: Blocks((3,), (3,))}, gain=0.5, gain_share=Fraction(1, 3))}
    plan = make_plan({"qkv": (12, 2)}, {"qkv": (6, 2)}, rule, Fraction(1, 2), "leading")
    full = 1.0 + torch.arange(24.0).view(12, 2)
    expected = torch.cat([full[0:2] / 2, full[4:6], full[8:10]])
    assert torch.equal(plan["qkv"](full), expected)


def test_the_full_width_is_the_parameter_itself() -> None:
    plan = make_plan({"p": (4, 6)}, {"p": (4, 6)}, {}, Fraction(1), "leading")
    full = torch.randn(4, 6)
    assert plan["p"](full).data_ptr() == full.data_ptr()
    assert torch.equal(plan["p"](full), full)


@pytest.mark.parametrize(
    ("full", "narrow", "rules", "named"),
    [
        ({"a": (4,), "b": (4,)}, {"a": (2,)}, {}, "b"),
        ({"a": (4,)}, {"a": (2,), "b": (2,)}, {}, "b"),
        ({"a": (4, 4)}, {"a": (2,)}, {}, "a"),
        ({"a": (4,)}, {"a": (3,)}, {}, "a"),
        ({"a": (4,)}, {"a": (8,)}, {}, "a"),
        ({"a": (6,)}, {"a": (3,)}, {"a": Rule({0: Blocks((2,), (2,))})}, "a"),
        ({"a": (4,)}, {"a": (2,)}, {"a": Rule({0: Blocks((3,), (3,))})}, "a"),
    ],
    ids=["missing", "extra", "rank", "other_fraction", "grows", "narrow_block_not_whole", "full_block_not_whole"],
)
def test_what_does_not_fit_is_refused_with_the_parameters_name(full: Any, narrow: Any, rules: Any, named: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        make_plan(full, narrow, rules, Fraction(1, 2), "leading")


def test_a_tensor_of_another_shape_is_refused() -> None:
    cut = make_plan({"a": (4, 2)}, {"a": (2, 1)}, {}, Fraction(1, 2), "leading")["a"]
    with pytest.raises(ValueError, match="shape"):
        cut(torch.zeros(2, 4))
