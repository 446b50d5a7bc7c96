"""Every named method, and parameters of every kind: what the laws of all optimizers are tested on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scrimp import optim
from scrimp.optim.optimizer import Optimizer

Parameters = dict[str, nn.Parameter]
Gradients = dict[str, Tensor]

# A method takes those that it knows. Subspaces change within a few steps, and moments are of few numbers.
SMALL: Mapping[str, Any] = {"rank": 4, "density": 0.5, "refresh_every": 3, "history": 3}
NAMED: dict[str, dict[str, Any]] = {
    name: {} for name in optim.__all__ if name not in ("Composition", "Optimizer")
}
VARIANTS: dict[str, dict[str, Any]] = {
    "AdamW with resets": {"reset_every": 3},
    "AdamW with bf16 moments": {"store": "bf16"},
    "SGDM without momentum": {"momentum": 0.0},
    "Adafactor with momentum": {"momentum": 0.9},
    "SPAM with resets": {"reset_every": 3, "warmup": 2},
    "GaLore paper": {"variant": "paper"},
    "GaLore of both sides": {"side": "full"},
    "QGaLore paper": {"variant": "paper", "threshold": 0.0},
    "NaturalGaLore paper": {"variant": "paper"},
    "Fira paper": {"variant": "paper"},
    "Apollo released": {"variant": "released"},
    "Apollo of singular vectors": {"proj": "svd"},
    "Frugal of columns": {"projector": "columns"},
    "Frugal of elements alone": {"projector": "elements", "residual": "none"},
    "Frugal of singular vectors": {"projector": "svd"},
    "Frugal of random directions alone": {"projector": "random", "residual": "none"},
    "Frugal with 8-bit moments": {"store": "8bit"},
    "DCTAdamW with feedback": {"error_feedback": True},
}
EVERY = {**NAMED, **VARIANTS}

MATRICES: dict[str, tuple[int, ...]] = {
    "tall": (24, 16),
    "wide": (16, 24),
    "square": (20, 20),
    "experts": (3, 18, 12),
    "kernel": (8, 4, 3, 3),
    "long": (1041, 16),  # whose moments are quantised in a subspace too, the last block ragged
}
REST: dict[str, tuple[int, ...]] = {"vector": (7,), "scalar": (), "deep": (5, 3, 2, 2), "table": (67, 64)}


def method(name: str) -> Any:
    """Return the function of a method or of its variant."""
    return getattr(optim, name.split(maxsplit=1)[0])


def options_of(name: str, **options: Any) -> dict[str, Any]:
    """Return a method's options, the small ones among them."""
    known = inspect.signature(method(name)).parameters
    small = {key: value for key, value in SMALL.items() if key in known}
    return {**small, **EVERY[name], **options}


def is_projecting(name: str) -> bool:
    """Tell whether a method projects matrices."""
    return "refresh_every" in inspect.signature(method(name)).parameters


def parameters(
    dtype: torch.dtype = torch.float32, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Parameters:
    """Return parameters of every kind, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in (shapes or {**MATRICES, **REST}).items()
    }


def gradients(ps: Parameters, steps: int, *, seed: int = 2) -> list[Gradients]:
    """Return gradients for some steps; from the second one on a different parameter misses its own."""
    generator = torch.Generator().manual_seed(seed)
    names = list(ps)
    return [
        {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            for number, (name, p) in enumerate(ps.items())
            if step == 0 or number != step % len(names)
        }
        for step in range(steps)
    ]


def make(name: str, ps: Parameters, **options: Any) -> Optimizer:
    """Return a method over two groups: matrices, projected where it projects, and the rest, which decays."""
    every = options_of(name, **options)
    marks = {key: every[key] for key in ("rank", "density") if key in every}
    if method(name) is optim.ApolloMini:
        marks = {"rank": 1}
    inner = [(key, p) for key, p in ps.items() if key not in REST]
    rest = [(key, p) for key, p in ps.items() if key in REST]
    groups = [{"params": inner, **marks}, {"params": rest, "weight_decay": 0.1}]
    return method(name)([group for group in groups if group["params"]], **every)


def run(optimizer: torch.optim.Optimizer, ps: Parameters, steps: Sequence[Gradients]) -> None:
    """Take some steps with given gradients."""
    for step in steps:
        for name, p in ps.items():
            p.grad = step[name].clone() if name in step else None
        optimizer.step()


def loss(ps: Parameters, step: Gradients) -> Tensor:
    """Return a loss whose gradients are those of `step`, to the bit."""
    terms = [(ps[name] * g).sum().double() for name, g in step.items()]
    return torch.stack(terms).sum()


def values(ps: Parameters) -> Gradients:
    """Return copies of the parameters."""
    return {name: p.detach().clone() for name, p in ps.items()}


def state(optimizer: Optimizer, ps: Parameters) -> dict[str, Any]:
    """Return copies of all that an optimizer keeps, by the parameters' names."""
    return {
        f"{name}/{key}": value.clone() if isinstance(value, Tensor) else value
        for name, p in ps.items()
        for key, value in optimizer.state.get(p, {}).items()
    }


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the names under which two mappings differ in a bit, a dtype or a shape."""
    return [
        name
        for name in sorted(a.keys() | b.keys())
        if name not in a or name not in b or not _same(a[name], b[name])
    ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the largest distance of two tensors of a name, in norms of the second."""
    return max(float((a[name] - b[name]).detach().norm() / b[name].detach().norm()) for name in b)
