from __future__ import annotations

import numpy as np
import pytest

from scrimp.data.permutation import permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1000, 4097])
@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_it_is_a_bijection_of_any_size(size: int, seed: int) -> None:
    assert sorted(permute(np.arange(size), size, seed)) == list(range(size))


def test_any_index_can_be_asked_for_alone() -> None:
    whole = permute(np.arange(1000), 1000, 7)
    assert [int(permute(np.array([index]), 1000, 7)[0]) for index in (0, 1, 500, 999)] == [
        int(whole[index]) for index in (0, 1, 500, 999)
    ]


def test_it_holds_for_sizes_that_could_not_be_stored() -> None:
    size = 10**15
    images = permute(np.arange(1000), size, 3)
    assert len(set(images.tolist())) == 1000
    assert images.min() >= 0
    assert images.max() < size


def test_another_seed_gives_another_order() -> None:
    orders = {tuple(permute(np.arange(50), 50, seed).tolist()) for seed in range(20)}
    assert len(orders) == 20


def test_it_scatters_like_chance() -> None:
    # The mean of |image - index| over a random order of n is (n^2 - 1) / 3n, its standard deviation
    # over orders about 0.15 sqrt(n): five of them, over 20 orders, is a wide berth.
    n = 5000
    means = [np.abs(permute(np.arange(n), n, seed) - np.arange(n)).mean() for seed in range(20)]
    assert abs(np.mean(means) - n / 3) < 5 * 0.3 * np.sqrt(n)
    # Neighbours in the order are no neighbours in the data: chance gives 2/n of them.
    steps = np.abs(np.diff(permute(np.arange(n), n, 0)))
    assert (steps == 1).sum() < 12
