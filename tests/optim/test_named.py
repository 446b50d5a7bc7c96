"""AdamW against the equations of its docstring, and against torch's own, unfused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from scrimp.optim import adamw

SHAPES = [(1, 1), (3, 5), (7,), (2, 3, 4), ()]
SETTINGS = [
    {"lr": 1e-2},
    {"lr": 1e-2, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3},
    {"lr": 1e-2, "weight_decay": 0.0},
]


def make_parameters(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def gradients(generator: torch.Generator, steps: int) -> list[list[Tensor]]:
    return [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        for _ in range(steps)
    ]


def run(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], all_steps: list[list[Tensor]]
) -> None:
    for step in all_steps:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("settings", SETTINGS)
def test_adamw_is_its_equations(settings: dict[str, float], generator: torch.Generator) -> None:
    parameters = make_parameters(generator)
    expected = [parameter.detach().clone() for parameter in parameters]
    steps = gradients(generator, 20)
    run(adamw(parameters, **settings), parameters, steps)

    lr, eps, wd = settings["lr"], settings.get("eps", 1e-8), settings.get("weight_decay", 0.01)
    beta1, beta2 = settings.get("betas", (0.9, 0.999))
    for index, start in enumerate(expected):
        w = start
        m = v = torch.zeros_like(w)
        decay = wd if w.ndim >= 2 else 0.0
        for t, step in enumerate(steps, 1):
            g = step[index]
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
            w = (1 - lr * decay) * w - lr * update
        torch.testing.assert_close(parameters[index].detach(), w, rtol=1e-12, atol=1e-14)  # fp64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_follows_torchs_unfused_one(dtype: torch.dtype, generator: torch.Generator) -> None:
    parameters = make_parameters(generator, dtype)
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    groups = [
        {"params": [p for p in theirs if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in theirs if p.ndim < 2], "weight_decay": 0.0},
    ]
    steps = [[g.to(dtype) for g in step] for step in gradients(generator, 50)]
    run(adamw(parameters, lr=1e-2), parameters, steps)
    run(torch.optim.AdamW(groups, lr=1e-2, fused=False, foreach=False), theirs, steps)
    rounding = 50 * torch.finfo(dtype).eps  # one rounding a step
    for ours, expected in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=rounding, atol=rounding)


def test_matrices_decay_and_vectors_do_not(generator: torch.Generator) -> None:
    parameters = make_parameters(generator)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = adamw(parameters, lr=0.1, weight_decay=0.5)
    run(optimizer, parameters, [[torch.zeros_like(p) for p in parameters]])  # decay is all that is left
    for parameter, old in zip(parameters, before, strict=True):
        factor = 1 - 0.1 * 0.5 if parameter.ndim >= 2 else 1
        torch.testing.assert_close(parameter.detach(), old * factor, rtol=1e-15, atol=0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_every_parameter_is_in_one_group_and_no_group_is_empty(generator: torch.Generator) -> None:
    parameters = make_parameters(generator)
    held = [p for group in adamw(iter(parameters), lr=1.0).param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in parameters} and len(held) == len(parameters)
    assert len(adamw([nn.Parameter(torch.ones(3))], lr=1.0).param_groups) == 1


def test_the_state_takes_the_bytes_of_the_docstring(generator: torch.Generator) -> None:
    parameters = make_parameters(generator, torch.float32)
    optimizer = adamw(parameters, lr=1e-3)
    run(optimizer, parameters, [[torch.ones_like(p) for p in parameters]])
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert held == 8 * sum(p.numel() for p in parameters) + 4 * len(parameters)


def test_a_schedule_that_sets_the_rate_is_obeyed(generator: torch.Generator) -> None:
    parameters = make_parameters(generator)
    optimizer = adamw(parameters, lr=1e-2)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [parameter.detach().clone() for parameter in parameters]
    run(optimizer, parameters, gradients(generator, 3))
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_the_package_needs_torch_alone() -> None:
    code = (
        "import sys, scrimp.optim\n"
        "heavy = {'transformers', 'peft', 'pydantic', 'typer', 'pyarrow', 'tokenizers', 'yaml', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
