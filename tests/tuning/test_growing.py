"""IncreLoRA and TriAdaptLoRA: what they compute and measure, when they grow, and what stays as it is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.tuning.small import PEFT_ASKS, llama, loss_of, tokens, train
from torch import Tensor, nn

from scrimp.base.errors import ScrimpError
from scrimp.tuning.deltas.growing import ADVANCE, RankOnes, Triangular
from scrimp.tuning.deltas.tuning import DeltaTuning
from scrimp.tuning.low_rank.growing import IncreLora, TriAdaptLora
from scrimp.tuning.low_rank.rank_growth import (
    Orthogonality,
    ScoredGrowth,
    ThresholdGrowth,
    ranked,
    sensitivities,
    share,
)

INCRE = {"interval": 2, "measure_every": 1, "warmup": 1}
TRI = {"rank": 4, "largest": 6, "first": 1, "last": 9, "every": 2}


def rank_ones(**options: int) -> RankOnes:
    """Make one for 7 inputs and 5 outputs."""
    return RankOnes(7, 5, **{"rank": 2, "ahead": 1, "largest": 5, "alpha": 16.0, "seed": 3, **options})


def with_coefficients(delta: RankOnes) -> RankOnes:
    """Give what has grown coefficients that are not zero."""
    with torch.no_grad():
        delta.e.copy_(torch.linspace(1, 2, len(delta.e)) * delta.grown())
    return delta


def inputs() -> Tensor:
    return torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(2))


def test_fixed_rank_is_an_svd_lora() -> None:
    delta, base, x = with_coefficients(rank_ones(ahead=0)), nn.Linear(7, 5), inputs()
    change = 16 / (2 + 1e-5) * delta.b[:, :2] @ torch.diag(delta.e[:2]) @ delta.a[:2]
    assert torch.allclose(delta(x, base), base(x) + x @ change.T, atol=1e-6)
    found = delta.factors()
    assert found.a.shape == (2, 7) and torch.allclose(found.b @ found.a, change, atol=1e-7)


def test_what_learns_ahead_has_a_fixed_coefficient_and_does_not_count() -> None:
    delta, base, x = with_coefficients(rank_ones()), nn.Linear(7, 5), inputs()
    assert delta.rank == 2 and int(delta.present().sum()) == 3
    e = torch.tensor([*delta.e[:2].tolist(), ADVANCE])
    change = 16 / (2 + 1e-5) * delta.b[:, :3] @ torch.diag(e) @ delta.a[:3]
    assert torch.allclose(delta(x, base), base(x) + x @ change.T, atol=1e-6)
    delta(x, base).square().sum().backward()
    assert delta.a.grad[2].any() and delta.b.grad[:, 2].any()
    assert delta.e.grad[:2].all() and not delta.e.grad[2:].any()


def test_what_is_not_there_is_zero_has_no_gradient_and_stays_zero() -> None:
    for delta in (with_coefficients(rank_ones()), Triangular(7, 5, rank=3, largest=5, alpha=16.0, seed=0)):
        base, x = nn.Linear(7, 5).requires_grad_(False), inputs()
        optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            delta(x, base).square().sum().backward()
            Orthogonality(weight=1.0).before_step(1, {"layer": delta}, optimizer, None)
            optimizer.step()
        assert delta.a[:3].all() and not delta.a[3:].any()
        assert delta.b[:, :3].all() and not delta.b[:, 3:].any()


def test_growing_takes_what_learnt_ahead_and_draws_its_successor() -> None:
    delta = with_coefficients(rank_ones())
    before = delta.a.detach().clone()
    change = delta.product().b @ delta.product().a
    delta.grow(1)
    assert delta.rank == 3 and int(delta.present().sum()) == 4
    assert torch.equal(delta.a[:3], before[:3]) and delta.a[3].any() and not delta.a[4].any()
    grown = delta.product().b @ delta.product().a
    assert torch.allclose(grown * 3, change * 2, rtol=1e-4, atol=1e-7)  # but for rho, the same function
    delta.stop()
    assert delta.rank == 3 and int(delta.present().sum()) == 3 and not delta.a[3].any()
    fresh = rank_ones(rank=4, ahead=0)
    assert torch.equal(fresh.a[3], rank_ones(rank=3, ahead=1).a[3])  # drawn by its number alone


def test_sensitivity_is_that_of_the_dense_change_and_leaves_no_gradient() -> None:
    model = llama(2)
    tune = IncreLora(first_rank=2)
    trained = tune.select(model)
    deltas = [with_coefficients(delta) for delta in tune.deltas.values() if isinstance(delta, RankOnes)]
    found = sensitivities(deltas, lambda: loss_of(model, 1))
    assert all(p.grad is None for p in trained.values())
    plain = llama(2)
    for name, delta in tune.deltas.items():
        plain.get_submodule(name).weight.data += delta.change(torch.empty(0))
    loss_of(plain, 1).backward()
    for (name, delta), score in zip(tune.deltas.items(), found, strict=True):
        g = plain.get_submodule(name).weight.grad
        change = delta.change(torch.empty(0))
        wanted = (change * g).abs().sum() / math.sqrt(g.numel())
        assert torch.allclose(score, wanted, rtol=1e-4), name


def test_sensitivity_in_tiles_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(2)
    tune = IncreLora(first_rank=2)
    tune.select(model)
    deltas = [with_coefficients(delta) for delta in tune.deltas.values() if isinstance(delta, RankOnes)]
    whole = sensitivities(deltas, lambda: loss_of(model, 1))
    monkeypatch.setattr("scrimp.tuning.low_rank.rank_growth._TILE", 30)
    tiled = sensitivities(deltas, lambda: loss_of(model, 1))
    assert torch.allclose(torch.stack(whole), torch.stack(tiled), rtol=1e-5)


def test_increlora_gives_out_its_ranks_and_then_stops() -> None:
    model = llama(2)
    tune = IncreLora(**INCRE, top=3, rank=2, largest=4)
    trained = tune.select(model)
    deltas = [delta for delta in tune.deltas.values() if isinstance(delta, RankOnes)]
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    seen: list[list[int]] = []
    train(model, tune, optimizer, range(14), after=lambda step: seen.append([d.rank for d in deltas]))
    sums = [sum(ranks) for ranks in seen]
    # From step 2 on, three layers grow by one every second step, until 14 layers have 28.
    assert sums[:10] == [14, 14, 17, 17, 20, 20, 23, 23, 26, 26]
    assert sums[10:] == [28] * 4
    assert max(seen[-1]) <= 4 and len(set(seen[-1])) > 1
    assert all(torch.equal(delta.present(), delta.grown()) for delta in deltas)


def _score_rule(**options: int) -> ScoredGrowth:
    rule = IncreLora(**options).events[0]
    assert isinstance(rule, ScoredGrowth)
    return rule


def test_growth_fits_the_length_of_the_run_and_gives_all_out_in_it() -> None:
    rule = _score_rule()
    assert (rule.warmup, rule.interval, rule.every, rule.layers(14)) == (1000, 1000, 100, 2)
    rule = _score_rule(steps=3900)
    assert (rule.warmup, rule.interval, rule.interval % rule.every, rule.layers(72)) == (97, 97, 0, 5)
    rule = _score_rule(steps=60, rank=4)
    growths = sum(step > rule.warmup and step % rule.interval == 0 for step in range(60))
    assert growths * rule.layers(210) >= 210 * (4 - 1)
    assert _score_rule(top=3).layers(210) == 3
    for steps, expected in ((None, (100, 1000, 100)), (60, (3, 30, 3)), (2, (1, 10, 1))):
        grows = TriAdaptLora(steps=steps).events[0]
        assert isinstance(grows, ThresholdGrowth)
        assert (grows.first, grows.last, grows.every) == expected


def test_what_was_dropped_no_longer_counts_in_the_penalty() -> None:
    delta = rank_ones()
    delta.stop()
    rule = Orthogonality(weight=1.0)
    rule.before_step(1, {"layer": delta}, torch.optim.SGD(delta.parameters(), lr=1.0), None)
    wanted = delta.a.grad.clone()
    with torch.no_grad():
        delta.a[2] = 1.0  # as an optimizer's momentum may move it
    rule.before_step(1, {"layer": delta}, torch.optim.SGD(delta.parameters(), lr=1.0), None)
    assert torch.equal(delta.a.grad, wanted)


def test_the_highest_scores_grow_and_a_full_layer_makes_room_for_the_next() -> None:
    full, low, high = rank_ones(rank=5), rank_ones(rank=1), rank_ones(rank=1)
    order = ranked([low, full, high], torch.tensor([1.0, 9.0, 2.0]))
    assert order[0] is high and order[1] is low and len(order) == 2
    assert share(order, 2, 3) == 0
    assert (high.rank, low.rank) == (3, 2)


def test_the_penalty_is_that_of_the_loss() -> None:
    delta = with_coefficients(rank_ones())
    there = slice(0, 3)
    a, b = delta.a[there], delta.b[:, there]
    penalty = ((a @ a.T - torch.eye(3)).norm() + (b.T @ b - torch.eye(3)).norm()) / 2
    (0.1 * penalty).backward()
    wanted = delta.a.grad.clone(), delta.b.grad.clone()
    optimizer = torch.optim.SGD(delta.parameters())
    for _ in range(2):  # a second call sets the same
        Orthogonality(weight=0.1).before_step(0, {"layer": delta}, optimizer, None)
    assert torch.allclose(delta.a.grad, wanted[0], atol=1e-7)
    assert torch.allclose(delta.b.grad, wanted[1], atol=1e-7)


def test_triangles_are_the_blocks_that_grew_and_meet_in_squares() -> None:
    delta, base, x = Triangular(7, 5, rank=2, largest=5, alpha=16.0, seed=0), nn.Linear(7, 5), inputs()
    assert torch.equal(delta(x, base), base(x))
    delta(x, base).square().sum().backward()
    assert delta.lower.grad[:2, :2].all() and delta.upper.grad[:2, :2].all()
    with torch.no_grad():
        delta.lower.fill_(0.5)
        delta.upper.fill_(0.25)
    before = delta.factors()
    delta.grow(1)
    core = torch.tensor([[0.75, 0.75, 0.25], [0.75, 0.75, 0.25], [0.5, 0.5, 0.75]])
    change = 16 / (3 + 1e-5) * delta.b[:, :3] @ core @ delta.a[:3]
    assert before.a.shape == (2, 7) and torch.allclose(delta(x, base), base(x) + x @ change.T, atol=1e-5)
    found = delta.factors()
    assert torch.allclose(found.b @ found.a, change, atol=1e-6)
    assert torch.allclose(delta.norm(), core.norm() / 2)


def test_a_new_block_changes_nothing_but_the_scale_and_learns() -> None:
    delta, base, x = Triangular(7, 5, rank=2, largest=5, alpha=16.0, seed=0), nn.Linear(7, 5), inputs()
    with torch.no_grad():
        delta.lower[:2, :2] = 1.0
    before = delta(x, base) - base(x)
    delta.grow(2)
    assert torch.allclose(delta(x, base) - base(x), before / 2, rtol=1e-3, atol=1e-6)
    delta(x, base).square().sum().backward()
    assert delta.lower.grad[2:4, :4].all() and delta.upper.grad[:4, 2:4].all()
    assert not delta.lower.grad[:2, 2:].any() and not delta.upper.grad[4:].any()


def test_thresholds_are_linear_or_exponential() -> None:
    options = {"target": 8, "first": 100, "last": 1000, "every": 100, "mu": 0.5, "increase": 4}
    linear = ThresholdGrowth(growth="linear", **options)
    assert [linear.layers(step, 90) for step in (100, 200, 550, 1000)] == [1, 10, 45, 90]
    assert ThresholdGrowth(growth="exponential", **options).layers(100, 90) == 9


@pytest.mark.parametrize("growth", ["linear", "exponential"])
def test_triadapt_grows_where_the_core_changed_most_up_to_its_budget(growth: str) -> None:
    model = llama(2)
    tune = TriAdaptLora(**TRI, growth=growth)
    trained = tune.select(model)
    deltas = [delta for delta in tune.deltas.values() if isinstance(delta, Triangular)]
    assert [delta.rank for delta in deltas] == [2] * 14
    with torch.no_grad():
        deltas[5].lower[0, 0] = 9.0
    tune.before_step(1, torch.optim.SGD(trained.values()), lambda: loss_of(model, 0))
    assert deltas[5].rank == 4
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    train(model, tune, optimizer, range(2, 12))
    ranks = [delta.rank for delta in deltas]
    assert sum(ranks) <= 4 * 14 and max(ranks) <= 6
    assert sum(ranks) > 2 * 14 + 2


NAMES = {"increlora": lambda: IncreLora(**INCRE), "triadapt-lora": lambda: TriAdaptLora(**TRI)}


@pytest.mark.parametrize("make", NAMES.values(), ids=NAMES)
def test_a_resumed_run_is_the_same_bits_across_growth(make) -> None:
    runs = []
    for cut in (None, 3):
        model = llama(2)
        tune: DeltaTuning = make()
        trained = tune.select(model)
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
        train(model, tune, optimizer, range(cut or 6))
        if cut:
            stored = {name: value.clone() for name, value in tune.stored(model).items()}
            state = optimizer.state_dict()
            model, tune = llama(2), make()
            trained = tune.select(model)
            optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
            model.load_state_dict(stored, strict=False)
            optimizer.load_state_dict(state)
            train(model, tune, optimizer, range(cut, 6))
        runs.append(tune.stored(model))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.parametrize("make", NAMES.values(), ids=NAMES)
def test_grown_ranks_export_as_plain_loras_of_their_ranks(make, tmp_path: Path) -> None:
    from peft import PeftModel

    model = llama(2)
    tune: DeltaTuning = make()
    trained = tune.select(model)
    train(model, tune, torch.optim.AdamW(trained.values(), lr=5e-2), range(4))
    tune.save(model, tmp_path, "base")
    with torch.no_grad():
        adapted = model(tokens(9)).logits
        assert (adapted - llama(2)(tokens(9)).logits).abs().max() > 1e-3
        loaded = PeftModel.from_pretrained(llama(2), tmp_path)
        assert torch.allclose(loaded(tokens(9)).logits, adapted, atol=1e-5)
        tune.merge(model)
        assert torch.allclose(model(tokens(9)).logits, adapted, atol=1e-5)


@pytest.mark.parametrize("make", NAMES.values(), ids=NAMES)
def test_a_simulation_neither_measures_nor_grows(make) -> None:
    with torch.device("meta"):
        model = llama(2)
        tune: DeltaTuning = make()
        trained = tune.select(model)
    assert all(p.is_meta for p in trained.values())
    tune.before_step(3, torch.optim.SGD(trained.values()), None)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: IncreLora(rank=2, first_rank=3), "must not fall"),
        (lambda: IncreLora(largest=9), "rank 9 does not fit"),
        (lambda: IncreLora(interval=150, measure_every=100), "multiple of measure_every"),
        (lambda: IncreLora(beta1=1.0), "between 0 and 1"),
        (lambda: IncreLora(top=0), "top 0"),
        (lambda: TriAdaptLora(rank=3), "even"),
        (lambda: TriAdaptLora(largest=4), "must not fall"),
        (lambda: TriAdaptLora(first=5, last=5), "a step before"),
        (lambda: TriAdaptLora(growth="cubic"), "growth 'cubic'"),
    ],
)
def test_mistakes_are_refused(make, word: str) -> None:
    with pytest.raises(ScrimpError, match=word):
        make().select(llama(2))
