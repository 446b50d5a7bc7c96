"""SSF and DiffFit: what trains, what folds, and that folding is exact."""

from __future__ import annotations

import pytest
import torch
from tests.tuning.small_adapted import begin, llama, logits, loss_of, train
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, OPTConfig, OPTForCausalLM

from scrimp.base.errors import ScrimpError
from scrimp.tuning.modules.scaling import SSF, DiffFit, ScaleShift

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def gemma() -> nn.Module:
    """Make a model whose norms scale by 1 + w."""
    torch.manual_seed(0)
    more = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
    return GemmaForCausalLM(GemmaConfig(**SIZES, **more))


def opt() -> nn.Module:
    """Make a model with biases everywhere, norms with shifts, and an MLP in pieces."""
    torch.manual_seed(0)
    more = {"ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0, "word_embed_proj_dim": 32}
    return OPTForCausalLM(OPTConfig(**SIZES, **more, use_cache=False)).eval()


def test_ssf_without_spread_is_the_model_and_with_it_has_the_paper_s() -> None:
    model, tune = llama(), SSF(std=0.0)
    before = logits(model)
    tune.select(model)
    assert torch.equal(logits(model), before)
    drawn = SSF()
    drawn.select(llama())
    parts = [part for part in drawn.parts.values() if isinstance(part, ScaleShift)]
    assert len(parts) == 14 + 5  # linear layers, norms
    scales, shifts = torch.cat([p.scale for p in parts]), torch.cat([p.shift for p in parts])
    assert abs(scales.mean() - 1) < 3e-3 and abs(scales.std() / 0.02 - 1) < 0.1
    assert abs(shifts.mean()) < 3e-3 and abs(shifts.std() / 0.02 - 1) < 0.1


@pytest.mark.parametrize(("make", "shift"), [(llama, False), (gemma, False), (opt, True)])
def test_ssf_folds_exactly(make, shift: bool) -> None:
    model, tune = make(), SSF(shift=shift, std=0.3)
    paths = {name for name, _ in model.named_parameters()}
    before = logits(model)
    trained, optimizer = begin(model, tune)
    assert all(".attached." in name for name in trained)
    train(model, tune, optimizer, range(2))
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-2)
    tune.merge(model)
    assert torch.allclose(logits(model), after, atol=2e-5)
    assert {name for name, _ in model.named_parameters()} == paths


def test_ssf_with_shifts_cannot_be_merged_where_there_is_no_bias() -> None:
    model, tune = llama(), SSF()
    tune.select(model)
    assert not tune.is_mergeable
    with pytest.raises(ScrimpError, match="cannot be merged"):
        tune.merge(model)


@pytest.mark.parametrize("make", [llama, opt])
def test_difffit_begins_as_the_model_trains_its_vectors_and_scales_and_folds_exactly(make) -> None:
    model, tune = make(), DiffFit()
    vectors = {name for name, p in model.named_parameters() if p.ndim == 1}
    before = logits(model)
    trained, optimizer = begin(model, tune)
    assert torch.equal(logits(model), before)
    scales = trained.keys() - vectors
    assert vectors < trained.keys() and len(scales) == 4
    ends = ("o_proj", "down_proj", "out_proj", "fc2")
    assert all(name.endswith(tuple(f"{end}.attached.scale" for end in ends)) for name in scales)
    loss_of(model).backward()
    assert all(
        p.grad is not None and p.grad.any() for name, p in trained.items() if "k_proj.bias" not in name
    )
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
    train(model, tune, optimizer, range(3))
    after = logits(model)
    tune.merge(model)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(logits(model), after, atol=1e-5)


def test_a_bf16_model_stays_bf16() -> None:
    model = llama(torch.bfloat16)
    SSF().select(model)
    loss_of(model).backward()
    assert model(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
