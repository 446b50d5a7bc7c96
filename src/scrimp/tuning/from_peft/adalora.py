"""AdaLoRA through peft, whose allocator of ranks keeps what no state dict holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from scrimp.tuning.from_peft.tuning import ADAPTER, TASK, PeftTuning, check_numbers
from scrimp.tuning.targets import ALL_LINEAR

Targets = tuple[str, ...]
EVERY: Targets = (ALL_LINEAR,)


def AdaLoRA(
    *,
    rank: int = 8,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: Targets = EVERY,
    steps: int = 1000,
    seed: int = 0,
) -> PeftTuning:
    """W + P diag(E) Q, whose entries of E are pruned by sensitivity from 1.5 r down to r a matrix.

    The budget falls between a tenth and the last third of the run. The pull of P and Q towards orthogonality
    is added to their gradients after clipping.

    References:
        AdaLoRA, Zhang et al., ICLR 2023, arXiv 2303.10512.
    """
    check_numbers("adalora", rank, alpha, dropout)

    def configure(_model: nn.Module, names: list[str] | None) -> Any:
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            init_r=_wide(rank),
            target_r=rank,
            lora_alpha=cast("Any", alpha),  # annotated as a whole number
            lora_dropout=dropout,
            target_modules=names,
            tinit=steps // 10,
            tfinal=max(1, steps // 3),
            deltaT=max(1, steps // 100),
            total_step=max(steps, 3),
            task_type=TASK,
        )

    return PeftTuning(
        name="adalora",
        configure=configure,
        seed=seed,
        targets=targets,
        rank=_wide(rank),
        before_update=_pull_to_orthogonality,
        after_update=lambda wrapper, step: wrapper.base_model.update_and_allocate(step),
        memory=Importances(),
    )


def _wide(rank: int) -> int:
    return rank + (rank + 1) // 2


def _pull_to_orthogonality(wrapper: Any) -> None:
    """Add the gradient of weight * mean ||P P^T - I||, as peft's own forward would have added the loss."""
    weight = wrapper.peft_config[ADAPTER].orth_reg_weight
    factors = [
        p for n, p in wrapper.named_parameters() if ("lora_A" in n or "lora_B" in n) and p.requires_grad
    ]
    with torch.enable_grad():
        for p in factors:
            gram: Tensor = p @ p.T if p.shape[0] < p.shape[1] else p.T @ p
            eye = torch.eye(len(gram), device=p.device, dtype=p.dtype)
            (pull,) = torch.autograd.grad(torch.linalg.matrix_norm(gram - eye), p)
            if p.grad is not None:
                p.grad.add_(pull, alpha=weight / len(factors))


class Importances:
    """What peft's allocator remembers: smoothed importances of all numbers, and which ranks are left."""

    def tensors(self, wrapper: Any) -> dict[str, Tensor]:
        """Return the importances and their deviations, zero until the allocator has seen a step."""
        allocator = wrapper.base_model.rankallocator
        for name, p in wrapper.base_model.model.named_parameters():
            if "lora_" in name and ADAPTER in name and name not in allocator.ipt:
                for kept in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
                    kept[name] = torch.zeros_like(p)
        smoothed = (("importance", allocator.exp_avg_ipt), ("deviation", allocator.exp_avg_unc))
        return {f"{what}.{name}": tensor for what, kept in smoothed for name, tensor in kept.items()}

    def state(self, wrapper: Any) -> dict[str, list[float]]:
        """Return the ranks that are left, as ones, by the name of their parameter."""
        left = wrapper.peft_config[ADAPTER].rank_pattern or {}
        return {name: [float(each) for each in ranks] for name, ranks in left.items()}

    def load_state(self, wrapper: Any, state: Mapping[str, Sequence[float]]) -> None:
        """Take what `state` returned."""
        left = {name: [bool(each) for each in ranks] for name, ranks in state.items()}
        wrapper.peft_config[ADAPTER].rank_pattern = left or None
