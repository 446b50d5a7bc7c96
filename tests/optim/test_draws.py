"""What is drawn or chosen: random bases, coordinates, blocks and columns of the cosine basis."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.optim.held import Held, captured, eye_error, gradient
from torch import Tensor

from scrimp.base.counter_random import normal
from scrimp.optim.pieces import Projector, Slot, Target
from scrimp.optim.projectors.blocks import Blocks
from scrimp.optim.projectors.coordinates import Coordinates
from scrimp.optim.projectors.dct import Cosine, cosine_basis
from scrimp.optim.projectors.random import Random
from scrimp.optim.projectors.refresh import matching


def drawn(projector: Projector, *, step: int = 0, index: int = 0) -> Any:
    held = Held(projector, (24, 16), index)
    return held.refresh(gradient(24, 16), step=step)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: Random(rank=4, seed=seed),
        lambda seed: Coordinates(density=0.5, seed=seed),
        lambda seed: Coordinates(density=0.5, kind="elements", seed=seed),
    ],
    ids=["random", "columns", "elements"],
)
def test_a_draw_is_a_function_of_seed_refresh_and_index_alone(make: Any) -> None:
    first = drawn(make(0))
    assert torch.equal(first, drawn(make(0)))
    for other in (drawn(make(1)), drawn(make(0), index=1), drawn(make(0), step=200)):
        assert not torch.equal(first, other)


def test_a_random_basis_keeps_norms_in_expectation() -> None:
    projector = Random(rank=8)
    g = gradient(24, 16)
    lengths = torch.stack([(g @ drawn(projector, index=i)).square().sum() for i in range(200)])
    ratios = lengths / g.square().sum()
    mean, spread = ratios.mean(), ratios.std() / math.sqrt(200)
    assert abs(mean - 1) < 4 * spread < 0.1


def test_a_random_basis_is_normal_and_its_columns_are_independent() -> None:
    projector = Random(rank=100)
    held = Held(projector, (2000, 1000))
    basis = held.refresh(torch.zeros(2000, 1000)) * 10  # N(0, 1) before the division by sqrt(r)
    count = basis.numel()
    z = basis.flatten().double()
    # Standard errors of the first four moments of 10^5 normal numbers.
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 4 * math.sqrt(spread / count)
    inner = basis.mT @ basis / 1000 - torch.eye(100)
    assert inner.abs().max() < 5 * math.sqrt(2 / 1000)
    assert (basis[:, :50] * basis[:, 50:]).mean().abs() < 4 / math.sqrt(count / 2)


def test_a_random_basis_is_drawn_from_its_seed_alone_and_stored_nowhere() -> None:
    for hold in (False, True):
        held = Held(Random(rank=4, hold=hold), (24, 16))
        g = gradient(24, 16)
        basis = held.refresh(g)
        assert held.projector.slots(held.target) == ()
        assert held.projector.tensors(held.target) == {}
        again = Held(Random(rank=4), (24, 16))
        again.entries["seed"] = held.entries["seed"]
        assert torch.equal(again.basis(g), basis)


def test_a_held_matrix_is_drawn_once_a_refresh() -> None:
    projector = Random(rank=4, hold=True)
    held = Held(projector, (24, 16))
    g = gradient(24, 16)
    first = held.refresh(g)
    assert held.basis(g) is first
    assert not torch.equal(held.refresh(g, step=200), first)
    assert len(projector._held) == 1


def test_indices_are_distinct_ascending_and_all_equally_likely() -> None:
    counts = torch.zeros(16)
    for index in range(400):
        indices = drawn(Coordinates(density=0.25), index=index)
        assert (indices.diff() > 0).all()
        counts[indices] += 1
    # Binomial(400, 1/4): a standard deviation of 8.7 about 100.
    assert (counts - 100).abs().max() < 4 * 8.7


def test_coordinates_take_whole_columns_rows_and_elements() -> None:
    g = gradient(24, 16)
    for kind, fraction in (("columns", 4 / 16), ("rows", 6 / 24), ("elements", 0.25)):
        held = Held(Coordinates(density=0.25, kind=kind), (24, 16))  # type: ignore[arg-type]
        basis = held.refresh(g)
        back = held.see(held.projector.up(held.projector.down(held.see(g), basis), basis, held.see(g)))
        active = back != 0
        assert torch.equal(back[active], g[active])
        assert float(active.double().mean()) == fraction
        if kind != "elements":
            lines = active.all(0 if kind == "columns" else 1)
            assert int(lines.sum()) * (24 if kind == "columns" else 16) == int(active.sum())


def test_half_an_index_is_none() -> None:
    projector = Coordinates(density=0.06)
    assert projector.down_shape(Target(name="w", shape=(24, 16)), 0) == (24, 0)
    assert Coordinates(density=1).down_shape(Target(name="w", shape=(24, 16)), 0) == (24, 16)


def awake(projector: Blocks, count: int, refreshes: int) -> list[list[int]]:
    targets = [Target(name="w", shape=(4, 4), index=i, count=count) for i in range(count)]
    steps = [refresh * projector.every for refresh in range(refreshes)]
    return [[t.index for t in targets if projector.awake(t, step)] for step in steps]


def test_block_orders() -> None:
    assert awake(Blocks(density=0.4, order="ascending"), 5, 3) == [[0, 1], [2, 3], [0, 4]]
    assert awake(Blocks(density=0.4, order="descending"), 5, 3) == [[3, 4], [1, 2], [0, 4]]
    assert awake(Blocks(density=0.25, order="mirror"), 8, 5) == [[0, 7], [1, 6], [2, 5], [3, 4], [0, 7]]
    assert awake(Blocks(density=0.4, order="mirror"), 5, 3) == [[0, 4], [1, 3], [0, 4]]
    random = awake(Blocks(density=0.25), 8, 40)
    assert all(len(chosen) == 2 for chosen in random)
    assert {i for chosen in random for i in chosen} == set(range(8))
    assert random != awake(Blocks(density=0.25, seed=1), 8, 40)


def test_a_block_asleep_has_no_state_and_wakes_at_a_refresh_alone() -> None:
    projector = Blocks(density=0.5, order="ascending", every=3)
    target = Target(name="w", shape=(4, 6), index=0, count=2)
    shapes = [projector.down_shape(target, step) for step in range(7)]
    assert shapes == [(4, 6)] * 3 + [(4, 0)] * 3 + [(4, 6)]


def dct(size: int) -> Tensor:
    return cosine_basis(size, torch.float64, torch.device("cpu"))


def test_the_cosine_basis_is_orthonormal() -> None:
    for size in (1, 2, 13, 64, 100):
        q = cosine_basis(size, torch.float64, torch.device("cpu"))
        torch.testing.assert_close(q @ q.mT, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14)
    assert dct(64) is dct(64)


def test_rows_times_the_transposed_basis_are_makhouls_transform() -> None:
    g, n = gradient(5, 24), 24
    reordered = torch.cat([g[:, ::2], g[:, 1::2].flip(-1)], -1)
    turn = torch.polar(torch.ones(n).double(), -math.pi * torch.arange(n).double() / (2 * n))
    transform = 2 * (torch.fft.fft(reordered, dim=-1) * turn).real * math.sqrt(1 / (2 * n))
    transform[:, 0] /= math.sqrt(2)
    q = dct(n)
    torch.testing.assert_close(g @ q.mT, transform, rtol=0, atol=1e-13)


def test_the_chosen_columns_lose_the_least_energy() -> None:
    g = gradient(24, 16)
    held = Held(Cosine(rank=5, norm=2), (24, 16))
    kept = captured(g, held.refresh(g))
    q = dct(16)
    energies = (g @ q).square().sum(0)
    assert kept == pytest.approx(float(energies.sort().values[-5:].sum()), rel=1e-12)
    one = Held(Cosine(rank=5, norm=1), (24, 16)).refresh(g)
    sums = (g @ q).abs().sum(0).sort(descending=True).indices[:5]
    torch.testing.assert_close(one, q[:, sums])


def test_all_columns_are_a_permutation_of_the_basis() -> None:
    basis = Held(Cosine(rank=16), (24, 16)).refresh(gradient(24, 16))
    assert eye_error(basis) < 1e-14
    assert basis.shape == (16, 16)


def test_surviving_columns_keep_their_moments_to_the_last_bit() -> None:
    held = Held(Cosine(rank=8), (24, 16))
    held.refresh(gradient(24, 16))
    old = held.entries["indices"].clone().view(-1).tolist()
    held.refresh(gradient(24, 16, seed=1), step=1)
    new = held.entries["indices"].view(-1).tolist()
    assert old != new
    assert set(old) & set(new)
    m = gradient(24, 8)
    carried = held.carry(m, Slot(name="m", shape=(24, 8), axis=1))
    for place, index in enumerate(new):
        expected = m[:, old.index(index)] if index in old else torch.zeros(24).double()
        assert torch.equal(carried[:, place], expected)


def test_matched_indices_carry_their_values_exactly_and_new_ones_start_at_zero() -> None:
    old, new = torch.tensor([7, 2, 9, 0]), torch.tensor([2, 5, 0, 7], dtype=torch.int32)
    value = gradient(3, 4)
    for signed in (True, False):
        carried = matching(old, new)(value, Slot(name="m", shape=(3, 4), axis=1, signed=signed))
        expected = torch.stack([value[:, 1], torch.zeros(3).double(), value[:, 3], value[:, 0]], 1)
        assert torch.equal(carried, expected)
    carry = matching(torch.stack([old, old.flip(0)]), torch.stack([new, new]))
    carried = carry(torch.stack([value, value]), Slot(name="m", shape=(2, 3, 4), axis=2))
    assert torch.equal(carried[0], expected)
    assert torch.equal(carried[1][:, 0], value[:, 2])


def test_compiled_code_draws_the_same_numbers_for_every_shape() -> None:
    def draw(seed: Tensor, count: int) -> Tensor:
        return normal(seed, count, device=torch.device("cpu"))

    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True, dynamic=True)
    for number, count in ((5, 200), (1 << 62, 77)):
        seed = torch.tensor(number)
        torch.testing.assert_close(compiled(seed, count), draw(seed, count), rtol=1e-6, atol=1e-6)
