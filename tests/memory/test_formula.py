"""The formula of what a run will need, against what autograd really keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from scrimp.activations.loss import TokenLoss
from scrimp.data.loader import MicroBatch
from scrimp.memory.formula import FORMULA_ERROR, Widths, estimate
from scrimp.recipe import Recipe, replace

LLAMA = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}


def _config(layers: int, **changes: Any) -> Any:
    return transformers.LlamaConfig(**{**LLAMA, **HEADS, "num_hidden_layers": layers, **changes})


def _saved_bytes(config: Any, dtype: torch.dtype, rows: int, seq: int) -> int:
    """Return the bytes that autograd holds for the backward pass, parameters and shared ones left out."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    ours = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    held: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, so that no address is used twice
        return tensor

    ids = torch.arange(rows * seq).reshape(rows, seq) % config.vocab_size
    batch = MicroBatch(ids, ids.roll(-1, 1), None, rows * seq)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        TokenLoss(model)(batch, divisor=1.0)
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 6}, {"head_dim": 16}, {"intermediate_size": 33}]
)
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_llama_layer_keeps_what_the_formula_says(
    changes: dict[str, Any], precision: str, dtype: torch.dtype
) -> None:
    rows, seq = 3, 32
    one, two = (_saved_bytes(_config(layers, **changes), dtype, rows, seq) for layers in (1, 2))
    widths = Widths.of(_config(2, **changes))
    assert (two - one) / (rows * seq) == widths.layer_bytes(precision)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "GPT2Config",
            Widths(layers=12, hidden=768, ffn=3072, heads=12, query=768, key_value=768, vocab=50257),
        ),
        (
            "OPTConfig",
            Widths(layers=12, hidden=768, ffn=3072, heads=12, query=768, key_value=768, vocab=50272),
        ),
        (
            "MixtralConfig",
            Widths(layers=32, hidden=4096, ffn=2 * 14336, heads=32, query=4096, key_value=1024, vocab=32000),
        ),
        (
            "Gemma2Config",
            Widths(layers=26, hidden=2304, ffn=9216, heads=8, query=2048, key_value=1024, vocab=256000),
        ),
        (
            "MambaConfig",
            Widths(layers=32, hidden=768, ffn=1536, heads=1, query=768, key_value=768, vocab=50280),
        ),
    ],
)
def test_widths_are_read_from_every_family(kind: str, expected: Widths) -> None:
    assert Widths.of(getattr(transformers, kind)()) == expected


FIXED = 7


def _estimate(**changes: Any) -> Any:
    values = {"seq": 16, "batch": 4, "micro_batch": 4, "precision": "fp32"}
    recipe = replace(Recipe(), {**values, **changes})
    return estimate(_config(2), recipe, fixed=FIXED, reason="a test")


def _parameters() -> int:
    return transformers.AutoModelForCausalLM.from_config(_config(2)).num_parameters()


def test_weights_gradients_and_state_are_counted_by_their_dtype() -> None:
    count = _parameters()
    for precision, width in (("fp32", 4), ("bf16-mixed", 4), ("bf16", 2)):
        ledger = _estimate(precision=precision)
        for moment in ledger.moments:
            assert moment.terms["weights"] == width * count
            assert moment.terms["optimizer state"] == 8 * count  # two moments in fp32, whatever the weights
            assert moment.terms["fixed"] == FIXED
        step = ledger.moments[-1]
        assert step.name == "optimizer step"
        assert step.terms["gradients"] == width * count


def test_the_peak_is_the_largest_moment_and_not_the_sum_of_the_terms() -> None:
    ledger = _estimate()
    totals = [moment.total for moment in ledger.moments]
    assert [moment.name for moment in ledger.moments] == ["loss", "backward", "optimizer step"]
    assert ledger.peak.total == max(totals)
    largest: dict[str, int] = {}
    for moment in ledger.moments:
        for term, size in moment.terms.items():
            largest[term] = max(size, largest.get(term, 0))
    assert ledger.peak.total < sum(largest.values())


def test_gradients_are_alive_during_the_loss_only_when_they_accumulate() -> None:
    assert _estimate().moments[0].terms["gradients"] == 0
    assert _estimate(micro_batch=2).moments[0].terms["gradients"] == 4 * _parameters()


def test_activations_grow_with_the_tokens_alone() -> None:
    one, two = (_estimate(seq=seq).moments[0].terms["activations"] for seq in (16, 32))
    assert two == 2 * one > 0


def test_an_estimate_says_what_it_is() -> None:
    ledger = _estimate()
    assert (ledger.basis, ledger.error) == ("formula", FORMULA_ERROR)
    assert "could not be traced (a test)" in ledger.notes[0]
