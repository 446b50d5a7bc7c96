"""The gradient of a step is that of the sum of its micro-batches' losses."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.gradient.backprop import backprop


def quadratic(weight: Tensor, batch: Tensor) -> Tensor:
    return ((batch @ weight) ** 2).sum()


def test_micro_batches_add_up_to_the_whole(generator: torch.Generator) -> None:
    weight = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    batch = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    losses, found = [], []
    for sizes in ([8], [4, 4], [1, 2, 5], [1] * 8):
        weight.grad = None
        losses.append(backprop().step(lambda micro: quadratic(weight, micro), batch.split(sizes)))
        found.append(weight.grad)
    by_hand = 2 * batch.T @ (batch @ weight.detach())
    for loss, gradient in zip(losses, found, strict=True):
        torch.testing.assert_close(gradient, by_hand, rtol=1e-13, atol=0)
        torch.testing.assert_close(loss, quadratic(weight.detach(), batch), rtol=1e-13, atol=0)


def test_the_loss_is_a_detached_scalar(generator: torch.Generator) -> None:
    weight = torch.randn(3, generator=generator, requires_grad=True)
    loss = backprop().step(lambda micro: quadratic(weight, micro), torch.ones(2, 3).split(1))
    assert loss.shape == () and not loss.requires_grad


def test_gradients_are_added_to_those_that_are_there(generator: torch.Generator) -> None:
    weight = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    batch = [torch.randn(2, 3, generator=generator, dtype=torch.float64)]
    backprop().step(lambda micro: quadratic(weight, micro), batch)
    assert weight.grad is not None
    once = weight.grad.clone()
    backprop().step(lambda micro: quadratic(weight, micro), batch)
    assert torch.equal(weight.grad, 2 * once)


def test_one_micro_batchs_graph_is_gone_before_the_next_begins() -> None:
    import gc
    import weakref

    weight = torch.ones(3, requires_grad=True)
    alive: list[weakref.ref[Tensor]] = []

    def loss(micro: Tensor) -> Tensor:
        gc.collect()
        assert all(ref() is None for ref in alive), "the activations of an earlier micro-batch are still held"
        hidden = micro @ weight  # what a model's activations are: saved for the backward pass
        alive.append(weakref.ref(hidden))
        return (hidden**2).sum()

    backprop().step(loss, torch.ones(3, 1, 3).unbind())
    assert len(alive) == 3
