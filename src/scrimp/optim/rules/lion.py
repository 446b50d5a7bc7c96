"""Lion: the sign of a blend of gradient and momentum.

    direction  sign(beta1 M + (1 - beta1) G)        size lr        decay before the update
    M = beta2 M + (1 - beta2) G

Every element moves by lr exactly, or not at all where the blend is 0; there is no eps and no bias
correction. The blend uses the old M and another rate than the new one: at (0.9, 0.99) the sign hears the
present more than the memory does. Learning rates are 3 to 10 times smaller than AdamW's, weight decay as
much larger. `lion-pytorch` divides the decay by the first learning rate on request; we do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from scrimp.optim.pieces import Options, Scalars, Slot, Step, Target


@dataclass(frozen=True, slots=True)
class Lion:
    """Lion with decoupled weight decay; 4 bytes an element in fp32, half of Adam's.

    References:
        Symbolic Discovery of Optimization Algorithms, Chen et al., NeurIPS 2023, arXiv 2302.06675.
    """

    @property
    def elementwise(self) -> bool:
        """Each element stands alone."""
        return True

    @property
    def decay_first(self) -> bool:
        """The old weights decay."""
        return True

    def slots(self, shape: tuple[int, ...], target: Target) -> tuple[Slot, ...]:
        """Return the momentum, shaped like the gradient."""
        return (Slot(name="exp_avg", shape=shape, axis=len(shape) - 1),)

    def scalars(self, options: Options, age: int) -> dict[str, float]:
        """Return the decay rates and the step size."""
        beta1, beta2 = options["betas"]
        return {"beta1": beta1, "beta2": beta2, "size": options["lr"]}

    def step(self, r: Tensor, slots: Mapping[str, Tensor], s: Scalars, weight: Tensor) -> Step:
        """Return the sign and the new momentum."""
        m = slots["exp_avg"]
        blend = s["beta1"] * m + (1 - s["beta1"]) * r
        return Step(blend.sign(), s["size"], s["lr"], {"exp_avg": s["beta2"] * m + (1 - s["beta2"]) * r})
