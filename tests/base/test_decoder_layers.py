"""Layers are found by structure, whatever a family calls them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from scrimp.base.decoder_layers import all_layers, decoder_layers


class Layer(GradientCheckpointingLayer):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])


@pytest.mark.parametrize(("family", "path"), [("llama", "model.layers"), ("openai-gpt", "transformer.h")])
def test_layers_are_found_with_and_without_marks(family: str, path: str) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=9, **sizes))
    is_marked = any(isinstance(m, GradientCheckpointingLayer) for m in model.modules())
    assert is_marked == (family == "llama")
    assert decoder_layers(model) == all_layers(model) == tuple(model.get_submodule(path).children())


def stack(count: int, width: int) -> nn.ModuleList:
    return nn.ModuleList([Layer(width) for _ in range(count)])


def test_the_decoder_s_are_as_many_as_the_configuration_says_and_all_are_every_stack_s() -> None:
    model = nn.ModuleDict({"tower": stack(3, 4), "layers": stack(2, 2)})
    model.config = SimpleNamespace(num_hidden_layers=2)  # type: ignore[assignment]
    assert decoder_layers(model) == tuple(model["layers"].children())
    assert all_layers(model) == (*model["tower"].children(), *model["layers"].children())


def test_layers_that_the_configuration_counts_otherwise_are_found_by_their_marks() -> None:
    model = nn.ModuleDict({"layers": stack(2, 4), "norms": nn.ModuleList([nn.LayerNorm(4)] * 4)})
    model.config = SimpleNamespace(num_hidden_layers=4)  # type: ignore[assignment]
    assert decoder_layers(model) == tuple(model["layers"].children())


def test_a_list_of_layers_goes_before_a_larger_one_of_anything_else() -> None:
    model = nn.ModuleDict({"few": nn.ModuleList([nn.Linear(20, 20)] * 2), "layers": stack(2, 2)})
    assert decoder_layers(model) == tuple(model["layers"].children())


def test_where_there_is_no_list_there_are_no_layers() -> None:
    assert decoder_layers(nn.Linear(2, 2)) == all_layers(nn.Linear(2, 2)) == ()
