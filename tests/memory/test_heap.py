"""malloc's slack stays out of the peak, by the cheapest means that does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from scrimp.base import platform
from scrimp.base.ledger import Ledger, Moment
from scrimp.memory.heap import LARGEST_THRESHOLD, THRESHOLD, choose_policy, returning, trimming
from scrimp.recipe import Recipe, replace

MB = 10**6


def _ledger(*, weights: int, layers: int, loss: int) -> Ledger:
    """Return a ledger in MB: what the layers hold at the most, and what the loss holds besides."""
    always = {"fixed": 400 * MB, "weights": weights * MB}
    forward = {**always, "activations": layers * MB}
    return Ledger(
        (
            Moment("load", always),
            Moment("forward, micro-batch 1", forward),
            Moment("loss, micro-batch 1", {**forward, "temporaries": loss * MB}),
            Moment("backward, micro-batch 1", {**forward, "gradients": weights * MB}),
            Moment("evaluation", {**always, "temporaries": loss // 2 * MB}),
        )
    )


@pytest.mark.parametrize(
    ("ledger", "policy"),
    [
        pytest.param(_ledger(weights=1, layers=50, loss=10), "leave", id="small"),
        pytest.param(_ledger(weights=20, layers=400, loss=800), "trim", id="large logits"),
        pytest.param(_ledger(weights=1, layers=400, loss=10), "return", id="small logits"),
        pytest.param(_ledger(weights=20, layers=800, loss=200), "return", id="deep"),
    ],
)
def test_the_cheapest_policy_that_keeps_the_prediction_is_chosen(ledger: Ledger, policy: str) -> None:
    assert choose_policy(ledger, Recipe()) == policy


@pytest.mark.parametrize("change", [{"activations.loss": "chunked"}, {"compile": True}])
def test_only_an_eager_loss_over_whole_logits_is_trimmed_before(change: dict[str, Any]) -> None:
    ledger = _ledger(weights=20, layers=400, loss=800)
    assert choose_policy(ledger, replace(Recipe(), change)) == "return"


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.base_model(x)
        return hidden.sum()


@pytest.mark.parametrize("policy", ["leave", "trim", "return"])
def test_only_the_trimming_policy_trims_and_only_inside(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(platform, "trim_heap", lambda: not trims.append(1))
    model, x = _Model(), torch.ones(2, 3)
    expected = model(x)
    with pytest.raises(RuntimeError), trimming(model, policy):  # type: ignore[arg-type]
        assert torch.equal(model(x), expected)
        raise RuntimeError
    model(x)
    assert len(trims) == (1 if policy == "trim" else 0)


def test_only_the_returning_policy_sets_the_threshold_and_gives_the_usual_one_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(platform, "set_mmap_threshold", lambda size: not sizes.append(size))
    for policy in ("leave", "trim"):
        with returning(policy):  # type: ignore[arg-type]
            assert sizes == []
    with pytest.raises(RuntimeError), returning("return"):
        assert sizes == [THRESHOLD]
        raise RuntimeError
    assert sizes == [THRESHOLD, LARGEST_THRESHOLD]
