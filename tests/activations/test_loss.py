"""The loss against transformers' own, and the sums that make micro-batches add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from scrimp.activations.everything import everything
from scrimp.activations.loss import TokenLoss
from scrimp.data.loader import IGNORED, MicroBatch

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def make_batch(generator: torch.Generator, rows: int = 4, seq: int = 9) -> MicroBatch:
    """Return rows of which each is shorter than the one before."""
    tokens = torch.randint(0, 50, (rows, seq + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(rows):
        labels[row, seq - 2 * row :] = IGNORED
    return MicroBatch(tokens[:, :-1], labels, None, int((labels != IGNORED).sum()))


def theirs(batch: MicroBatch) -> dict[str, Tensor]:
    """Return a batch as transformers takes it: a label stands beside its own token."""
    first, last = torch.full_like(batch.labels[:, :1], IGNORED), torch.zeros_like(batch.input_ids[:, :1])
    return {
        "input_ids": torch.cat([batch.input_ids, last], 1),
        "labels": torch.cat([first, batch.labels], 1),
    }


def test_the_mean_over_targets_is_transformers_loss(
    llama: LlamaForCausalLM, generator: torch.Generator
) -> None:
    batch = make_batch(generator)
    loss = TokenLoss(llama)(batch, divisor=batch.targets)
    torch.testing.assert_close(loss, llama(**theirs(batch)).loss, rtol=1e-6, atol=0)
    assert batch.targets < batch.labels.numel()


def test_losses_of_parts_add_up_to_that_of_the_whole(
    llama: LlamaForCausalLM, generator: torch.Generator
) -> None:
    batch = make_batch(generator)
    parts = [
        MicroBatch(batch.input_ids[i : i + 1], batch.labels[i : i + 1], None, 9 - 2 * i) for i in range(4)
    ]
    assert sum(part.targets for part in parts) == batch.targets
    loss = TokenLoss(llama)
    added = sum(loss(part, divisor=batch.targets) for part in parts)
    torch.testing.assert_close(added, loss(batch, divisor=batch.targets), rtol=1e-6, atol=0)
    # A mean of means is another number here, so the test can fail.
    mean = sum(loss(part, divisor=part.targets) for part in parts) / 4
    assert abs(mean - added) > 1e-4


def test_a_micro_batch_without_targets_has_no_loss_and_no_gradient(
    llama: LlamaForCausalLM, generator: torch.Generator
) -> None:
    batch = make_batch(generator)
    empty = MicroBatch(batch.input_ids, torch.full_like(batch.labels, IGNORED), None, 0)
    loss = TokenLoss(llama)(empty, divisor=5)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in llama.parameters())


def test_positions_are_handed_on(llama: LlamaForCausalLM, generator: torch.Generator) -> None:
    batch = make_batch(generator)
    through = torch.arange(9).expand(4, 9)
    restarted = torch.cat([torch.arange(4), torch.arange(5)]).expand(4, 9)
    loss = TokenLoss(llama)
    losses = [
        loss(MicroBatch(batch.input_ids, batch.labels, positions, batch.targets), divisor=1.0)
        for positions in (None, through, restarted)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    assert abs(losses[0] - losses[2]) > 1e-4


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_loss_is_fp32_whatever_the_model_computes_in(
    llama: LlamaForCausalLM, generator: torch.Generator, autocast: torch.dtype | None
) -> None:
    batch = make_batch(generator)
    loss = TokenLoss(llama, autocast=autocast)(batch, divisor=batch.targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    exact = llama(**theirs(batch)).loss
    torch.testing.assert_close(loss, exact, rtol=1e-6 if autocast is None else 2**-7, atol=0)
    assert (loss.item() == pytest.approx(exact.item(), rel=1e-7)) is (autocast is None)
    assert TokenLoss(llama.bfloat16())(batch, divisor=batch.targets).dtype == torch.float32


def test_the_balancing_loss_of_experts_is_transformers_own(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
    model = MixtralForCausalLM(config)
    tokens = torch.randint(0, 50, (2, 9), generator=generator)
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), IGNORED)], 1)
    batch = MicroBatch(tokens, labels, None, 16)
    ours = TokenLoss(model)(batch, divisor=16)
    expected = model(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(ours, expected.loss, rtol=1e-6, atol=0)
    assert expected.aux_loss > 0.1
    model.config.output_router_logits = False
    assert abs(TokenLoss(model)(batch, divisor=16) - ours) > 0.01


def test_no_reference_to_the_logits_outlives_the_call(
    llama: LlamaForCausalLM, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    logits: list[weakref.ref[Tensor]] = []
    llama.register_forward_hook(lambda _, __, output: logits.append(weakref.ref(output.logits)))
    with torch.no_grad():
        loss = TokenLoss(llama)(make_batch(generator), divisor=1.0)
    assert len(logits) == 1 and logits[0]() is None and loss.isfinite()


def test_everything_is_kept_as_autograd_would() -> None:
    with everything().context():
        x = torch.ones(2, requires_grad=True)
        (x * x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0))
