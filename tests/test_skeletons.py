"""A skeleton is made without filling its parameters, whatever the memory that they lie in holds."""

from __future__ import annotations

import torch
from torch import nn

from slicevit.skeletons import build_on_meta, materialise


class Drawn(nn.Module):
    """Draws as timm's models do, in memory that holds numbers outside of every bound."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 4), 1e9))
        self.other = nn.Parameter(torch.full((4, 4), 1e9))
        self.register_buffer("table", torch.zeros(3))
        self.register_buffer("ones", torch.zeros(3))
        nn.init.trunc_normal_(self.weight, std=0.02)  # redraws what lies outside of its bounds
        nn.init.trunc_normal_(self.other.data, std=0.02)
        self.table.copy_(torch.arange(3.0))
        nn.init.ones_(self.ones)


def test_nothing_is_drawn_and_no_draw_is_waited_for() -> None:
    state = torch.get_rng_state()
    module = build_on_meta(Drawn)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.weight.device.type == module.other.device.type == "meta"


def test_buffers_are_what_the_constructor_made_them() -> None:
    module = build_on_meta(Drawn)
    assert module.table.tolist() == [0, 1, 2]
    assert module.ones.tolist() == [1, 1, 1]


def test_a_materialised_skeleton_has_parameters_of_zero() -> None:
    module = materialise(build_on_meta(Drawn))
    assert not module.weight.any()
    assert module.weight.requires_grad
