"""Stochastic gradient descent with momentum, as torch has it but for the weight decay.

    B = momentum B + (1 - dampening) G        at first B = G, undamped
    direction  B, or G + momentum B (Nesterov)        size lr        decay before the update

Weight decay is decoupled here, as for every other rule: W shrinks by lr * decay. `torch.optim.SGD` adds
decay * W to the gradient, which is the same without momentum, and otherwise lets the momentum remember it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.optim.pieces import Options, Scalars, Slot, Step, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class SGD:
    """SGD, with heavy-ball or Nesterov momentum; 4 bytes an element in fp32, none without momentum.

    Attributes:
        momentum: Decay rate of the sum of past gradients; 0 keeps none.
        dampening: What the momentum takes off each gradient but the first.
        nesterov: Look one step ahead.

    Raises:
        ScrimpError: Nesterov's form without momentum or with dampening, which it does not define.

    References:
        On the importance of initialization and momentum in deep learning, Sutskever et al., ICML 2013.
    """

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ScrimpError(
                f"SGD(nesterov=True) with momentum {self.momentum} and dampening {self.dampening}: "
                "Nesterov's form needs momentum above 0 and dampening 0"
            )

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
        if self.momentum == 0:
            return ()
        return (Slot(name="momentum_buffer", shape=shape, axis=len(shape) - 1),)

    def scalars(self, options: Options, age: int) -> dict[str, float]:
        """Return the step size, and how much of the gradient enters the momentum."""
        return {"size": options["lr"], "momentum": self.momentum, "intake": 1 - self.dampening * (age > 1)}

    def step(self, r: Tensor, slots: Mapping[str, Tensor], s: Scalars, weight: Tensor) -> Step:
        """Return the momentum, or what Nesterov makes of it."""
        if self.momentum == 0:
            return Step(r, s["size"], s["lr"], {})
        buffer = s["momentum"] * slots["momentum_buffer"] + s["intake"] * r
        direction = r + s["momentum"] * buffer if self.nesterov else buffer
        return Step(direction, s["size"], s["lr"], {"momentum_buffer": buffer})
