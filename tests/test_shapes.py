"""Named shapes are those of the papers, and their parameter counts those of the models made from them."""

from __future__ import annotations

import pytest

from scrimp import models
from scrimp.memory.formula import count_parameters
from scrimp.shapes import CONTEXT, SHAPES

# Of the GaLore line's configuration files: hidden, ffn, heads, layers; millions of parameters, head untied.
PAPERS = {
    "llama-60m": (512, 1376, 8, 8, 58.07),
    "llama-130m": (768, 2048, 12, 12, 134.11),
    "llama-350m": (1024, 2736, 16, 24, 367.97),
    "llama-1b": (2048, 5461, 32, 24, 1339.08),
    "llama-7b": (4096, 11008, 32, 32, 6738.42),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_shapes_are_exact(name: str) -> None:
    shape = SHAPES[name]
    hidden, ffn, heads, layers, millions = PAPERS[name]
    assert (shape.hidden, shape.ffn, shape.heads, shape.layers) == (hidden, ffn, heads, layers)
    assert (shape.vocab, shape.tied) == (32_000, False)
    assert round(shape.parameters(32_000) / 1e6, 2) == millions


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_counts_the_parameters_of_its_model(name: str) -> None:
    shape = SHAPES[name]
    config = models.load_config(models.locate(name), vocab=259)
    assert config.vocab_size == (shape.vocab or 259)
    assert models.context_length(config) == CONTEXT
    assert count_parameters(config) == shape.parameters(config.vocab_size)


def test_shapes_are_llamas_as_the_papers_train_them() -> None:
    config = models.load_config(models.locate("llama-60m"), vocab=5)
    assert config.model_type == "llama"
    assert config.rms_norm_eps == 1e-6
    assert config.hidden_act == "silu"
    assert config.num_key_value_heads == config.num_attention_heads
    assert not config.attention_bias
    assert not config.tie_word_embeddings


def test_settings_of_a_shape_are_usable() -> None:
    assert len(SHAPES) >= 8
    for shape in SHAPES.values():
        assert shape.hidden % shape.heads == 0
        assert 0 < shape.lr < 1
        assert 0 < shape.seq <= CONTEXT
        assert shape.batch > 0


def test_the_default_model_is_about_a_million_parameters() -> None:
    assert 0.7e6 < SHAPES["llama-1m"].parameters(259) < 1.3e6
