"""The named low-rank methods: identities that need no oracle, and tests that tell near misses apart."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.base.errors import ScrimpError
from scrimp.optim.lifts.back import ProjectBack
from scrimp.optim.lifts.feedback import ErrorFeedback
from scrimp.optim.lifts.scaling import ScaleGradient
from scrimp.optim.named.apollo import Apollo, ApolloMini
from scrimp.optim.named.galore import GaLore, GaLore8bit, NaturalGaLore, QGaLore
from scrimp.optim.named.low_rank import DCTAdamW, Fira, Frugal
from scrimp.optim.optimizer import Optimizer
from scrimp.optim.pieces import Composition, Lift, Projector, Rule, Target
from scrimp.optim.projectors.dct import Cosine
from scrimp.optim.projectors.identity import Identity
from scrimp.optim.projectors.svd import SingularVectors
from scrimp.optim.rules.adam import Adam
from scrimp.optim.rules.sgd import SGD
from scrimp.optim.stores.full import Full

SHAPES = [(24, 16), (16, 24), (20, 20), (2, 12, 18)]
SMALL: dict[str, Any] = {"rank": 4, "refresh_every": 3}
NAMED: dict[str, Callable[..., Optimizer]] = {
    "GaLore released": lambda ps, **o: GaLore(ps, **SMALL, **o),
    "GaLore paper": lambda ps, **o: GaLore(ps, variant="paper", **SMALL, **o),
    "GaLore of both sides": lambda ps, **o: GaLore(ps, side="full", **SMALL, **o),
    "GaLore8bit": lambda ps, **o: GaLore8bit(ps, **SMALL, **o),
    "QGaLore released": lambda ps, **o: QGaLore(ps, threshold=0.0, **SMALL, **o),
    "QGaLore paper": lambda ps, **o: QGaLore(ps, variant="paper", **SMALL, **o),
    "NaturalGaLore released": lambda ps, **o: NaturalGaLore(ps, history=3, **SMALL, **o),
    "NaturalGaLore paper": lambda ps, **o: NaturalGaLore(ps, history=3, variant="paper", **SMALL, **o),
    "Fira released": lambda ps, **o: Fira(ps, **SMALL, **o),
    "Fira paper": lambda ps, **o: Fira(ps, variant="paper", **SMALL, **o),
    "Apollo paper": lambda ps, **o: Apollo(ps, **SMALL, **o),
    "Apollo held": lambda ps, **o: Apollo(ps, hold=True, **SMALL, **o),
    "Apollo released": lambda ps, **o: Apollo(ps, variant="released", **SMALL, **o),
    "Apollo of singular vectors": lambda ps, **o: Apollo(ps, proj="svd", **SMALL, **o),
    "ApolloMini": lambda ps, **o: ApolloMini(ps, refresh_every=3, **o),
    "Frugal of blocks": lambda ps, **o: Frugal(ps, density=0.5, refresh_every=3, **o),
    "Frugal of columns": lambda ps, **o: Frugal(ps, projector="columns", refresh_every=3, **o),
    "DCTAdamW": lambda ps, **o: DCTAdamW(ps, rank=4, **o),
    "DCTAdamW with feedback": lambda ps, **o: DCTAdamW(ps, rank=4, error_feedback=True, **o),
}


def parameters(
    dtype: torch.dtype = torch.float64, shapes: list[tuple[int, ...]] = SHAPES
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def gradients(count: int, like: list[nn.Parameter], seed: int = 2) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in like]
        for _ in range(count)
    ]


def run(optimizer: torch.optim.Optimizer, ps: list[nn.Parameter], steps: list[list[Tensor]]) -> None:
    for step in steps:
        for p, g in zip(ps, step, strict=True):
            p.grad = g.clone()
        optimizer.step()


def composed(
    ps: list[nn.Parameter], rule: Rule, projector: Projector, lift: Lift, **options: Any
) -> Optimizer:
    """Return an optimizer that treats every parameter by these pieces."""
    pieces = Composition(rule=rule, projector=projector, lift=lift, store=Full(), basis_store=Full())
    given = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, **options}
    return Optimizer(ps, compose=lambda group: pieces, options=given)


def same(ours: list[nn.Parameter], theirs: list[nn.Parameter], tolerance: float) -> bool:
    return all(
        float((a - b).detach().norm() / b.detach().norm()) <= tolerance
        for a, b in zip(ours, theirs, strict=True)
    )


# ---- identities --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyVectors(SingularVectors):
    """Singular vectors of any number, whether that pays or not."""

    def check(self, target: Target) -> str | None:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyCosines(Cosine):
    """Cosines of any number, whether that pays or not."""

    def check(self, target: Target) -> str | None:
        return None


def test_adam_under_the_identity_is_adamw_and_under_a_full_rotation_is_not() -> None:
    shapes: list[tuple[int, ...]] = [(24, 8), (2, 12, 8)]
    whole, turned, theirs = (parameters(shapes=shapes) for _ in range(3))
    steps = gradients(10, whole)
    run(composed(whole, Adam(), Identity(), ProjectBack(), weight_decay=0.1), whole, steps)
    vectors = AnyVectors(rank=8, method="svd", every=100)
    run(composed(turned, Adam(), vectors, ProjectBack(), weight_decay=0.1), turned, steps)
    run(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1), theirs, steps)
    assert same(whole, theirs, 1e-12)
    assert not same(turned, theirs, 1e-3)


@pytest.mark.parametrize(
    "projector",
    [AnyVectors(rank=8, every=3, method="svd"), AnyVectors(rank=8, every=3), AnyCosines(rank=8)],
    ids=repr,
)
def test_sgd_in_a_subspace_of_all_dimensions_is_sgd(projector: Projector) -> None:
    shapes: list[tuple[int, ...]] = [(24, 8), (8, 10), (3, 12, 8)]
    ours, theirs = parameters(shapes=shapes), parameters(shapes=shapes)
    steps = gradients(7, ours)
    run(composed(ours, SGD(momentum=0.0), projector, ProjectBack()), ours, steps)
    run(torch.optim.SGD(theirs, lr=0.01), theirs, steps)
    assert same(ours, theirs, 1e-12)


def test_galore_is_adam_on_a_zero_tensor_in_the_subspace_projected_back() -> None:
    ours = parameters(shapes=[(24, 16)])
    start, scale = ours[0].detach().clone(), 0.25
    steps = gradients(6, ours)
    run(GaLore8bit(ours, lr=0.01, rank=4, scale=scale, store="fp32"), ours, steps)
    basis = torch.linalg.svd(steps[0][0].float(), full_matrices=False).Vh[:4].double().mT
    small = [nn.Parameter(torch.zeros(24, 4, dtype=torch.float64))]
    run(torch.optim.AdamW(small, lr=0.01, weight_decay=0.0), small, [[step[0] @ basis] for step in steps])
    moved = scale * small[0].detach() @ basis.mT
    torch.testing.assert_close(ours[0].detach() - start, moved, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("projector", ["columns", "rows", "elements", "blocks"])
def test_frugal_of_all_is_adamw_and_of_nothing_is_sign_sgd(projector: Any) -> None:
    for density in (1.0, 0.0):
        ours, theirs = parameters(), parameters()
        steps = gradients(6, ours)
        optimizer = Frugal(
            ours, lr=0.01, density=density, projector=projector, refresh_every=100, weight_decay=0.1
        )
        run(optimizer, ours, steps)
        if density:
            run(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1), theirs, steps)
        else:
            for step in steps:
                for p, g in zip(theirs, step, strict=True):
                    p.data.mul_(1 - 0.01 * 0.1).sub_(0.01 * g.sign())
            moments = [
                state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
            ]
            assert moments and all(moment.numel() == 0 for moment in moments)
        assert same(ours, theirs, 1e-12)


def test_frugals_moments_and_bias_correction_begin_anew_with_each_part() -> None:
    ours, theirs = parameters(), parameters()
    steps = gradients(6, ours)
    run(Frugal(ours, lr=0.01, density=1.0, projector="columns", refresh_every=3), ours, steps)
    for begin in (0, 3):
        run(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.0), theirs, steps[begin : begin + 3])
    assert same(ours, theirs, 1e-12)


def test_frugal_without_a_residual_touches_the_chosen_columns_alone() -> None:
    ours = parameters(shapes=[(24, 16)])
    start = ours[0].detach().clone()
    optimizer = Frugal(ours, density=0.25, projector="columns", residual="none", refresh_every=100)
    run(optimizer, ours, gradients(4, ours))
    moved = (ours[0].detach() - start).abs().sum(0) > 0
    assert moved.nonzero().flatten().tolist() == optimizer.state[ours[0]]["indices"].flatten().tolist()
    assert moved.sum() == 4


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_frugal_of_columns_holds_two_moments_and_an_index_of_each(shape: tuple[int, int]) -> None:
    ours = parameters(torch.float32, [shape])
    optimizer = Frugal(ours, density=0.25, projector="columns")
    run(optimizer, ours, gradients(1, ours))
    held = [v for k, v in optimizer.state[ours[0]].items() if isinstance(v, Tensor) and k != "step"]
    assert sum(value.numel() for value in held) == 2 * shape[0] * shape[1] // 4 + shape[1] // 4


@pytest.mark.parametrize("projector", ["svd", "random"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_frugal_of_directions_is_adam_in_a_quarter_of_the_smaller_side_and_the_sign_of_the_rest(
    shape: tuple[int, int], projector: Any
) -> None:
    ours = parameters(shapes=[shape])
    optimizer = Frugal(ours, lr=0.01, density=0.25, projector=projector, refresh_every=3)
    found, expected = optimizer.plan_of(ours[0]), ours[0].detach().clone()
    for number, step in enumerate(gradients(7, ours)):
        run(optimizer, ours, [step])
        g = found.oriented(step[0])
        basis = found.basis(optimizer.state[ours[0]], g)
        torch.testing.assert_close(basis.mT @ basis, torch.eye(4, dtype=g.dtype), rtol=0, atol=1e-6)
        if number % 3 == 0:
            low = nn.Parameter(torch.zeros(24, 4, dtype=g.dtype))
            adam = torch.optim.Adam([low], lr=0.01)
            captured = torch.linalg.svdvals(g)[:4].square().sum()
            assert projector == "random" or (g @ basis).square().sum() > 0.999 * captured
        before, low.grad = low.detach().clone(), g @ basis
        adam.step()
        rest = g - g @ basis @ basis.mT
        found.oriented(expected).add_((low.detach() - before) @ basis.mT - 0.01 * rest.sign())
        assert same(ours, [expected], 1e-12)


def test_frugals_sleeping_blocks_hold_no_moments() -> None:
    ours = parameters(shapes=[(12, 10)] * 6)
    optimizer = Frugal(ours, density=1 / 3, order="ascending", refresh_every=2)
    steps = gradients(6, ours)
    for number, step in enumerate(steps):
        run(optimizer, ours, [step])
        awake = [i for i, p in enumerate(ours) if optimizer.state[p]["exp_avg"].numel()]
        first = 2 * (number // 2) % 6
        assert awake == [first, first + 1]


@pytest.mark.parametrize("make", [Fira, Apollo])
def test_lifts_that_scale_channels_refuse_to_shorten_both_sides(make: Any) -> None:
    with pytest.raises(ScrimpError, match=r"side 'full'.*choose std"):
        make(parameters(), rank=4, side="full")


@pytest.mark.parametrize("make", [GaLore, Fira, Apollo, QGaLore, NaturalGaLore])
def test_an_unknown_variant_is_refused_by_name(make: Any) -> None:
    with pytest.raises(ScrimpError, match=r"variant.*'authors'.*paper, released"):
        make(parameters(), variant="authors")


# ---- tests that discriminate -------------------------------------------------------------------------


def test_a_first_step_of_rate_zero_moves_the_state_and_not_the_weights() -> None:
    ours, theirs = parameters(), parameters()
    steps = gradients(2, ours)
    waiting, plain = (GaLore(ps, lr=0.01, **SMALL) for ps in (ours, theirs))
    for group in waiting.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in ours]
    run(waiting, ours, steps[:1])
    run(plain, theirs, steps[:1])
    assert all(torch.equal(p, old) for p, old in zip(ours, before, strict=True))
    for p, q in zip(ours, theirs, strict=True):
        assert (
            torch.equal(waiting.state[p]["exp_avg"], plain.state[q]["exp_avg"])
            and waiting.state[p]["step"] == 1
        )


def test_subspaces_are_chosen_at_steps_0_and_every_multiple_of_the_period() -> None:
    ours = parameters(shapes=[(24, 16)])
    optimizer, chosen, last = GaLore(ours, lr=0.01, rank=4, refresh_every=3), [], None
    for number, step in enumerate(gradients(8, ours)):
        run(optimizer, ours, [step])
        basis = optimizer.state[ours[0]]["basis"]
        if last is None or not torch.equal(basis, last):
            chosen.append(number)
        last = basis.clone()
    assert chosen == [0, 3, 6]


def test_a_square_matrix_is_shortened_from_the_right() -> None:
    ours = parameters(shapes=[(20, 20)])
    optimizer = GaLore(ours, lr=0.01, rank=4)
    (step,) = gradients(1, ours)
    run(optimizer, ours, [step])
    right = torch.linalg.svd(step[0].float(), full_matrices=False).Vh[:4].double().mT
    basis = optimizer.state[ours[0]]["basis"]
    torch.testing.assert_close(basis @ basis.mT, right @ right.mT, rtol=1e-6, atol=1e-6)


LONG, SHORT, RANK = 48, 32, 4
NUMBERS = {  # of the docstrings, for a matrix (48, 32)
    "GaLore released": SHORT * RANK + 2 * LONG * RANK,
    "GaLore of both sides": (LONG + SHORT) * RANK + 2 * RANK**2,
    "NaturalGaLore released": (LONG + SHORT) * RANK + (2 + 3) * RANK**2,
    "NaturalGaLore paper": SHORT * RANK + (2 + 3) * LONG * RANK,
    "Fira released": SHORT * RANK + 2 * LONG * RANK + 1,
    "Apollo paper": 2 * LONG * RANK + 1,
    "ApolloMini": 2 * LONG + 1,
    "DCTAdamW": 2 * LONG * RANK + RANK,
    "DCTAdamW with feedback": 2 * LONG * RANK + RANK + LONG * SHORT,
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("shape", [(LONG, SHORT), (SHORT, LONG)])
def test_the_state_holds_the_numbers_of_the_docstring(name: str, shape: tuple[int, int]) -> None:
    ours = parameters(torch.float32, [shape])
    optimizer = NAMED[name](ours)
    run(optimizer, ours, gradients(1, ours))
    state = optimizer.state[ours[0]]
    held = {key: value for key, value in state.items() if isinstance(value, Tensor) and key != "step"}
    assert sum(value.numel() for value in held.values()) == NUMBERS[name]
    assert sum(value.nbytes for value in held.values()) == 4 * NUMBERS[name]


@pytest.mark.parametrize("name", NAMED)
def test_no_entry_of_the_state_keeps_a_larger_tensor_alive(name: str) -> None:
    ours = parameters(torch.float32)
    optimizer = NAMED[name](ours)
    run(optimizer, ours, gradients(2, ours))
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert tensors and all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


@pytest.mark.parametrize("make", [Fira, Apollo, ApolloMini])
def test_a_zero_first_gradient_does_not_end_the_method(make: Any) -> None:
    ours, theirs = parameters(shapes=[(24, 16)]), parameters(shapes=[(24, 16)])
    steps = gradients(3, ours)
    options: dict[str, Any] = {} if make is ApolloMini else {"rank": 4}
    late, prompt = make(ours, lr=0.01, **options), make(theirs, lr=0.01, **options)
    start = ours[0].detach().clone()
    run(late, ours, [[torch.zeros_like(steps[0][0])], *steps])
    run(prompt, theirs, steps)
    way, other = (float((ps[0].detach() - start).norm()) for ps in (ours, theirs))
    assert way > 0.2 * other


def test_apollos_scale_is_the_factor_of_its_update() -> None:
    one, four = parameters(shapes=[(24, 16)]), parameters(shapes=[(24, 16)])
    start, steps = one[0].detach().clone(), gradients(4, one)
    run(Apollo(one, lr=0.01, rank=4), one, steps)
    run(Apollo(four, lr=0.01, rank=4, scale=4.0), four, steps)
    torch.testing.assert_close(four[0] - start, 4 * (one[0] - start), rtol=1e-10, atol=1e-13)


def test_error_feedback_spends_at_last_what_a_small_subspace_missed() -> None:
    # The same gradient again and again: with feedback all of it arrives, without it only a part.
    def distance(lift: Lift) -> float:
        w = parameters(shapes=[(24, 16)])
        start = w[0].detach().clone()
        g = gradients(1, w)[0]
        run(composed(w, SGD(momentum=0.0), Cosine(rank=2), lift), w, [g] * 60)
        return float((start - 0.01 * 60 * g[0] - w[0].detach()).norm() / g[0].norm()) / (0.01 * 60)

    assert distance(ErrorFeedback()) < 0.2 < 0.7 < distance(ProjectBack())


def test_scaling_by_a_subspace_of_all_dimensions_is_structured_adam_and_no_adamw() -> None:
    ours, theirs = parameters(), parameters()
    steps = gradients(5, ours)
    run(composed(ours, Adam(), Identity(), ScaleGradient(gamma=None)), ours, steps)
    starts = parameters()
    run(torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.0), theirs, steps)
    assert not same(ours, theirs, 1e-3)
    first = parameters()
    run(composed(first, Adam(), Identity(), ScaleGradient(gamma=None)), first, steps[:1])
    for p, start, g in zip(first, starts, steps[0], strict=True):
        moved = start.detach() - p.detach()
        expected = 0.01 * g.shape[-1] ** 0.5 * g / g.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=0)  # Adam's eps


@pytest.mark.parametrize("name", NAMED)
def test_updates_inside_the_backward_pass_are_those_of_step_bitwise(name: str) -> None:
    at_step, inside = parameters(torch.float32), parameters(torch.float32)
    one, other = NAMED[name](at_step), NAMED[name](inside)
    other.fuse_backward()
    for step in gradients(5, at_step):
        for ps, optimizer in ((at_step, one), (inside, other)):
            torch.stack([(p * g).sum() for p, g in zip(ps, step, strict=True)]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(at_step, inside, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMED)
def test_a_run_resumed_between_refreshes_computes_the_same_bits(name: str, dtype: torch.dtype) -> None:
    whole, first = parameters(dtype), parameters(dtype)
    steps = gradients(9, whole)
    run(NAMED[name](whole), whole, steps)
    stopped = NAMED[name](first)
    run(stopped, first, steps[:4])
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in first], "optimizer": stopped.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = [nn.Parameter(w) for w in saved["weights"]]
    resumed = NAMED[name](second)
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, second, steps[4:])
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


@pytest.mark.parametrize("name", NAMED)
def test_a_gradient_that_is_not_finite_changes_nothing_and_poisons_nothing(name: str) -> None:
    ours = parameters(torch.float32)
    optimizer = NAMED[name](ours)
    steps = gradients(4, ours)
    run(optimizer, ours, steps[:1])
    before = [p.detach().clone() for p in ours]
    for g in steps[1]:
        g.view(-1)[7] = float("nan")
    run(optimizer, ours, steps[1:2])
    assert all(torch.equal(p, old) for p, old in zip(ours, before, strict=True))
    run(optimizer, ours, steps[2:])
    assert all(
        bool(p.isfinite().all()) and not torch.equal(p, old) for p, old in zip(ours, before, strict=True)
    )
