"""fira 1.0.2 under its own names: `FiraAdamW`, `divide_params`.

    groups = divide_params(model, target_modules_list=["attn", "mlp"], rank=8)
    optimizer = FiraAdamW(groups, lr=0.01)

It is the released form: `alpha` multiplies what is projected back, not the residual.

Deliberately different, besides what `authors` lists:

- A zero first gradient does not disable the residual's norm-growth limiter for good.
- Channels are those of the side that the projection keeps. Theirs take the longer side of the projected
  gradient, which is another one (and a shape error, or a wrong scale) where the rank reaches the kept side.
- `proj_type` "full", which fails at their first step, is refused at construction.
- `divide_params` does not print the names of the modules; `optimizer.describe()` shows every parameter. A
  matrix that two chosen modules share is in the group once, which theirs hand to torch twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from scrimp.optim.compat.authors import AuthorsOptimizer, Betas, adam, options_of_adam
from scrimp.optim.lifts.residual import ScaledResidual
from scrimp.optim.named.subspace import check_channels
from scrimp.optim.pieces import Options

__all__ = ["FiraAdamW", "divide_params"]

_GROUP = {"rank": None, "update_proj_gap": 200, "alpha": 1.0, "proj_type": "std"}


class FiraAdamW(AuthorsOptimizer):
    """Fira, as `fira.FiraAdamW`.

    Args:
        params: Parameters, or groups of them; those with a `rank` are projected.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment, before the bias correction.
        weight_decay: Decoupled decay, after the update.
        correct_bias: Whether the moments' start at zero is made up for.
        no_deprecation_warning: Has no effect.
        compile: Run the arithmetic as compiled functions; not an argument of theirs.

    Raises:
        ScrimpError: A value is not allowed; a ValueError, as theirs.

    References:
        Fira, Chen et al., NeurIPS 2025, arXiv 2410.01623.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
        *,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            rule=adam,
            lift=_scaled_residual,
            options=options_of_adam(lr, betas, eps, weight_decay, correct_bias),
            projected=_GROUP,
            compile=compile,
        )


def divide_params(
    model: nn.Module | None = None,
    target_modules_list: Sequence[str] = (),
    rank: int = 8,
    update_proj_gap: int = 200,
    alpha: float = 1.0,
    proj_type: str = "std",
) -> list[dict[str, Any]] | None:
    """Divide a model's parameters into a regular group and a projected one.

    Args:
        model: The model; None returns None.
        target_modules_list: Weights of `nn.Linear` modules whose names contain one of these are projected.
        rank: Of the subspaces.
        update_proj_gap: Steps between choices of the subspaces.
        alpha: Factor of what is projected back.
        proj_type: Which side is shortened: "std" the smaller, "reverse_std", "left" or "right".
    """
    if model is None:
        return None
    chosen = {
        module.weight: None
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part in name for part in target_modules_list)
    }
    regular = [p for p in model.parameters() if p not in chosen]
    words = {"rank": rank, "update_proj_gap": update_proj_gap, "alpha": alpha, "proj_type": proj_type}
    return [{"params": regular}, {"params": list(chosen), **words}]


def _scaled_residual(options: Options) -> ScaledResidual:
    check_channels({"side": options["proj_type"]})
    return ScaledResidual(scale=options["alpha"], variant="released")
