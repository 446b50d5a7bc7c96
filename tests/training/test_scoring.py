"""`scrimp eval`: the loop's own number for a run, and a number for any model on any text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.training.conftest import write_gpt2
from transformers import AutoModelForCausalLM, AutoTokenizer

from scrimp.base.errors import ScrimpError
from scrimp.training.scoring import score

if TYPE_CHECKING:
    from tests.training.conftest import Lab

    from scrimp.training.evaluate import Evaluation


def ask(lab: Lab, target: Path | str, *paths: Path, **options: Any) -> Evaluation:
    return score(
        str(target),
        paths=[str(path) for path in paths],
        options=options,
        reporter=lab.reporter(),
        cache=lab.cache,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16-mixed"},
        {"precision": "bf16"},
        {"data.packing": "padded", "data.long": "cut"},
        {"data.boundaries": "isolate"},
        {"evaluation.tokens": 200},
        {"model": "llama-1m", "steps": 2},
        {"model": "gpt2"},
    ],
    ids=["fp32", "bf16-mixed", "bf16", "padded", "isolated", "sample", "named-shape", "dropout"],
)
def test_a_runs_score_is_the_loops_last_number_bit_for_bit(lab: Lab, changes: dict[str, Any]) -> None:
    if changes.get("model") == "gpt2":
        changes = {"model": str(write_gpt2(lab.path / "gpt2", dropout=0.3))}
    run = lab.train(lab.recipe(**{"data.held_out": 0.3, **changes}))
    assert run.evaluation is not None and run.evaluation.eval_loss > 1
    assert ask(lab, run.out) == run.evaluation
    assert asdict(run.evaluation).items() <= lab.rows()[-1].items()


def test_what_training_would_hold_is_nothing_to_a_score(lab: Lab) -> None:
    run = lab.train(lab.recipe(data__held_out=0.3))
    assert ask(lab, run.out, memory="1MiB") == run.evaluation


def test_other_text_is_scored_whole_and_none_of_it_held_out(lab: Lab) -> None:
    run = lab.train(lab.recipe(data__packing="padded"))
    text = lab.path / "other.txt"
    text.write_text("blue birds over the hills\n" * 3)
    found = ask(lab, run.out, text)
    model = AutoModelForCausalLM.from_pretrained(run.model)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]  # where a text ends is predicted too
    nats = 0.0
    with torch.no_grad():
        for first in range(0, len(row) - 1, 16):
            part = torch.tensor([row[first : first + 17]])
            nats += model(input_ids=part, labels=part).loss.item() * (part.shape[1] - 1)
    assert found.eval_bytes == text.stat().st_size and found.eval_tokens == len(ids) + 1
    assert found.eval_loss == pytest.approx(nats / found.eval_tokens, rel=1e-5)


def test_a_text_shorter_than_a_sequence_is_scored(lab: Lab) -> None:
    run = lab.train(lab.recipe())
    text = lab.path / "short.txt"
    text.write_text("a cat")
    assert ask(lab, run.out, text).eval_bytes == 5
    assert ask(lab, run.model, text, seq=32).eval_bytes == 5


def test_a_plain_models_folder_is_scored_like_the_run(lab: Lab) -> None:
    run = lab.train(lab.recipe())
    by_run = ask(lab, run.out, lab.text)
    assert ask(lab, run.model, lab.text, seq=16, micro_batch=2, batch=2) == by_run


def test_a_score_needs_a_run_or_a_text(lab: Lab) -> None:
    run = lab.train(lab.recipe())
    with pytest.raises(ScrimpError, match="--data"):
        ask(lab, run.model)


def test_an_unfinished_run_has_no_model_to_score(lab: Lab) -> None:
    from scrimp.base.errors import Interrupted

    def stop() -> None:
        import signal

        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        lab.train(lab.recipe(), reporter=lab.reporter({2: stop}))
    with pytest.raises(ScrimpError, match=r"has not finished.*--resume"):
        ask(lab, lab.path / "run")


def test_a_model_without_weights_is_refused(lab: Lab) -> None:
    with pytest.raises(ScrimpError, match="no weights"):
        ask(lab, lab.model, lab.text)


def test_the_exported_model_has_the_loss_of_the_loop(lab: Lab) -> None:
    """Transformers alone, in a few lines that know nothing of scrimp."""
    run = lab.train(lab.recipe(data__packing="padded", data__held_out=0.3, seq=64))
    assert run.evaluation is not None
    held_out = lab.job(run.recipe).prepared.corpus.held_out
    model = AutoModelForCausalLM.from_pretrained(run.model)
    nats = 0.0
    with torch.no_grad():
        for document in range(held_out.documents):
            row = held_out.tokens[slice(*held_out.row(document))].tolist()
            for first in range(0, len(row) - 1, 64):
                ids = torch.tensor([row[first : first + 65]])
                nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert run.evaluation.eval_loss == pytest.approx(nats / run.evaluation.eval_tokens, rel=1e-6)
