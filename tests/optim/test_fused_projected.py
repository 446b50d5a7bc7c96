"""Adam in a subspace by one call: what the pieces compute, but for the order of sums in products and norms.

The reference is the eager update.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.optim.driver import OPTIONS, gradients, relative
from torch import Tensor, nn

from scrimp.base.counter_random import normal
from scrimp.optim import Apollo, ApolloMini, Fira, GaLore, GaLore8bit, Optimizer
from scrimp.optim.fused_cpu import is_fused
from scrimp.optim.kernels import cpu
from scrimp.optim.lifts.back import ProjectBack
from scrimp.optim.lifts.residual import ScaledResidual
from scrimp.optim.lifts.scaling import ScaleGradient
from scrimp.optim.pieces import Composition, Entries, Lift, Projector, Reset, Store, Target
from scrimp.optim.plan import Plan
from scrimp.optim.projectors.dct import Cosine
from scrimp.optim.projectors.random import Random
from scrimp.optim.projectors.svd import SingularVectors
from scrimp.optim.rules.adam import Adam
from scrimp.optim.rules.lion import Lion
from scrimp.optim.stores.dynamic8 import Dynamic8
from scrimp.optim.stores.full import Full
from scrimp.optim.update import Updater

LIFTS: dict[str, Lift] = {
    "back": ProjectBack(0.25),
    "residual": ScaledResidual(0.25),
    "residual, paper": ScaledResidual(0.25, variant="paper"),
    "residual, free": ScaledResidual(0.25, gamma=None),
    "channels": ScaleGradient(0.5),
    "channels, free": ScaleGradient(0.5, gamma=None),
    "tensor": ScaleGradient(3.0, per="tensor"),
    "tensor, front": ScaleGradient(3.0, per="tensor", front=True),
}
BASES: dict[str, Projector] = {
    "vectors": SingularVectors(rank=4, every=3),
    "drawn": Random(rank=4, every=3),
    "cosines": Cosine(rank=4, every=3, on_refresh="keep"),
    "one vector": SingularVectors(rank=1, every=3),
    "one drawn": Random(rank=1, every=3),
}
# As (m, n) and whether it is seen transposed: several blocks of rows, of columns, and rows of several blocks.
SEEN = [((150, 37), False), ((70, 300), True), ((9, 300), False)]
DECAYS: dict[str, Any] = {**OPTIONS, "lr": 3e-2, "weight_decay": 0.1}
WHOLE, NO_RESET = Full(), Reset()

lifts = pytest.mark.parametrize("lift", LIFTS.values(), ids=LIFTS.keys())
seen = pytest.mark.parametrize(("shape", "transposed"), SEEN, ids=str)
rules = pytest.mark.parametrize("rule", [Adam(), Adam(convention="hf")], ids=["torch", "hf"])


@pytest.fixture(autouse=True)
def kernel() -> None:
    assert cpu.prepare()


class Side:
    """One matrix, its plan and its state."""

    def __init__(
        self,
        pieces: Composition,
        shape: tuple[int, int],
        *,
        transposed: bool = False,
        fused: bool,
        options: dict[str, Any] = DECAYS,
    ) -> None:
        self.p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        target = Target(name="w", shape=shape[::-1] if transposed else shape)
        self.plan = Plan(composition=pieces, target=target, exact=Full(), transposed=transposed)
        self.plan.is_fused = fused and is_fused(pieces, self.p)
        assert self.plan.is_fused == fused
        self.options, self.updater = options, Updater(0, compiles=fused)
        layout = self.plan.layout().items()
        self.state: Entries = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in layout}
        self.state |= dict.fromkeys(("step", *self.plan.counters()), 0)

    @torch.no_grad()
    def step(self, grad: Tensor, small: Tensor | None = None) -> None:
        self.updater.update(self.p, grad, self.plan, self.state, self.options, small)
        self.state["step"] += 1

    def tensors(self) -> dict[str, Tensor]:
        held = {name: value for name, value in self.state.items() if isinstance(value, Tensor)}
        return held | {"w": self.p.detach()}


def composed(
    lift: Lift, basis: Projector = BASES["vectors"], *, rule: Adam | Lion | None = None, store: Store = WHOLE
) -> Composition:
    rule = Adam(convention="hf") if rule is None else rule
    return Composition(rule=rule, projector=basis, lift=lift, store=store, basis_store=Full())


def assert_alike(ours: Side, eager: Side, *, times: float = 1) -> None:
    """Hold two sides against each other, whose products are summed in another order."""
    for (name, a), b in zip(ours.tensors().items(), eager.tensors().values(), strict=True):
        if a.dtype == torch.uint8:
            apart = (a.int() - b.int()).abs()
            assert apart.max() <= 1 and apart.count_nonzero() <= 0.002 * a.numel() + 1, name
        else:
            assert relative(a.double(), b.double()) < times * (1e-6 if name == "w" else 1e-5), name


@lifts
@rules
@seen
def test_a_step_is_the_eager_one(lift: Lift, rule: Adam, shape: tuple[int, int], transposed: bool) -> None:
    ours, eager = (
        Side(composed(lift, rule=rule), shape, transposed=transposed, fused=fused) for fused in (True, False)
    )
    for grad in gradients(shape, 5, dtype=torch.float32):
        ours.step(grad)
        eager.step(grad)
        assert_alike(ours, eager)


@pytest.mark.parametrize("basis", BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("lift", [LIFTS["back"], LIFTS["residual"], LIFTS["tensor"]], ids=str)
@seen
def test_every_basis_will_do(lift: Lift, basis: Any, shape: tuple[int, int], transposed: bool) -> None:
    # A channel's only number may be all but cancelled in R, whose rounding is then seen in phi.
    times = 100 if basis.rank == 1 and isinstance(lift, ScaledResidual) else 1
    ours, eager = (
        Side(composed(lift, basis), shape, transposed=transposed, fused=fused) for fused in (True, False)
    )
    for grad in gradients(shape, 5, dtype=torch.float32):
        ours.step(grad)
        eager.step(grad)
        assert_alike(ours, eager, times=times)


@pytest.mark.parametrize("rank", [2, 8, 21, 64, 130])
@pytest.mark.parametrize("lift", [LIFTS["back"], LIFTS["residual"], LIFTS["channels"]], ids=str)
@pytest.mark.parametrize(("shape", "transposed"), [((310, 145), False), ((145, 310), True)], ids=str)
def test_every_rank_will_do(lift: Lift, rank: int, shape: tuple[int, int], transposed: bool) -> None:
    pieces = composed(lift, SingularVectors(rank=rank, every=3))
    ours, eager = (Side(pieces, shape, transposed=transposed, fused=fused) for fused in (True, False))
    for grad in gradients(shape, 3, dtype=torch.float32):
        ours.step(grad)
        eager.step(grad)
        assert_alike(ours, eager, times=3)


@lifts
def test_moments_as_codes_are_the_eager_ones(lift: Lift) -> None:
    pieces = composed(lift, store=Dynamic8(min_size=0))
    ours, eager = (Side(pieces, (150, 37), fused=fused) for fused in (True, False))
    for grad in gradients((150, 37), 4, dtype=torch.float32):
        ours.step(grad)
        eager.step(grad)
        assert_alike(ours, eager)


@pytest.mark.parametrize("basis", [BASES["vectors"], BASES["one drawn"]], ids=["vectors", "one drawn"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@lifts
@seen
def test_a_gradient_that_is_not_finite_changes_nothing(
    lift: Lift, basis: Projector, bad: float, shape: tuple[int, int], transposed: bool
) -> None:
    ours = Side(composed(lift, basis), shape, transposed=transposed, fused=True)
    first, second = gradients(shape, 2, dtype=torch.float32)
    ours.step(first)
    kept = copy.deepcopy(ours.tensors())
    second[-1, -1] = bad
    ours.step(second)
    assert all(torch.equal(kept[name], value) for name, value in ours.tensors().items())


def test_a_gradient_summed_in_the_subspace_is_enough_to_project_back() -> None:
    pieces = composed(LIFTS["back"])
    ours, whole = (Side(pieces, (70, 300), transposed=True, fused=True) for _ in range(2))
    for grad in gradients((70, 300), 3, dtype=torch.float32):
        with torch.no_grad():
            ours.updater.refresh_when_due(grad.mT, ours.plan, ours.state)
            small = ours.updater.project(grad, ours.plan, ours.state)
        ours.step(torch.zeros(()).expand(70, 300), small)
        whole.step(grad)
        assert_alike(ours, whole)


@pytest.mark.parametrize("basis", [BASES["vectors"], BASES["one drawn"]], ids=["vectors", "one drawn"])
@lifts
def test_a_rate_of_zero_moves_the_state_alone(lift: Lift, basis: Projector) -> None:
    pieces = composed(lift, basis)
    still = Side(pieces, (150, 37), fused=True, options={**DECAYS, "lr": 0.0})
    moving = Side(pieces, (150, 37), fused=True)
    w = still.p.detach().clone()
    (grad,) = gradients((150, 37), 1, dtype=torch.float32)
    still.step(grad)
    moving.step(grad)
    assert torch.equal(still.p, w)
    assert not torch.equal(moving.p, w)
    held = moving.tensors()
    assert all(torch.equal(held[name], value) for name, value in still.tensors().items() if name != "w")


@lifts
def test_gradients_that_lie_otherwise_are_read_in_order(lift: Lift) -> None:
    ours, other = (Side(composed(lift), (150, 37), fused=True) for _ in range(2))
    for grad in gradients((150, 37), 2, dtype=torch.float32):
        ours.step(grad)
        other.step(grad.T.contiguous().T)
        assert_alike(ours, other)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "galore": lambda params, **more: GaLore(params, lr=1e-2, rank=4, refresh_every=3, **more),
    "galore-8bit": lambda params, **more: GaLore8bit(params, lr=1e-2, rank=4, refresh_every=3, **more),
    "fira": lambda params, **more: Fira(params, lr=1e-2, rank=4, refresh_every=3, **more),
    "apollo": lambda params, **more: Apollo(params, lr=1e-2, rank=4, refresh_every=3, **more),
    "apollo-mini": lambda params, **more: ApolloMini(params, lr=1e-2, refresh_every=3, **more),
}


@pytest.mark.parametrize("order", [(True, False), (False, True)], ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_either_way_goes_on_where_the_other_stopped(
    make: Callable[..., Optimizer], order: tuple[bool, bool]
) -> None:
    shapes = {"tall": (40, 24), "wide": (24, 40)}
    steps = [gradients(shape, 8, dtype=torch.float32) for shape in shapes.values()]
    ends = []
    for ways in (order, (False, False)):
        w = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
        optimizer = None
        for half, by_kernel in enumerate(ways):
            following = make(list(w.items()), weight_decay=0.1)
            if not by_kernel:
                following.leave_kernels_out()
            if optimizer is not None:
                following.load_state_dict(optimizer.state_dict())
            optimizer = following
            for turn in range(4 * half, 4 * half + 4):
                for p, grads in zip(w.values(), steps, strict=True):
                    p.grad = grads[turn]
                optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in w.values()]))
    assert relative(*ends) < 1e-6


@pytest.mark.parametrize("shape", [(512, 16), (7, 3), (129, 1), (4099, 5)], ids=str)
@pytest.mark.parametrize("seed", [0, 5, 2**40 + 1, 2**63 - 1])
def test_a_draw_is_the_one_of_torch_to_the_bit(shape: tuple[int, int], seed: int) -> None:
    expected = normal(seed, math.prod(shape), device=torch.device("cpu")).view(shape) / math.sqrt(shape[1])
    assert torch.equal(cpu.draw(seed, *shape), expected)


def test_what_the_kernel_does_not_compute_is_left_to_others() -> None:
    p = nn.Parameter(torch.zeros(24, 16))
    assert all(is_fused(composed(lift), p) for lift in LIFTS.values())
    assert not is_fused(composed(LIFTS["back"]), nn.Parameter(torch.zeros(2, 24, 16)))
    assert not is_fused(composed(LIFTS["back"]), nn.Parameter(torch.zeros(24, 16).bfloat16()))
    assert not is_fused(composed(LIFTS["back"], rule=Lion()), p)
    assert not is_fused(composed(ScaledResidual(orthonormal=False)), p)
