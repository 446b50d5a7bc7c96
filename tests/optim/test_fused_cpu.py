"""AdamW, Lion and SGD in one pass: the arithmetic of the pieces, and nothing else.

The reference decodes, steps and encodes through the pieces themselves, with one difference: its square root
is rounded to nearest, as the kernel's is, where torch's may be off by a last place. The other reference is
the eager update of the optimizers.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tests.optim.driver import OPTIONS, gradients
from torch import Tensor, nn

from scrimp.optim import AdamW
from scrimp.optim.arithmetic import decode, key
from scrimp.optim.fused_cpu import fused_cpu, is_fused, is_ready
from scrimp.optim.kernels import cpu
from scrimp.optim.pieces import Composition, Entries, Reset, Rule, Store, Target
from scrimp.optim.plan import Plan
from scrimp.optim.rules.adafactor import Adafactor
from scrimp.optim.rules.adam import Adam
from scrimp.optim.rules.adam_mini import AdamMini
from scrimp.optim.rules.lion import Lion
from scrimp.optim.rules.sgd import SGD
from scrimp.optim.stores.dynamic8 import Dynamic8
from scrimp.optim.stores.full import Full
from scrimp.optim.update import Updater

RULES: dict[str, Rule] = {
    "torch": Adam(),
    "hf": Adam(convention="hf"),
    "lion": Lion(),
    "sgd": SGD(dampening=0.1),
    "nesterov": SGD(nesterov=True),
}
STORES: dict[str, Store] = {"fp32": Full(), "8bit": Dynamic8()}
SHAPES = [(20, 256), (67, 77), (5000,)]  # blocks that come out even, and a short last one
DECAYS = {**OPTIONS, "lr": 3e-3, "weight_decay": 0.1}
NO_RESET, CODES = Reset(), Dynamic8()

rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
stores = pytest.mark.parametrize("store", STORES.values(), ids=STORES.keys())


@pytest.fixture(autouse=True)
def kernel() -> None:
    assert cpu.prepare()


def planned(rule: Rule, shape: tuple[int, ...], reset: Reset = NO_RESET, store: Store = CODES) -> Plan:
    pieces = Composition(rule=rule, store=store, basis_store=Full(), reset=reset)
    return Plan(composition=pieces, target=Target(name="w", shape=shape), exact=Full())


def begun(plan: Plan) -> Entries:
    layout = plan.layout().items()
    return {"step": 0} | {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in layout}


def parameter(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def fused(p: nn.Parameter, grad: Tensor, plan: Plan, state: Entries, options: dict[str, object]) -> None:
    assert is_fused(plan.composition, p) and is_ready(p)
    numbers = plan.numbers(state, options, state["step"])
    fused_cpu(p, grad, plan.composition, state, numbers)
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


def moments_of(state: Entries) -> list[Tensor]:
    return [value for name, value in state.items() if name != "step"]


def same(state: Entries, other: Entries) -> bool:
    tensors = [name for name in other if name != "step"]
    return len(tensors) > 0 and all(torch.equal(state[name], other[name]) for name in tensors)


@pytest.fixture
def rounded_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Tensor.sqrt
    monkeypatch.setattr(Tensor, "sqrt", lambda x: root(x.double()).to(x.dtype))


@pytest.mark.usefixtures("rounded_roots")
@pytest.mark.parametrize("options", [OPTIONS, DECAYS], ids=["plain", "decay"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@stores
@rules
def test_one_pass_is_the_pieces_to_the_bit(
    rule: Rule, store: Store, shape: tuple[int, ...], options: dict[str, object]
) -> None:
    plan = planned(rule, shape, Reset(every=4, warmup=3), store)  # whose warmup scales the step
    p, state, expected = parameter(shape), begun(plan), begun(plan)
    w = p.detach().clone()
    for grad in gradients(shape, 6, dtype=torch.float32):
        fused(p, grad, plan, state, options)
        w = by_pieces(w, grad, plan, expected, options)
        assert torch.equal(p, w)
    assert same(state, expected)


@rules
def test_one_pass_is_the_eager_update(rule: Rule) -> None:
    shape, updater = (67, 77), Updater(0, compiles=False)
    plan = planned(rule, shape, Reset(every=4, warmup=3), Full())
    p, q, state, expected = parameter(shape), parameter(shape), begun(plan), begun(plan)
    for grad in gradients(shape, 3, dtype=torch.float32):
        grad[11, 5], grad[66, 76] = float("nan"), -float("inf")
        fused(p, grad, plan, state, DECAYS)
        with torch.no_grad():
            updater.update(q, grad, plan, expected, DECAYS, None)
        expected["step"] += 1
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
    for name, tensor in expected.items():
        if name != "step":
            torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-12)


@rules
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_element_leaves_itself_alone(rule: Rule, bad: float) -> None:
    plan, p, q = planned(rule, (5000,), store=Full()), parameter((5000,)), parameter((5000,))
    state, other, grads = begun(plan), begun(plan), gradients((5000,), 2, dtype=torch.float32)
    for grad in grads:
        fused(q, grad, plan, other, DECAYS)
    fused(p, grads[0], plan, state, DECAYS)
    at = torch.tensor([0, 300, 4999])
    kept = [tensor[at].clone() for tensor in (p.detach(), *moments_of(state))]
    grads[1][at] = bad
    fused(p, grads[1], plan, state, DECAYS)
    for old, new, ok in zip(
        kept, (p.detach(), *moments_of(state)), (q.detach(), *moments_of(other)), strict=True
    ):
        assert torch.equal(new[at], old)
        rest = torch.ones(5000, dtype=torch.bool).index_fill(0, at, False)
        assert torch.equal(new[rest], ok[rest])


@rules
@pytest.mark.parametrize("shape", [(67, 77), (77,)], ids=["codes", "small"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_gradient_changes_no_bit_where_moments_are_codes(
    rule: Rule, shape: tuple[int, ...], bad: float
) -> None:
    plan, p = planned(rule, shape), parameter(shape)
    state, (first, second) = begun(plan), gradients(shape, 2, dtype=torch.float32)
    fused(p, first, plan, state, DECAYS)
    kept, w = copy.deepcopy(state), p.detach().clone()
    second[..., -1] = bad
    fused(p, second, plan, state, DECAYS)
    assert torch.equal(p, w)
    assert same(state, kept)


def assert_eager_but_for_sums(rule: Rule, shape: tuple[int, ...]) -> None:
    """Hold the kernel against the eager update; a gradient that is not finite changes nothing."""
    updater, plan = Updater(0, compiles=False), planned(rule, shape, store=Full())
    p, q, state, expected = parameter(shape), parameter(shape), begun(plan), begun(plan)
    for grad in gradients(shape, 4, dtype=torch.float32):
        fused(p, grad, plan, state, DECAYS)
        with torch.no_grad():
            updater.update(q, grad, plan, expected, DECAYS, None)
        expected["step"] += 1
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-7)
    held = (p.detach(), *(value for value in state.values() if isinstance(value, Tensor)))
    before = copy.deepcopy(held)
    for bad in (float("inf"), float("nan")):
        grad.view(-1)[-1] = bad
        fused(p, grad, plan, state, DECAYS)
    fused(p, torch.full(shape, float("nan")), plan, state, DECAYS)
    assert all(map(torch.equal, before, held))


@pytest.mark.parametrize("shape", [(67, 770), (5000,), (3, 20, 30)])
def test_a_block_s_second_moment_is_the_eager_one(shape: tuple[int, ...]) -> None:
    """Squares are summed in another order; a gradient that is not finite changes nothing."""
    assert_eager_but_for_sums(AdamMini(), shape)


@pytest.mark.parametrize(
    "rule",
    [
        Adafactor(relative_step=False, scale_parameter=False),
        Adafactor(relative_step=False),
        Adafactor(clip_threshold=0.1, eps=(1e-8, 1e-3)),
    ],
    ids=["plain", "relative to the weights", "its own schedule"],
)
@pytest.mark.parametrize("shape", [(67, 770), (300, 5), (1, 9), (130, 1)], ids=str)
def test_adafactor_is_the_eager_one(rule: Adafactor, shape: tuple[int, ...]) -> None:
    """Squares are summed in another order; a gradient that is not finite changes nothing."""
    assert_eager_but_for_sums(rule, shape)


def test_adafactor_s_result_does_not_depend_on_threads() -> None:
    plan, shape = planned(Adafactor(), (700, 90), store=Full()), (700, 90)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            p, state = parameter(shape), begun(plan)
            for grad in gradients(shape, 3, dtype=torch.float32):
                fused(p, grad, plan, state, DECAYS)
            found.append(p.detach())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


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


def test_climbing_steps_are_those_of_the_opposite_gradient() -> None:
    p, q = parameter((24, 16)), parameter((24, 16))
    (grad,) = gradients((24, 16), 1, dtype=torch.float32)
    p.grad, q.grad = grad, -grad
    AdamW([p], compile=True, maximize=True).step()
    AdamW([q], compile=True).step()
    torch.testing.assert_close(p, q)


def test_what_the_kernel_does_not_compute_is_left_to_others() -> None:
    p = parameter((24, 16))
    assert all(is_fused(planned(Adam(), (24, 16), store=store).composition, p) for store in STORES.values())
    assert not is_fused(planned(Adam(), (24, 16)).composition, nn.Parameter(p.detach().bfloat16()))
    assert not is_ready(nn.Parameter(torch.zeros(64, 96).T))
    others = [
        planned(Adam(), (24, 16), store=Dynamic8(block_size=128)),
        planned(Adam(), (24, 16), store=Full(torch.float64)),
        planned(SGD(momentum=0), (24, 16), store=Full()),
        planned(AdamMini(), (24, 16)),
        planned(Adafactor(), (24, 16)),
        planned(Adafactor(beta1=0.9), (24, 16), store=Full()),
    ]
    assert not any(is_fused(plan.composition, p) for plan in others)
