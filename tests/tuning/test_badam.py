"""BAdam: one block at a time, in the order asked for, and its state gone at each switch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tuning.small import llama, train

from scrimp.base.errors import ScrimpError
from scrimp.memory.state_bytes import state_bytes
from scrimp.tuning.badam import BAdam


def _blocks(tune: BAdam, steps: int, **model: Any) -> list[int]:
    tune.select(llama(**model))
    return [tune.block(step) for step in range(steps)]


@pytest.mark.parametrize(
    ("order", "start", "expected"),
    [
        ("ascending", None, [0, 0, 1, 1, 2, 2, 0, 0]),
        ("descending", None, [2, 2, 1, 1, 0, 0, 2, 2]),
        ("descending", 1, [1, 1, 0, 0, 2, 2, 1, 1]),
        ("fixed", 2, [2] * 8),
    ],
)
def test_blocks_follow_the_order(order: Any, start: int | None, expected: list[int]) -> None:
    assert _blocks(BAdam(every=2, order=order, start=start), 8, layers=3) == expected


def test_a_random_order_has_every_block_once_a_round() -> None:
    blocks = _blocks(BAdam(every=1, seed=5), 120, layers=4)
    rounds = [tuple(blocks[i : i + 4]) for i in range(0, 120, 4)]
    assert all(sorted(each) == [0, 1, 2, 3] for each in rounds)
    assert len(set(rounds)) > 12  # of 24


def test_only_the_released_variant_s_first_block_is_one_step_short() -> None:
    options: dict[str, Any] = {"every": 3, "order": "ascending"}
    assert _blocks(BAdam(**options), 7, layers=3) == [0, 0, 0, 1, 1, 1, 2]
    assert _blocks(BAdam(**options, variant="released"), 7, layers=3) == [0, 0, 1, 1, 1, 2, 2]
    each = BAdam(every=1, order="ascending", variant="released")
    assert _blocks(each, 4, layers=3) == [0, 1, 2, 0]  # as it runs: a block of no step would be none


def test_embedding_and_head_train_only_where_asked_for() -> None:
    model = llama(2)
    assert {name.split(".")[1] for name in BAdam().select(model)} == {"layers"}
    assert not model.lm_head.weight.requires_grad
    assert list(BAdam(include_head=True).select(model))[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert next(iter(BAdam(include_embedding=True).select(model))) == "model.embed_tokens.weight"


def test_a_tied_head_trains_once_a_round() -> None:
    tied = llama(2, tied=True)
    for embedding, block in ((False, 2), (True, 0)):
        tune = BAdam(every=1, order="ascending", include_embedding=embedding, include_head=True)
        optimizer = torch.optim.AdamW(tune.select(tied).values(), lr=1e-2)
        awake = []
        for step in range(4 if embedding else 3):
            tune.before_step(step, optimizer)
            awake.append(tied.lm_head.weight.requires_grad)
        assert [i for i, is_awake in enumerate(awake) if is_awake] == [block]


def test_a_start_that_is_no_block_is_refused_with_their_number() -> None:
    with pytest.raises(ScrimpError, match="start 4 of 4 blocks"):
        BAdam(order="ascending", start=4).select(llama(4))


def test_one_block_of_state_is_held_and_begins_anew_at_each_switch() -> None:
    model, tune = llama(3), BAdam(every=4, order="ascending")
    optimizer = torch.optim.AdamW(tune.select(model).values(), lr=1e-2)
    held, ages = [], []

    def measure(step: int) -> None:
        held.append(state_bytes(optimizer))
        ages.extend({int(entries["step"]) for entries in optimizer.state.values()})

    train(model, tune, optimizer, range(24), after=measure)
    layer = list(model.model.layers[0].parameters())
    assert set(held) == {8 * sum(p.numel() for p in layer) + 4 * len(layer)}
    assert ages == [1, 2, 3, 4] * 6


def test_one_block_for_good_is_adamw_begun_anew_every_so_often() -> None:
    """And plain AdamW for as long as there is no switch."""
    ours, plain = llama(1), llama(1)
    tune = BAdam(every=5, order="ascending")
    train(ours, tune, torch.optim.AdamW(tune.select(ours).values(), lr=1e-2), range(10))
    frozen = [p for name, p in plain.named_parameters() if ".layers." not in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    from scrimp.tuning.full import Full  # its before_step does nothing

    for half in (range(5), range(5, 10)):
        train(plain, Full(), torch.optim.AdamW(plain.model.layers.parameters(), lr=1e-2), half)
    for mine, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, expected)
