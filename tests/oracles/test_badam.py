"""BAdam against the authors' package (badam 1.4): the same weights, block after block.

The package copies each block to fp32 and back, which changes nothing of fp32 weights, so the trajectories are
equal bit for bit. It clears its own attribute `state` and so starts Adam anew; a first switch at construction
and one after `every` - 1 steps are its schedule.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import pytest
import torch
from tests.tuning.small import llama, loss_of, train

from scrimp.tuning.badam import BAdam

BlockOptimizer = pytest.importorskip("badam").BlockOptimizer

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
EVERY, STEPS = 3, 13  # five blocks' worth


def _theirs(model: Any, order: str, *, embedding: bool, head: bool, start: int | None) -> None:
    adamw = torch.optim.AdamW(model.parameters(), **OPTIONS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "BAdam expect model")  # it advises half precision
        optimizer = BlockOptimizer(
            base_optimizer=adamw,
            named_parameters_list=list(model.named_parameters()),
            switch_block_every=EVERY,
            switch_mode=order,
            start_block=start,
            include_embedding=embedding,
            include_lm_head=head,
            verbose=0,
        )
    for step in range(STEPS):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("order", "embedding", "head", "start"),
    [
        ("ascending", True, True, None),
        ("descending", False, False, None),
        ("fixed", False, False, 2),
    ],
)
def test_the_trajectory_is_the_package_s_bit_for_bit(
    order: Literal["ascending", "descending", "fixed"], embedding: bool, head: bool, start: int | None
) -> None:
    theirs, ours, untrained = llama(3), llama(3), llama(3)
    _theirs(theirs, order, embedding=embedding, head=head, start=start)
    tune = BAdam(
        every=EVERY,
        order=order,
        include_embedding=embedding,
        include_head=head,
        start=start,
        variant="released",
    )
    train(ours, tune, torch.optim.AdamW(tune.select(ours).values(), **OPTIONS), range(STEPS))
    moved = 0
    for mine, expected, before in zip(*(m.parameters() for m in (ours, theirs, untrained)), strict=True):
        assert torch.equal(mine, expected)
        moved += not torch.equal(mine, before)
    assert moved == (9 if order == "fixed" else 9 * 3) + embedding + 2 * head
