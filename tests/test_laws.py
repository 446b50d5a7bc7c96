"""The laws against the numbers of their authors, and what they say about themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import transformers
from tests.test_families import CONFIGURATIONS
from transformers import LlamaConfig, PreTrainedConfig

from scrimp.laws import power_lr, steplaw_batch, steplaw_lr
from scrimp.models import non_embedding

PAPER: dict[str, float] = {"cap": 0.02, "amplitude": 4.0, "exponent": -0.51}


@pytest.mark.parametrize(
    ("parameters", "tokens", "published", "tool"),
    [
        (7_000_000_000, 1_400_000_000_000, 9.166e-4, 9.347e-4),
        (1_000_000_000, 100_000_000_000, 1.6325e-3, 1.6624e-3),
        (60_000_000, 1_300_000_000, 3.199e-3, 3.250e-3),
    ],
)
def test_step_law_gives_the_published_rate(
    parameters: int, tokens: int, published: float, tool: float
) -> None:
    """To the digits that are given; the unrounded constants of the authors' tool lie within 2.5 % of it."""
    rate = steplaw_lr(parameters, tokens).value
    assert rate == pytest.approx(published, rel=2e-4)
    assert rate == pytest.approx(tool, rel=0.025)


@pytest.mark.parametrize(
    ("tokens", "tool"), [(1.4e12, 4.997e6), (1e11, 1.1075e6), (1.3e9, 92_789)]
)  # the tool's constants, of which the published ones are the rounding
def test_step_law_gives_the_tools_batch_in_tokens(tokens: float, tool: float) -> None:
    assert steplaw_batch(int(tokens)).value == pytest.approx(tool, rel=2e-3)


@pytest.mark.parametrize(
    ("parameters", "tokens", "inside"),
    [
        (60_000_000, 2_000_000_000, True),
        (1_000_000_000, 100_000_000_000, True),
        (59_999_999, 2_000_000_000, False),
        (1_000_000_001, 2_000_000_000, False),
        (60_000_000, 1_999_999_999, False),
        (60_000_000, 100_000_000_001, False),
    ],
)
def test_a_guess_says_what_it_rests_on_and_whether_it_extrapolates(
    parameters: int, tokens: int, inside: bool
) -> None:
    rate, batch = steplaw_lr(parameters, tokens), steplaw_batch(tokens)
    assert rate.inside == inside
    assert ("extrapolation" in rate.text) == (not inside)
    assert batch.inside == ("extrapolation" not in batch.text) == (2e9 <= tokens <= 1e11)
    for words in ("2503.04715", "60 M to 1 B parameters", "2 B to 100 B tokens", "about 2x"):
        assert words in rate.text


@pytest.mark.parametrize("count", [0, -1])
def test_a_law_refuses_what_no_model_or_run_has(count: int) -> None:
    with pytest.raises(ValueError, match=f"parameters must be positive.*{count}"):
        steplaw_lr(count, 10)
    with pytest.raises(ValueError, match=f"tokens must be positive.*{count}"):
        steplaw_lr(10, count)
    with pytest.raises(ValueError, match=f"tokens must be positive.*{count}"):
        steplaw_batch(count)


def test_power_is_capped_until_its_crossing_and_falls_from_there() -> None:
    crossing = (1024 * 4 / 0.02) ** (1 / 0.51)
    assert crossing == pytest.approx(2.6e10, rel=0.02)
    assert power_lr(int(crossing * 0.99), 1024, **PAPER) == 0.02
    assert power_lr(int(crossing * 1.01), 1024, **PAPER) < 0.02
    assert power_lr(10**12, 1024, **PAPER) == pytest.approx(3.1e-3, rel=0.01)


def test_twice_the_batch_is_twice_the_rate_below_the_cap() -> None:
    once, twice = (power_lr(10**12, batch, **PAPER) for batch in (512, 1024))
    assert twice == pytest.approx(2 * once, rel=1e-12)
    assert power_lr(10**9, 512, **PAPER) == power_lr(10**9, 1024, **PAPER) == 0.02


def test_power_has_no_pole_at_the_start() -> None:
    assert power_lr(0, 8, **PAPER) == 0.02
    assert math.isfinite(power_lr(1, 8, **PAPER))


def test_non_embedding_counts_what_step_laws_authors_counted() -> None:
    """A model of their table: 7 (4 h^2 + 3 h ffn), whatever the vocabulary and the head."""
    wide: dict[str, Any] = {"hidden_size": 960, "intermediate_size": 9368, "num_attention_heads": 10}
    for vocab, tied in ((65_536, False), (65_536, True), (100, False)):
        config = LlamaConfig(num_hidden_layers=7, vocab_size=vocab, tie_word_embeddings=tied, **wide)
        assert non_embedding(config) == 214_663_680


@pytest.mark.parametrize(
    ("family", "matrices"),
    [
        ("llama", 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)),  # grouped queries
        ("gpt2", 2 * (4 * 16 * 16 + 2 * 16 * 64)),  # learned positions and biases left out
        ("opt", 2 * (4 * 16 * 16 + 2 * 16 * 24)),
        ("mixtral", 2 * (2 * 16 * 16 + 2 * 16 * 8 + 4 * 3 * 16 * 24 + 4 * 16)),  # every expert and the router
    ],
)
def test_non_embedding_counts_the_matrices_of_any_family(family: str, matrices: int) -> None:
    kind, values = CONFIGURATIONS[family]
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config: PreTrainedConfig = getattr(transformers, kind)(vocab_size=264, **values, **ids)
    assert non_embedding(config) == matrices
