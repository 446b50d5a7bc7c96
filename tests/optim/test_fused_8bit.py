"""8-bit AdamW and Lion in one pass: the arithmetic of the pieces, and nothing else.

The reference decodes, steps and encodes through the pieces themselves, with one difference: its square root
is rounded to nearest, as the kernel's is, where torch's may be off by a last place.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tests.optim.driver import OPTIONS, gradients
from torch import Tensor, nn

from scrimp.optim.arithmetic import decode, key
from scrimp.optim.fused_8bit import fused_8bit, is_8bit, is_ready
from scrimp.optim.pieces import Composition, Entries, Reset, Rule, Target
from scrimp.optim.plan import Plan
from scrimp.optim.rules.adam import Adam
from scrimp.optim.rules.lion import Lion
from scrimp.optim.stores.dynamic8 import Dynamic8
from scrimp.optim.stores.full import Full

RULES = [Adam(), Adam(convention="hf"), Lion()]
SHAPES = [(20, 256), (67, 77), (5000,)]  # blocks that come out even, and a short last one
DECAYS = {**OPTIONS, "lr": 3e-3, "weight_decay": 0.1}
NO_RESET = Reset()


@pytest.fixture(autouse=True)
def kernel() -> None:
    Dynamic8().prepare(torch.device("cpu"))


def planned(rule: Rule, shape: tuple[int, ...], reset: Reset = NO_RESET) -> Plan:
    pieces = Composition(rule=rule, store=Dynamic8(), basis_store=Full(), reset=reset)
    return Plan(composition=pieces, target=Target(name="w", shape=shape), exact=Full())


def begun(plan: Plan) -> Entries:
    layout = plan.layout().items()
    return {"step": 0} | {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in layout}


def parameter(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def fused(p: nn.Parameter, grad: Tensor, plan: Plan, state: Entries, options: dict[str, object]) -> None:
    assert is_8bit(plan.composition, p) and is_ready(p)
    numbers = plan.numbers(state, options, state["step"])
    fused_8bit(p, grad, plan.composition.rule, state, numbers)
    state["step"] += 1


def by_pieces(w: Tensor, grad: Tensor, plan: Plan, state: Entries, options: dict[str, object]) -> Tensor:
    """Renew a state through its pieces, and return the new weights."""
    rule, store = plan.composition.rule, plan.composition.store
    numbers = plan.numbers(state, options, state["step"])
    s = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    slots = rule.slots(tuple(w.shape), plan.target)
    step = rule.step(grad, {slot.name: decode(state, slot, store, w.dtype) for slot in slots}, s, w)
    for slot in slots:
        for suffix, entry in store.encode(step.slots[slot.name], slot, torch.tensor(0)).items():
            state[key(slot, suffix)].copy_(entry)
    state["step"] += 1
    move, decay = step.size * s["rewarm"] * step.direction, step.decay * s["weight_decay"]
    if rule.decay_first:
        return w - decay * w - move
    return w - move - decay * (w - move)


def same(state: Entries, other: Entries) -> bool:
    tensors = [name for name in other if name != "step"]
    return len(tensors) > 1 and all(torch.equal(state[name], other[name]) for name in tensors)


@pytest.fixture
def rounded_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Tensor.sqrt
    monkeypatch.setattr(Tensor, "sqrt", lambda x: root(x.double()).to(x.dtype))


@pytest.mark.usefixtures("rounded_roots")
@pytest.mark.parametrize("options", [OPTIONS, DECAYS], ids=["plain", "decay"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=["torch", "hf", "lion"])
def test_one_pass_is_the_pieces_to_the_bit(
    rule: Rule, shape: tuple[int, ...], options: dict[str, object]
) -> None:
    plan = planned(rule, shape, Reset(every=4, warmup=3))  # whose warmup scales the step
    p, state, expected = parameter(shape), begun(plan), begun(plan)
    w = p.detach().clone()
    for grad in gradients(shape, 6, dtype=torch.float32):
        fused(p, grad, plan, state, options)
        w = by_pieces(w, grad, plan, expected, options)
        assert torch.equal(p, w)
    assert same(state, expected)


@pytest.mark.parametrize("rule", RULES, ids=["torch", "hf", "lion"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_gradient_changes_no_bit(rule: Rule, bad: float) -> None:
    plan, p = planned(rule, (67, 77)), parameter((67, 77))
    state, (first, second) = begun(plan), gradients((67, 77), 2, dtype=torch.float32)
    fused(p, first, plan, state, DECAYS)
    kept, w = copy.deepcopy(state), p.detach().clone()
    second[-1, -1] = bad
    fused(p, second, plan, state, DECAYS)
    assert torch.equal(p, w)
    assert same(state, kept)


def test_gradients_that_lie_otherwise_are_read_in_order() -> None:
    plan, p, q = planned(Adam(), (64, 96)), parameter((64, 96)), parameter((64, 96))
    (grad,) = gradients((64, 96), 1, dtype=torch.float32)
    fused(p, grad, plan, begun(plan), OPTIONS)
    fused(q, grad.T.contiguous().T, plan, begun(plan), OPTIONS)
    assert torch.equal(p, q)


def test_extremes_code_as_the_pieces_do() -> None:
    plan, p = planned(Adam(), (4096,)), parameter((4096,))
    state, expected = begun(plan), begun(plan)
    grad = torch.zeros(4096)  # blocks of zeros alone, of the smallest numbers, of squares beyond float32
    grad[256:512], grad[512:768], grad[800] = 1e-42, -1e-20, 1e25
    fused(p, grad, plan, state, OPTIONS)
    by_pieces(p.detach(), grad, plan, expected, OPTIONS)
    assert same(state, expected)


def test_what_the_kernel_does_not_compute_is_left_to_others() -> None:
    pieces = planned(Adam(), (5000,)).composition
    assert is_8bit(pieces, parameter((5000,)))
    assert not is_8bit(pieces, parameter((4000,)))  # too small for codes
    assert not is_8bit(pieces, nn.Parameter(torch.zeros(5000, dtype=torch.bfloat16)))
    assert not is_ready(nn.Parameter(torch.zeros(64, 96).T))
    wide = Composition(rule=Adam(), store=Dynamic8(block_size=128), basis_store=Full())
    assert not is_8bit(wide, parameter((5000,)))
    assert not is_8bit(Composition(rule=Adam(), store=Full(), basis_store=Full()), parameter((5000,)))
