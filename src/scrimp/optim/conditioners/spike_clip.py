"""SPAM's clipping of spikes: an element far above its own second moment is cut to it.

    G = sign(G) sqrt(theta v)    where G^2 > theta v

v is the rule's second moment before this update, without bias correction. Nothing is clipped in the first
`window` updates, nor in as many after each reset of the moments, when v says nothing yet.

The released code clips elements with v = 0 too: to 0, so that their v stays 0, and a row of an embedding
that is first seen after update 20 is frozen until the next reset. The default leaves them alone.

SPAM is H-Adam, this conditioner and a `Reset`; its bias correction does not restart there, so updates are
two to three times too long after a reset, which the warm-up hides: neither is to be mended alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.optim.pieces import Options, Scalars, Slot, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class SpikeClip:
    """Spike-aware clipping, for rules that keep a second moment for each element; without state.

    Attributes:
        theta: The squared factor by which an element may exceed the root of its second moment.
        every: Updates between resets of the moments, as in `Reset`; 0 for none.
        window: Updates without clipping, at the start and after a reset.
        variant: "paper" spares elements whose second moment is 0, "released" does not.

    References:
        SPAM: Spike-Aware Adam with Momentum Reset, Huang et al., ICLR 2025, arXiv 2501.06842.
    """

    theta: float = 5000.0
    every: int = 500
    window: int = 20
    variant: Literal["paper", "released"] = "paper"

    @property
    def elementwise(self) -> bool:
        """Each element stands alone."""
        return True

    def slots(self, shape: tuple[int, ...], target: Target) -> tuple[Slot, ...]:
        """Return none."""
        return ()

    def scalars(self, options: Options, step: int) -> dict[str, float]:
        """Return the threshold: infinite within a window."""
        since = step % self.every if self.every else step
        clips = step >= self.window and since >= self.window
        return {"spike_theta": self.theta if clips else math.inf}

    def condition(
        self, r: Tensor, rule: Mapping[str, Tensor], slots: Mapping[str, Tensor], s: Scalars
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradient without its spikes.

        Raises:
            ScrimpError: The rule keeps no second moment for each element.
        """
        v = rule.get("exp_avg_sq")
        if v is None or v.shape != r.shape:
            raise ScrimpError("SpikeClip reads a second moment for each element: use it with the rule Adam")
        limit = s["spike_theta"] * v  # NaN for v = 0 within a window, which nothing exceeds
        spikes = r * r > limit
        if self.variant == "paper":
            spikes = spikes & (v > 0)
        return torch.where(spikes, r.sign() * limit.sqrt(), r), {}
