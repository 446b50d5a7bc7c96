"""Dense weights are the identity: what transformers made stays as it is."""

from __future__ import annotations

import torch
from torch import nn

from scrimp.weights.dense import dense


def test_nothing_is_swapped_and_nothing_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    modules = list(model.modules())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = dense()
    weights.apply(model)
    weights.materialize(model)
    assert all(now is old for now, old in zip(model.modules(), modules, strict=True))
    assert set(before) == set(model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
