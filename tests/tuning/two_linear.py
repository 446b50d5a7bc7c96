"""Two layers that an adapter is laid over, and what comes of a pass: for tests beside peft's own layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

IN, OUT, TOKENS = 24, 40, 11


class Two(nn.Module):
    """Two linear layers, the first with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, OUT), nn.Linear(OUT, IN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).tanh())
        return y


def outcome(model: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Return the output and every gradient of a loss that weights all outputs differently."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)  # of dropout
    y = model(x) if call is None else call(model, x)
    (y.float() * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": y.detach(), "x": x.grad, **gradients}


def assert_same(mine: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert mine.keys() == other.keys()
    for name, value in other.items():
        error = (mine[name] - value).abs().max() / value.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"
        assert mine[name].dtype == value.dtype and mine[name].shape == value.shape, name
