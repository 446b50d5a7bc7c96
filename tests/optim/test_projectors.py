"""Projectors: what holds for all of them, and what none of them takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.optim.held import Held, gradient

from scrimp.base.errors import ScrimpError
from scrimp.optim.pieces import Projector, Target
from scrimp.optim.projectors.blocks import Blocks
from scrimp.optim.projectors.coordinates import Coordinates
from scrimp.optim.projectors.dct import Cosine
from scrimp.optim.projectors.identity import Identity
from scrimp.optim.projectors.random import Random
from scrimp.optim.projectors.svd import SingularVectors
from scrimp.optim.projectors.two_sided import TwoSided

ALL: list[Any] = [
    SingularVectors(rank=4),
    SingularVectors(rank=4, method="svd"),
    SingularVectors(rank=4, method="randomized"),
    TwoSided(rank=4),
    Random(rank=4),
    Random(rank=4, orthonormal=True, hold=True),
    Cosine(rank=4),
    Coordinates(density=0.25),
    Coordinates(density=0.25, kind="rows"),
    Coordinates(density=0.25, kind="elements"),
    Coordinates(density=0),
    Blocks(density=1),
    Blocks(density=0),
    Identity(),
]
ORTHONORMAL = [p for p in ALL if not isinstance(p, Random) or p.orthonormal]


def short(projector: Any) -> str:
    """Tell projectors of `ALL` apart."""
    chosen = [str(getattr(projector, name, "")) for name in ("method", "kind", "density", "orthonormal")]
    return "-".join([type(projector).__name__, *filter(None, chosen)])


SHAPES = [(24, 16), (16, 24), (16, 16), (3, 24, 16), (3, 16, 24)]


@pytest.mark.parametrize("projector", ALL, ids=short)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_down_has_the_shape_promised_and_up_is_its_transpose(
    projector: Projector, shape: tuple[int, ...]
) -> None:
    g = gradient(*shape)
    held = Held(projector, shape)
    basis = held.refresh(g)
    r = projector.down(held.see(g), basis)
    assert r.shape == projector.down_shape(held.target, 0)
    x = gradient(*r.shape, seed=1)
    back = projector.up(x, basis, held.see(g))
    assert back.shape == held.see(g).shape
    torch.testing.assert_close((back * held.see(g)).sum(), (x * r).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("projector", ORTHONORMAL, ids=short)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_projecting_back_and_forth_changes_nothing(projector: Projector, shape: tuple[int, ...]) -> None:
    g = gradient(*shape)
    held = Held(projector, shape)
    basis = held.refresh(g)
    r = projector.down(held.see(g), basis)
    again = projector.down(projector.up(r, basis, held.see(g)), basis)
    # What is drawn is drawn in float32.
    torch.testing.assert_close(again, r, rtol=0, atol=1e-5 if isinstance(projector, Random) else 1e-12)


@pytest.mark.parametrize("projector", ALL, ids=short)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_subtract_changes_the_weights_by_what_up_returns(
    projector: Projector, shape: tuple[int, ...]
) -> None:
    w = gradient(*shape, seed=2)
    held = Held(projector, shape)
    basis = held.refresh(gradient(*shape))
    x = gradient(*projector.down_shape(held.target, 0), seed=1)
    expected = held.see(w) - projector.up(x, basis, held.see(w))
    projector.subtract(held.see(w), x, basis)
    torch.testing.assert_close(held.see(w), expected, rtol=0, atol=1e-13)


# Of a batch every matrix has its own draw.
UNDRAWN = [p for p in ALL if not isinstance(p, Random | Coordinates)]


@pytest.mark.parametrize("projector", UNDRAWN, ids=short)
def test_a_batch_is_its_matrices(projector: Projector) -> None:
    batch = gradient(3, 24, 16)
    whole = Held(projector, (3, 24, 16))
    r = projector.down(batch, whole.refresh(batch))
    one = Held(projector, (24, 16))
    alone = [projector.down(g, one.refresh(g)) for g in batch]
    # Random columns differ by a matrix's place: two iterations leave more of that than five do.
    exact = getattr(projector, "method", "svd") == "svd"
    torch.testing.assert_close(r.norm(dim=(-2, -1)), torch.stack(alone).norm(dim=(-2, -1)), rtol=0.01, atol=0)
    if exact:
        torch.testing.assert_close(r, torch.stack(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("side", "shape", "transposed"),
    [
        ("std", (24, 16), False),
        ("std", (16, 24), True),
        ("std", (16, 16), False),  # ties go right
        ("reverse_std", (24, 16), True),
        ("reverse_std", (16, 24), False),
        ("reverse_std", (16, 16), True),
        ("left", (24, 16), True),
        ("right", (16, 24), False),
        ("std", (5, 16, 24), True),
    ],
)
def test_sides(side: Any, shape: tuple[int, ...], transposed: bool) -> None:
    for projector in (
        SingularVectors(rank=2, side=side),
        Random(rank=2, side=side),
        Cosine(rank=2, side=side),
    ):
        assert projector.transposes(shape) is transposed


@pytest.mark.parametrize("projector", ALL, ids=short)
def test_refreshes_fall_on_multiples_of_the_period(projector: Projector) -> None:
    if isinstance(projector, Identity):
        assert not projector.due({}, 0)
        return
    held = Held(projector, (24, 16))
    every = projector.every  # type: ignore[attr-defined]
    assert [step for step in range(3 * every) if projector.due(held.entries, step)] == [0, every, 2 * every]


@pytest.mark.parametrize("kind", [SingularVectors, Random, Cosine, TwoSided])
def test_a_rank_above_the_smaller_side_is_refused_with_the_largest_allowed(kind: Any) -> None:
    target = Target(name="layers.3.up", shape=(24, 16))
    with pytest.raises(ScrimpError, match=r"layers\.3\.up.*largest allowed is 16"):
        kind(rank=17).check(target)
    assert kind(rank=2).check(target) is None


def test_a_state_no_smaller_than_adams_leaves_the_matrix_alone() -> None:
    target = Target(name="w", shape=(24, 16))
    for projector, whole in (
        (SingularVectors(rank=12), 16 * 12 + 2 * 24 * 12),
        (TwoSided(rank=15), 40 * 15 + 2 * 225),
        (Random(rank=16), 2 * 24 * 16),
    ):
        assert projector.check(target) == f"its state would hold {whole} numbers, Adam's holds 768"
    assert SingularVectors(rank=11).check(target) is None
    assert SingularVectors(rank=12, released=True).check(target) is not None
    assert SingularVectors(rank=1).check(Target(name="b", shape=(24,))) == "it is no matrix"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SingularVectors(rank=0), "rank is 0"),
        (lambda: SingularVectors(rank=4.0), "rank is 4.0"),  # type: ignore[arg-type]
        (lambda: Random(rank=True), "rank is True"),
        (lambda: Cosine(rank=4, every=0), "every is 0"),
        (lambda: Random(rank=4, side="top"), "side is 'top'"),  # type: ignore[arg-type]
        (lambda: Coordinates(density=1.5), "density is 1.5"),
        (lambda: Coordinates(density=0.5, kind="diagonals"), "kind is 'diagonals'"),  # type: ignore[arg-type]
        (lambda: Cosine(rank=4, norm=3), "norm is 3"),  # type: ignore[arg-type]
    ],
)
def test_options_are_checked_where_they_are_given(make: Any, words: str) -> None:
    with pytest.raises(ScrimpError, match=words):
        make()


def test_an_odd_number_of_blocks_is_not_taken_in_pairs() -> None:
    with pytest.raises(ScrimpError, match="wakes 3 of 8"):
        Blocks(density=0.375, order="mirror").check_count(8)
