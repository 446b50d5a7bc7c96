"""Adam-mini: one second moment for a block of the Hessian instead of one for an element.

    v_b = beta2 v_b + (1 - beta2) mean over block b of G^2        all else is torch's Adam

Blocks are consecutive elements, by what the parameter is:

    query or key         one for each head
    other matrices       one for each row: an output neuron, a token, an expert's output neuron
    bias                 one for each element: Adam
    other vectors        one for the tensor (the gains of a norm)

The authors' package (1.1.1) goes by substrings of names, and gives every matrix that no list of its knows (a
fused `c_attn`, a vision tower) one number for the whole tensor, which its own warning calls unstable. We go
by role, so a matrix without a known head count has one number a row, the finer partition; on the names the
package knows the two agree. Rows are those of the tensor as it is stored: GPT-2's Conv1D, stored (in, out),
has one number for each input, as with the authors. A stack of experts (experts, out, in), on which the
package stops, is treated expert by expert. The package leaves norms and biases without weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.optim.pieces import Options, Scalars, Slot, Step, Target
from scrimp.optim.rules.adam import Adam, torch_direction


@dataclass(frozen=True, slots=True)
class AdamMini:
    """Adam-mini with decoupled weight decay; 4 (elements + blocks) bytes in fp32, half of Adam's.

    References:
        Adam-mini: Use Fewer Learning Rates To Gain More, Zhang et al., ICLR 2025, arXiv 2406.16793.
    """

    @property
    def elementwise(self) -> bool:
        """A block is treated as one."""
        return False

    @property
    def decay_first(self) -> bool:
        """The old weights decay."""
        return True

    def slots(self, shape: tuple[int, ...], target: Target) -> tuple[Slot, ...]:
        """Return the first moment, shaped like the gradient, and one number a block.

        Raises:
            ScrimpError: A matrix has more heads than can share its rows equally.
        """
        blocks = _blocks(shape, target)
        return (
            Slot(name="exp_avg", shape=shape, axis=len(shape) - 1),
            Slot(name="exp_avg_sq", shape=(blocks, 1), signed=False, exact=True),
        )

    def scalars(self, options: Options, age: int) -> dict[str, float]:
        """Return Adam's."""
        return Adam().scalars(options, age)

    def step(self, r: Tensor, slots: Mapping[str, Tensor], s: Scalars, weight: Tensor) -> Step:
        """Return Adam's direction, each block with its own learning rate, and the new moments."""
        old = slots["exp_avg_sq"]
        blocks = r.reshape(old.shape[0], -1)
        m = s["beta1"] * slots["exp_avg"] + (1 - s["beta1"]) * r
        v = s["beta2"] * old + (1 - s["beta2"]) * (blocks * blocks).mean(-1, keepdim=True)
        direction = torch_direction(m.reshape(blocks.shape), v, s).reshape(r.shape)
        return Step(direction, s["size"], s["lr"], {"exp_avg": m, "exp_avg_sq": v})


def _blocks(shape: tuple[int, ...], target: Target) -> int:
    """Return how many blocks a parameter has."""
    if len(shape) < 2:
        return math.prod(shape) if target.role == "bias" else 1
    rows = math.prod(shape[:-1]) if target.role == "experts" else shape[0]
    if target.heads == 1:
        return rows
    if rows % target.heads:
        raise ScrimpError(
            f"{target.name} has {rows} rows, which {target.heads} heads cannot share equally: "
            "give Adam-mini the number of heads that this projection has"
        )
    return target.heads
