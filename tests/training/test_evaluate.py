"""Held-out loss, perplexity and bits per byte against transformers' own loss and arithmetic by hand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scrimp.activations.loss import TokenLoss
from scrimp.base.errors import ScrimpError
from scrimp.training.evaluate import evaluate

if TYPE_CHECKING:
    from tests.training.conftest import Lab


def held_out_documents(lab: Lab, recipe: Any) -> list[list[int]]:
    """Return the token rows of the held-out documents, decoded back to make sure that they are text."""
    job = lab.job(recipe)
    held_out = job.prepared.corpus.held_out
    return [held_out.tokens[slice(*held_out.row(i))].tolist() for i in range(held_out.documents)]


def by_hand(model: Any, rows: list[list[int]]) -> tuple[float, int]:
    """Sum transformers' mean loss, times the tokens it was taken over, row by row."""
    nats, targets = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            nats += model.double()(input_ids=ids, labels=ids).loss.item() * (len(row) - 1)
            targets += len(row) - 1
    return nats, targets


def test_padded_evaluation_is_transformers_loss_and_counts_every_token_once(lab: Lab) -> None:
    recipe = lab.recipe(data__packing="padded", data__held_out=0.3, seq=64, steps=3)
    run = lab.train(recipe)
    found = run.evaluation
    assert found is not None
    model = AutoModelForCausalLM.from_pretrained(run.model)
    documents = held_out_documents(lab, recipe)
    # A document longer than a row goes on in the next one, which begins with the last token before.
    rows = [doc[first : first + 65] for doc in documents for first in range(0, len(doc) - 1, 64)]
    assert len(rows) > len(documents) > 2
    nats, targets = by_hand(model, rows)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    texts = [tokenizer.decode(doc, skip_special_tokens=True) for doc in documents]
    assert all((lab.text / f"{n:03}.txt").exists() for n in range(24))
    originals = {path.read_text() for path in lab.text.iterdir()}
    assert set(texts) <= originals
    assert found.eval_tokens == targets == sum(len(doc) - 1 for doc in documents)
    assert found.eval_bytes == sum(len(text.encode()) for text in texts)
    assert found.eval_loss == pytest.approx(nats / targets, rel=1e-6)
    assert found.perplexity == math.exp(found.eval_loss)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.eval_bytes, rel=1e-6)


def test_packed_evaluation_is_transformers_loss_over_the_stream(lab: Lab) -> None:
    recipe = lab.recipe(data__held_out=0.3, seq=32, steps=3)
    run = lab.train(recipe)
    documents = held_out_documents(lab, recipe)
    job = lab.job(recipe)
    assert run.evaluation is not None
    stream: list[int] = []
    for document in documents:  # a shared separator is there once
        stream += document[1:] if stream and job.prepared.corpus.held_out.shared else document
    start = job.prepared.tokenizer.bos_token_id
    rows = [stream[first : first + 33] for first in range(0, len(stream) - 1, 32)]
    model = AutoModelForCausalLM.from_pretrained(run.model).double()
    nats, targets = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            labels = ids.clone()
            if not job.prepared.corpus.held_out.shared:
                labels[ids == start] = -100  # what begins a document is not predicted
            count = int((labels[:, 1:] != -100).sum())
            nats += model(input_ids=ids, labels=labels).loss.item() * count
            targets += count
    assert run.evaluation.eval_tokens == targets == sum(len(doc) - 1 for doc in documents)
    assert run.evaluation.eval_loss == pytest.approx(nats / targets, rel=1e-6)


def test_the_micro_batch_of_an_evaluation_changes_rounding_only(lab: Lab) -> None:
    job = lab.job(lab.recipe(data__held_out=0.3))
    found = []
    for micro_batch in (1, 3, 4):
        recipe = job.recipe.model_copy(update={"micro_batch": micro_batch})
        found.append(evaluate(job.loss, job.prepared, recipe, job.prepared.corpus.held_out, max_tokens=None))
    assert {(f.eval_tokens, f.eval_bytes) for f in found} == {(found[0].eval_tokens, found[0].eval_bytes)}
    assert [f.eval_loss for f in found] == pytest.approx([found[0].eval_loss] * 3, rel=1e-6)


def test_an_evaluation_leaves_the_model_as_it_was(lab: Lab) -> None:
    job = lab.job(lab.recipe(data__held_out=0.3))
    for training in (True, False):
        job.model.train(training)
        random_state = torch.get_rng_state()
        evaluate(job.loss, job.prepared, job.recipe, job.prepared.corpus.held_out, max_tokens=None)
        assert job.model.training is training and torch.equal(random_state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in job.trained.values())


def test_how_often_the_loop_evaluates_changes_no_weight(lab: Lab) -> None:
    lab.train(lab.recipe(evaluation__every=1), "often")
    lab.train(lab.recipe(evaluation__every=6), "once")
    assert lab.weights("often") == lab.weights("once")
    assert [row["step"] for row in lab.rows("often", kind="eval")] == [1, 2, 3, 4, 5, 6]
    assert lab.rows("often", kind="eval")[-1] == lab.rows("once", kind="eval")[-1]


def test_a_sample_takes_whole_documents_up_to_the_limit(lab: Lab) -> None:
    job = lab.job(lab.recipe(data__held_out=0.4))
    held_out = job.prepared.corpus.held_out
    full = evaluate(job.loss, job.prepared, job.recipe, held_out, max_tokens=None)
    part = evaluate(job.loss, job.prepared, job.recipe, held_out, max_tokens=full.eval_tokens // 2)
    assert 0 < part.eval_tokens <= full.eval_tokens // 2


def test_a_loss_beyond_every_exponent_has_infinite_perplexity(lab: Lab) -> None:
    job = lab.job(lab.recipe(data__held_out=0.3))
    with torch.no_grad():
        for parameter in job.model.parameters():
            parameter.mul_(1e4)
    found = evaluate(
        TokenLoss(job.model), job.prepared, job.recipe, job.prepared.corpus.held_out, max_tokens=None
    )
    assert found.eval_loss > 710 and found.perplexity == math.inf


def test_a_run_with_an_infinite_perplexity_saves_and_resumes(lab: Lab) -> None:
    # Whether gradients that large overflow depends on how a CPU sums.
    changes = {"schedule.warmup": 0, "schedule.name": "constant", "clip": 0, "nonfinite": "skip"}
    lab.train(lab.recipe(**{"optimizer.lr": 300.0, **changes}))
    rows = lab.rows(kind="eval")
    assert any(row["perplexity"] is None and row["eval_loss"] > 710 for row in rows), rows


def test_nothing_held_out_is_no_evaluation(lab: Lab) -> None:
    run = lab.train(lab.recipe(data__held_out=0))
    assert run.evaluation is None and not lab.rows(kind="eval")
    assert "eval_loss" not in lab.rows()[-1]


def test_nothing_to_predict_is_refused(lab: Lab) -> None:
    job = lab.job(lab.recipe(data__held_out=0))
    with pytest.raises(ScrimpError, match="no token to predict"):
        evaluate(job.loss, job.prepared, job.recipe, job.prepared.corpus.held_out, max_tokens=None)
