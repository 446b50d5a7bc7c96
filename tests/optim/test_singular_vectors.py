"""Singular vectors: the iteration against the decomposition, bad gradients, signs, rotation and laziness."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tests.optim.held import Held, captured, eye_error, gradient
from torch import Tensor

from scrimp.optim.pieces import Entries, Slot
from scrimp.optim.projectors.refresh import Lazy, rotation
from scrimp.optim.projectors.svd import SingularVectors, right_vectors
from scrimp.optim.projectors.two_sided import TwoSided


def spectrum(kind: str, k: int = 96, d: int = 64) -> Tensor:
    """A matrix with singular values that fall as `kind` says."""
    if kind == "flat":
        return gradient(k, d)
    number = torch.arange(d, dtype=torch.float64)
    values = {"slow": (1 + number) ** -0.5, "fast": (1 + number) ** -1, "steep": torch.exp(-number / 4)}[kind]
    left, right = torch.linalg.qr(gradient(k, d)).Q, torch.linalg.qr(gradient(d, d, seed=1)).Q
    return (left * values) @ right.mT


# (k, d), and a rank: all eigenvectors; a block by G^T G; a block by G^T (G S).
WAYS = {"all": (96, 64, 16), "block": (128, 112, 20), "thin block": (352, 352, 4)}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kind", "least"), [("flat", 0.998), ("slow", 0.9999), ("steep", 0.999999)])
def test_the_iteration_captures_the_energy_that_the_decomposition_does(
    kind: str, least: float, transposed: bool, way: str
) -> None:
    k, d, rank = WAYS[way]
    g = spectrum(kind, k, d).float()
    g = g.mT if transposed else g
    best = captured(g, right_vectors(g, rank, "svd", seed=0))
    found = right_vectors(g, rank, "power", seed=0)
    assert least < captured(g, found) / best < 1 + 1e-5
    assert eye_error(found) < 5e-6


def test_the_filter_does_the_work_of_more_iterations() -> None:
    g, rank = spectrum("flat", 112, 112), 20
    best = captured(g, right_vectors(g, rank, "svd", seed=0))
    missed = 1 - captured(g, right_vectors(g, rank, "power", seed=0)) / best
    columns = gradient(112, rank + 16, seed=1)
    without = []
    for _ in range(10):
        columns = torch.linalg.qr(g.mT @ (g @ columns)).Q
        turn = torch.linalg.svd(g @ columns).Vh[:rank].mT
        without.append(1 - captured(g, columns @ turn) / best)
    assert missed < 0.2 * without[6]  # as many iterations, unfiltered
    assert missed < without[9]


@pytest.mark.parametrize(("huge", "least"), [(1e2, 0.9988), (3e2, 0.99)])
def test_huge_directions_do_not_drown_the_others_in_float32(huge: float, least: float) -> None:
    values = 1 - torch.arange(112, dtype=torch.float64) / 224
    values[:10] = huge
    left, right = torch.linalg.qr(gradient(128, 112)).Q, torch.linalg.qr(gradient(112, 112, seed=1)).Q
    found = right_vectors(((left * values) @ right.mT).float(), 20, "power", seed=0).double()
    others = (left[:, 10:] * values[10:]) @ right[:, 10:].mT
    assert (others @ found).square().sum() > least * values[10:20].square().sum()


def test_each_matrix_of_a_batch_has_its_own_subspace() -> None:
    for k, d, rank in WAYS.values():
        batch = torch.stack([spectrum("steep", k, d), torch.zeros(k, d), spectrum("slow", k, d)])
        found = right_vectors(batch, rank, "power", seed=0)
        assert eye_error(found) < 1e-12
        for g, basis in zip(batch[::2], found[::2], strict=True):
            assert captured(g, basis) > 0.9999 * captured(g, right_vectors(g, rank, "svd", seed=0))


METHODS: tuple[Any, ...] = ("svd", "power", "randomized")


@pytest.mark.parametrize("method", METHODS)
def test_columns_are_singular_vectors_and_not_another_basis_of_their_span(method: Any) -> None:
    g = spectrum("steep")
    image = g @ right_vectors(g, 6, method, seed=0)
    gram = image.mT @ image
    lengths = gram.diagonal()
    assert (gram - lengths.diag()).abs().max() < 1e-9 * lengths[0]
    assert (lengths.diff() < 0).all()


def deficient(k: int, d: int) -> dict[str, Tensor]:
    broken = gradient(k, d)
    broken[3, 5], broken[4, 6], broken[0, 0] = math.nan, math.inf, -math.inf
    return {
        "zero": torch.zeros(k, d),
        "rank one": gradient(k, 1) @ gradient(1, d),
        "ill-conditioned": gradient(k, d) * torch.logspace(0, -14, d, dtype=torch.float64),
        "30 decades": gradient(k, d) * torch.logspace(0, -30, d, dtype=torch.float64),
        "not finite": broken,
        "all nan": torch.full((k, d), math.nan),
        "huge": gradient(k, d).float() * 1e37,
        "tiny": gradient(k, d).float() * 1e-38,
        "one huge": torch.eye(k, d).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(3e38)),
    }


@pytest.mark.parametrize("name", list(deficient(24, 16)))
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_bad_gradient_gives_an_orthonormal_basis(method: Any, name: str, transposed: bool) -> None:
    for shape in ((24, 16), (112, 96)):  # all eigenvectors, and a block
        g = deficient(*shape)[name].float()
        g = g.mT.contiguous() if transposed else g
        for projector in (
            SingularVectors(rank=6, method=method, side="right"),
            TwoSided(rank=6, method=method),
        ):
            held = Held(projector, tuple(g.shape))
            held.refresh(g)
            for basis in held.slots.values():
                assert eye_error(basis) < 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_leaves_the_rest_of_the_subspace_alone(value: float) -> None:
    g = spectrum("steep")
    broken = g.clone()
    broken[5, 7] = value
    whole, hurt = (right_vectors(x, 2, "power", seed=0) for x in (g, broken))
    assert ((whole.mT @ hurt).square().sum() / 2) > 0.95


def test_a_basis_is_stored_alone_and_not_as_a_view_of_all_vectors() -> None:
    for projector in (SingularVectors(rank=4, method="svd"), SingularVectors(rank=4), TwoSided(rank=4)):
        held = Held(projector, (24, 16))
        held.refresh(gradient(24, 16).float())
        for slot in projector.slots(held.target):
            stored = held.slots[slot.name]
            assert stored.untyped_storage().nbytes() == stored.numel() * 4 == math.prod(slot.shape) * 4


@pytest.mark.parametrize("method", METHODS)
def test_signs_do_not_depend_on_the_gradients_sign(method: Any) -> None:
    g, later = spectrum("steep", 24, 16), spectrum("steep", 24, 16) + 0.01 * gradient(24, 16, seed=4)
    bases = []
    for sign in (1, -1):
        held = Held(SingularVectors(rank=4, method=method), (24, 16))
        first = held.refresh(sign * g)
        assert (first.gather(0, first.abs().argmax(0, keepdim=True)) > 0).all()
        second = held.refresh(-sign * later, step=200)
        assert ((first * second).sum(0) >= 0).all()
        bases.append(second)
    torch.testing.assert_close(*bases)


def test_float64_gradients_are_decomposed_in_float64_unless_released() -> None:
    g = gradient(24, 16)
    exact = torch.linalg.svd(g).Vh[:4].mT
    for released, error in ((False, 1e-13), (True, 1e-5)):
        for projector in (
            SingularVectors(rank=4, method="svd", released=released),
            SingularVectors(rank=4, released=released),
        ):
            basis = Held(projector, (24, 16)).refresh(g)
            assert basis.dtype == torch.float64
            assert eye_error(basis) < error
    basis = Held(SingularVectors(rank=4, method="svd"), (24, 16)).refresh(g)
    torch.testing.assert_close(basis @ basis.mT, exact @ exact.mT, rtol=0, atol=1e-13)


def test_two_sided_moments_are_diagonal_at_a_refresh() -> None:
    g = spectrum("steep", 24, 16)
    for method in METHODS:
        projector = TwoSided(rank=4, method=method, align=False)
        r = projector.down(g, Held(projector, (24, 16)).refresh(g))
        torch.testing.assert_close(r, torch.linalg.svdvals(g)[:4].diag(), rtol=1e-9, atol=1e-9)


def test_rotation_into_the_same_subspace_changes_what_the_slots_mean_by_nothing() -> None:
    old = torch.linalg.qr(gradient(16, 4)).Q
    turn = torch.linalg.qr(gradient(4, 4, seed=1)).Q
    new = old @ turn
    m, v = gradient(24, 4), gradient(24, 4).square()
    carry = rotation(old, new)
    turned = carry(m, Slot(name="m", shape=(24, 4), axis=1))
    torch.testing.assert_close(turned @ new.mT, m @ old.mT)
    spread = carry(v, Slot(name="v", shape=(24, 4), axis=1, signed=False))
    torch.testing.assert_close(spread, v @ turn.square())
    torch.testing.assert_close(spread.sum(-1), v.sum(-1))  # columns of squares sum to 1
    assert (spread >= 0).all()
    vector = carry(v[0], Slot(name="col", shape=(4,), axis=0, signed=False))
    torch.testing.assert_close(vector, spread[0])
    assert carry(v[:, 0], Slot(name="row", shape=(24,))) is not None
    torch.testing.assert_close(carry(v[:, 0], Slot(name="row", shape=(24,))), v[:, 0])


def test_refresh_rotates_only_where_asked() -> None:
    for on_refresh, rotates in (("keep", False), ("reset", False), ("rotate", True)):
        held = Held(SingularVectors(rank=4, on_refresh=on_refresh), (24, 16))  # type: ignore[arg-type]
        held.refresh(gradient(24, 16))
        assert held.carry is None
        held.refresh(gradient(24, 16, seed=1), step=200)
        assert (held.carry is not None) == rotates


def lazily(lazy: Lazy, gradients: list[Tensor], every: int, steps: int) -> list[int]:
    held = Held(SingularVectors(rank=4, every=every, lazy=lazy, method="svd"), (24, 16))
    refreshed = []
    for step in range(steps):
        if held.projector.due(held.entries, step):
            held.refresh(gradients[len(refreshed) % len(gradients)], step=step)
            refreshed.append(step)
    return refreshed


def test_the_period_doubles_once_the_queue_is_full_of_alike_subspaces_and_again_at_each_refresh() -> None:
    g = spectrum("steep", 24, 16)
    # Similarities are seen at 2, 4 and 6: the third fills the queue, and 4 counts from then on.
    assert lazily(Lazy(queue=3), [g], every=2, steps=40) == [0, 2, 4, 6, 8, 16, 32]


def test_the_period_stays_where_subspaces_differ_or_the_threshold_is_out_of_reach() -> None:
    alike = spectrum("steep", 24, 16)
    others = [gradient(24, 16, seed=seed) for seed in range(9)]
    for lazy, gradients in ((Lazy(queue=3, threshold=1.1), [alike]), (Lazy(queue=3, threshold=0.9), others)):
        assert lazily(lazy, gradients, every=2, steps=16) == list(range(0, 16, 2))


@pytest.mark.parametrize("measure", ["cosine", "overlap"])
def test_laziness_does_not_see_the_signs_of_singular_vectors(measure: Any) -> None:
    basis = torch.linalg.qr(gradient(16, 4)).Q
    seen = {}
    for signed in (False, True):
        lazy = Lazy(measure=measure, signed=signed, queue=1)
        entries: Entries = {name: torch.zeros(s, dtype=t) for name, (s, t) in lazy.tensors().items()}
        lazy.observe(entries, None, basis, 5, torch.tensor(True))
        lazy.observe(entries, basis, -basis, 5, torch.tensor(True))
        seen[signed] = (float(entries["similarities"]), entries["period"])
    assert seen[False] == (pytest.approx(1), 10)
    assert seen[True] == ((pytest.approx(-1), 5) if measure == "cosine" else seen[False])


def test_lazy_refresh_goes_on_from_its_saved_numbers() -> None:
    g = [spectrum("steep", 24, 16) + 0.3 * gradient(24, 16, seed=seed) for seed in range(20)]
    whole, stopped = (Held(SingularVectors(rank=4, every=2, lazy=Lazy(queue=2)), (24, 16)) for _ in range(2))
    for step in range(20):
        if step == 9:  # a new process has nothing but the tensors
            fresh = Held(SingularVectors(rank=4, every=2, lazy=Lazy(queue=2)), (24, 16))
            fresh.entries = copy.deepcopy(stopped.entries)
            fresh.slots = copy.deepcopy(stopped.slots)
            stopped = fresh
        due = [held.projector.due(held.entries, step) for held in (whole, stopped)]
        assert due[0] == due[1]
        for held in (whole, stopped):
            if due[0]:
                held.refresh(g[step], step=step)
    assert whole.entries["period"] > 2
    assert torch.equal(whole.slots["basis"], stopped.slots["basis"])
