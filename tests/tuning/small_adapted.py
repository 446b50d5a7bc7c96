"""A small Llama of two layers for adapters, its tokens, and a tuning put into it and begun."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from scrimp.tuning.deltas.delta import AdaptedLinear
from scrimp.tuning.deltas.low_rank import LowRank, LowRankCore
from scrimp.tuning.deltas.tuning import DeltaTuning

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Make the model, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, num_hidden_layers=2, max_position_embeddings=64, use_cache=False, **SIZES
        )
        return LlamaForCausalLM(config).to(dtype)


def tokens(seed: int = 1) -> Tensor:
    """Return (2, 12) token numbers."""
    return torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    """Return the mean loss on some tokens."""
    ids = tokens(seed)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def logits(model: nn.Module) -> Tensor:
    """Return the logits for tokens that no training saw."""
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens(99)).logits
    return found


def begin(model: nn.Module, tune: DeltaTuning) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Select, and let the events before step 0 act."""
    trained = tune.select(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    tune.before_step(0, optimizer, lambda: loss_of(model))
    return trained, optimizer


def train(model: nn.Module, tune: DeltaTuning, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Run steps as the training loop does."""
    for step in steps:
        tune.before_step(step, optimizer, lambda: loss_of(model))
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the adapted layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def low_rank(layer: AdaptedLinear) -> LowRank:
    """Return a layer's delta."""
    assert isinstance(layer.delta, LowRank)
    return layer.delta


def core(layer: AdaptedLinear) -> LowRankCore:
    """Return a layer's delta."""
    assert isinstance(layer.delta, LowRankCore)
    return layer.delta


def change(layer: AdaptedLinear) -> Tensor:
    """Return what merging would add, (out, in) float32."""
    found = layer.delta.change(layer.base_layer.weight.float())
    assert found is not None
    return found.detach()


def reload(folder: Path) -> nn.Module:
    """Put a saved adapter around a fresh base by plain peft."""
    loaded: nn.Module = PeftModel.from_pretrained(llama(), str(folder))
    return loaded


def best(matrix: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a rank, in fp64."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank]
