"""Held-out loss, perplexity and bits per byte: one function for the loop and for `scrimp eval`.

    loss           mean cross-entropy in nats, every predicted token counted once
    perplexity     exp(loss)
    bits per byte  summed cross-entropy / ln 2 / UTF-8 bytes of the text those tokens stand for

Bits per byte compare models whose tokenizers differ; separators are predicted, and stand for no byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from scrimp.base.errors import ScrimpError
from scrimp.data import Split
from scrimp.data.loader import MicroBatch, evaluation_batches, evaluation_bytes

if TYPE_CHECKING:
    from scrimp.base.protocols import Loss
    from scrimp.build import Prepared
    from scrimp.recipe import Recipe

MAX_EXPONENT = 700.0  # exp of more overflows a double


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        eval_loss: Nats a token.
        perplexity: exp of it.
        bits_per_byte: Bits for each UTF-8 byte of the text.
        eval_tokens: Tokens that were predicted.
        eval_bytes: UTF-8 bytes they stand for.
    """

    eval_loss: float
    perplexity: float
    bits_per_byte: float
    eval_tokens: int
    eval_bytes: int


def on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Return a micro-batch on `device`, without waiting for the copy where the device need not."""
    if device.type == "cpu":
        return batch

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor.pin_memory() if device.type == "cuda" else tensor
        return pinned.to(device, non_blocking=True)

    positions = None if batch.position_ids is None else moved(batch.position_ids)
    return replace(
        batch, input_ids=moved(batch.input_ids), labels=moved(batch.labels), position_ids=positions
    )


def evaluate(
    loss: Loss,
    prepared: Prepared,
    recipe: Recipe,
    split: Split,
    *,
    max_tokens: int | None,
    first: AbstractContextManager[None] | None = None,
) -> Evaluation:
    """Take a model's loss on a split of a corpus.

    Args:
        loss: The loss over the model, which is left as it was.
        prepared: The inputs that the split belongs to.
        recipe: The resolved recipe: how rows are cut, and on which device.
        split: The documents.
        max_tokens: About how many tokens to take, in whole documents; None takes all.
        first: Entered around the first micro-batch.

    Raises:
        ScrimpError: There is nothing to predict.
    """
    assert recipe.seq is not None and recipe.micro_batch is not None
    device = torch.device(recipe.device)
    seq, packing, long = recipe.seq, recipe.data.packing, recipe.data.long
    batches = evaluation_batches(
        split,
        seq=seq,
        micro_batch=recipe.micro_batch,
        packing=packing,
        boundaries=recipe.data.boundaries,
        long=long,
        pad_id=prepared.pad_id,
        max_tokens=max_tokens,
    )
    text_bytes = evaluation_bytes(
        split, prepared.tokenizer, seq=seq, packing=packing, long=long, max_tokens=max_tokens
    )
    total, targets = _sum(loss, batches, device, first or nullcontext())
    if not targets or not text_bytes:
        raise ScrimpError(
            "the held-out text has no token to predict: give more data or raise --data.held-out"
        )
    mean = total / targets
    return Evaluation(
        eval_loss=mean,
        perplexity=math.exp(mean) if mean < MAX_EXPONENT else math.inf,
        bits_per_byte=total / math.log(2) / text_bytes,
        eval_tokens=targets,
        eval_bytes=text_bytes,
    )


def _sum(
    loss: Loss, batches: Iterable[MicroBatch], device: torch.device, first: AbstractContextManager[None]
) -> tuple[float, int]:
    """Return the summed cross-entropy in nats and the number of targets."""
    exact = torch.float32 if device.type == "mps" else torch.float64
    nats = torch.zeros((), dtype=exact, device=device)
    targets = 0
    was_training = loss.model.training
    loss.model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                with first:
                    nats += loss(on_device(batch, device), divisor=1.0)
                targets += batch.targets
                first = nullcontext()
    finally:
        loss.model.train(was_training)
    return nats.item(), targets
