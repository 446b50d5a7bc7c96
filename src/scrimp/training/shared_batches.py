"""Which rows of which jobs go through a shared model at once.

A *round* is one step of the job that has the fewest, and as many of the others' as let all end together:
round t of R takes job j from step floor(t n_j / R) to floor((t + 1) n_j / R), n_j its steps. At a round's end
no gradient is pending, so that is where all can be saved and go on from.

A round is packed into *slots*, the shared micro-batches. A job's step lies in slots of its own, one after the
other, since its next step needs its update; within them its rows are spread evenly, so that all slots hold
about the same. There are as few slots as the token budget allows. Rows are padded to the longest of their
slot, so only jobs of similar lengths share slots.

Source: balanced micro-batches of several adapters under a token capacity are LoRAFusion's (Zhu et al., arXiv
2510.00206), which solves an integer program for sequences packed by length.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

SIMILAR = 0.75  # of the longest job's sequence: shorter ones would be padding for more than a quarter


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a job's step.

    Attributes:
        job: Its number.
        step: Of the job, from 0.
        first: The first row of the step's batch.
        last: The row after the last.
    """

    job: int
    step: int
    first: int
    last: int


Slot = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Demand:
    """What a job needs of a round.

    Attributes:
        job: Its number.
        steps: Its steps.
        batch: Rows a step.
        seq: Tokens a row.
    """

    job: int
    steps: range
    batch: int
    seq: int


def rounds_of(steps: Sequence[int]) -> int:
    """Return how many rounds jobs of so many steps take."""
    return min(steps)


def step_at(turn: int, steps: int, rounds: int) -> int:
    """Return the steps that a job has done when round `turn` begins."""
    return turn * steps // rounds


def pack(demands: Sequence[Demand], tokens: int) -> list[Slot]:
    """Pack a round.

    Args:
        demands: What the jobs need; each has a step at least.
        tokens: The most that a slot holds, padding included; a single row may be longer.

    Returns:
        The slots in order. Each row lies in one, and a job's steps follow one another.
    """
    return [slot for group in _groups(demands, tokens) for slot in _packed(group, tokens)]


def _groups(demands: Sequence[Demand], tokens: int) -> list[list[Demand]]:
    """Put jobs of similar lengths together, as many as may have a row each in a slot."""
    groups: list[list[Demand]] = []
    for demand in sorted(demands, key=lambda each: -each.seq):
        longest = groups[-1][0].seq if groups else 0
        fits = bool(groups) and (len(groups[-1]) + 1) * longest <= tokens
        if fits and demand.seq >= SIMILAR * longest:
            groups[-1].append(demand)
        else:
            groups.append([demand])
    return [sorted(group, key=lambda each: each.job) for group in groups]


def _packed(group: Sequence[Demand], tokens: int) -> list[Slot]:
    longest = max(each.seq for each in group)
    rows = sum(len(each.steps) * each.batch for each in group)
    fewest = max(*(len(each.steps) for each in group), -(-rows * longest // tokens))
    for count in itertools.count(fewest):
        slots = _spread(group, count)
        sizes = [sum(part.last - part.first for part in slot) for slot in slots]
        if all(size * longest <= tokens or size == 1 for size in sizes):
            return slots
    raise AssertionError("with a row of each job a slot all fit")


def _spread(group: Sequence[Demand], count: int) -> list[Slot]:
    """Spread the rows of all jobs over `count` slots; empty ones are left out."""
    slots: list[list[Part]] = [[] for _ in range(count)]
    for each in group:
        steps = len(each.steps)
        for number, step in enumerate(each.steps):
            begin, end = number * count // steps, (number + 1) * count // steps
            edges = [each.batch * place // (end - begin) for place in range(end - begin + 1)]
            for slot, (first, last) in zip(range(begin, end), itertools.pairwise(edges), strict=True):
                if last > first:
                    slots[slot].append(Part(each.job, step, first, last))
    return [tuple(slot) for slot in slots if slot]
