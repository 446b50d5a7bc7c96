"""galore-torch 1.0 under its own names: `GaLoreAdamW`, `GaLoreAdamW8bit`, `GaLoreAdafactor`.

    groups = [{"params": regular}, {"params": matrices, "rank": 128, "update_proj_gap": 200, "scale": 0.25,
                                    "proj_type": "std"}]
    optimizer = GaLoreAdamW(groups, lr=0.01)

Deliberately different, besides what `authors` lists:

- `GaLoreAdamW8bit` needs neither a GPU nor bitsandbytes. With today's bitsandbytes theirs passes two
  arguments on that are gone (`max_unorm=100` and `skip_zeros=True` come of them); ours reads them as meant.
- `reverse_std` with m < n and a rank of at least m works.
- `GaLoreAdafactor(lr=None)`, its default, shows `lr` 0 in its groups (the rule has its own), and beside
  `relative_step=False` is refused, where theirs fails at the first step.
"""

from __future__ import annotations

from typing import Any

from scrimp.base.errors import ScrimpError
from scrimp.optim.compat.authors import (
    AdamThatDecaysLast,
    AuthorsOptimizer,
    Betas,
    adam,
    options_of_adam,
    refuse_other,
)
from scrimp.optim.lifts.back import ProjectBack
from scrimp.optim.pieces import Options, Rule
from scrimp.optim.rules.adafactor import Adafactor
from scrimp.optim.rules.adam import Adam
from scrimp.optim.stores.dynamic8 import Dynamic8

__all__ = ["GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit"]

_GROUP = {"rank": None, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}


class GaLoreAdamW(AuthorsOptimizer):
    """GaLore, as `galore_torch.GaLoreAdamW`.

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
        GaLore, Zhao et al., ICML 2024, arXiv 2403.03507.
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
            lift=_project_back,
            options=options_of_adam(lr, betas, eps, weight_decay, correct_bias),
            projected=_GROUP,
            compile=compile,
        )


class GaLoreAdamW8bit(AuthorsOptimizer):
    """8-bit GaLore, as `galore_torch.GaLoreAdamW8bit`: bitsandbytes' Adam in the subspace.

    Args:
        params: Parameters, or groups of them; those with a `rank` are projected.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decoupled decay: of projected matrices after the update, of all others before it.
        amsgrad: Has no effect, in theirs neither.
        optim_bits: Has no effect, in theirs neither: moments have 8 bits.
        args: Has no effect.
        min_8bit_size: Moments of fewer numbers stay in float32.
        percentile_clipping: 100, which does not clip.
        block_wise: True.
        is_paged: False: states stay on the parameter's device.
        compile: Run the arithmetic as compiled functions; not an argument of theirs.

    Raises:
        ScrimpError: A value is not allowed, or one of the last three has another one.

    References:
        GaLore, Zhao et al., ICML 2024, arXiv 2403.03507, section 4.3.
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
        *,
        compile: bool = False,
    ) -> None:
        refuse_other("percentile_clipping", percentile_clipping, 100)
        refuse_other("block_wise", block_wise, True)
        refuse_other("is_paged", is_paged, False)
        super().__init__(
            params,
            rule=_adam_of_bitsandbytes,
            lift=_project_back,
            options={"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            projected=_GROUP,
            store=Dynamic8(min_size=min_8bit_size),
            compile=compile,
        )


class GaLoreAdafactor(AuthorsOptimizer):
    """GaLore with Adafactor, as `galore_torch.GaLoreAdafactor`.

    Args:
        params: Parameters, or groups of them; those with a `rank` are projected.
        lr: Learning rate, with `relative_step=False`.
        eps: Added to squared gradients; the least RMS of the weights.
        clip_threshold: The RMS that an unscaled update is cut to.
        decay_rate: The exponent in beta2.
        beta1: Decay rate of the averaged updates; None keeps none.
        weight_decay: Decay before the update, by the rule's own rate.
        scale_parameter: Whether steps are relative to the RMS of the whole weight.
        relative_step: Whether the rule has its own schedule instead of `lr`.
        warmup_init: Whether that schedule starts with 1e-6 t.
        compile: Run the arithmetic as compiled functions; not an argument of theirs.

    Raises:
        ScrimpError: A value is not allowed, or `lr` and `relative_step` contradict each other.

    References:
        GaLore, Zhao et al., ICML 2024, arXiv 2403.03507. Adafactor, Shazeer and Stern, ICML 2018,
        arXiv 1804.04235.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        compile: bool = False,
    ) -> None:
        if (lr is None) != relative_step:
            raise ScrimpError("give either lr, with relative_step=False, or relative_step=True without lr")
        super().__init__(
            params,
            rule=_adafactor,
            lift=_project_back,
            options={
                "lr": lr or 0.0,
                "eps": eps,
                "clip_threshold": clip_threshold,
                "decay_rate": decay_rate,
                "beta1": beta1,
                "weight_decay": weight_decay,
                "scale_parameter": scale_parameter,
                "relative_step": relative_step,
                "warmup_init": warmup_init,
            },
            projected=_GROUP,
            compile=compile,
        )


def _adam_of_bitsandbytes(options: Options) -> Rule:
    return Adam() if options["rank"] is None else AdamThatDecaysLast()


def _adafactor(options: Options) -> Rule:
    return Adafactor(
        eps=options["eps"],
        clip_threshold=options["clip_threshold"],
        decay_rate=options["decay_rate"],
        beta1=options["beta1"],
        scale_parameter=options["scale_parameter"],
        relative_step=options["relative_step"],
        warmup_init=options["warmup_init"],
    )


def _project_back(options: Options) -> ProjectBack:
    return ProjectBack(options["scale"])
