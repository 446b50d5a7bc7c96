"""What was assumed widens the error that a ledger states."""

from __future__ import annotations

from dataclasses import replace as replaced

from transformers import LlamaConfig, MixtralConfig

from scrimp.memory.account import ASSUMED_ERROR, TRACED_ERROR, Parts, ledger
from scrimp.memory.profiling import Tracer
from scrimp.recipe import Recipe, replace

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 128}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
RECIPE = replace(
    Recipe(),
    {"seq": 16, "batch": 2, "micro_batch": 2, "precision": "fp32", "device": "cpu", "optimizer.lr": 1e-3},
)


def make_parts(config: LlamaConfig | MixtralConfig) -> Parts:
    tracer = Tracer(config)
    return Parts(
        size=tracer.size(RECIPE),
        step=tracer.step(RECIPE, 2),
        evaluation=tracer.evaluation(RECIPE, 2),
        optimizer=tracer.optimizer(RECIPE),
        fixed=1000,
    )


def test_an_eager_mixture_says_what_was_assumed_and_a_larger_error() -> None:
    dense = ledger(make_parts(LlamaConfig(**SIZES, **HEADS)), RECIPE)
    assert (dense.error, dense.notes) == (TRACED_ERROR, ())
    eager = MixtralConfig(**SIZES, **HEADS, num_local_experts=4, experts_implementation="eager")
    mixture = ledger(make_parts(eager), RECIPE)
    assert mixture.error == ASSUMED_ERROR > TRACED_ERROR
    assert any("assumed about a value" in note for note in mixture.notes)
    assert any("all tokens to one of them" in note for note in mixture.notes)


def test_slack_comes_after_loading_and_a_file_of_another_type_before_training() -> None:
    parts = make_parts(LlamaConfig(**SIZES, **HEADS))
    found = ledger(replaced(parts, slack=77, file_bytes=55), RECIPE)
    load, *others = found.moments
    assert load.name == "load"
    assert (load.terms["fixed"], load.terms["temporaries"]) == (1000, 55)
    assert {moment.terms["fixed"] for moment in others} == {1077}


def test_on_a_gpu_the_host_holds_the_model_while_it_is_loaded_and_saved() -> None:
    parts = make_parts(LlamaConfig(**SIZES, **HEADS))
    found = ledger(replaced(parts, file_bytes=55), replace(RECIPE, {"device": "cuda"}))
    places = {moment.name: moment.elsewhere for moment in found.moments}
    assert places["load"]["host"] == {"weights": parts.size.weights, "temporaries": 55}
    assert places["save"]["host"] == {"temporaries": parts.size.weights}
    assert found.peak_at("disk") == sum(places["save"]["disk"].values())


def test_paged_state_lies_elsewhere_but_for_what_an_update_needs() -> None:
    wide = LlamaConfig(**{**SIZES, "hidden_size": 128, "intermediate_size": 256}, **HEADS)
    parts = make_parts(wide)
    whole, state = parts.optimizer, parts.optimizer.state
    assert 0 < whole.at_hand < whole.paged < state
    plain = ledger(parts, RECIPE)
    for device, place in (("cpu", "disk"), ("cuda", "host")):
        found = ledger(parts, replace(RECIPE, {"placement.name": "paged-state", "device": device}))
        for moment, before in zip(found.moments[1:], plain.moments[1:], strict=True):
            at_hand = whole.at_hand if moment.name == "optimizer step" else 0
            assert moment.terms["optimizer state"] == state - whole.paged + at_hand
            assert before.terms["optimizer state"] == state
            assert moment.elsewhere[place]["optimizer state"] >= whole.paged
    inside = replace(RECIPE, {"placement.name": "paged-state", "optimizer.fused_backward": True, "clip": 0})
    terms = {moment.name: moment.terms["optimizer state"] for moment in ledger(parts, inside).moments[1:]}
    assert terms["backward"] == terms["forward"] + whole.at_hand
