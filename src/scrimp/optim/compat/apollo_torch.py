"""apollo-torch 1.0.3 under its own names: `APOLLOAdamW`, `QAPOLLOAdamW`, and GaLore's three.

    groups = [{"params": regular}, {"params": matrices, "rank": 1, "proj": "random", "scale_type": "tensor",
                                    "scale": 128, "update_proj_gap": 200, "proj_type": "std"}]
    optimizer = APOLLOAdamW(groups, lr=0.01)

`scale` stands under a root, as theirs does: 128 multiplies the update by 11.3. Random matrices are drawn
from torch's generator on the gradient's device, with seeds 1, 2, 3, ... for all parameters in the order of
the groups, projected or not, and a chain of seeds from one to the next. They are drawn again at every step
instead of being kept, the memory that the paper claims; `hold=True` keeps them outside the state.

Deliberately different, besides what `authors` lists:

- A zero first gradient does not disable the norm-growth limiter's matrix for good.
- Channels with a forced opposite side or `reverse_std` work, where theirs raise a shape error. `proj_type`
  "full", which theirs do not have either, is refused at construction.
- Parameters of a group that is added later have the next seeds; theirs fail.
- `QAPOLLOAdamW` runs anywhere, where theirs asks for a GPU and fails with today's bitsandbytes. It treats
  the int8 weights of `scrimp.weights`, not those of theirs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from scrimp.optim.compat.authors import (
    AdamThatDecaysLast,
    AuthorsOptimizer,
    Betas,
    adam,
    options_of_adam,
    refuse_other,
    singular_vectors,
)
from scrimp.optim.compat.galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from scrimp.optim.lifts.scaling import ScaleGradient
from scrimp.optim.named.subspace import check_channels
from scrimp.optim.pieces import Options, Projector, Rule
from scrimp.optim.projectors.orientation import require
from scrimp.optim.projectors.random import Random
from scrimp.optim.rules.adam import Adam

__all__ = ["APOLLOAdamW", "GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit", "QAPOLLOAdamW"]

_GROUP = {
    "rank": None,
    "update_proj_gap": 200,
    "scale": 1.0,
    "proj_type": "std",
    "proj": "random",
    "scale_type": "channel",
}


class _Apollo(AuthorsOptimizer):
    """What both classes share: the seeds, and the sketch that the gradient is scaled by."""

    def __init__(
        self,
        params: Any,
        *,
        rule: Callable[[Options], Rule],
        options: Mapping[str, Any],
        scale_front: bool,
        gamma: float | None,
        hold: bool,
        compile: bool,
    ) -> None:
        super().__init__(
            params,
            rule=rule,
            projector=functools.partial(_sketch, hold),
            lift=functools.partial(_scale_gradient, gamma, scale_front),
            options=options,
            projected=_GROUP,
            compile=compile,
        )

    def _plan_all(self, groups: list[dict[str, Any]]) -> None:
        super()._plan_all(groups)
        # A seed is a parameter's position among all, where `Optimizer` counts the projected ones alone.
        for position, found in enumerate(self._plans.values()):
            found.target = replace(found.target, index=position)


class APOLLOAdamW(_Apollo):
    """APOLLO, as `apollo_torch.APOLLOAdamW`.

    Args:
        params: Parameters, or groups of them; those with a `rank` are projected.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment, before the bias correction.
        weight_decay: Decoupled decay, after the update.
        correct_bias: Whether the moments' start at zero is made up for.
        scale_front: Whether the scale acts before the norm-growth limiter.
        disable_nl: Whether there is no limiter.
        no_deprecation_warning: Has no effect.
        hold: Keeps the random matrices between draws, outside the state; not an argument of theirs.
        compile: Run the arithmetic as compiled functions; not an argument of theirs.

    Raises:
        ScrimpError: A value is not allowed; a ValueError, as theirs.

    References:
        APOLLO, Zhu et al., MLSys 2025, arXiv 2412.05270.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        scale_front: bool = False,
        disable_nl: bool = False,
        no_deprecation_warning: bool = True,
        *,
        hold: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            rule=adam,
            options=options_of_adam(lr, betas, eps, weight_decay, correct_bias),
            scale_front=scale_front,
            gamma=None if disable_nl else 1.01,
            hold=hold,
            compile=compile,
        )


class QAPOLLOAdamW(_Apollo):
    """APOLLO over int8 weights, as `apollo_torch.QAPOLLOAdamW`: bitsandbytes' Adam in the sketch, in 32 bits.

    Args:
        params: Parameters, or groups of them; those with a `rank` are projected.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decoupled decay of projected matrices, after the update; others do not decay, in theirs
            neither.
        amsgrad: Has no effect, in theirs neither.
        optim_bits: Has no effect, in theirs neither: moments are float32.
        args: Has no effect.
        min_8bit_size: Has no effect, in theirs neither.
        percentile_clipping: 100, which does not clip.
        block_wise: Has no effect, in theirs neither.
        is_paged: False: states stay on the parameter's device.
        scale_front: Whether the scale acts before the norm-growth limiter.
        no_deprecation_warning: Has no effect.
        hold: Keeps the random matrices between draws, outside the state; not an argument of theirs.
        compile: Run the arithmetic as compiled functions; not an argument of theirs.

    Raises:
        ScrimpError: A value is not allowed.

    References:
        APOLLO, Zhu et al., MLSys 2025, arXiv 2412.05270.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        scale_front: bool = False,
        no_deprecation_warning: bool = True,
        *,
        hold: bool = False,
        compile: bool = False,
    ) -> None:
        refuse_other("percentile_clipping", percentile_clipping, 100)
        refuse_other("is_paged", is_paged, False)
        super().__init__(
            params,
            rule=_adam_of_bitsandbytes,
            options={"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            scale_front=scale_front,
            gamma=1.01,
            hold=hold,
            compile=compile,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _AdamWithoutDecay(Adam):
    """Torch's Adam, whatever the group's weight decay."""

    def scalars(self, options: Options, age: int) -> dict[str, float]:
        """Return Adam's numbers, and no weight decay."""
        return {**Adam.scalars(self, options, age), "weight_decay": 0.0}


def _adam_of_bitsandbytes(options: Options) -> Rule:
    return _AdamWithoutDecay() if options["rank"] is None else AdamThatDecaysLast()


def _sketch(hold: bool, group: Options) -> Projector:
    check_channels({"side": group["proj_type"]})
    require("proj", group["proj"], ("random", "svd"))
    if group["proj"] == "svd":
        return singular_vectors(group)
    rank, every, side = group["rank"], group["update_proj_gap"], group["proj_type"]
    return Random(rank=rank, every=every, side=side, seed=1, hold=hold, released=True)


def _scale_gradient(gamma: float | None, scale_front: bool, group: Options) -> ScaleGradient:
    require("scale_type", group["scale_type"], ("channel", "tensor"))
    return ScaleGradient(math.sqrt(group["scale"]), group["scale_type"], gamma, scale_front)
