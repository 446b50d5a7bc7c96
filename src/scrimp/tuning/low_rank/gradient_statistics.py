"""The gradient of each frozen weight on some training tokens, one matrix at a time.

    G = g^T x          x: (tokens, in) what the layer got, g: (tokens, out) the gradient of what it gave

Frozen weights have no gradient, and if they had, all of them would be in memory at once. So each layer's
output gets a tap, a function that passes it on and forms G in the backward pass, in fp32; whoever asked takes
what he needs of it, before the next layer's is formed. Means over several passes are summed on the host.

- Only the taps' gradient is asked for, so parameters gather none and no hook of theirs runs.
- A layer that runs several times in a pass is handed over when its last use is in. Recomputed activations run
  a layer again in the backward pass, which is none of these uses.
- What never runs (an expert without tokens) is never handed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.base.protocols import Probe

Sink = Callable[[str, Tensor], None]  # takes a layer's name and its G, (out, in) float32


def each_gradient(modules: Mapping[str, nn.Module], probe: Probe, sink: Sink, *, passes: int = 1) -> None:
    """Hand over the mean gradient of each layer's weight, once.

    Args:
        modules: By name; each takes (..., in) first and returns (..., out): linear layers, or deltas.
        probe: Runs the model, on other tokens at each call where it can.
        sink: Takes (out, in) float32, which it may change. With one pass it is called in the backward pass,
            where nothing that the model computes with may be changed.
        passes: How often to run the probe. More than one hold 4 bytes a weight on the host.
    """
    if passes == 1:
        _run(modules, probe, sink)
        return
    sums: dict[str, Tensor] = {}
    devices: dict[str, torch.device] = {}

    def add(name: str, gradient: Tensor) -> None:
        devices[name] = gradient.device
        host = gradient.cpu()
        sums[name] = sums[name].add_(host) if name in sums else host

    for _ in range(passes):
        _run(modules, probe, add)
    for name in list(sums):
        sink(name, sums.pop(name).to(devices[name]).div_(passes))


def _run(modules: Mapping[str, nn.Module], probe: Probe, sink: Sink) -> None:
    taps = _Taps(sink)
    with ExitStack() as hooks, torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(taps.hook(name)))
        loss = probe()
        taps.is_backward = True
        torch.autograd.grad(loss, taps.anchors, allow_unused=True)
    for name, gradient in taps.pending.items():  # of a layer one of whose uses the loss does not depend on
        sink(name, gradient)


@dataclass(slots=True)
class _Taps:
    sink: Sink
    uses: Counter[str] = field(default_factory=Counter)
    pending: dict[str, Tensor] = field(default_factory=dict)
    anchors: list[Tensor] = field(default_factory=list)  # what autograd is asked for: one for each tap
    is_backward: bool = False

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def take(gradient: Tensor) -> None:
            self._take(name, gradient)

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            anchor = torch.zeros((), device=output.device, requires_grad=True)
            if not self.is_backward:
                self.uses[name] += 1
                self.anchors.append(anchor)
            tapped: Tensor = _Tap.apply(output, inputs[0], anchor, take)  # type: ignore[no-untyped-call]
            return tapped

        return after

    def _take(self, name: str, gradient: Tensor) -> None:
        if name in self.pending:
            gradient = self.pending.pop(name).add_(gradient)
        self.uses[name] -= 1
        if self.uses[name] == 0:
            self.sink(name, gradient)
        else:
            self.pending[name] = gradient


class _Tap(torch.autograd.Function):
    """Passes an output on, and hands g^T x over in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, take: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (g,) = ctx.saved_tensors, gradients
        ctx.take(g.flatten(0, -2).float().mT @ x.detach().flatten(0, -2).float())
        return g, None, torch.zeros((), device=g.device), None
