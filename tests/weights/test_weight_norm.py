"""Weight normalisation: the function stays, GaLore works on the directions, and a plain model comes back."""

from __future__ import annotations

import torch
from torch import nn

from scrimp.optim import GaLore
from scrimp.weights.weight_norm import weight_norm


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24)).double()


def test_the_function_and_the_names_of_the_plain_model_stay() -> None:
    model, x = _model(), torch.randn(5, 24, dtype=torch.float64)
    before, names = model(x), [name for name, _ in model.named_parameters()]
    weight_norm().apply(model)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    weight_norm().materialize(model)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)


def test_the_gradient_of_a_direction_is_the_papers() -> None:
    """dg = sum_j G V / ||V||, dV = g / ||V|| (G - dg V / ||V||), row by row."""
    model, x = _model(), torch.randn(5, 24, dtype=torch.float64)
    weight_norm().apply(model)
    first = model[0].parametrizations.weight
    first.original0.data.mul_(1.5)  # so that g is not ||V||
    weight = model[0].weight.detach().requires_grad_()
    out = nn.functional.linear(x, weight, model[0].bias)
    (model[2](model[1](out)) ** 2).sum().backward()
    whole = weight.grad
    (model(x) ** 2).sum().backward()
    v, g = first.original1.detach(), first.original0.detach()
    size = v.norm(dim=1, keepdim=True)
    dg = (whole * v).sum(1, keepdim=True) / size
    torch.testing.assert_close(first.original0.grad, dg, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        first.original1.grad, g / size * (whole - dg * v / size), rtol=1e-10, atol=1e-12
    )


def test_galore_projects_directions_and_leaves_lengths_whole() -> None:
    model, x = _model(), torch.randn(64, 24, dtype=torch.float64)
    weight_norm().apply(model)
    optimizer = GaLore(model, lr=0.02, rank=4, refresh_every=5, scale=1.0)
    pieces = {n: optimizer.plan_of(p).composition.projector for n, p in model.named_parameters()}
    assert {n for n, projector in pieces.items() if projector} == {
        "0.parametrizations.weight.original1",
        "2.parametrizations.weight.original1",
    }
    losses = []
    for _ in range(30):
        loss = ((model(x) - x) ** 2).mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
