"""Schedules around the low-rank optimizers: projectors go with the state, also inside the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tuning.small import llama, train

from scrimp.base.protocols import Trainable
from scrimp.memory.state_bytes import state_bytes
from scrimp.optim.named.galore import GaLore
from scrimp.optim.named.low_rank import Fira
from scrimp.tuning.badam import BAdam
from scrimp.tuning.layer_sampling import LISA, OwLore

SCHEDULES: dict[str, Callable[[], Trainable]] = {
    "lisa": lambda: LISA(layers=1, every=3, seed=1),
    "owlore": lambda: OwLore(layers=1, every=3, threshold=2.0, seed=1),
    "badam": lambda: BAdam(every=3, seed=1),
}


def _run(schedule: str, make: Any, *, fused: bool = False) -> tuple[Any, list[int]]:
    model, tune, held = llama(3), SCHEDULES[schedule](), []
    trained = tune.select(model)
    optimizer = make(trained.items(), lr=1e-2, rank=2, refresh_every=2)
    if fused:
        optimizer.fuse_backward()
    train(model, tune, optimizer, range(12), after=lambda _: held.append(state_bytes(optimizer)))
    return model, held


@pytest.mark.parametrize("make", [GaLore, Fira])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_state_is_flat_and_fusing_changes_no_bit(schedule: str, make: Any) -> None:
    plain, held = _run(schedule, make)
    fused, held_fused = _run(schedule, make, fused=True)
    assert len(set(held)) == 1
    assert held_fused == [each + 4 for each in held]  # the gradient norm of the last step
    moved = 0
    for ours, expected, before in zip(*(m.parameters() for m in (fused, plain, llama(3))), strict=True):
        assert torch.equal(ours, expected)
        moved += not torch.equal(ours, before)
    assert moved > 9  # more than one layer
