"""Peers put to work: each function sets one package on a job, and returns the settings as it used them.

An adapter replaces the job's optimizer, or more, and leaves the rest of the job alone: rows, initial
weights, schedule, clipping and evaluation stay those of the recipe. The loop writes the scheduled rate into
every group before each step. What is Adam takes the recipe's betas; a package's own eps stays where its
convention differs (GaLore, Fira and APOLLO: 1e-6, without bias correction). Decay is the recipe's, on
matrices only. GaLore and its relatives are in `projections`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from scrimp.base import extras
from scrimp.base.errors import ScrimpError
from scrimp.bench.protocol import refresh_every
from scrimp.build import Job

Settings = Mapping[str, Any]
Groups = list[dict[str, Any]]


def load(module: str, peer: str) -> ModuleType:
    """Import a peer's package.

    Raises:
        MissingExtraError: It is not installed.
    """
    return extras.load(module, extra="oracles", purpose=f"peer {peer}")


def width(job: Job) -> int:
    """Return the width of a model's residual stream."""
    return int(job.model.config.get_text_config().hidden_size)


def update_gap(job: Job) -> int:
    """Return the steps between two refreshes of a projection."""
    assert job.recipe.steps is not None
    return refresh_every(job.recipe.steps)


def rate(job: Job) -> float:
    """Return the peak learning rate of a resolved recipe."""
    lr = job.recipe.optimizer.lr
    assert isinstance(lr, float)
    return lr


def inner_matrices(job: Job) -> dict[str, nn.Parameter]:
    """Return the trained matrices of attention and MLP: neither embedding nor head, as the authors choose.

    Raises:
        ScrimpError: The model has none.
    """
    outer = [module for module in job.model.modules() if isinstance(module, nn.Embedding)]
    head = job.model.get_output_embeddings()
    outer_ids = {
        id(p) for module in (*outer, head) if isinstance(module, nn.Module) for p in module.parameters()
    }
    inner = {name: p for name, p in job.trained.items() if p.ndim == 2 and id(p) not in outer_ids}
    if not inner:
        raise ScrimpError(
            f"model {job.recipe.model.name} trains no matrix of attention or MLP, which is all that this "
            "peer treats in its own way: leave it out of --methods"
        )
    return inner


def groups(
    parameters: Iterable[nn.Parameter], *, decay: float, inner: Mapping[str, Any] | None = None
) -> Groups:
    """Sort parameters into groups: matrices, which decay, and vectors, which do not.

    Args:
        parameters: What trains.
        decay: Weight decay of the matrices.
        inner: `params` and other keys of a group of its own; it decays too.
    """
    given = list(parameters)
    taken = set() if inner is None else {id(p) for p in inner["params"]}
    matrices = [p for p in given if p.ndim >= 2 and id(p) not in taken]
    vectors = [p for p in given if p.ndim < 2]
    sorted_: Groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if inner is not None:
        sorted_.append({"weight_decay": decay, **inner})
    return [group for group in sorted_ if group["params"]]


def plain_groups(job: Job, *, factor: float = 1.0) -> Groups:
    """Return the job's parameters in two groups, with the recipe's weight decay times `factor`."""
    return groups(job.trained.values(), decay=weight_decay(job) * factor)


def weight_decay(job: Job) -> float:
    """Return the recipe's weight decay; 0 where its optimizer has none."""
    return job.recipe.optimizer.weight_decay or 0.0


def adam_settings(job: Job) -> dict[str, Any]:
    """Return the recipe's betas and eps."""
    return {"betas": job.recipe.optimizer.betas, "eps": job.recipe.optimizer.eps}


def torch_adamw(job: Job, settings: Settings) -> dict[str, Any]:
    """Set torch's AdamW, with the kernel it chooses itself, on a job."""
    used = {**adam_settings(job), **settings}
    job.optimizer = torch.optim.AdamW(plain_groups(job), lr=rate(job), **used)
    return used


def torch_sgd(job: Job, settings: Settings) -> dict[str, Any]:
    """Set torch's SGD on a job; its decay is a term of the loss, not decoupled."""
    job.optimizer = torch.optim.SGD(plain_groups(job), lr=rate(job), **settings)
    return dict(settings)


def torch_adafactor(job: Job, settings: Settings) -> dict[str, Any]:
    """Set torch's Adafactor on a job; it takes at most 1 / sqrt(step) of the scheduled rate."""
    job.optimizer = torch.optim.Adafactor(plain_groups(job), lr=rate(job), **settings)
    return dict(settings)


class Joined(torch.optim.Optimizer):
    """Several optimizers as one; the groups are theirs."""

    def __init__(self, *members: torch.optim.Optimizer) -> None:
        self.members = members
        super().__init__([group for member in members for group in member.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step with each of them."""
        for member in self.members:
            member.step()


def torch_muon(job: Job, settings: Settings) -> dict[str, Any]:
    """Set torch's Muon on the matrices of attention and MLP, and torch's AdamW on the rest."""
    inner = list(inner_matrices(job).values())
    taken = {id(p) for p in inner}
    rest = [p for p in job.trained.values() if id(p) not in taken]
    decay = weight_decay(job)
    muon = torch.optim.Muon(inner, lr=rate(job), weight_decay=decay, **settings)
    adamw = torch.optim.AdamW(groups(rest, decay=decay), lr=rate(job), **adam_settings(job))
    job.optimizer = Joined(muon, adamw)
    return {**settings, "the rest": "AdamW"}


def transformers_adafactor(job: Job, settings: Settings) -> dict[str, Any]:
    """Set transformers' Adafactor on a job."""
    from transformers.optimization import Adafactor

    job.optimizer = Adafactor(plain_groups(job), lr=rate(job), **settings)
    return dict(settings)


def lion(job: Job, settings: Settings) -> dict[str, Any]:
    """Set lion-pytorch's Lion on a job, with a weight decay as much larger as its rate is smaller."""
    used = dict(settings)
    decaying = plain_groups(job, factor=used.pop("weight_decay_factor"))
    job.optimizer = load("lion_pytorch", "lion-pytorch").Lion(decaying, lr=rate(job), **used)
    return dict(settings)


def adam_mini(job: Job, settings: Settings) -> dict[str, Any]:
    """Set Adam-mini on a job; it needs names and the sizes of heads, and decides on decay by name."""
    config = job.model.config.get_text_config()
    heads = config.num_attention_heads
    used = {"dim": config.hidden_size, "n_heads": heads, **adam_settings(job), **settings}
    job.optimizer = load("adam_mini", "adam-mini").Adam_mini(
        list(job.trained.items()),
        lr=rate(job),
        weight_decay=weight_decay(job),
        n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        verbose=False,
        **used,
    )
    return used


def came(job: Job, settings: Settings) -> dict[str, Any]:
    """Set CAME on a job."""
    job.optimizer = load("came_pytorch.CAME", "came-pytorch").CAME(
        plain_groups(job), lr=rate(job), **settings
    )
    return dict(settings)


def bitsandbytes_adamw(job: Job, settings: Settings) -> dict[str, Any]:
    """Set bitsandbytes' 8-bit AdamW on a job; tensors of fewer than 4,096 elements stay fp32."""
    used = {**adam_settings(job), **settings}
    job.optimizer = load("bitsandbytes", "bitsandbytes").optim.AdamW8bit(
        plain_groups(job), lr=rate(job), **used
    )
    return used


def bitsandbytes_lion(job: Job, settings: Settings) -> dict[str, Any]:
    """Set bitsandbytes' 8-bit Lion on a job."""
    used = dict(settings)
    decaying = plain_groups(job, factor=used.pop("weight_decay_factor"))
    job.optimizer = load("bitsandbytes", "bitsandbytes").optim.Lion8bit(decaying, lr=rate(job), **used)
    return dict(settings)


def torchao_adamw(job: Job, settings: Settings) -> dict[str, Any]:
    """Set torchao's 8-bit or 4-bit AdamW on a job; the first step compiles a kernel for every shape."""
    made = getattr(load("torchao.optim", "torchao"), f"AdamW{settings['bits']}bit")
    optimizer = made(plain_groups(job), lr=rate(job), **adam_settings(job))
    # It takes a rate as a tensor and nothing else; the loop, like any schedule of torch's, writes a number.
    tensors = [group["lr"] for group in optimizer.param_groups]

    def as_tensors(*_: object) -> None:
        for group, tensor in zip(optimizer.param_groups, tensors, strict=True):
            group["lr"] = tensor.fill_(float(group["lr"]))

    optimizer.register_step_pre_hook(as_tensors)
    job.optimizer = optimizer
    return {**adam_settings(job), **settings}
