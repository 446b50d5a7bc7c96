"""A small Llama, its batches, and a plain training loop around a schedule of what trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from scrimp.base.protocols import Trainable

PEFT_ASKS = "ignore:.*is_gradient_checkpointing:FutureWarning"  # by the old name
SIZES = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}


def llama(layers: int = 4, *, seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    """Make a Llama with weights that depend on `seed` alone."""
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, tie_word_embeddings=tied, use_cache=False)
    return LlamaForCausalLM(config)


def tokens(step: int) -> Tensor:
    """Return (2, 6) token numbers of a step."""
    return torch.randint(0, 17, (2, 6), generator=torch.Generator().manual_seed(step))


def loss_of(model: Any, step: int) -> Tensor:
    """Return the mean loss on a step's tokens."""
    ids = tokens(step)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def train(
    model: Any,
    tune: Trainable,
    optimizer: torch.optim.Optimizer,
    steps: range,
    *,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Run steps as the training loop does; `after` sees the gradients."""
    for step in steps:
        tune.before_step(step, optimizer, lambda step=step: loss_of(model, step))  # type: ignore[misc]
        loss_of(model, step).backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad(set_to_none=True)
