"""Eight-bit codes: bounded error, exact mean, and what Q-GaLore's own form loses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scrimp.base.seeds import derive
from scrimp.weights.affine8 import Affine8, Variant

DTYPES = (torch.float32, torch.bfloat16)
# (24, 40) in groups of 16: the last group of a row has 8 elements.
SHAPES = ((24, 32, 16), (24, 40, 16), (3, 7, 256), (5, 1, 4))


def values(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def noise(*names: int) -> Tensor:
    return torch.tensor(derive(0, *names))


def spread(scale: Tensor, group: int, columns: int) -> Tensor:
    """Return each element's scale."""
    return scale.float().repeat_interleave(group, dim=1)[:, :columns]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_the_error_is_half_a_step_at_most_and_a_step_where_rounded_stochastically(
    rows: int, columns: int, group: int, dtype: torch.dtype
) -> None:
    codec, value = Affine8(group=group, dtype=dtype), values(rows, columns)
    for draws, bound in ((None, 0.5), (noise(1), 1.0)):
        entries = codec.encode(value, draws)
        error = (codec.decode(entries, torch.float32) - value).abs()
        assert (error <= spread(entries["scale"], group, columns) * bound * 1.0001).all()
        assert error.max() > 0 or columns == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_are_what_layout_and_nbytes_say(dtype: torch.dtype) -> None:
    codec = Affine8(group=16, dtype=dtype)
    entries = codec.encode(values(24, 40), None)
    found = {name: (tuple(entry.shape), entry.dtype) for name, entry in entries.items()}
    assert found == codec.layout(24, 40)
    assert sum(entry.nbytes for entry in entries.values()) == codec.nbytes(24, 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, -30.0])
def test_the_mean_of_stochastic_rounding_is_the_value(dtype: torch.dtype, offset: float) -> None:
    """At the ends of the range, too: nothing is clamped. A group may lie on one side of zero."""
    codec, value = Affine8(group=8, dtype=dtype), values(4, 16) + offset
    draws = 1500
    total = torch.zeros_like(value, dtype=torch.float64)
    for draw in range(draws):
        entries = codec.encode(value, noise(2, draw))
        total += codec.decode(entries, torch.float32)
    step = spread(entries["scale"], 8, 16)
    sigma = 0.5 * step / draws**0.5  # a Bernoulli's deviation is half a step at most
    assert ((total / draws - value).abs() <= 5 * sigma + 1e-6 * abs(offset)).all()


def test_steps_far_below_the_code_survive_on_average() -> None:
    """A hundredth of a step, two hundred times: rounded to nearest it is lost, stochastically it is not."""
    codec, start = Affine8(group=64, dtype=torch.float32), values(16, 64).clamp(-3, 3)
    start[:, 0], start[:, 1] = -4, 4  # the ends stay, so that the step of the code does
    step, moved = 8 / 255, torch.ones(16, 64)
    moved[:, :2] = 0

    def after(*, stochastic: bool) -> Tensor:
        entries = codec.encode(start, None)
        for t in range(200):
            value = codec.decode(entries, torch.float32) + 0.01 * step * moved
            entries = codec.encode(value, noise(3, t) if stochastic else None)
        return codec.decode(entries, torch.float32) - codec.decode(codec.encode(start, None), torch.float32)

    assert after(stochastic=False).abs().max() < 1e-3 * step
    drift = after(stochastic=True)[:, 2:].mean() / step
    # Each of 992 elements makes 2 ± sqrt(2) steps.
    assert abs(drift - 2) < 5 * 2**0.5 / 992**0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_of_steps_are_left_alone(dtype: torch.dtype) -> None:
    codec = Affine8(group=16, dtype=dtype)
    entries = codec.encode(values(8, 32), None)
    decoded = codec.decode(entries, torch.float32)
    ranges = [entries["scale"].float().max()]
    for t in range(20):
        entries = codec.encode(codec.decode(entries, torch.float32), noise(4, t))
        ranges.append(entries["scale"].float().max())
    assert max(ranges) == ranges[0]  # bf16 scales that are rounded up do not creep up
    if dtype == torch.float32:
        assert (codec.decode(entries, torch.float32) - decoded).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_a_constant_group_is_held_exactly(dtype: torch.dtype, value: float) -> None:
    codec = Affine8(group=16, dtype=dtype)
    constant = torch.full((2, 40), value)
    for draws in (None, noise(5)):
        assert torch.equal(codec.decode(codec.encode(constant, draws), torch.float32), constant)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_of_rows_draws_what_the_whole_matrix_draws(dtype: torch.dtype) -> None:
    codec, value = Affine8(group=16, dtype=dtype), values(24, 40)
    whole = codec.encode(value, noise(6))
    blocks = [codec.encode(value[rows], noise(6), rows.start * 40) for rows in (slice(0, 7), slice(7, 24))]
    for name, entry in whole.items():
        assert torch.equal(torch.cat([block[name] for block in blocks]), entry), name


def test_the_released_form_breaks_a_group_on_one_side_of_zero() -> None:
    value = torch.linspace(1, 2, 16)[None]

    def error(variant: Variant) -> float:
        codec = Affine8(group=16, dtype=torch.float32, variant=variant)
        return float((codec.decode(codec.encode(value, None), torch.float32) - value).abs().max())

    assert error("paper") <= 0.5001 / 255
    assert error("released") > 0.9


def test_the_released_form_clamps_the_largest_value() -> None:
    """From -100.6 to 154.4 steps the zero point is 101: 255 is then 154, and the last 0.4 never drawn."""
    step = 0.01
    value = torch.linspace(-100.6, 154.4, 16)[None] * step

    def highest(variant: Variant) -> Tensor:
        codec = Affine8(group=16, dtype=torch.float32, variant=variant)
        drawn = [codec.decode(codec.encode(value, noise(8, t)), torch.float32)[0, -1] for t in range(50)]
        return torch.stack(drawn) / step

    assert (highest("paper") - 154.4).abs().max() < 1e-3
    assert (highest("released") - 154).abs().max() < 1e-3


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own compiler says so
def test_one_compiled_function_decodes_updates_and_encodes_the_same_bits() -> None:
    codec, value = Affine8(group=16), values(24, 40)

    def update(entries: dict[str, Tensor], gradient: Tensor, draws: Tensor, start: int) -> dict[str, Tensor]:
        return codec.encode(codec.decode(entries, torch.float32) - 0.1 * gradient, draws, start)

    entries, gradient = codec.encode(value, None), values(24, 40, seed=1)
    compiled = torch.compile(update, fullgraph=True)
    expected, found = (each(entries, gradient, noise(7), 80) for each in (update, compiled))
    assert all(torch.equal(found[name], entry) for name, entry in expected.items())
