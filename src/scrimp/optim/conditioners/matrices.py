"""Conditioners that keep a number for a matrix keep one for each expert of a stack."""

from __future__ import annotations

import math

from scrimp.optim.pieces import Target


def matrices(shape: tuple[int, ...], target: Target) -> int:
    """Return how many matrices a gradient of `shape` holds: a stack's experts, else 1."""
    return math.prod(shape[:-2]) if target.role == "experts" else 1
