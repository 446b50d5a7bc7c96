"""A shuffled order that is computed, not stored: a Feistel network on the indices.

    (L, R) -> (R, L xor F(R, key))        a bijection of 2^(2h) numbers whatever F is

Four rounds with independent keys scatter well. Numbers are 2h bits wide, the fewest that hold
`size`; a result beyond `size` is sent through again until it falls inside ("cycle walking"),
which keeps the map a bijection and takes fewer than four passes on average.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from scrimp.base.seeds import derive

_ROUNDS = 4
_MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def permute(indices: npt.NDArray[np.int64], size: int, seed: int) -> npt.NDArray[np.int64]:
    """Send each index in [0, size) to its place in the order that `seed` stands for.

    Args:
        indices: Any indices below `size`, of any shape.
        size: How many there are to order.
        seed: Names the order.

    Returns:
        Their images, int64, the same shape; a bijection of [0, size).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = [np.uint64(derive(seed, "round", number)) for number in range(_ROUNDS)]
    values = indices.astype(np.uint64)
    outside = np.ones(values.shape, np.bool_)
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(
    values: npt.NDArray[np.uint64], half: np.uint64, keys: list[np.uint64]
) -> npt.NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << half) | right


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spread every input bit over all output bits (SplitMix64's finaliser)."""
    values = values + _MIX[0]
    values = (values ^ (values >> np.uint64(30))) * _MIX[1]
    values = (values ^ (values >> np.uint64(27))) * _MIX[2]
    return values ^ (values >> np.uint64(31))
