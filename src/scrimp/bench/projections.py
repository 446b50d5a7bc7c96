"""Peers that do more than replace an optimizer's arithmetic: projections, blocks, fused updates, adapters.

GaLore, Q-GaLore, Fira and APOLLO take a group with a `rank` for the matrices of attention and MLP, and treat
the rest with their own plain AdamW at the same rate. Their scale is that of the papers' 60M scripts, as are
a rank of a quarter of the width and, in a run long enough, 200 steps between refreshes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from scrimp.assembly import make_optimizer
from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import Batch, LossFunction
from scrimp.base.seeds import derive
from scrimp.bench.adapters import (
    Settings,
    adam_settings,
    groups,
    inner_matrices,
    load,
    plain_groups,
    rate,
    update_gap,
    weight_decay,
    width,
)
from scrimp.build import Job


def _projected(job: Job, settings: Settings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the groups, the last one projected, and the settings as numbers."""
    rank = width(job) // 4 if settings["rank"] == "width/4" else settings["rank"]
    used = {**settings, "rank": rank, "update_proj_gap": update_gap(job)}
    inner = {"params": list(inner_matrices(job).values()), **used}
    decay = weight_decay(job)
    return groups(job.trained.values(), decay=decay, inner=inner), used


def galore(job: Job, settings: Settings) -> dict[str, Any]:
    """Set galore-torch's AdamW on a job."""
    made, used = _projected(job, settings)
    job.optimizer = load("galore_torch", "galore-torch").GaLoreAdamW(
        made, lr=rate(job), betas=job.recipe.optimizer.betas, no_deprecation_warning=True
    )
    return used


def galore_8bit(job: Job, settings: Settings) -> dict[str, Any]:
    """Set galore-torch's 8-bit AdamW on a job."""
    made, used = _projected(job, settings)
    module = load("galore_torch", "galore-torch")
    job.optimizer = _mend(module.GaLoreAdamW8bit(made, lr=rate(job), betas=job.recipe.optimizer.betas))
    return used


def q_galore(job: Job, settings: Settings) -> dict[str, Any]:
    """Set q-galore-torch's AdamW on a job; the weights stay as they are, for that is another choice.

    With weights in 8 bits the package reads a setting that current bitsandbytes no longer has; its class for
    simulated ones takes plain weights too, and is otherwise the same.
    """
    made, used = _projected(job, settings)
    projected = made[-1]
    # Groups of the projector's elements are to fill it, which 256 does only in models of some width.
    sizes = (used["rank"] * min(p.shape) for p in projected["params"])
    used["quant_group_size"] = projected["quant_group_size"] = math.gcd(used["quant_group_size"], *sizes)
    optimizer = load("q_galore_torch", "q-galore-torch").QGaLoreAdamW8bit_simulate
    job.optimizer = _mend(optimizer(made, lr=rate(job), betas=job.recipe.optimizer.betas))
    return used


def _mend(optimizer: Any) -> torch.optim.Optimizer:
    """Undo what current bitsandbytes makes of two arguments that these packages give by place.

    They mean `percentile_clipping=100, block_wise=True`, which is off and the default. Both arguments are
    gone, and in their places stand `max_unorm=100, skip_zeros=True`.
    """
    optimizer.args.max_unorm = 0.0
    optimizer.args.skip_zeros = False
    return cast("torch.optim.Optimizer", optimizer)


def galore_adafactor(job: Job, settings: Settings) -> dict[str, Any]:
    """Set galore-torch's Adafactor on a job."""
    switches = {"relative_step", "scale_parameter", "beta1"}
    own = {name: value for name, value in settings.items() if name in switches}
    made, used = _projected(job, {k: v for k, v in settings.items() if k not in switches})
    job.optimizer = load("galore_torch", "galore-torch").GaLoreAdafactor(made, lr=rate(job), **own)
    return {**used, **own}


def apollo(job: Job, settings: Settings) -> dict[str, Any]:
    """Set apollo-torch's AdamW on a job; its sketches come from seeds 1, 2, 3, … in the order of groups."""
    made, used = _projected(job, settings)
    job.optimizer = load("apollo_torch", "apollo-torch").APOLLOAdamW(
        made, lr=rate(job), betas=job.recipe.optimizer.betas
    )
    return used


def fira(job: Job, settings: Settings) -> dict[str, Any]:
    """Set Fira's AdamW on a job."""
    made, used = _projected(job, settings)
    job.optimizer = load("fira", "fira").FiraAdamW(
        made, lr=rate(job), betas=job.recipe.optimizer.betas, no_deprecation_warning=True
    )
    return used


def badam(job: Job, settings: Settings) -> dict[str, Any]:
    """Set BAdam on a job: torch's AdamW on one layer at a time, embedding and head among them.

    The package leaves embedding and head untrained unless told otherwise, which a model that starts from
    random weights cannot afford. A block has 50 steps, or fewer where a run has no time for all blocks.
    """
    made = load("badam", "badam").BlockOptimizer

    class Quiet(made):  # type: ignore[misc, valid-type]
        """It prints at every switch, whatever `verbose` it was made with."""

        def switch_trainable_params(self, verbose: int | None = 0) -> None:
            super().switch_trainable_params(verbose=0)

    base = torch.optim.AdamW(plain_groups(job), lr=rate(job), **adam_settings(job))
    with warnings.catch_warnings():
        # It says that fp32 weights cost more memory than bf16 ones; the bench measures that.
        warnings.filterwarnings("ignore", "BAdam expect model to be loaded")
        optimizer = Quiet(
            base,
            list(job.trained.items()),
            switch_mode=settings["switch_mode"],
            include_embedding=True,
            include_lm_head=True,
        )
    assert job.recipe.steps is not None
    optimizer.switch_block_every = max(2, min(50, job.recipe.steps // optimizer.block_num))
    job.optimizer = optimizer
    return {**settings, "switch_block_every": optimizer.switch_block_every, "blocks": optimizer.block_num}


class FusedBackward:
    """AdaLomo's own backward pass, which updates each parameter as soon as its gradient is there."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def step(self, loss: LossFunction, batch: Sequence[Batch]) -> Tensor:
        """Update all parameters by the loss of the one micro-batch, and return it, detached."""
        (micro,) = batch
        value = loss(micro)
        self._optimizer.fused_backward(value, self._optimizer.param_groups[0]["lr"])
        return value.detach()


def adalomo(job: Job, settings: Settings) -> dict[str, Any]:
    """Set AdaLomo on a job; gradients are gone before they could be clipped or summed.

    Raises:
        ScrimpError: The batch is more than one micro-batch.
    """
    if job.recipe.batch != job.recipe.micro_batch:
        raise ScrimpError(
            f"lomo-optim updates within the backward pass and so after every micro-batch, but a batch of "
            f"{job.recipe.batch} is split into {job.recipe.micro_batch}: raise --micro-batch"
        )
    made = load("lomo_optim", "lomo-optim").AdaLomo

    class Done(made):  # type: ignore[misc, valid-type]
        """All is done when the loop asks for the step."""

        def step(self, closure: None = None) -> None:
            return None

    job.optimizer = Done(job.model, lr=rate(job), weight_decay=weight_decay(job), **settings)
    job.estimator = FusedBackward(job.optimizer)
    return dict(settings)


def peft_lora(job: Job, settings: Settings) -> dict[str, Any]:
    """Put peft's LoRA into a job's model; the recipe's optimizer trains the factors, the rest is frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[job.device] if job.device.type == "cuda" else []):
        torch.manual_seed(derive(job.recipe.seed, "lora"))
        inject_adapter_in_model(LoraConfig(**settings), job.model)
    job.trained = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
    job.optimizer = make_optimizer(job.recipe, job.model)
    return {**settings, "trained": sum(p.numel() for p in job.trained.values())}
