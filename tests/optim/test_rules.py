"""The rules' laws, without anybody's package (tests/oracles has those)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from tests.optim.driver import OPTIONS, Driver, gradients, relative
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.optim.pieces import Reset, Rule, Step, Target
from scrimp.optim.rules.adafactor import Adafactor
from scrimp.optim.rules.adam import Adam
from scrimp.optim.rules.adam_mini import AdamMini
from scrimp.optim.rules.lion import Lion
from scrimp.optim.rules.sgd import SGD
from scrimp.optim.rules.sm3 import SM3

SHAPE = (24, 16)
RULES: list[Rule] = [
    SGD(momentum=0),
    SGD(momentum=0.9, nesterov=True),
    Lion(),
    Adam(),
    Adam(convention="hf"),
    AdamMini(),
    Adafactor(relative_step=False, scale_parameter=False, beta1=0.9),
    Adafactor(),
    SM3(),
]


def matrix(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("convention", "eps"), [("torch", 1e-8), ("hf", 1e-6)])
def test_the_conventions_of_adam_differ_by_where_eps_stands(convention: Any, eps: float) -> None:
    size, g = 1e-7, torch.full(SHAPE, 1e-7, dtype=torch.float64)
    driver = Driver(Adam(convention=convention), torch.zeros_like(g), options={"eps": eps})
    for t in (1, 2, 3):
        before = driver.w.clone()
        own = eps if convention == "torch" else eps / math.sqrt(1 - 0.999**t)
        assert relative(driver.step(g) - before, -1e-2 * g / (size + own)) < 1e-9


@pytest.mark.parametrize(("convention", "first"), [("torch", True), ("hf", False)])
def test_the_conventions_of_adam_differ_by_which_weights_decay(convention: Any, first: bool) -> None:
    w, g = matrix(*SHAPE), matrix(*SHAPE, seed=2)
    options = {"lr": 0.1, "eps": 0.0, "weight_decay": 0.5}
    moved = Driver(Adam(convention=convention), w, options=options).step(g)
    expected = 0.95 * w - 0.1 * g.sign() if first else 0.95 * (w - 0.1 * g.sign())
    assert relative(moved, expected) < 1e-14


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != Adafactor()], ids=repr)
def test_a_learning_rate_of_zero_moves_nothing_but_the_state(rule: Rule) -> None:
    # Adafactor averages updates that the rate has scaled; its own schedule knows no rate of zero.
    idle = ["exp_avg"] if isinstance(rule, Adafactor) else []
    driver = Driver(rule, matrix(*SHAPE), options={"lr": 0.0, "weight_decay": 0.1})
    before = driver.w.clone()
    driver.step(matrix(*SHAPE, seed=2))
    assert torch.equal(driver.w, before)
    assert [name for name, value in driver.slots.items() if not bool(value.any())] == idle


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_zero_gradient_moves_nothing_and_leaves_everything_finite(rule: Rule) -> None:
    driver = Driver(rule, matrix(*SHAPE, dtype=torch.float32))
    before = driver.w.clone()
    driver.run([torch.zeros(SHAPE)] * 3)
    assert torch.equal(driver.w, before)
    driver.step(matrix(*SHAPE, seed=2, dtype=torch.float32))
    assert bool(driver.w.isfinite().all())


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_declared_slots_are_those_of_the_step(rule: Rule) -> None:
    for shape, role in ((SHAPE, "linear"), ((16,), "norm"), ((3, 8, 6), "experts"), ((4, 3, 2, 2), "conv")):
        target = Target(name="w", shape=shape, role=role)  # type: ignore[arg-type]
        driver = Driver(rule, matrix(*shape), target=target)
        driver.step(matrix(*shape, seed=2))
        declared = {slot.name: slot for slot in rule.slots(shape, target)}
        assert {name: tuple(value.shape) for name, value in driver.slots.items()} == {
            name: slot.shape for name, slot in declared.items()
        }
        assert all(
            bool((driver.slots[name] >= 0).all()) for name, slot in declared.items() if not slot.signed
        )
        assert all(slot.shape[slot.axis] == shape[-1] for slot in declared.values() if slot.axis is not None)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.elementwise], ids=repr)
def test_an_elementwise_rule_treats_blocks_alone(rule: Rule) -> None:
    w, given = matrix(40), gradients((40,), 5)
    parts = [Driver(rule, w[cut]).run([g[cut] for g in given]) for cut in (slice(0, 24), slice(24, 40))]
    assert torch.equal(Driver(rule, w).run(given), torch.cat(parts))


@pytest.mark.parametrize("rule", [*RULES[:6], SM3(), SM3(momentum=0)], ids=repr)
def test_stacked_experts_are_matrices_of_their_own(rule: Rule) -> None:
    w, given = matrix(3, 8, 6), gradients((3, 8, 6), 5)
    stack = Driver(rule, w, target=Target(name="w", shape=(3, 8, 6), role="experts")).run(given)
    apart = [Driver(rule, w[e]).run([g[e] for g in given]) for e in range(3)]
    assert relative(stack, torch.stack(apart)) < 1e-15


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_fp32_weights_keep_fp32_state(rule: Rule) -> None:
    driver = Driver(rule, matrix(*SHAPE, dtype=torch.float32))
    driver.step(matrix(*SHAPE, seed=2, dtype=torch.float32))
    assert driver.w.dtype == torch.float32
    assert {value.dtype for value in driver.slots.values()} <= {torch.float32}


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_reset_that_restarts_is_a_new_beginning(rule: Rule) -> None:
    given = gradients(SHAPE, 10)
    resets = Driver(rule, matrix(*SHAPE), reset=Reset(every=6))
    half = resets.run(given[:5])
    assert torch.equal(resets.run(given[5:]), Driver(rule, half).run(given[5:]))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_rule_compiles_into_one_graph_for_all_shapes_and_rates(rule: Rule) -> None:
    graphs = 0

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return module

    compiled = torch.compile(rule.step, backend=backend, fullgraph=True, dynamic=True)
    for shape, age in ((SHAPE, 1), ((20, 12), 7), ((20, 12), 8)):
        given = _inputs(rule, matrix(*shape, seed=2), age)
        made, expected = compiled(*given, matrix(*shape)), rule.step(*given, matrix(*shape))
        assert torch.equal(made.direction, expected.direction)
        assert all(torch.equal(made.slots[name], value) for name, value in expected.slots.items())
    assert graphs == 1


def test_lion_moves_every_element_by_the_learning_rate() -> None:
    driver = Driver(Lion(), matrix(*SHAPE), options={"betas": (0.9, 0.99)})
    before = driver.w
    for g in gradients(SHAPE, 5):
        after = driver.step(g)
        assert torch.allclose((after - before).abs(), torch.full_like(g, 1e-2), rtol=1e-12, atol=0)
        before = after


def test_lion_starts_with_the_sign_of_the_gradient() -> None:
    g = matrix(*SHAPE, seed=2)
    assert torch.equal(Driver(Lion(), torch.zeros_like(g)).step(g), -1e-2 * g.sign())


def test_sgd_takes_the_first_gradient_undamped() -> None:
    driver = Driver(
        SGD(momentum=0.5, dampening=0.25), torch.zeros(1, dtype=torch.float64), options={"lr": 1.0}
    )
    assert [float(driver.step(torch.ones(1, dtype=torch.float64))) for _ in range(2)] == [-1.0, -2.25]


def test_sm3_accumulators_cover_the_sum_of_squares() -> None:
    driver, total = Driver(SM3(), matrix(*SHAPE)), torch.zeros(SHAPE, dtype=torch.float64)
    for g in gradients(SHAPE, 20):
        driver.step(g)
        total += g * g
        cover = torch.minimum(driver.slots["accumulator_0"], driver.slots["accumulator_1"])
        assert bool((cover >= total * (1 - 1e-15)).all())


def test_sm3_of_a_rank_one_square_is_exact() -> None:
    # Row and column maxima lose nothing of a matrix of ones, so SM3 is Adagrad there.
    driver = Driver(SM3(momentum=0), torch.zeros(SHAPE, dtype=torch.float64), options={"lr": 1.0})
    driver.run([torch.ones(SHAPE, dtype=torch.float64)] * 3)
    assert torch.allclose(driver.w, torch.full_like(driver.w, -(1 + 2**-0.5 + 3**-0.5)), rtol=1e-14)


def test_a_square_that_underflows_does_not_move_sm3() -> None:
    driver = Driver(SM3(momentum=0), torch.zeros(2, 2), options={"lr": 1.0})
    assert torch.equal(driver.step(torch.full((2, 2), 1e-30)), torch.zeros(2, 2))


def test_adafactor_recovers_a_second_moment_of_rank_one() -> None:
    # At t = 1 nothing is remembered and the factors are exact: the update is the sign, of RMS 1.
    g = matrix(24, 1, seed=2) * matrix(1, 16, seed=3)
    rule = Adafactor(relative_step=False, scale_parameter=False)
    driver = Driver(rule, torch.zeros(SHAPE, dtype=torch.float64))
    assert relative(driver.step(g), -1e-2 * g.sign()) < 1e-14


def test_adafactor_averages_the_scaled_update() -> None:
    rule = Adafactor(relative_step=False, scale_parameter=False, beta1=0.9)
    driver = Driver(rule, torch.zeros(SHAPE, dtype=torch.float64), options={"lr": 1.0})
    first = driver.step(matrix(*SHAPE, seed=2))
    driver.options["lr"] = 0.0
    # A rate of 0 stops no update that was averaged before.
    assert relative(driver.step(matrix(*SHAPE, seed=3)) - first, 0.9 * first) < 1e-14


def test_adafactor_in_a_subspace_scales_by_the_whole_of_w() -> None:
    rule, w, r = Adafactor(relative_step=False), 3 * matrix(24, 16), matrix(24, 4, seed=2)
    step = _step(rule, r, w)
    plain = _step(dataclasses.replace(rule, scale_parameter=False), r, w)
    assert float(step.size / plain.size) == pytest.approx(float(w.square().mean().sqrt()), rel=1e-12)
    assert step.decay is step.size
    assert torch.equal(step.direction, plain.direction)


def _step(rule: Rule, r: Tensor, w: Tensor) -> Step:
    return rule.step(*_inputs(rule, r, 1), w)


def _inputs(rule: Rule, r: Tensor, age: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    shape = tuple(r.shape)
    target = Target(name="w", shape=shape, role="linear")
    slots = {slot.name: r.new_ones(slot.shape) for slot in rule.slots(shape, target)}
    numbers = {"lr": OPTIONS["lr"], **rule.scalars(OPTIONS, age)}
    return r, slots, {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}


def test_adafactor_follows_its_own_schedule() -> None:
    rates = [Adafactor().scalars({"lr": 5.0}, t)["rho"] for t in (1, 10_000, 40_000)]
    warm = [Adafactor(warmup_init=True).scalars({"lr": 5.0}, t)["rho"] for t in (1, 100, 40_000)]
    assert rates == [1e-2, 1e-2, 5e-3]
    assert warm == pytest.approx([1e-6, 1e-4, 5e-3], rel=1e-15)


def test_adam_mini_with_blocks_of_one_element_is_adam() -> None:
    w, given = matrix(24), gradients((24,), 10)
    bias = Target(name="bias", shape=(24,), role="bias")
    assert relative(Driver(AdamMini(), w, target=bias).run(given), Driver(Adam(), w).run(given)) < 1e-15


@pytest.mark.parametrize(
    ("shape", "role", "heads", "blocks"),
    [
        ((32, 16), "linear", 4, 4),
        ((32, 16), "linear", 1, 32),
        ((32, 16), "other", 1, 32),
        ((1, 16), "linear", 1, 1),
        ((40, 16), "embedding", 1, 40),
        ((3, 8, 6), "experts", 1, 24),
        ((8, 4, 3, 3), "conv", 1, 8),
        ((16,), "norm", 1, 1),
        ((16,), "bias", 1, 16),
        ((), "other", 1, 1),
    ],
)
def test_adam_mini_has_a_number_for_each_block(
    shape: tuple[int, ...], role: Any, heads: int, blocks: int
) -> None:
    slots = AdamMini().slots(shape, Target(name="w", shape=shape, role=role, heads=heads))
    assert [slot.shape for slot in slots] == [shape, (blocks, 1)]


def test_adam_mini_refuses_heads_that_do_not_divide_the_rows() -> None:
    target = Target(name="layers.0.q_proj.weight", shape=(10, 16), role="linear", heads=4)
    with pytest.raises(ScrimpError, match=r"layers\.0\.q_proj\.weight has 10 rows, which 4 heads"):
        AdamMini().slots((10, 16), target)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ScrimpError, match="momentum above 0"):
        SGD(momentum=0, nesterov=True)
    with pytest.raises(ScrimpError, match="dampening 0"):
        SGD(momentum=0.9, dampening=0.1, nesterov=True)
    with pytest.raises(ScrimpError, match="relative_step=True"):
        Adafactor(relative_step=False, warmup_init=True)
