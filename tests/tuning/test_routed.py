"""FlyLoRA: what a token selects, what is kept for the backward pass, and how selections are balanced."""

from __future__ import annotations

import pytest
import torch
from tests.tuning.small import llama, tokens, train
from torch import Tensor, nn

from scrimp.base.errors import ScrimpError
from scrimp.tuning.deltas.routed import RoutedRanks, sparse_projection
from scrimp.tuning.low_rank.routed import FlyLora


def delta(*, rank: int = 8, active: int = 2, variant: str = "paper", entries: int = 3) -> RoutedRanks:
    """Make one with a B that is not zero."""
    a = sparse_projection(3, rank, 12, entries)
    made = RoutedRanks(a, out_features=6, active=active, scale=2.0, variant=variant)
    nn.init.normal_(made.b, generator=torch.Generator().manual_seed(1))
    return made


def inputs() -> Tensor:
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))


def test_projection_has_its_entries_in_each_row_and_their_deviation() -> None:
    a = sparse_projection(0, 32, 2000, 500)
    assert torch.equal((a != 0).sum(dim=1), torch.full((32,), 500))
    assert abs(a[a != 0].std() * 32 - 1) < 0.02
    assert torch.equal(a, sparse_projection(0, 32, 2000, 500))
    assert not torch.equal(a[0] != 0, a[1] != 0)


def test_every_rank_active_and_a_dense_is_a_lora_with_frozen_a() -> None:
    every, base, x = delta(active=8, entries=12), nn.Linear(12, 6), inputs()
    assert (every.a != 0).all()
    assert torch.allclose(every(x, base), base(x) + 2.0 * (x @ every.a.T) @ every.b.T, atol=1e-6)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_token_uses_the_ranks_that_answer_it_most(variant: str) -> None:
    some, base, x = delta(variant=variant), nn.Linear(12, 6), inputs()
    some.bias.copy_(torch.linspace(-0.05, 0.05, 8))
    z = x @ some.a.T
    score = z + some.bias
    order = (score.abs() if variant == "paper" else score).argsort(dim=-1, descending=True)
    mask = some.mask(z)
    assert torch.equal(mask.sum(dim=-1), torch.full((2, 5), 2.0))
    assert torch.equal(mask.gather(-1, order[..., :2]), torch.ones(2, 5, 2))
    assert torch.allclose(some(x, base), base(x) + 2.0 * (mask * z) @ some.b.T, atol=1e-6)


def test_signed_and_absolute_selection_differ() -> None:
    z = torch.tensor([[0.1, -0.9, 0.2, -0.8, 0.0, 0.0, 0.0, 0.0]])
    assert delta().mask(z)[0].nonzero().flatten().tolist() == [1, 3]
    assert delta(variant="released").mask(z)[0].nonzero().flatten().tolist() == [0, 2]


def test_input_is_not_kept_for_the_backward_pass_and_has_a_gradient() -> None:
    some, base, x = delta(), nn.Linear(12, 6).requires_grad_(False), inputs().requires_grad_()
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = some(x, base)
    assert (2, 5, 12) not in saved and (10, 12) not in saved
    y.sum().backward()
    change = torch.autograd.functional.jacobian(lambda v: some(v, base).sum(), x.detach())
    assert torch.allclose(x.grad, change)
    assert not torch.allclose(x.grad, base.weight.sum(dim=0).expand(2, 5, 12))


def test_bias_moves_once_a_step_by_what_was_selected_in_training_alone() -> None:
    model = llama(2)
    tune = FlyLora(rank=4, active=1, balance=0.01, targets=("q_proj",))
    trained = tune.select(model)
    some = next(iter(tune.deltas.values()))
    assert isinstance(some, RoutedRanks)
    model.eval()
    model(tokens(0))
    assert some.counts.sum() == 0
    model.train()
    model(tokens(0))
    model(tokens(1))  # two micro-batches of 12 tokens
    counts = some.counts.clone()
    assert counts.sum() == 24
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    tune.before_step(1, optimizer)
    expected = 0.01 * (counts.float().mean() - counts.float()).sign()
    assert torch.equal(some.bias, expected) and some.counts.sum() == 0
    tune.before_step(1, optimizer)
    assert torch.equal(some.bias, expected)


def test_balance_makes_selections_more_even() -> None:
    some, base = delta(rank=4, active=1, variant="released"), nn.Linear(12, 6)
    x = torch.randn(400, 12, generator=torch.Generator().manual_seed(4)).abs()  # lopsided answers

    def spread() -> float:
        some(x, base)
        share = some.counts / some.counts.sum()
        return float(share.std())

    before = spread()
    for _ in range(100):
        some.balance(0.01)
        after = spread()
    assert after < before / 2


def test_only_b_trains_and_a_resumed_run_is_the_same_bits() -> None:
    runs = []
    for cut in (None, 2):
        model = llama(2)
        tune = FlyLora(rank=4, active=2)
        trained = tune.select(model)
        assert {name.rpartition(".")[2] for name in trained} == {"b"}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
        train(model, tune, optimizer, range(cut or 4))
        if cut:
            stored = {name: value.clone() for name, value in tune.stored(model).items()}
            state = optimizer.state_dict()
            model, tune = llama(2), FlyLora(rank=4, active=2)
            trained = tune.select(model)
            optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
            model.load_state_dict(stored, strict=False)
            optimizer.load_state_dict(state)
            train(model, tune, optimizer, range(cut, 4))
        runs.append(tune.stored(model))
    assert any(name.endswith("bias") and value.any() for name, value in runs[0].items())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_it_cannot_be_merged() -> None:
    model = llama(2)
    tune = FlyLora(rank=4, active=2)
    tune.select(model)
    with pytest.raises(ScrimpError, match="cannot be merged"):
        tune.merge(model)
    assert next(iter(tune.deltas.values())).change(torch.zeros(8, 8)) is None


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rank": 4, "active": 5}, "active 5"),
        ({"rank": 9, "active": 2}, "rank 9 does not fit"),
        ({"balance": -1.0}, "balance -1.0"),
        ({"variant": "signed"}, "variant 'signed'"),
    ],
)
def test_mistakes_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(ScrimpError, match=word):
        FlyLora(**options).select(llama(2))
