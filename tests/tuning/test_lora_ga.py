"""Starts from gradients: the statistics are autograd's, LoRA-GA and LoRA-One their authors'."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tuning.small_adapted import adapted, begin, best, change, llama, logits, loss_of, low_rank
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scrimp.base.errors import ScrimpError
from scrimp.tuning.low_rank.gradient_statistics import each_gradient
from scrimp.tuning.low_rank.lora_ga import Direction, LoraGA, LoraOne, picked


def _dense_gradients(model: nn.Module, *seeds: int) -> dict[str, Tensor]:
    """Return the mean gradients of unfrozen weights."""
    model.requires_grad_(True)
    (torch.stack([loss_of(model, seed) for seed in seeds or (1,)]).mean()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _linear(model: nn.Module) -> dict[str, nn.Module]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    assert len(found) == 14
    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_frozen_weights_are_autograd_s_and_come_one_at_a_time(recompute: bool) -> None:
    expected = _dense_gradients(llama())
    model = llama().requires_grad_(False)
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    seen: list[str] = []
    alive: list[weakref.ref[Tensor]] = []

    def sink(name: str, gradient: Tensor) -> None:
        assert all(ref() is None for ref in alive)
        alive.append(weakref.ref(gradient))
        seen.append(name)
        torch.testing.assert_close(gradient, expected[f"{name}.weight"], rtol=1e-4, atol=1e-7)

    each_gradient(_linear(model), lambda: loss_of(model), sink)
    assert sorted(seen) == sorted(_linear(model))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks for m in _linear(model).values())


def test_several_passes_hand_over_their_mean() -> None:
    expected = _dense_gradients(llama(), 1, 2, 3)
    model = llama().requires_grad_(False)
    seeds = iter((1, 2, 3))
    found: dict[str, Tensor] = {}
    each_gradient(_linear(model), lambda: loss_of(model, next(seeds)), found.__setitem__, passes=3)
    assert len(found) == 14
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[f"{name}.weight"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_that_runs_twice_is_handed_over_once_and_whole(recompute: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 5), torch.randn(3, 4, 5)

    def run(x: Tensor) -> Tensor:
        return layer(layer(x).tanh())

    def probe() -> Tensor:
        y: Any = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        return y.square().mean()

    probe().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    layer.requires_grad_(False)
    found: list[Tensor] = []
    each_gradient({"layer": layer}, probe, lambda name, gradient: found.append(gradient))
    assert len(found) == 1
    torch.testing.assert_close(found[0], expected)


def test_parameters_gather_nothing_and_their_hooks_do_not_run() -> None:
    model = llama()
    ran: list[Tensor] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(ran.append)
    each_gradient(_linear(model), lambda: loss_of(model), lambda name, gradient: None)
    assert not ran
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_lora_ga_s_first_step_follows_the_best_approximation_of_rank_2r(direction: Direction) -> None:
    model, r = llama(), 3
    begin(model, LoraGA(rank=r, direction=direction, scale="unit", seed=5))
    expected = _dense_gradients(llama())
    for name, layer in adapted(model).items():
        delta, g = low_rank(layer), expected[f"{name}.weight"].double()
        a, b = delta.lora_A.detach().double(), delta.lora_B.detach().double()
        torch.testing.assert_close(a @ a.mT, torch.eye(r, dtype=a.dtype), atol=1e-5, rtol=0)
        torch.testing.assert_close(b.mT @ b, torch.eye(r, dtype=a.dtype), atol=1e-5, rtol=0)
        step = b @ b.mT @ g + g @ a.mT @ a
        scale = g.abs().max()
        torch.testing.assert_close(step / scale, best(g, 2 * r) / scale, atol=2e-4, rtol=0)


def test_lora_ga_leaves_the_function_and_the_base() -> None:
    model = llama()
    begin(model, LoraGA(rank=4))
    base = llama()
    assert torch.equal(logits(model), logits(base))
    for name, layer in adapted(model).items():
        assert torch.equal(layer.base_layer.weight, base.get_parameter(f"{name}.weight"))


def test_lora_ga_s_stable_factors_do_not_grow_with_the_gradient() -> None:
    model = llama()
    tune = LoraGA(rank=4, gamma=64)
    begin(model, tune)
    for layer in adapted(model).values():
        delta = low_rank(layer)
        norm = layer.base_layer.out_features**0.25 / math.sqrt(64)
        torch.testing.assert_close(delta.lora_A.norm(dim=1), torch.full((4,), norm), rtol=1e-4, atol=0)
        torch.testing.assert_close(delta.lora_B.norm(dim=0), torch.full((4,), norm), rtol=1e-4, atol=0)
        assert delta.scale == 16 / math.sqrt(4)


def test_lora_ga_s_other_scales() -> None:
    for scale, rank_stabilised in (("gd", True), ("weightS", False)):
        model = llama()
        options: Any = {"scale": scale, "rank_stabilised": rank_stabilised}
        begin(model, LoraGA(rank=4, alpha=8, **options))
        s = 8 / 2 if rank_stabilised else 8 / 4
        for layer in adapted(model).values():
            sigma = torch.linalg.svdvals(layer.base_layer.weight)[:4]
            norm = 1 / s if scale == "gd" else float((sigma / s).sqrt().mean())
            torch.testing.assert_close(low_rank(layer).lora_A.norm(dim=1), torch.full((4,), norm))
            assert low_rank(layer).scale == s


def test_a_gradient_start_acts_before_step_0_alone() -> None:
    model, tune = llama(), LoraGA(rank=4)
    trained = tune.select(model)
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    tune.before_step(0, optimizer)  # a simulation
    tune.before_step(1, optimizer, lambda: loss_of(model))
    assert all(torch.equal(p, before[name]) for name, p in trained.items())
    tune.before_step(0, optimizer, lambda: loss_of(model))
    assert not any(torch.equal(p, before[name]) for name, p in trained.items())


@pytest.mark.parametrize(("scale", "gamma"), [("paper", 128), ("stable", 64)])
def test_lora_one_begins_with_the_best_step_down_the_gradient(scale: Any, gamma: float) -> None:
    model = llama()
    begin(model, LoraOne(rank=4, scale=scale, gamma=gamma))
    expected = _dense_gradients(llama())
    for name, layer in adapted(model).items():
        g = expected[f"{name}.weight"].double()
        size = 16 / 2 / gamma * (g.shape[0] ** 0.5 if scale == "stable" else 1)
        step = -size * best(g, 4) / torch.linalg.matrix_norm(g, 2)
        torch.testing.assert_close(change(layer).double(), step, atol=1e-4 * size, rtol=0)
        a, b = low_rank(layer).lora_A, low_rank(layer).lora_B
        torch.testing.assert_close(a @ a.mT, b.mT @ b, atol=1e-5, rtol=0)  # balanced
    assert loss_of(model) < loss_of(llama())


def test_lora_one_of_no_gradient_is_the_base() -> None:
    model, tune = llama(), LoraOne(rank=4)
    optimizer = torch.optim.SGD(tune.select(model).values(), lr=0.1)
    tune.before_step(0, optimizer, lambda: 0 * loss_of(model))
    assert torch.equal(logits(model), logits(llama()))


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    model, tune = llama(), LoraGA(rank=4)
    optimizer = torch.optim.SGD(tune.select(model).values(), lr=0.1)
    with pytest.raises(ScrimpError, match=r"gradient of model\.layers\.1.* is not finite"):
        tune.before_step(0, optimizer, lambda: math.inf * loss_of(model))


def test_random_halves_are_disjoint() -> None:
    pick = picked("random", 8, seed=3)
    assert sorted(pick.a + pick.b) == list(range(16))
    assert pick.a != sorted(pick.a)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraGA(rank=9, targets=("k_proj",)).select(llama()), "has 16: the largest rank is 8"),
        (lambda: LoraGA(direction="ArB3r"), "'ArB3r' is unknown; choose from: ArB2r"),  # type: ignore[arg-type]
        (lambda: LoraGA(gamma=0), "gamma 0 must be above 0"),
        (lambda: LoraGA(dropout=1.0), "dropout 1.0"),
        (lambda: LoraOne(scale="unit"), "'unit' is unknown"),  # type: ignore[arg-type]
        (lambda: LoraOne(passes=0), "passes 0"),
        (lambda: LoraOne(rank=17, targets=("k_proj",)).select(llama()), "largest allowed is 16"),
    ],
)
def test_nonsense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ScrimpError, match=message):
        make()
