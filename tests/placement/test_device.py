"""Everything on one device: a move where there is one, and nothing during a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scrimp.placement.device import device


def test_a_model_is_moved_whole() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    moved = device().place(model, torch.device("meta"))
    assert {tensor.device.type for tensor in moved.state_dict().values()} == {"meta"}
    assert len(moved.state_dict()) == 7  # buffers too


def test_a_model_that_is_there_is_not_copied() -> None:
    model = nn.Linear(3, 3)
    address = model.weight.data_ptr()
    assert device().place(model, torch.device("cpu")) is model and model.weight.data_ptr() == address


def test_a_step_moves_nothing() -> None:
    x = torch.ones(2, requires_grad=True)
    with device().context():
        y = x * 2
    assert y.device == x.device


@pytest.mark.gpu
def test_parameters_stay_the_same_objects_on_a_gpu() -> None:
    """The optimizer and the ties hold them: a copy would train apart from the model."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    before = list(model.parameters())
    moved = device().place(model, torch.device("cuda"))
    assert {parameter.device.type for parameter in moved.parameters()} == {"cuda"}
    assert all(now is old for now, old in zip(moved.parameters(), before, strict=True))
    assert moved[1].weight is moved[0].weight
