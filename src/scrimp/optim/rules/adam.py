"""Adam, in both conventions that the field uses.

They are not interchangeable (gradients of 1e-7 move W fifty times less under H-Adam's eps):

    torch   direction (m / c1) / (sqrt(v / c2) + eps)    size lr                 decay before the update
    hf      direction m / (sqrt(v) + eps)                size lr sqrt(c2) / c1   decay after it, on the new W

with c1 = 1 - beta1^t, c2 = 1 - beta2^t. "hf" is the old Hugging Face AdamW that GaLore, Fira, APOLLO, SPAM
and GradNormLoRP carry; its eps is 1e-6 there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from scrimp.optim.annealing import annealed
from scrimp.optim.pieces import Options, Scalars, Slot, Step, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """Adam with decoupled weight decay.

    Attributes:
        convention: "torch" or "hf", as above.
        anneal_steps: Updates of the run, resets or not, over which beta1 falls to its half; None keeps it.

    References:
        Decoupled Weight Decay Regularization, Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101.
    """

    convention: Literal["torch", "hf"] = "torch"
    anneal_steps: int | None = None

    @property
    def elementwise(self) -> bool:
        """Each element stands alone."""
        return True

    @property
    def decay_first(self) -> bool:
        """Torch decays the old weights, the Hugging Face form the new ones."""
        return self.convention == "torch"

    def slots(self, shape: tuple[int, ...], target: Target) -> tuple[Slot, ...]:
        """Return both moments, shaped like the gradient."""
        axis = len(shape) - 1
        return (
            Slot(name="exp_avg", shape=shape, axis=axis),
            Slot(name="exp_avg_sq", shape=shape, axis=axis, signed=False),
        )

    def scalars(self, options: Options, age: int) -> dict[str, float]:
        """Return the decay rates, eps and the step size."""
        beta1, beta2 = options["betas"]
        if self.anneal_steps is not None:
            beta1 = annealed(beta1, options["step"], self.anneal_steps)
        first, second = 1 - beta1**age, math.sqrt(1 - beta2**age)
        size = options["lr"] * (1.0 if self.convention == "torch" else second / first)
        return {
            "beta1": beta1,
            "beta2": beta2,
            "eps": options["eps"],
            "inv_c1": 1 / first,
            "inv_root_c2": 1 / second,
            "size": size,
        }

    def step(self, r: Tensor, slots: Mapping[str, Tensor], s: Scalars, weight: Tensor) -> Step:
        """Return Adam's direction and the new moments."""
        m = s["beta1"] * slots["exp_avg"] + (1 - s["beta1"]) * r
        v = s["beta2"] * slots["exp_avg_sq"] + (1 - s["beta2"]) * (r * r)
        direction = torch_direction(m, v, s) if self.convention == "torch" else m / (v.sqrt() + s["eps"])
        return Step(direction, s["size"], s["lr"], {"exp_avg": m, "exp_avg_sq": v})


def torch_direction(m: Tensor, v: Tensor, s: Scalars) -> Tensor:
    """Return the direction of torch's convention; `v` is broadcastable to `m`."""
    return (m * s["inv_c1"]) / (v.sqrt() * s["inv_root_c2"] + s["eps"])
