"""Full tuning trains every parameter, each once."""

from __future__ import annotations

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from scrimp.tuning.full import full


def test_every_parameter_trains_even_one_that_was_frozen() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[0].weight.requires_grad_(False)
    trained = full().select(model)
    assert list(trained) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert all(parameter.requires_grad for parameter in trained.values())
    assert trained["0.weight"] is model[0].weight


def test_a_tied_head_counts_once() -> None:
    sizes = {"vocab_size": 11, "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1}
    counts = {}
    for tied in (True, False):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, tie_word_embeddings=tied))
        trained = full().select(model)
        assert len({id(parameter) for parameter in trained.values()}) == len(trained)
        counts[tied] = sum(parameter.numel() for parameter in trained.values())
    assert counts[False] - counts[True] == 11 * 4
