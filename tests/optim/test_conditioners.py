"""Clipping of spikes, steady norms and the natural gradient: closed forms and identities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from tests.optim.driver import Driver, gradients, relative
from torch import Tensor, nn

from scrimp.base.errors import ScrimpError
from scrimp.optim import StableSPAM
from scrimp.optim.conditioners.natural_gradient import NaturalGradient
from scrimp.optim.conditioners.spike_clip import SpikeClip
from scrimp.optim.conditioners.stable import StableClip
from scrimp.optim.pieces import Conditioner, Reset, Target
from scrimp.optim.rules.adam import Adam
from scrimp.optim.rules.lion import Lion
from scrimp.optim.rules.sgd import SGD

SHAPE = (24, 16)
HF = {"eps": 1e-6}
CONDITIONERS: list[Conditioner] = [SpikeClip(), StableClip(), NaturalGradient(history=3)]


def matrix(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Alone:
    """A conditioner without a rule: what it makes of gradients."""

    def __init__(
        self, conditioner: Conditioner, shape: tuple[int, ...] = SHAPE, role: str = "linear"
    ) -> None:
        target = Target(name="w", shape=shape, role=role)  # type: ignore[arg-type]
        self.conditioner, self.updates = conditioner, 0
        self.slots = {
            slot.name: torch.zeros(slot.shape, dtype=torch.float64)
            for slot in conditioner.slots(shape, target)
        }

    def __call__(self, g: Tensor, v: Tensor | None = None) -> Tensor:
        self.updates += 1
        numbers = self.conditioner.scalars({"eps": 1e-8}, self.updates)
        s = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        slots = {name: value.to(g.dtype) for name, value in self.slots.items()}
        made, self.slots = self.conditioner.condition(g, {} if v is None else {"exp_avg_sq": v}, slots, s)
        return made

    def each(self, given: Sequence[Tensor]) -> list[Tensor]:
        return [self(g) for g in given]


# ---- SPAM ----------------------------------------------------------------------------------------------


def spam(conditioner: SpikeClip, *, warmup: int = 0) -> Driver:
    reset = Reset(every=conditioner.every, warmup=warmup, restart=False)
    return Driver(Adam(convention="hf"), matrix(*SHAPE), conditioner=conditioner, reset=reset, options=HF)


def test_spam_with_an_infinite_threshold_and_no_reset_is_adam() -> None:
    given = gradients(SHAPE, 40)
    plain = Driver(Adam(convention="hf"), matrix(*SHAPE), options=HF).run(given)
    assert torch.equal(spam(SpikeClip(theta=math.inf, every=0)).run(given), plain)


def test_a_spike_is_cut_to_the_root_of_its_second_moment() -> None:
    clip, v = Alone(SpikeClip(theta=4.0, every=0, window=0)), matrix(*SHAPE, seed=2).square()
    g = matrix(*SHAPE)
    expected = g.sign() * torch.minimum(g.abs(), 2 * v.sqrt())
    assert relative(clip(g, v), expected) < 1e-15
    assert not torch.equal(clip(g, v), g)


def test_spikes_pass_in_the_windows_alone() -> None:
    clip, v = Alone(SpikeClip(theta=1.0, every=50, window=20)), torch.ones(SHAPE, dtype=torch.float64)
    spike = torch.full(SHAPE, 9.0, dtype=torch.float64)
    clipped = [step for step in range(1, 121) if bool((clip(spike, v) == 1).all())]
    assert clipped == [*range(20, 50), *range(70, 100), 120]


@pytest.mark.parametrize(("variant", "moves"), [("paper", True), ("released", False)])
def test_a_row_first_seen_late_moves(variant: str, moves: bool) -> None:
    driver = spam(SpikeClip(every=500, variant=variant))  # type: ignore[arg-type]
    given = gradients(SHAPE, 30)
    for g in given[:25]:
        g[3] = 0
    driver.run(given[:25])
    before = driver.w.clone()
    driver.run(given[25:])
    assert bool((driver.w[3] != before[3]).any()) is moves
    assert bool((driver.w[4] != before[4]).all())


def test_spam_follows_its_equations_through_two_resets() -> None:
    clip = SpikeClip(theta=2.0, every=13, window=4)
    w, m, v, beta1, beta2 = matrix(*SHAPE), *torch.zeros(2, *SHAPE, dtype=torch.float64), 0.9, 0.999
    given = gradients(SHAPE, 30)
    for k, raw in enumerate(given, start=1):
        if k % 13 == 0:
            m, v = torch.zeros_like(m), torch.zeros_like(v)
        g = raw.clone()
        if k >= 4 and k % 13 >= 4:
            spikes = (g**2 > 2 * v) & (v > 0)
            g[spikes] = (g.sign() * (2 * v).sqrt())[spikes]
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        size = 1e-2 * math.sqrt(1 - beta2**k) / (1 - beta1**k)
        w = w - size * m / (v.sqrt() + 1e-6)
    assert relative(spam(clip).run(given), w) < 1e-13


def test_spike_clipping_needs_a_second_moment() -> None:
    driver = Driver(Lion(), matrix(*SHAPE), conditioner=SpikeClip())
    with pytest.raises(ScrimpError, match="use it with the rule Adam"):
        driver.step(matrix(*SHAPE))


# ---- Stable-SPAM ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_stable_spam_follows_its_equations_through_two_resets(variant: str) -> None:
    (g1, g2), theta, eps, every = (0.7, 0.9), 0.9, 1e-8, 7
    clip = Alone(StableClip(gammas=(g1, g2), theta=theta, every=every, variant=variant))  # type: ignore[arg-type]
    top = first = second = 0.0
    shared = 0  # the authors' counter, which their reset sets to 1 after the statistics read it
    for k, raw in enumerate(gradients(SHAPE, 20), start=1):
        shared += 1
        t = k if variant == "paper" else shared
        largest = float(raw.abs().max())
        top = theta * top + (1 - theta) * largest
        limit = top / (1 - theta**t)
        g = torch.where(raw.abs() > limit, raw * limit / largest, raw)
        norm = float(g.norm())
        first, second = g1 * first + (1 - g1) * norm, g2 * second + (1 - g2) * norm**2
        wanted = first / (1 - g1**t) / (math.sqrt(second / (1 - g2**t)) + eps)
        assert relative(clip(raw), g * wanted / norm) < 1e-14
        if k % every == 0:
            shared = 1


def test_stable_spam_anneals_over_a_run_through_a_reset_and_stays_where_it_ends() -> None:
    (g1, g2), (b1, b2), theta, lr, every, total = (0.7, 0.9), (0.9, 0.999), 0.999, 1e-2, 5, 8
    w = nn.Parameter(matrix(*SHAPE))
    optimizer = StableSPAM([w], lr=lr, weight_decay=0.1, reset_every=every, anneal_steps=total)
    expected = w.detach().clone()
    top, first, second, age = torch.zeros(4, dtype=torch.float64)
    m, v = torch.zeros_like(expected), torch.zeros_like(expected)
    for k, raw in enumerate(gradients(SHAPE, 12), start=1):
        w.grad = raw.clone()
        optimizer.step()
        s = 0.5 + 0.25 * (1 + math.cos(math.pi * min(k, total + 1) / (total + 1)))
        top = theta * top + (1 - theta) * raw.abs().max()
        limit = top / (1 - theta**k)
        g = torch.where(raw.abs() > limit, raw * limit / raw.abs().max(), raw)
        first = g1 * s * first + (1 - g1 * s) * g.norm()
        second = g2 * second + (1 - g2) * g.norm() ** 2
        g = g / g.norm() * (first / (1 - (g1 * s) ** k)) / ((second / (1 - g2**k)).sqrt() + 1e-8)
        age += 1
        if k % every == 0:
            m, v, age = torch.zeros_like(m), torch.zeros_like(v), torch.ones_like(age)
        m, v = b1 * s * m + (1 - b1 * s) * g, b2 * v + (1 - b2) * g * g
        expected -= lr * 0.1 * expected
        expected -= lr * (m / (1 - (b1 * s) ** age)) / ((v / (1 - b2**age)).sqrt() + 1e-8)
        assert relative(w.detach(), expected) < 1e-13


def test_a_run_of_no_steps_cannot_be_annealed_over() -> None:
    with pytest.raises(ScrimpError, match="anneal_steps is 0; it must be a whole number of at least 1"):
        StableSPAM([nn.Parameter(torch.zeros(SHAPE))], anneal_steps=0)


def test_the_released_counter_lets_spikes_pass_after_a_reset() -> None:
    left = {}
    for variant in ("paper", "released"):
        clip = Alone(StableClip(every=30, variant=variant))
        clip.each([g / g.abs().max() for g in gradients(SHAPE, 33)])
        spike = matrix(*SHAPE, seed=5) / 100
        spike[0, 0] = 5
        made = clip(spike) / spike
        left[variant] = float(made[0, 0] / made[1, 1])
    # The largest elements were 1, so a spike of 5 is to be cut to little more than a fifth.
    assert left["paper"] == pytest.approx(1 / 5, rel=0.2)
    assert left["released"] == pytest.approx(1, rel=1e-12)


def test_a_steady_gradient_is_normalised_to_length_one() -> None:
    clip, g = Alone(StableClip()), matrix(*SHAPE)
    assert all(float(made.norm()) == pytest.approx(1, rel=1e-7) for made in clip.each([g] * 5))


def test_the_largest_element_is_never_above_the_tracked_maximum() -> None:
    clip, given = Alone(StableClip(theta=0.5)), gradients(SHAPE, 10)
    for t, g in enumerate(given, start=1):
        made = clip(g)
        limit = clip.slots["max_avg"] / (1 - 0.5**t)
        kept = (g.abs() <= limit) & (g != 0)
        scale = (made / g)[kept].mean()  # what the norm did to all
        assert bool((made.abs() <= scale * limit * (1 + 1e-12)).all())


def test_a_zero_gradient_stays_zero_under_stable_spam() -> None:
    clip = Alone(StableClip())
    made = clip.each([torch.zeros(SHAPE, dtype=torch.float64), matrix(*SHAPE)])
    assert not bool(made[0].any())
    assert bool(made[1].isfinite().all())


# ---- the natural gradient ------------------------------------------------------------------------------


def test_a_history_of_one_divides_by_damping_and_square() -> None:
    g = matrix(*SHAPE)
    made = Alone(NaturalGradient(history=1, damping=0.5))(g)
    assert relative(made, g / (0.5 + g.square().sum())) < 1e-14


# The dense inverse loses as many digits as its condition number, about scale^2, has.
@pytest.mark.parametrize(("scale", "tolerance"), [(1e-3, 1e-13), (1.0, 1e-12), (1e3, 1e-6)])
def test_the_natural_gradient_is_the_dense_inverse(scale: float, tolerance: float) -> None:
    natural, given = Alone(NaturalGradient(history=4, damping=0.5)), gradients(SHAPE, 9)
    for t, made in enumerate(natural.each([scale * g for g in given])):
        history = scale * torch.stack([g.flatten() for g in given[max(0, t - 3) : t + 1]], dim=1)
        fisher = history @ history.mT + 0.5 * torch.eye(len(history), dtype=torch.float64)
        expected = torch.linalg.solve(fisher, scale * given[t].flatten()).view(SHAPE)
        assert relative(made, expected) < tolerance


def test_the_natural_gradient_is_the_authors_difference() -> None:
    natural, given, damping = Alone(NaturalGradient(history=4, damping=1e-1)), gradients(SHAPE, 6), 1e-1
    made = natural.each(given)[-1]
    g, history = given[-1].flatten(), torch.stack([g.flatten() for g in given[-4:]], dim=1)
    core = torch.eye(4, dtype=torch.float64) + history.mT @ history / damping
    z = torch.cholesky_solve((history.mT @ g)[:, None], torch.linalg.cholesky(core))[:, 0]
    assert relative(made.flatten(), g / damping - history @ z / damping**2) < 1e-9


def test_large_gradients_keep_their_digits_in_fp32() -> None:
    given = [1e2 * g for g in gradients(SHAPE, 6)]
    exact = Alone(NaturalGradient(history=4)).each(given)[-1]
    single = Alone(NaturalGradient(history=4)).each([g.float() for g in given])[-1]
    assert single.dtype == torch.float32
    assert relative(single.double(), exact) < 1e-5


def test_small_gradients_are_only_divided_by_the_damping() -> None:
    g = 1e-6 * matrix(*SHAPE)
    assert relative(Alone(NaturalGradient())(g), g / 1e-3) < 1e-6


def test_a_repeated_gradient_is_finite_and_shrinks() -> None:
    natural, g = Alone(NaturalGradient(history=3, damping=1e-6)), matrix(*SHAPE)
    for t, made in enumerate(natural.each([g] * 5), start=1):
        assert relative(made, g / (1e-6 + min(t, 3) * g.square().sum())) < 1e-6


def test_an_impossible_history_is_refused() -> None:
    for options in ({"history": 0}, {"damping": 0.0}, {"damping": math.nan}):
        with pytest.raises(ScrimpError, match="history must be at least 1 and damping above 0"):
            NaturalGradient(**options)


# ---- all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioner", [StableClip(), NaturalGradient(history=3)], ids=repr)
def test_stacked_experts_are_conditioned_apart(conditioner: Conditioner) -> None:
    given = gradients((3, 8, 6), 5)
    stack = Alone(conditioner, (3, 8, 6), "experts").each(given)[-1]
    apart = [Alone(conditioner, (8, 6)).each([g[e] for g in given])[-1] for e in range(3)]
    assert relative(stack, torch.stack(apart)) < 1e-13


@pytest.mark.parametrize("conditioner", CONDITIONERS, ids=repr)
def test_conditioners_compile_into_one_graph_for_all_shapes(conditioner: Conditioner) -> None:
    graphs = 0

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return module

    condition = torch.compile(conditioner.condition, backend=backend, fullgraph=True, dynamic=True)
    for shape in ((24, 16), (20, 12)):
        alone, g = Alone(conditioner, shape), matrix(*shape)
        numbers = conditioner.scalars({"eps": 1e-8}, 25)
        s = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        rule = {"exp_avg_sq": 1e-8 * torch.ones_like(g)}
        made, _ = condition(g, rule, alone.slots, s)
        assert torch.equal(made, conditioner.condition(g, rule, alone.slots, s)[0])
    assert graphs == 1


@pytest.mark.parametrize("conditioner", CONDITIONERS, ids=repr)
def test_a_conditioner_keeps_what_it_declares(conditioner: Conditioner) -> None:
    driver = Driver(Adam(), matrix(*SHAPE), conditioner=conditioner)
    driver.run(gradients(SHAPE, 3))
    declared = conditioner.slots(SHAPE, driver.target)
    assert {name: tuple(value.shape) for name, value in driver.kept.items()} == {
        s.name: s.shape for s in declared
    }
    assert all(slot.exact and slot.axis is None for slot in declared)


def test_a_conditioner_without_a_window_leaves_plain_descent_to_the_norm() -> None:
    # SGD on a steady gradient moves by lr a step under Stable-SPAM, whatever the gradient's length.
    driver = Driver(SGD(momentum=0), torch.zeros(SHAPE, dtype=torch.float64), conditioner=StableClip())
    driver.run([1e3 * matrix(*SHAPE)] * 3)
    assert float(driver.w.norm()) == pytest.approx(3e-2, rel=1e-6)
