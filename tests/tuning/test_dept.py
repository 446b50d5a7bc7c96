"""DePT: what the decoder is called with, what comes back, and generation with a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tuning.small_adapted import begin, llama, logits, loss_of, tokens, train

from scrimp.base.errors import ScrimpError
from scrimp.tuning.modules.dept import DecomposedPrompt, DePT


def dept(**more: Any) -> tuple[Any, DecomposedPrompt]:
    """Return a model with one, whose B is not zero, and its part."""
    model = llama()
    tune = DePT(**{"prompt": 4, "rank": 3, "length": 24, "ratio": 5.0, **more})
    tune.select(model)
    part = tune.parts["model"]
    assert isinstance(part, DecomposedPrompt)
    torch.nn.init.normal_(part.b, std=0.05, generator=torch.Generator().manual_seed(1))
    return model.eval(), part


def by_hand(model: Any, part: DecomposedPrompt, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of the tokens from embeddings made by hand, on the model as it was."""
    plain = llama().eval()
    scale = 8 / 3**0.5
    changed = plain.model.embed_tokens(ids) + scale * part.a[: ids.shape[1]] @ part.b
    prompt = (5 * part.prompt).expand(len(ids), -1, -1)
    found: torch.Tensor = plain(inputs_embeds=torch.cat([prompt, changed], dim=1)).logits[:, 4:]
    return found


def test_it_is_a_prompt_before_changed_embeddings() -> None:
    model, part = dept()
    assert torch.allclose(model(input_ids=tokens()).logits, by_hand(model, part, tokens()), atol=1e-5)


def test_at_first_only_the_prompt_counts_and_rank_zero_is_prompt_tuning() -> None:
    found = []
    for rank in (3, 0):
        model = llama()
        tune = DePT(prompt=4, rank=rank, length=24)
        tune.select(model)
        found.append(logits(model))
    assert torch.equal(*found)
    assert not torch.allclose(found[0], logits(llama()), atol=1e-3)


def test_prompt_begins_with_embeddings_of_different_tokens() -> None:
    _, part = dept()
    table = llama().get_input_embeddings().weight
    near = torch.cdist(5 * part.prompt.detach(), table)
    assert near.min(dim=1).values.max() < 1e-3 and len(set(near.argmin(dim=1).tolist())) == 4


def test_the_prompt_learns_faster_by_the_ratio() -> None:
    model, part = dept(ratio=5.0)
    before = (5 * part.prompt).detach().clone(), part.a.detach().clone()
    optimizer = torch.optim.AdamW(part.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-12)
    loss_of(model).backward()
    optimizer.step()
    assert ((5 * part.prompt - before[0]).abs() - 5e-3).abs().max() < 1e-5
    assert ((part.a - before[1])[:11].abs() - 1e-3).abs().max() < 1e-5


def test_generation_with_a_cache_is_generation_without() -> None:
    model, part = dept()
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # filled on the left
    with torch.no_grad():
        found = [
            model.generate(
                ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0
            )
            for cache in (True, False)
        ]
        assert torch.equal(*found)
        greedy = by_hand(model, part, found[0][:1, :-1])[:, 11:].argmax(dim=-1)
    assert torch.equal(greedy, found[0][:1, 12:])


def test_only_prompt_and_factors_train() -> None:
    model = llama()
    tune = DePT(prompt=4, rank=3, length=24)
    trained, optimizer = begin(model, tune)
    assert {name.rpartition(".")[2] for name in trained} == {"prompt", "a", "b"}
    assert sum(p.numel() for p in trained.values()) == 4 * 32 + 3 * (24 + 32)
    start = {name: p.detach().clone() for name, p in trained.items()}
    train(model, tune, optimizer, range(3))
    assert not any(torch.equal(start[name], p) for name, p in trained.items())
    assert not tune.is_mergeable


def test_a_sequence_longer_than_the_factor_is_refused() -> None:
    model, _ = dept(length=11)
    with pytest.raises(ScrimpError, match="12 tokens is longer than length 11"):
        model(input_ids=tokens())
    with pytest.raises(ScrimpError, match="prompt 65 is more than the 64 tokens"):
        DePT(prompt=65).select(llama())
