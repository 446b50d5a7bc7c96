"""Short traces, extrapolated, are the long ones: to the byte, in depth and in rows."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from transformers import (
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from scrimp.base.errors import ScrimpError
from scrimp.memory.extrapolate import NotAligned, deepen, lines_of, points_of
from scrimp.memory.profile import StepProfile, highest, step_profile
from scrimp.memory.profiling import Tracer, _depths, _with_layers
from scrimp.memory.trace import Curve, trace_micro_batch
from scrimp.memory.untraceable import Untraceable
from scrimp.recipe import Recipe, replace

LAYERS = 8
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 128,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3, tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma2, two kinds of layer": Gemma2Config(**{**SIZES, "num_hidden_layers": 12}, sliding_window=16),
    "gpt2, dropout": GPT2Config(
        n_embd=32, n_layer=LAYERS, n_head=2, vocab_size=128, bos_token_id=0, eos_token_id=0
    ),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
}


def make_recipe(**changes: Any) -> Recipe:
    values = {"seq": 32, "precision": "fp32", "optimizer.lr": 1e-3, "threads": 1}
    return replace(Recipe(), {**values, **{k.replace("__", "."): v for k, v in changes.items()}})


def peaks(profile: StepProfile, rows: int) -> dict[str, int]:
    return {name: sum(highest(lines, rows)[0]) for name, lines in profile.first.items()}


def peaks_of(curve: Curve) -> dict[str, int]:
    points = points_of(curve)
    found: dict[str, int] = {}
    for moment, total in zip(points.moments, curve.total.tolist(), strict=True):
        found[moment] = max(found.get(moment, 0), total)
    return found


@pytest.mark.parametrize(
    ("family", "policy"),
    [*((family, "everything") for family in FAMILIES), ("llama", "recompute"), ("llama", "recompute-mlp")],
)
def test_a_deep_model_is_what_two_shallow_ones_say(family: str, policy: str) -> None:
    config, recipe = FAMILIES[family], make_recipe(activations__name=policy)
    assert _depths(config, config.num_hidden_layers) is not None  # so that the profile is an extrapolation
    tracer = Tracer(config)
    profile = tracer.step(recipe, 2)
    rows = 5  # of which no trace was made
    assert peaks(profile, rows) == peaks_of(trace_micro_batch(recipe, config, rows=rows))
    evaluated = trace_micro_batch(recipe, config, rows=rows, training=False)
    assert sum(highest(tracer.evaluation(recipe, 2).lines, rows)[0]) == evaluated.total.max()


def test_one_row_is_on_the_line_or_traced_for_itself() -> None:
    recipe = make_recipe()
    falcon = FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=128)
    for config, rows in ((FAMILIES["llama"], (1, None)), (falcon, (1, 1))):
        profile = Tracer(config).step(recipe, 1)
        assert profile.rows == rows
        true = peaks_of(trace_micro_batch(recipe, config, rows=1))
        assert peaks(profile, 1) == pytest.approx(true, rel=2e-3)


def test_a_profile_survives_the_cache() -> None:
    profile = Tracer(LlamaConfig(**{**SIZES, "num_hidden_layers": 2})).step(make_recipe(), 2)
    assert step_profile(json.loads(json.dumps(asdict(profile)))) == profile


def test_only_lines_that_can_be_the_peak_are_kept() -> None:
    """The kept lines are the largest at every number of rows, and they are few."""
    config, recipe = FAMILIES["llama"], make_recipe()
    curves = [points_of(trace_micro_batch(recipe, config, rows=rows)) for rows in (2, 3)]
    kept = lines_of(curves[0], curves[1], rows=2, least=2)
    everywhere = [[0, 1, 3]]
    terms = [curve.bytes_[everywhere[0]].sum(0) for curve in curves]
    for rows in (2, 3, 7, 64, 4096):
        totals = terms[0] + (terms[1] - terms[0]) * (rows - 2)
        assert max(sum(highest(lines, rows)[0]) for lines in kept.values()) == totals.max()
    assert sum(len(lines) for lines in kept.values()) < 20


def test_later_micro_batches_hold_all_gradients() -> None:
    profile = Tracer(LlamaConfig(**{**SIZES, "num_hidden_layers": 2})).step(make_recipe(), 2)
    size = Tracer(LlamaConfig(**{**SIZES, "num_hidden_layers": 2})).size(make_recipe())
    for name, lines in profile.later.items():
        (_, gradients, _), _ = highest(lines, 2)
        assert gradients == size.gradients
        assert sum(highest(lines, 2)[0]) >= sum(highest(profile.first[name], 2)[0])


def test_traces_that_do_not_match_are_refused() -> None:
    recipe = make_recipe()
    llama, gpt2 = FAMILIES["llama"], FAMILIES["gpt2, dropout"]
    shallow = trace_micro_batch(recipe, _with_layers(llama, 3), rows=2)
    deep = trace_micro_batch(recipe, _with_layers(gpt2, 4), rows=2)
    with pytest.raises(NotAligned):
        deepen(shallow, deep, layers=(3, 4), wanted=LAYERS)


def test_an_adapter_that_shallow_models_are_too_small_for_is_traced_whole() -> None:
    config, recipe = FAMILIES["llama"], make_recipe(tune__name="mos", tune__rank=8)
    with pytest.raises(ScrimpError, match="public ones"):
        trace_micro_batch(recipe, _with_layers(config, 3), rows=2)
    profile = Tracer(config).step(recipe, 2)
    assert peaks(profile, 2) == peaks_of(trace_micro_batch(recipe, config, rows=2))


def test_an_optimizer_is_counted_to_the_byte() -> None:
    tracer = Tracer(FAMILIES["llama"])
    size, optimizer = tracer.size(make_recipe()), tracer.optimizer(make_recipe())
    assert optimizer.state == 2 * size.gradients  # two moments
    assert optimizer.temporaries < 64  # of one parameter at a time: a sum and a flag


def test_a_model_that_cannot_be_simulated_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self: Any, hidden: Any) -> Any:
        return self.down_proj(hidden.masked_select(hidden > 0))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(Untraceable, match="DynamicOutputShape"):
        Tracer(FAMILIES["llama"]).step(make_recipe(), 2)
