"""The rules of a comparison."""

from __future__ import annotations

import math

import pytest

from scrimp.bench.entries import Run
from scrimp.bench.protocol import POINTS, at_edge, best, rates, spread, thinned, to_target, turn_order


@pytest.mark.parametrize("trials", [1, 2, 3, 4, 5])
def test_a_search_has_as_many_rates_as_trials_evenly_spaced_around_its_centre(trials: int) -> None:
    found = rates(0.004, trials)
    assert len(set(found)) == trials
    assert found[0] == 0.004
    steps = [math.log(b / a) for a, b in zip(sorted(found), sorted(found)[1:], strict=False)]
    assert steps == pytest.approx([math.log(10) / 2] * (trials - 1), rel=0.01)
    if trials % 2:
        assert math.exp(sum(map(math.log, found)) / trials) == pytest.approx(0.004, rel=0.01)


def test_two_contestants_with_ratios_search_the_same_span() -> None:
    assert [10 * rate for rate in rates(0.001, 3)] == pytest.approx(rates(0.01, 3), rel=0.01)


def _trial(lr: float, loss: float | None) -> Run:
    return Run(lr=lr, seed=0, loss=loss)


def test_the_best_trial_has_the_lowest_finite_loss() -> None:
    trials = [_trial(0.1, None), _trial(0.01, 2.0), _trial(0.001, 2.0)]
    assert best(trials) == trials[2]
    assert best(trials[:1]) is None


def test_an_edge_is_the_smallest_or_largest_of_several_that_differ() -> None:
    trials = [_trial(0.1, 3.0), _trial(0.01, 2.0), _trial(0.001, 1.0)]
    assert [at_edge(trial, trials) for trial in trials] == [True, False, True]
    assert not at_edge(trials[0], trials[:1])
    # A method that finds its rate itself does not care which one it is given.
    assert not at_edge(_trial(0.1, 2.0), [_trial(0.1, 2.0), _trial(0.01, 2.0)])


def test_the_target_is_reached_at_the_first_evaluation_at_or_below_it() -> None:
    curve = {"eval_tokens": [10, 20, 30, 40], "eval": [3.0, 2.0, 2.5, 1.0]}
    assert to_target([curve], 2.0) == {"tokens": 20, "reached": 1, "of": 1}
    assert to_target([curve], 0.5) == {"tokens": None, "reached": 0, "of": 1}


def test_a_seed_that_misses_the_target_counts_as_never() -> None:
    quick = {"eval_tokens": [10, 20], "eval": [1.0, 1.0]}
    slow = {"eval_tokens": [10, 20], "eval": [2.0, 1.0]}
    never = {"eval_tokens": [10, 20], "eval": [2.0, None]}
    assert to_target([quick, slow, never], 1.0) == {"tokens": 20, "reached": 2, "of": 3}
    assert to_target([quick, never, never], 1.0) == {"tokens": None, "reached": 1, "of": 3}


def test_neither_side_goes_first_more_than_once_oftener() -> None:
    for pairs in range(8):
        order = turn_order(pairs)
        assert len(order) == pairs
        assert abs(2 * sum(order) - pairs) <= 1


def test_a_thinned_curve_keeps_its_mean_and_its_last_token() -> None:
    tokens, losses = list(range(10, 10_010, 10)), [math.sin(step) + 2 for step in range(1000)]
    few, means = thinned(tokens, losses)
    assert len(few) == len(means) <= POINTS
    assert few[-1] == tokens[-1]
    size = tokens.index(few[0]) + 1
    assert means[0] == pytest.approx(sum(losses[:size]) / size, rel=1e-4)


def test_a_short_curve_stays_whole_and_a_stretch_that_diverged_has_no_mean() -> None:
    assert thinned([1, 2, 3], [1.0, 2.0, None]) == ([1, 2, 3], [1.0, 2.0, None])
    _, means = thinned(list(range(300)), [1.0] * 299 + [None])
    assert means[-1] is None and means[0] == 1.0


def test_a_spread_holds_all_its_values() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "lowest": 1.0, "highest": 3.0, "all": [3.0, 1.0, 2.0]}
    assert spread([]) is None


def test_a_run_that_diverged_is_worse_than_any_other() -> None:
    assert spread([1.0, None, 2.0]) == {"median": 2.0, "lowest": 1.0, "highest": 2.0, "all": [1.0, 2.0]}
    assert spread([1.0, None]) is None
    assert spread([None, None, 2.0]) is None
