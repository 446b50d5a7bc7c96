"""Any optimizer class of torch or pytorch-optimizer as a peer, with the class's own defaults.

Most take two groups of parameters and gradients, and need nothing said about them. Here is what is known of
the others: those that part the matrices of attention and MLP from the rest, those that find their learning
rate themselves, and those that the loop cannot drive.
"""

from __future__ import annotations

from typing import Any

import torch

from scrimp.base.errors import ScrimpError
from scrimp.bench.adapters import (
    Groups,
    Settings,
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

# What they need that the loop does not give.
_CLOSURE, _CURVATURE = "a closure that computes the loss again", "second derivatives"
UNFIT = {
    "AdaHessian": _CURVATURE,
    "SophiaH": _CURVATURE,
    "AliG": _CLOSURE,
    "BSAM": _CLOSURE,
    "LBFGS": _CLOSURE,
    "DeMo": "several processes",
    "DistributedMuon": "several processes",
    "AdaLOMO": "the backward pass",
    "LOMO": "the backward pass",
    "AdamMini": "the model itself (the authors' package is adam-mini)",
    "LoRARite": "the factors of LoRA in pairs",
    "SparseAdam": "sparse gradients",
    "SpectralSphere": "matrices alone",
    "ScheduleFreeAdamW": "other weights for evaluation",
    "ScheduleFreeRAdam": "other weights for evaluation",
    "ScheduleFreeSGD": "other weights for evaluation",
}
# The settings of the three papers' 60M scripts, in pytorch-optimizer's words.
PROJECTED: dict[str, dict[str, Any]] = {
    "APOLLO": {"projection_type": "std", "scale": 1.0},
    "Fira": {"projection_type": "std", "scale": 0.25},
    "GaLore": {"projection_type": "std", "scale": 0.25},
}
ORTHOGONAL = ("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon")
# They find the rate themselves: what they are given is a multiple of it, meant to be 1 at its peak.
RATE_FREE = ("AdamG", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD", "Prodigy")


def any_class(job: Job, settings: Settings) -> dict[str, Any]:
    """Set an optimizer class of torch or pytorch-optimizer on a job.

    Raises:
        ScrimpError: The class needs more than gradients.
    """
    package, title = settings["package"], settings["class"]
    if title in UNFIT:
        raise ScrimpError(
            f"{package}:{title} needs {UNFIT[title]}, which the bench does not give; leave it out"
        )
    module = torch.optim if package == "torch" else load("pytorch_optimizer.optimizer", package)
    own: dict[str, Any] = {"num_iterations": job.recipe.steps} if title == "Ranger21" else {}
    made, used = _groups(job, package, title)
    try:
        job.optimizer = getattr(module, title)(made, lr=rate(job), **own)
    except (ImportError, TypeError, ValueError) as error:
        raise ScrimpError(f"{package}:{title} cannot be set on this job: {error}; leave it out") from error
    if title in RATE_FREE:
        _peak_at_one(job.optimizer, rate(job))
    return {**own, **used}


def _groups(job: Job, package: str, title: str) -> tuple[Groups, dict[str, Any]]:
    """Return the groups of parameters as a class wants them, and the settings in them."""
    if package == "torch" or title not in (*PROJECTED, *ORTHOGONAL):
        return plain_groups(job), {}
    projected = {
        "rank": width(job) // 4,
        "update_proj_gap": update_gap(job),
        **PROJECTED.get(title, {}),
    }
    used = {"use_muon": True} if title in ORTHOGONAL else projected
    inner = {"params": list(inner_matrices(job).values()), **used}
    made = groups(job.trained.values(), decay=weight_decay(job), inner=inner)
    return [{"use_muon": False, **group} for group in made] if title in ORTHOGONAL else made, used


def _peak_at_one(optimizer: torch.optim.Optimizer, peak: float) -> None:
    def scale(*_: object) -> None:
        for group in optimizer.param_groups:
            group["lr"] /= peak

    optimizer.register_step_pre_hook(scale)
