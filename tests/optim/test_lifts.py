"""Lifts against their equations in the direct form, and the laws that tell the variants apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from scrimp.optim.lifts.back import ProjectBack
from scrimp.optim.lifts.feedback import ErrorFeedback
from scrimp.optim.lifts.residual import ScaledResidual
from scrimp.optim.lifts.scaling import ScaleGradient
from scrimp.optim.lifts.sign import SignResidual
from scrimp.optim.pieces import Lift, Step, Target, Update
from scrimp.optim.rules.adam import Adam

K, D, R = 24, 16, 5  # kept side, projected side, rank
LR = 0.01
OPTIONS = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}


def orthonormal(generator: torch.Generator, *batch: int) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(*batch, D, R, generator=generator, dtype=torch.float64)).Q
    return q


def gradients(
    generator: torch.Generator, steps: int, *batch: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    sizes = [100.0 ** (step % 3) for step in range(steps)]  # spiky: the limiter works
    return [
        (size * torch.randn(*batch, K, D, generator=generator, dtype=torch.float64)).to(dtype)
        for size in sizes
    ]


@dataclass
class Run:
    """One matrix, or a batch, under Adam (H-Adam) in the subspace of `basis`, (..., d, r), and a lift."""

    lift: Lift
    basis: Tensor
    age: int = 0
    rule: dict[str, Tensor] | None = None
    slots: dict[str, Tensor] | None = None

    def up(self, r: Tensor) -> Tensor:
        return r @ self.basis.mT

    def step(self, g: Tensor) -> tuple[Update, Step, Tensor]:
        target, adam = Target(name="w", shape=tuple(g.shape)), Adam(convention="hf")
        if self.slots is None:
            self.slots = {
                s.name: torch.zeros(s.shape, dtype=self.basis.dtype) for s in self.lift.slots(target)
            }
        a = self.lift.prepare(g, self.slots)
        r = a.to(self.basis.dtype) @ self.basis
        self.rule = self.rule or {name: torch.zeros_like(r) for name in ("exp_avg", "exp_avg_sq")}
        self.age += 1
        numbers = {"lr": LR, **adam.scalars(OPTIONS, self.age)}
        s = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        step = adam.step(r, self.rule, s, g)
        self.rule = step.slots
        update = self.lift.update(a, r, step, self.up, self.slots, s)
        self.slots = update.slots
        return update, step, r

    def whole(self, g: Tensor) -> Tensor:
        """Return what is subtracted from W."""
        update, _, _ = self.step(g)
        assert update.factor is None or update.factor.ndim == 0 or update.factor.shape[-1] == 1
        parts = [
            None if update.small is None else self.up(update.small),
            None if update.factor is None else update.factor * g,
            update.dense,
        ]
        return sum((part for part in parts if part is not None), torch.zeros(g.shape, dtype=self.basis.dtype))


def rows(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).sqrt()


def frobenius(x: Tensor) -> Tensor:
    return x.square().sum((-2, -1), keepdim=True).sqrt()


def limited(s: Tensor, last: Tensor | None, gamma: float = 1.01) -> tuple[Tensor, Tensor]:
    """Return the limited update and its norm, as the authors write it."""
    norm = frobenius(s)
    if last is None:
        return s, norm
    q = torch.maximum(norm / (last + 1e-8), torch.full_like(norm, gamma)) / gamma
    return s / q, norm / q


def test_project_back_is_the_scaled_step_and_reads_no_gradient(generator: torch.Generator) -> None:
    run = Run(ProjectBack(scale=0.25), orthonormal(generator))
    assert not run.lift.needs_gradient
    for g in gradients(generator, 3):
        update, step, _ = run.step(g)
        assert update.small is not None and update.factor is None and update.dense is None
        torch.testing.assert_close(update.small, 0.25 * step.size * step.direction, rtol=1e-15, atol=0)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("orthonormal_basis", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_fira_is_its_equations_in_two_products_and_in_three(
    variant: Any,
    batch: tuple[int, ...],
    orthonormal_basis: bool,
    dtype: torch.dtype,
    tolerance: float,
    generator: torch.Generator,
) -> None:
    # Two in float32 with an orthonormal basis, three elsewhere.
    basis, scale = orthonormal(generator, *batch).to(dtype), 0.25
    if not orthonormal_basis:
        basis = basis + 0.1 * torch.randn(basis.shape, generator=generator, dtype=dtype)
    run = Run(ScaledResidual(scale, variant=variant, orthonormal=orthonormal_basis), basis)
    shadow = Run(ProjectBack(), basis)
    last, held_back = None, 0
    for g in gradients(generator, 12, *batch, dtype=dtype):
        _, step, r = shadow.step(g)
        inside = scale if variant == "released" else 1.0
        s = rows(step.direction) / (rows(r) + 1e-8) * (g - inside * run.up(r))
        raw = frobenius(s)
        s, last = limited(s, last)
        held_back += int((frobenius(s) < 0.999 * raw).sum())
        weight = 1.0 if variant == "released" else scale
        expected = step.size * (scale * run.up(step.direction) + weight * s)
        assert float((run.whole(g) - expected).norm() / expected.norm()) < tolerance
    assert held_back > 3  # the limiter was at work


def test_the_short_norm_is_wrong_for_a_basis_that_is_not_orthonormal(generator: torch.Generator) -> None:
    basis = 1.5 * orthonormal(generator).float()
    short, exact = (Run(ScaledResidual(0.25, orthonormal=flag), basis) for flag in (True, False))
    g = gradients(generator, 1, dtype=torch.float32)[0]
    short.step(g), exact.step(g)
    assert short.slots is not None and exact.slots is not None
    assert abs(short.slots["limited_norm"] / exact.slots["limited_norm"] - 1).item() > 0.01


def test_firas_variants_agree_at_scale_one_and_nowhere_else(generator: torch.Generator) -> None:
    basis, steps = orthonormal(generator), gradients(generator, 6)
    for scale in (1.0, 0.25):
        paper, released = (Run(ScaledResidual(scale, variant=v), basis) for v in ("paper", "released"))
        for g in steps:
            ours, theirs = paper.whole(g), released.whole(g)
            if scale == 1:
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
            else:
                assert (theirs.norm() / ours.norm()).item() > 2.5  # section 2.4: 3.7 to 3.9 when unlimited


def test_a_residual_of_nothing_leaves_galore(generator: torch.Generator) -> None:
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    fira, galore = Run(ScaledResidual(1.0), basis), Run(ProjectBack(1.0), basis)
    for g in gradients(generator, 4):
        torch.testing.assert_close(fira.whole(g), galore.whole(g), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lift", [ScaledResidual(0.25), ScaleGradient(4.0), ScaleGradient(per="tensor")])
def test_norms_fall_freely_rise_one_percent_and_survive_a_zero_gradient(
    lift: Lift, generator: torch.Generator
) -> None:
    # The rule doubles what it is given, so that the update is as long as the gradient. Matrix 0 of the batch
    # begins with nothing and has a quiet phase, matrix 1 stays as it is: each has a limiter of its own.
    basis, one = orthonormal(generator, 2), torch.tensor(1.0, dtype=torch.float64)
    base = torch.randn(2, K, D, generator=generator, dtype=torch.float64)
    slots, norms = {"limited_norm": torch.zeros(2, 1, 1, dtype=torch.float64)}, []
    for size in (0.0, 1.0, 1e-3, 1.0, 1.0):
        g = base * torch.tensor([size, 1.0], dtype=torch.float64)[:, None, None]
        r = g @ basis
        step = Step(2 * r, one, one, {})
        update = lift.update(g, r, step, lambda x: x @ basis.mT, slots, {"lr": one})
        slots = update.slots
        norms.append(slots["limited_norm"].flatten())
    quiet, steady = torch.stack(norms).T.tolist()
    assert quiet[0] == 0 and quiet[1] > 1  # at once of full size: the authors' code would give 1e-8
    assert quiet[2] == pytest.approx(1e-3 * quiet[1], rel=1e-4)
    assert quiet[3] == pytest.approx(1.01 * quiet[2], rel=1e-4)  # 1e-8 in the limiter
    assert quiet[4] == pytest.approx(1.01 * quiet[3], rel=1e-4)
    assert steady == pytest.approx([steady[0]] * 5, rel=1e-9)


@pytest.mark.parametrize("lift", [ScaledResidual(gamma=None), ScaleGradient(gamma=None)])
def test_without_a_limiter_there_is_neither_limit_nor_state(lift: Lift, generator: torch.Generator) -> None:
    run = Run(lift, orthonormal(generator))
    for g in gradients(generator, 3):
        update, step, r = run.step(g)
        phi = rows(step.direction) / (rows(r) + 1e-8)
        assert update.factor is not None and run.slots == {}
        torch.testing.assert_close(update.factor, step.size * phi, rtol=1e-14, atol=0)


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("front", [True, False])
def test_apollo_scales_the_gradient_by_the_root_of_scale(
    per: Any, front: bool, generator: torch.Generator
) -> None:
    basis = torch.randn(D, R, generator=generator, dtype=torch.float64) / math.sqrt(R)
    run = Run(ScaleGradient(math.sqrt(128), per=per, front=front), basis)
    shadow, last = Run(ProjectBack(), basis), None
    for g in gradients(generator, 12):
        _, step, r = shadow.step(g)
        norm = rows if per == "channel" else frobenius
        u = norm(step.direction) / (norm(r) + 1e-8) * g
        u, last = limited(u, last)
        # front=True moves the 1e-8 of the limiter, and no more: the same algorithm.
        torch.testing.assert_close(run.whole(g), step.size * math.sqrt(128) * u, rtol=1e-6, atol=0)


def test_apollos_update_does_not_know_the_gradients_unit(generator: torch.Generator) -> None:
    basis = orthonormal(generator)
    big, small = Run(ScaleGradient(), basis), Run(ScaleGradient(), basis)
    for g in gradients(generator, 4):
        large = g.sign() + g  # away from eps
        torch.testing.assert_close(big.whole(1e6 * large), small.whole(1e3 * large), rtol=1e-5, atol=0)


def test_apollo_mini_has_one_factor_a_matrix_and_apollo_one_a_channel(generator: torch.Generator) -> None:
    basis, g = orthonormal(generator, 3), gradients(generator, 1, 3)[0]
    for per, shape in (("tensor", (3, 1, 1)), ("channel", (3, K, 1))):
        update, _, _ = Run(ScaleGradient(per=per), basis).step(g)  # type: ignore[arg-type]
        assert update.factor is not None and update.factor.shape == shape


def test_coordinates_get_a_sign_exactly_where_they_keep_no_state(generator: torch.Generator) -> None:
    chosen = torch.eye(D, dtype=torch.float64)[:, [1, 4, 5, 9, 15]]
    active = chosen.any(dim=1)
    run, shadow = Run(SignResidual(0.5, 0.1), chosen), Run(ProjectBack(0.5), chosen)
    for g in gradients(generator, 4):
        ours, expected = run.whole(g), shadow.whole(g)
        assert torch.equal(ours[:, active], expected[:, active])
        torch.testing.assert_close(
            ours[:, ~active], LR * 0.5 * 0.1 * g[:, ~active].sign(), rtol=1e-15, atol=0
        )


def test_a_dense_residual_moves_every_coordinate_by_the_learning_rate(generator: torch.Generator) -> None:
    run = Run(SignResidual(), orthonormal(generator))
    update, _, _ = run.step(gradients(generator, 1)[0])
    assert update.dense is not None and bool((update.dense.abs() - LR).abs().max() < 1e-15)


def test_the_residual_of_bfloat16_is_no_round_off(generator: torch.Generator) -> None:
    # The gradient lies in the subspace: in bfloat16 the residual would be round-off, its sign a full step.
    basis = torch.eye(D)[:, :R] * torch.tensor([1.0, -1, 1, 1, -1])
    g = (torch.randn(K, R, generator=generator) @ basis.mT).to(torch.bfloat16)
    update, _, _ = Run(SignResidual(), basis).step(g)
    assert update.dense is not None and update.dense.dtype == torch.float32
    assert not bool(update.dense.any())


def test_sgd_on_the_rest_and_in_the_subspace_is_sgd(generator: torch.Generator) -> None:
    g, basis = gradients(generator, 1)[0], torch.randn(D, R, generator=generator, dtype=torch.float64)
    r = g @ basis
    rate = torch.tensor(LR, dtype=torch.float64)
    sgd = Step(r, rate, rate, {})
    update = SignResidual(residual="sgd").update(g, r, sgd, lambda x: x @ basis.mT, {}, {"lr": rate})
    assert update.small is not None and update.factor is not None
    torch.testing.assert_close(update.small @ basis.mT + update.factor * g, LR * g, rtol=1e-14, atol=1e-16)
    update = SignResidual(residual="sgd", residual_scale=0.5).update(
        g, r, sgd._replace(direction=torch.zeros_like(r)), lambda x: x @ basis.mT, {}, {"lr": rate}
    )
    assert update.small is not None and update.factor is not None
    got = update.small @ basis.mT + update.factor * g
    torch.testing.assert_close(got, 0.5 * LR * (g - r @ basis.mT), rtol=1e-12, atol=1e-15)


def test_error_feedback_loses_nothing(generator: torch.Generator) -> None:
    run, steps = Run(ErrorFeedback(), orthonormal(generator)), gradients(generator, 5)
    spent = torch.zeros(K, D, dtype=torch.float64)
    for g in steps:
        _, _, r = run.step(g)
        spent = spent + run.up(r)
    assert run.slots is not None
    torch.testing.assert_close(spent + run.slots["error"], sum(steps), rtol=1e-10, atol=1e-10)


def test_error_feedback_with_a_share_of_one_minus_mu_is_trions_momentum(generator: torch.Generator) -> None:
    mu = 0.95
    run, momentum = (
        Run(ErrorFeedback(take=1 - mu), orthonormal(generator)),
        torch.zeros(K, D, dtype=torch.float64),
    )
    for g in gradients(generator, 5):
        _, _, r = run.step(g)
        momentum = momentum + g
        torch.testing.assert_close(r, momentum @ run.basis, rtol=1e-12, atol=1e-12)
        momentum = momentum - (1 - mu) * (r @ run.basis.mT)
        assert run.slots is not None
        torch.testing.assert_close(run.slots["error"], momentum, rtol=1e-12, atol=1e-12)


LIFTS = [
    ProjectBack(0.25),
    ScaledResidual(0.25),
    ScaledResidual(0.25, variant="paper"),
    ScaleGradient(2.0),
    ScaleGradient(per="tensor"),
    SignResidual(),
    SignResidual(residual="sgd"),
    ErrorFeedback(),
]


@pytest.mark.parametrize("lift", LIFTS, ids=repr)
def test_a_batch_is_its_matrices_one_by_one(lift: Lift, generator: torch.Generator) -> None:
    basis, steps = orthonormal(generator, 2), gradients(generator, 4, 2)
    together, alone = Run(lift, basis), [Run(lift, part) for part in basis]
    for g in steps:
        each = torch.stack([run.whole(part) for run, part in zip(alone, g, strict=True)])
        torch.testing.assert_close(together.whole(g), each, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("lift", LIFTS, ids=repr)
def test_slots_come_back_as_declared_and_sums_are_of_float32(lift: Lift, generator: torch.Generator) -> None:
    basis = orthonormal(generator).float()
    update, _, _ = Run(lift, basis).step(gradients(generator, 1, dtype=torch.bfloat16)[0])
    declared = {slot.name: slot.shape for slot in lift.slots(Target(name="w", shape=(K, D)))}
    assert {name: tuple(value.shape) for name, value in update.slots.items()} == declared
    held = [*update.slots.values(), *(x for x in update[:3] if x is not None and x.ndim)]
    assert held and all(x.dtype == torch.float32 for x in held)


def test_a_compiled_lift_is_the_eager_one_for_every_shape(generator: torch.Generator) -> None:
    lift = ScaledResidual(0.25)

    def arithmetic(g: Tensor, basis: Tensor, last: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r = g @ basis
        step = Step(r / (r.abs() + 0.1), size, size, {})
        update = lift.update(g, r, step, lambda x: x @ basis.mT, {"limited_norm": last}, {"lr": size})
        assert update.small is not None and update.factor is not None
        return update.small, update.factor, update.slots["limited_norm"]

    compiled = torch.compile(arithmetic, backend="aot_eager", fullgraph=True, dynamic=True)
    for k, size in ((24, 0.1), (31, 0.2)):
        g = torch.randn(k, D, generator=generator, dtype=torch.float64)
        args = (
            g,
            orthonormal(generator),
            torch.ones(1, 1, dtype=torch.float64),
            torch.tensor(size, dtype=torch.float64),
        )
        for ours, expected in zip(compiled(*args), arithmetic(*args), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)
