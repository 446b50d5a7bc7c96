"""Any causal language model of transformers trains, is saved, and is what transformers loads.

Tiny random configurations of the families people use, each with an oddity that a trainer can trip over:
grouped queries and tied heads (Qwen), soft caps, sliding windows and scaled embeddings (Gemma), learned
positions (GPT-2, OPT), routed experts (Mixtral), no attention at all (Mamba).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import scrimp
from scrimp.base.errors import ScrimpError
from scrimp.data import byte_tokenizer
from scrimp.recipe import parse, replace
from scrimp.report.lines import LineReporter
from scrimp.training.run import Run
from scrimp.training.scoring import score

WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**WIDTHS, "num_key_value_heads": 2, "max_position_embeddings": 64}
HEADS = {**GROUPED, "head_dim": 8}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", HEADS),
    "gemma2": ("Gemma2Config", {**HEADS, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**HEADS, "sliding_window": 8}),
    "gpt2": ("GPT2Config", {**GPT2, **NO_DROPOUT}),
    "opt": ("OPTConfig", {**OPT, "dropout": 0.0, "max_position_embeddings": 64}),
    "mixtral": ("MixtralConfig", {**GROUPED, **EXPERTS}),
    "mamba": ("MambaConfig", {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}),
}
FAMILIES = tuple(CONFIGURATIONS)
# Plain attention, sliding windows, routed experts, and none: what a micro-batch or a second run could meet.
KINDS = ("llama", "gemma3", "mixtral", "mamba")
# Those whose attention follows restarted positions, one of each kind: rotated, with sliding windows and soft
# caps, learned, with experts.
ISOLATING = ("llama", "gemma2", "gpt2", "mixtral")
# The others see across documents, or have no attention.
NOT_ISOLATING = ("mamba", "opt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with each family's configuration and tokenizer, and a text."""
    root = tmp_path_factory.mktemp("families")
    for name, (kind, values) in CONFIGURATIONS.items():
        getattr(transformers, kind)(vocab_size=264, **values).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    rows = [{"text": f"f{n}(x) = {n} x + {n * n}\n" * (1 + n % 5)} for n in range(60)]
    (root / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def train(folder: Path, tmp_path: Path) -> Callable[..., Run]:
    """Return a function that trains a family for three steps."""

    def run(family: str, **changes: Any) -> Run:
        recipe = parse(
            {"model": str(folder / family), "data": {"path": str(folder / "text.jsonl"), "held_out": 0.1}}
        )
        numbers = {"steps": 3, "batch": 4, "micro_batch": 4, "seq": 24, "threads": 1, "optimizer.lr": 1e-3}
        out = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        return scrimp.train(replace(recipe, {**numbers, **changes}), out=out)

    return run


def _rows(run: Run) -> list[dict[str, Any]]:
    lines = (run.out / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_was_trained_with_the_same_loss(
    train: Callable[..., Run], tmp_path: Path, family: str
) -> None:
    """Its own loss on a text, labels shifted by its own code, equals ours."""
    run = train(family)
    model = transformers.AutoModelForCausalLM.from_pretrained(run.model, dtype="auto").eval()
    assert model.dtype == torch.float32
    saved = load_file(run.out / "checkpoints" / "step-00000003" / "model.safetensors")
    state = model.state_dict()
    assert saved
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())

    text = tmp_path / "held.txt"
    text.write_text("def f(x): return 1")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.model)
    ids = torch.tensor([[*tokenizer(text.read_text())["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=ids).loss.item()
    ours = score(str(run.out), paths=[str(text)], options={}, reporter=LineReporter())
    assert ours.eval_tokens == ids.shape[1] - 1
    assert ours.eval_loss == pytest.approx(theirs, rel=1e-6)  # both sum 19 fp32 losses, in another order


@pytest.mark.parametrize("family", KINDS)
def test_micro_batches_change_no_result_beyond_rounding(train: Callable[..., Run], family: str) -> None:
    whole = _rows(train(family, micro_batch=4))
    assert len(whole) == 3
    assert whole[2]["loss"] != whole[0]["loss"]
    for micro_batch in (1, 2):
        for one, other in zip(whole, _rows(train(family, micro_batch=micro_batch)), strict=True):
            assert other["tokens"] == one["tokens"]
            # Three steps of AdamW, whose first ones turn a gradient's rounding (1e-7) into its sign.
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("family", KINDS)
def test_a_run_repeats_bit_for_bit_and_another_seed_differs(train: Callable[..., Run], family: str) -> None:
    first, again, other = (_rows(train(family, seed=seed, steps=2)) for seed in (0, 0, 1))
    assert [row["loss"] for row in first] == [row["loss"] for row in again]
    assert [row["loss"] for row in first] != [row["loss"] for row in other]


@pytest.mark.parametrize("family", ISOLATING)
def test_isolated_documents_of_a_row_are_as_if_alone(
    train: Callable[..., Run], tmp_path: Path, family: str
) -> None:
    """Documents of 16 tokens, four to a packed row of 64, cost what they cost in rows of their own."""
    documents = tmp_path / "documents.jsonl"
    rows = [{"text": f"{n:03d} * 2 = {2 * n:03d} "} for n in range(30)]
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(family, **{"data.boundaries": "isolate", "micro_batch": 2})

    def loss(**options: Any) -> float:
        options = {f"data.{name}": value for name, value in options.items()} | {"seq": 64, "micro_batch": 3}
        found = score(
            str(run.out), paths=[str(documents)], options={**options, "batch": 3}, reporter=LineReporter()
        )
        assert found.eval_tokens == 30 * 15
        return found.eval_loss

    alone = loss(packing="padded", boundaries="join")
    assert loss(packing="packed", boundaries="isolate") == pytest.approx(alone, rel=1e-6)
    assert loss(packing="packed", boundaries="join") != pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("family", NOT_ISOLATING)
def test_a_model_that_cannot_isolate_is_refused(train: Callable[..., Run], family: str) -> None:
    with pytest.raises(
        ScrimpError, match=r"isolate: model .* cannot keep documents of one row apart.*padded"
    ):
        train(family, **{"data.boundaries": "isolate"})
