"""What the operator of a server decides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import get_args

from slicevit.serving.choice import PolicyName

MAX_DEADLINE_MS = 60_000.0


@dataclass(frozen=True)
class Settings:
    """The limits and the policy of a server.

    Attributes:
        slo_ms: within how many milliseconds a request is to be answered that brings no deadline of its own.
        min_top1: the policy takes no width of lower top-1 accuracy, in per cent; None: any width.
        policy: `slicevit.runtime.policy`'s deadline_slack, fixed or budget.
        width: the width of the policy "fixed".
        budget_ms: milliseconds of a call, of the policy "budget".
        headroom: the share of its time that "deadline-slack" keeps free for a burst, from 0 to below 1.
        max_queue: the most requests that are held at once, from the first byte to the answer.
        max_bytes: of an image file.
        max_pixels: of an image.
        decoders: threads that decode images.
        body_seconds: within which the body of a request must have come.
        quantile: of recent calls, how many the estimate of service time is to cover (see `margin.Margin`).

    Raises:
        ValueError: a value out of range, or a policy without what it needs; the message names the flag.
    """

    slo_ms: float
    min_top1: float | None = None
    policy: PolicyName = "deadline-slack"
    width: Fraction | None = None
    budget_ms: float | None = None
    headroom: float = 0.5
    max_queue: int = 256
    max_bytes: int = 10 * 2**20
    max_pixels: int = 50_000_000
    decoders: int = 2
    body_seconds: float = 30.0
    quantile: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.slo_ms <= MAX_DEADLINE_MS:
            raise ValueError(f"--slo-ms {self.slo_ms:g}: give milliseconds above 0 and up to {MAX_DEADLINE_MS:g}")
        if self.policy not in get_args(PolicyName):
            raise ValueError(f"--policy {self.policy} is none of {', '.join(get_args(PolicyName))}")
        for flag, value, policy in (("--width", self.width, "fixed"), ("--budget-ms", self.budget_ms, "budget")):
            if (value is None) == (self.policy == policy):
                raise ValueError(f"--policy {policy} and {flag} go together: give both or neither")
        if self.budget_ms is not None and not (math.isfinite(self.budget_ms) and self.budget_ms > 0):
            raise ValueError(f"--budget-ms {self.budget_ms}: give milliseconds above 0")
        for flag in ("max_queue", "max_bytes", "max_pixels", "decoders"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(self, flag)}: give at least 1")
        if not (math.isfinite(self.body_seconds) and self.body_seconds > 0):
            raise ValueError(f"--body-seconds {self.body_seconds}: give seconds above 0")
        if not 0 <= self.headroom < 1:
            raise ValueError(f"--headroom {self.headroom}: give a share from 0 to below 1, such as 0.5")
        if not 0 < self.quantile < 1:
            raise ValueError(f"--quantile {self.quantile}: give a share between 0 and 1, such as 0.95")
