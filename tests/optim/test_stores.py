"""The stores of optimizer state: their bytes, their errors, and what they must never do."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.optim.kernels import cpu
from scrimp.optim.pieces import Slot, Store
from scrimp.optim.stores import dynamic_map
from scrimp.optim.stores.bf16 import BF16Nearest, BF16Stochastic
from scrimp.optim.stores.blockwise import Blockwise, unit
from scrimp.optim.stores.dynamic8 import Dynamic8
from scrimp.optim.stores.four_bit import FourBit
from scrimp.optim.stores.fp8 import FP8
from scrimp.optim.stores.full import Full
from scrimp.optim.stores.int_groups import Group4, Group8

NOISE = torch.tensor(7)
BLOCKWISE: list[Blockwise] = [
    Dynamic8(min_size=0),
    FP8(),
    FP8(expansion=False),
    FourBit(min_size=0),
    Group4(),
    Group8(),
    Group4(released=True),
]
STORES: list[Store] = [Full(), BF16Nearest(), BF16Stochastic(), *BLOCKWISE]
ALL = pytest.mark.parametrize("store", STORES, ids=repr)
QUANTISED = pytest.mark.parametrize("store", BLOCKWISE, ids=repr)


def slot(*shape: int, signed: bool = True, exact: bool = False) -> Slot:
    return Slot(name="m", shape=shape, signed=signed, exact=exact)


def round_trip(store: Store, value: Tensor, *, signed: bool = True) -> Tensor:
    own = slot(*value.shape, signed=signed)
    return store.decode(store.encode(value, own, NOISE), own, torch.float32)


def error(store: Store, value: Tensor, *, signed: bool = True) -> float:
    return ((round_trip(store, value, signed=signed) - value).norm() / value.norm()).item()


def nbytes(store: Store, own: Slot) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in store.layout(own).values())


@ALL
@pytest.mark.parametrize("shape", [(24, 16), (3, 5, 7), (1,), (256,), (2, 4, 32)])
def test_entries_are_what_the_layout_says(store: Store, shape: tuple[int, ...], generator: Any) -> None:
    own = slot(*shape)
    entries = store.encode(torch.randn(*shape, generator=generator), own, NOISE)
    assert {name: (tuple(x.shape), x.dtype) for name, x in entries.items()} == store.layout(own)
    assert store.decode(entries, own, torch.float64).shape == shape
    assert store.decode(entries, own, torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("store", "expected"),
    [
        (Full(), 4 * 10_000),
        (Full(torch.float64), 8 * 10_000),
        (BF16Stochastic(), 2 * 10_000),
        (Dynamic8(), 10_000 + 4 * 40),
        (FP8(), 10_000 + 8 * 79),
        (FP8(expansion=False), 10_000 + 4 * 79),
        (FourBit(), 5_000 + 4 * 79),
        (Group4(), 5_000 + 8 * 40),
        (Group8(), 10_000 + 8 * 40),
    ],
    ids=repr,
)
def test_bytes_follow_the_formula(store: Store, expected: int) -> None:
    assert nbytes(store, slot(100, 100)) == expected


@ALL
def test_exact_slots_stay_in_full_precision(store: Store, generator: Any) -> None:
    own, value = slot(5000, exact=True), torch.randn(5000, generator=generator)
    assert torch.equal(store.decode(store.encode(value, own, NOISE), own, torch.float32), value)
    assert store.block(own) == 1


def test_an_exact_slot_holds_float64_where_it_is_told_to(generator: Any) -> None:
    own, value = slot(64, exact=True), torch.randn(64, generator=generator, dtype=torch.float64)
    store = Dynamic8(exact=Full(torch.float64))
    assert torch.equal(store.decode(store.encode(value, own, NOISE), own, torch.float64), value)


def test_below_4096_elements_8_bit_slots_stay_float32() -> None:
    assert Dynamic8().layout(slot(4095)) == Full().layout(slot(4095))
    assert Dynamic8().layout(slot(4096))["codes"] == ((4096,), torch.uint8)
    assert Dynamic8().of(slot(4095)) == Full()
    assert Dynamic8().of(slot(4096)).layout(slot(256))["codes"] == ((256,), torch.uint8)


@QUANTISED
def test_a_block_alone_is_kept_as_within_the_whole(store: Blockwise, generator: Any) -> None:
    value, size = torch.randn(5 * 256 + 70, generator=generator), 2 * 256
    whole = store.encode(value, slot(value.numel()), NOISE)
    parts = [store.encode(x, slot(x.numel()), NOISE) for x in value.split(size)]
    assert all(torch.equal(torch.cat([part[name] for part in parts]), x) for name, x in whole.items())


@QUANTISED
@pytest.mark.parametrize("signed", [True, False])
def test_zeros_decode_to_zeros_freshly_allocated_or_encoded(store: Blockwise, signed: bool) -> None:
    own = slot(3, 100, signed=signed)
    entries = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in store.layout(own).items()}
    assert not store.decode(entries, own, torch.float32).any()
    assert not round_trip(store, torch.zeros(3, 100), signed=signed).any()


@pytest.mark.parametrize("store", [s for s in STORES[1:] if s != Group4(released=True)], ids=repr)
@pytest.mark.parametrize("size", [3.4028e38, 1e-38, 1e-44, 1e300])
def test_what_is_finite_stays_finite(store: Store, size: float, generator: Any) -> None:
    value = size * (2 * torch.rand(300, generator=generator, dtype=torch.float64) - 1)
    value = value if size > 1e40 else value.float()
    for x, signed in ((value, True), (value.abs(), False)):
        assert round_trip(store, x, signed=signed).isfinite().all()


@pytest.mark.parametrize(
    ("store", "normal", "squares"),
    [
        (BF16Nearest(), 0.0017, 0.0017),
        (Dynamic8(), 0.0108, 0.0064),
        (FP8(), 0.0144, 0.0241),
        (FP8(expansion=False), 0.0257, 0.0237),
        (FourBit(), 0.149, 0.18),
        (Group4(), 0.109, 0.098),
    ],
    ids=repr,
)
def test_relative_errors_are_those_of_the_papers(
    store: Store, normal: float, squares: float, generator: Any
) -> None:
    x = torch.randn(1 << 17, generator=generator)
    assert error(store, x) == pytest.approx(normal, rel=0.03)
    assert error(store, x * x, signed=False) == pytest.approx(squares, rel=0.03)


def stalled(store: Store, gradients: list[float], beta2: float = 0.999) -> float:
    own = slot(256, signed=False)
    entries = store.encode(torch.ones(256) if not gradients[0] else torch.zeros(256), own, NOISE)
    for step, g in enumerate(gradients):
        v = beta2 * store.decode(entries, own, torch.float32) + (1 - beta2) * g * g
        entries = store.encode(v, own, torch.tensor(step))
    return store.decode(entries, own, torch.float32).mean().item()


def test_bf16_second_moments_stall_to_nearest_and_to_nearest_alone() -> None:
    # After 3000 steps v is 1 - 0.999^3000 = 0.9503 under a unit gradient, and 0.0497 without one.
    for gradient, stuck, right in ((1.0, 0.25, 0.9503), (0.0, 1.0, 0.0497)):
        history = [gradient] * 3000
        assert stalled(BF16Nearest(), history) == stuck
        assert stalled(BF16Stochastic(), history) == pytest.approx(right, rel=0.05)
        assert stalled(Full(), history) == pytest.approx(right, rel=1e-3)


def test_stochastic_rounding_is_right_in_expectation_and_a_function_of_its_seed() -> None:
    value, own = torch.full((1 << 16,), 1 + 2.0**-9), slot(1 << 16)
    first, again, other = (BF16Stochastic().encode(value, own, torch.tensor(seed))[""] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    # A quarter of a place above 1: rounded up once in four times, give or take four standard deviations.
    assert (first.float() > 1).float().mean().item() == pytest.approx(0.25, abs=4 * 0.0017)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("decades", [7, 3])
def test_codes_are_the_nearest_by_search(decades: int, signed: bool, generator: Any) -> None:
    codes = torch.arange(2 ** (decades + 1), dtype=torch.uint8)
    values = dynamic_map.decode(codes, decades=decades, signed=signed)
    assert (values.diff() > 0).all()
    assert torch.equal(dynamic_map.encode(values, decades=decades, signed=signed), codes)
    x = torch.cat(
        [
            torch.linspace(0, 1, 65536),
            10 ** (-8 * torch.rand(100_000, generator=generator)),
        ]
    )
    x = torch.cat([x, -x]) if signed else x
    edges = ((values[1:].double() + values[:-1]) / 2).sort().values
    found = dynamic_map.encode(x, decades=decades, signed=signed).long()
    nearest = torch.searchsorted(edges, x.double())
    wrong = found != nearest
    assert wrong.float().mean() < 1e-4 and (found - nearest).abs().max() <= 1
    edge = edges[torch.minimum(found, nearest)[wrong]]
    assert ((x[wrong] - edge).abs() <= 1e-6 * edge.abs()).all()


def test_the_negative_extreme_is_stored_a_little_smaller() -> None:
    value = torch.linspace(-2.0, 1.0, 256)
    assert round_trip(Dynamic8(min_size=0), value)[0].item() == pytest.approx(-2 * 0.992969, rel=1e-6)
    assert round_trip(Dynamic8(min_size=0), -value)[0].item() == 2.0


def test_second_moments_in_4_bits_never_reach_zero() -> None:
    value = torch.cat([torch.ones(1), torch.full((127,), 1e-9)])
    assert round_trip(FourBit(min_size=0), value, signed=False).min().item() == 1 / 16


@pytest.mark.parametrize("expansion", [True, False])
def test_fp8_keeps_constant_blocks_and_single_values(expansion: bool) -> None:
    store = FP8(expansion=expansion)
    constant = torch.full((128,), 0.3) * torch.tensor([1.0, -1.0]).repeat(64)
    assert torch.allclose(round_trip(store, constant), constant, rtol=1e-6)
    single = torch.zeros(128)
    single[77] = -3e-7
    assert torch.allclose(round_trip(store, single), single, rtol=1e-6, atol=0)


def test_one_tiny_value_or_zero_does_not_spoil_an_fp8_block(generator: Any) -> None:
    value = 1 + torch.rand(128, generator=generator)
    for outlier in (1e-30, 0.0):
        spoilt = value.clone()
        spoilt[5] = outlier
        assert error(FP8(), spoilt) < 0.04  # without the guard 0.18
    assert error(FP8(), spoilt) < 0.004  # a zero does not count as the smallest


def test_only_the_released_group_store_breaks_off_zero(generator: Any) -> None:
    value = 1 + torch.rand(256, generator=generator)
    step = (value.max() - value.min()).item() / 15
    assert (round_trip(Group4(), value) - value).abs().max().item() <= step / 2 + 1e-6
    assert (round_trip(Group4(released=True), value) - value).abs().max().item() > 0.5
    both = torch.randn(256, generator=generator)
    assert (round_trip(Group4(released=True), both) - both).abs().max().item() <= (
        both.max() - both.min()
    ) / 15


def test_a_4_bit_basis_loses_its_orthonormality_by_a_few_percent(generator: Any) -> None:
    basis = torch.linalg.qr(torch.randn(768, 128, generator=generator)).Q
    kept = round_trip(Group4(), basis)
    assert error(Group4(), basis) == pytest.approx(0.11, abs=0.01)
    assert 0.01 < (kept.mT @ kept - torch.eye(128)).abs().max().item() < 0.06


@pytest.mark.parametrize("signed", [True, False])
def test_the_kernel_has_the_bits_of_the_reference(signed: bool, generator: Any) -> None:
    assert cpu.prepare()
    spread = torch.exp(4 * torch.randn(400, 256, generator=generator))
    rows = torch.randn(400, 256, generator=generator) * spread
    rows = torch.cat([rows, torch.zeros(1, 256), rows[:1] * 1e-44, torch.linspace(-1, 1, 256)[None]])
    _have_equal_bits(rows if signed else rows.abs(), signed)


@pytest.mark.parametrize("signed", [True, False])
def test_the_kernel_rounds_as_the_reference_does_where_codes_meet(signed: bool) -> None:
    assert cpu.prepare()
    places = torch.arange(256, dtype=torch.uint8)
    values = dynamic_map.decode(places, decades=7, signed=signed).abs().unique()
    middles = torch.cat([(values[1:] + values[:-1]) / 2, 10.0 ** -torch.arange(8), 2.0 ** -torch.arange(40)])
    near = (middles.view(torch.int32)[:, None] + torch.arange(-300, 301)).view(torch.float32).clamp_max(1)
    rows = torch.cat([near, torch.ones(len(near), 1)], 1)  # 602 numbers: no multiple of any register
    _have_equal_bits(rows, signed)
    if signed:
        _have_equal_bits(-rows, signed)


def _have_equal_bits(rows: Tensor, signed: bool) -> None:
    x, scale = unit(rows)
    codes = dynamic_map.encode(x, decades=7, signed=signed)
    found, found_scale = cpu.encode(rows, signed)
    assert torch.equal(found, codes) and torch.equal(found_scale, scale)
    values = dynamic_map.decode(codes, decades=7, signed=signed) * scale
    assert torch.equal(cpu.decode(found, found_scale, signed), values)


def test_without_a_compiler_the_reference_serves_and_the_user_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, generator: Any
) -> None:
    value = torch.randn(24, 16, generator=generator)
    Dynamic8().prepare(value.device)
    fast = round_trip(Dynamic8(min_size=0), value)

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))  # nothing built there yet
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    cpu._loaded.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no-compiler.*Install a C"):
            Dynamic8().prepare(value.device)
        assert torch.equal(round_trip(Dynamic8(min_size=0), value), fast)
        with warnings.catch_warnings():  # once is enough
            warnings.simplefilter("error")
            Dynamic8().prepare(value.device)
    finally:
        cpu._loaded.cache_clear()


@QUANTISED
def test_a_store_traces_whole_with_any_shape(store: Blockwise, generator: Any) -> None:
    def again(value: Tensor, seed: Tensor) -> Tensor:
        own = slot(*value.shape)
        return store.decode(store.encode(value, own, seed), own, torch.float32)

    torch.compiler.reset()  # the stores share this code: beyond eight it would be left eager
    traced = torch.compile(again, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((24, 16), (48, 32), (7, 9)):
        value = torch.randn(*shape, generator=generator)
        assert torch.equal(traced(value, NOISE), again(value, NOISE))


def test_a_block_size_that_cannot_be_is_refused() -> None:
    for size in (0, 3, -2):
        with pytest.raises(ScrimpError, match="block_size"):
            replace(Dynamic8(), block_size=size)
