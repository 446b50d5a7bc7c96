"""Each schedule at its ends and in between, and lengths given as a share of the run."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from scrimp.recipe import Recipe, parse
from scrimp.schedules import in_steps, learning_rate, multiplier

NAMES = ["constant", "linear", "cosine", "wsd", "power"]
PEAK = 0.02


def recipe(name: str = "power", *, batch: int = 512, seq: int = 1_000_000, **schedule: float) -> Recipe:
    """Return a resolved recipe of 100 steps; `power` is below its cap from step 13 on."""
    lengths = {"warmup": 10, "floor": 1.0, "decay": 20}
    data = {"optimizer": {"lr": PEAK}, "schedule": {"name": name, **lengths, **schedule}}
    return parse({**data, "steps": 100, "batch": batch, "seq": seq})


def rates(given: Recipe) -> list[float]:
    return [learning_rate(given, step) for step in range(100)]


def curve(
    name: str, *, steps: int = 100, warmup: int = 10, floor: float = 0.1, decay: int = 20
) -> list[float]:
    return [
        multiplier(name, step, steps=steps, warmup=warmup, floor=floor, decay=decay) for step in range(steps)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_rises_linearly_from_its_first_share_to_the_peak(name: str) -> None:
    assert curve(name)[:10] == [step / 10 for step in range(1, 11)]


@pytest.mark.parametrize("name", NAMES)
def test_after_warm_up_a_schedule_begins_at_the_peak_and_never_rises(name: str) -> None:
    after = curve(name)[10:]
    assert after[0] == 1 and all(now <= before for before, now in pairwise(after))
    assert curve(name, warmup=0)[0] == 1


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "power"])
def test_a_decay_ends_at_the_floor_and_never_below_it(name: str, floor: float) -> None:
    values = curve(name, floor=floor)
    assert min(values[10:]) >= floor - 1e-12
    # One more step would reach the floor; wsd reaches it.
    assert multiplier(name, 100, steps=100, warmup=10, floor=floor, decay=20) <= values[-1]
    assert values[-1] == pytest.approx(floor, abs=0.02)
    assert multiplier("wsd", 99, steps=100, warmup=10, floor=floor, decay=20) == pytest.approx(floor)


def test_constant_stays_at_the_peak() -> None:
    assert set(curve("constant")[10:]) == {1.0}


def test_linear_falls_by_equal_steps() -> None:
    values = curve("linear", floor=0.1)
    assert [a - b for a, b in pairwise(values[10:])] == pytest.approx([0.9 / 90] * 89)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert curve("cosine", floor=0.2)[10 + 45] == pytest.approx((1 + 0.2) / 2)
    assert curve("cosine", floor=0.0)[10 + 30] == pytest.approx((1 + math.cos(math.pi / 3)) / 2)


def test_wsd_is_stable_and_then_falls_by_equal_steps() -> None:
    values = curve("wsd", floor=0.0)
    assert values[10:80] == [1.0] * 70
    assert values[80:] == pytest.approx([1 - step / 20 for step in range(1, 21)])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "power"])
def test_a_rate_is_the_multiple_of_the_peak(name: str) -> None:
    found = rates(recipe(name, floor=0.1))
    assert found == [PEAK * multiple for multiple in curve(name)]


def test_power_holds_its_cap_and_then_falls_with_the_tokens() -> None:
    """Below the cap the rate is the published function: batch * 4 * n^-0.51 after n tokens."""
    found = rates(recipe())
    free = [512 * 4 * ((step + 1) * 512e6) ** -0.51 for step in range(100)]
    assert found[10:] == pytest.approx([min(PEAK, rate) for rate in free[10:]], rel=1e-12)
    assert found.count(PEAK) == 4  # the end of the warm-up, and three steps after it
    assert found[-1] < 0.4 * PEAK


@pytest.mark.parametrize("warmup", [1, 10, 50])
def test_power_is_continuous_where_its_warm_up_ends(warmup: int) -> None:
    given = recipe(warmup=warmup, amplitude=1.0)  # below the cap from the start
    found = rates(given)
    end = 512 * (warmup * 512e6) ** -0.51
    assert end < PEAK
    assert found[:warmup] == pytest.approx([end * (step + 1) / warmup for step in range(warmup)], rel=1e-12)
    assert found[warmup] == pytest.approx(end * ((warmup + 1) / warmup) ** -0.51, rel=1e-12)


def test_power_takes_twice_the_rate_for_twice_the_batch_at_the_same_tokens() -> None:
    once = rates(recipe(warmup=0, amplitude=0.1))
    twice = rates(recipe(batch=1024, seq=500_000, warmup=0, amplitude=0.1))
    assert twice == pytest.approx([2 * rate for rate in once], rel=1e-12)


def test_power_decays_to_the_floor_of_what_it_would_be() -> None:
    free, decayed = rates(recipe()), rates(recipe(floor=0.1))
    assert decayed[:80] == free[:80]
    shares = [decayed[step] / free[step] for step in range(80, 100)]
    assert shares == pytest.approx([1 - 0.9 * step / 20 for step in range(1, 21)])


def test_power_without_warm_up_starts_at_its_cap() -> None:
    assert learning_rate(recipe(warmup=0), 0) == PEAK


def test_a_run_of_one_step_has_a_rate() -> None:
    for name in NAMES:
        for warmup in (0, 1):
            value = multiplier(name, 0, steps=1, warmup=warmup, floor=0.1, decay=1)
            assert 0.1 - 1e-12 <= value <= 1


@pytest.mark.parametrize(
    ("length", "steps", "expected"),
    [(0, 100, 0), (0.05, 100, 5), (0.05, 5, 0), (0.5, 5, 2), (1, 100, 1), (7, 100, 7), (200, 100, 100)],
)
def test_a_length_below_one_is_a_share_of_the_run(length: float, steps: int, expected: int) -> None:
    assert in_steps(length, steps) == expected
    assert in_steps(expected, steps) == expected  # a resolved length stays
