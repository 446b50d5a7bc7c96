"""MoS, S2-LoRA and Block-LoRA: identities with plain LoRA, shared gradients, and what plain peft loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tuning.small import PEFT_ASKS, llama, loss_of, tokens, train
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from scrimp.base.errors import ScrimpError
from scrimp.tuning.deltas.pooled import Sharded, Tied, Tiled
from scrimp.tuning.deltas.tuning import DeltaTuning
from scrimp.tuning.low_rank.pooled import BlockLora, MoS, S2Lora

NAMES = {
    "mos": lambda: MoS(rank=4, equivalent_rank=2, private_rank=0, shards=2),
    "s2-lora": lambda: S2Lora(rank=4, penalty=0.0, threshold=0.0),
    "block-lora": lambda: BlockLora(rank=2, blocks=2),
}


def scramble(trained: dict[str, nn.Parameter]) -> None:
    """Give every trained parameter values that are not its first ones."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def outputs(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens(0)).logits
        return logits


@pytest.mark.parametrize("make", NAMES.values(), ids=NAMES)
def test_first_step_starts_from_the_base_and_every_parameter_learns_within_two(make) -> None:
    model = llama()
    before = outputs(model)
    tune: DeltaTuning = make()
    trained = tune.select(model)
    assert torch.equal(outputs(model), before)
    assert len({id(p) for p in trained.values()}) == len(trained)
    start = {name: p.detach().clone() for name, p in trained.items()}
    train(model, tune, torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0), range(3))
    assert [name for name, p in trained.items() if torch.equal(p, start[name])] == []


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.parametrize("make", NAMES.values(), ids=NAMES)
def test_the_function_is_the_same_merged_and_loaded_by_plain_peft(make, tmp_path: Path) -> None:
    from peft import PeftModel

    model = llama()
    tune: DeltaTuning = make()
    scramble(tune.select(model))
    adapted = outputs(model)
    assert (adapted - outputs(llama())).abs().max() > 1e-2
    tune.save(model, tmp_path, "base")
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(outputs(loaded), adapted, atol=1e-5)
    tune.merge(model)
    assert not any("delta" in name for name, _ in model.named_modules())
    assert torch.allclose(outputs(model), adapted, atol=1e-5)


def test_mos_whose_shards_are_all_private_is_plain_lora() -> None:
    tune = MoS(rank=2, equivalent_rank=2, private_rank=2, shards=2, alpha=6.0, targets=("q_proj",))
    model = llama(2)
    scramble(tune.select(model))
    first, second = tune.deltas.values()
    assert isinstance(first, Sharded) and isinstance(second, Sharded)
    assert first.pool is second.pool
    a, b = first.pool.a.detach(), first.pool.b.detach()
    for number, delta in enumerate((first, second)):
        # Nothing is shared: layer i has rows 4 i to 4 i + 3, in order, two shards a vector.
        own = slice(4 * number, 4 * number + 4)
        found = delta.factors()
        assert torch.equal(found.a, a[own].reshape(2, 8))
        assert torch.equal(found.b, 3.0 * b[own].reshape(2, 8).T)


def test_mos_with_one_shard_a_vector_selects_rows_apart_for_both_factors() -> None:
    tune = MoS(rank=3, equivalent_rank=2, private_rank=0, shards=1, targets=("q_proj",))
    tune.select(llama(4))
    deltas = [delta for delta in tune.deltas.values() if isinstance(delta, Sharded)]
    picks = [tuple(rows.tolist()) for delta in deltas for rows in (delta.rows_a, delta.rows_b)]
    assert all(len(set(pick)) == 3 and max(pick) < 8 for pick in picks)  # e L l = 8 shards, none twice
    assert len(set(picks)) == len(picks)
    found = deltas[0].factors()
    assert torch.equal(found.a, deltas[0].pool.a.detach()[list(picks[0])])


def test_gradient_of_a_shared_shard_is_the_sum_over_the_layers_that_use_it() -> None:
    model = llama(2)
    tune = MoS(rank=4, equivalent_rank=3, private_rank=1, shards=2, targets=("up_proj",))
    scramble(tune.select(model))
    deltas = [delta for delta in tune.deltas.values() if isinstance(delta, Sharded)]
    loss_of(model, 0).backward()
    whole = deltas[0].pool.a.grad
    assert whole is not None
    total = torch.zeros_like(whole)
    for kept in deltas:
        model.zero_grad()
        other = next(delta for delta in deltas if delta is not kept)
        handle = other.register_forward_pre_hook(_detached)
        loss_of(model, 0).backward()
        handle.remove()
        total += kept.pool.a.grad
        del other.__dict__["_assembled"]
    assert torch.allclose(total, whole, atol=1e-6)
    used = [set(delta.rows_a.tolist()) for delta in deltas]
    assert used[0] & used[1], "the layers share nothing: the test is empty"


def _detached(delta: Sharded, inputs: object) -> None:
    a, b = Sharded._assembled(delta)
    delta.__dict__["_assembled"] = lambda: (a.detach(), b.detach())


def test_mos_trains_as_many_numbers_as_a_lora_of_the_equivalent_rank() -> None:
    trained = MoS(rank=4, equivalent_rank=2, private_rank=1, shards=2).select(llama(4))
    square, wide = 4 * (8 + 8), 3 * (8 + 12)
    assert sum(p.numel() for p in trained.values()) == 4 * 2 * (square + wide)


def test_s2_lora_shares_factors_by_shape_and_its_penalty_is_that_of_the_loss() -> None:
    model = llama(2)
    tune = S2Lora(rank=3, alpha=6.0, penalty=0.05, threshold=0.1)
    trained = tune.select(model)
    scramble(trained)
    assert sum(name.endswith("pair.a") for name in trained) == 3  # square, up and gate, down
    deltas = [delta for delta in tune.deltas.values() if isinstance(delta, Tied)]
    penalty = 0.05 * sum(delta.coefficients.abs().sum() for delta in deltas)
    (loss_of(model, 0) + penalty).backward()
    expected = [delta.coefficients.grad for delta in deltas]
    model.zero_grad(set_to_none=True)
    for _ in range(2):  # a second call changes nothing
        tune.before_step(0, torch.optim.SGD(trained.values()))
    loss_of(model, 0).backward()
    assert all(
        torch.allclose(delta.coefficients.grad, wanted, atol=1e-7)
        for delta, wanted in zip(deltas, expected, strict=True)
    )


def test_s2_lora_leaves_ranks_under_the_threshold_out_and_lets_them_learn() -> None:
    model = llama(2)
    tune = S2Lora(rank=3, threshold=0.1, penalty=0.0, targets=("q_proj",))
    tune.select(model)
    delta = next(iter(tune.deltas.values()))
    assert isinstance(delta, Tied)
    with torch.no_grad():
        delta.coefficients.copy_(torch.tensor([0.5, 0.05, -0.2]))
    assert delta.factors().a.shape == (2, 8)
    base = nn.Linear(8, 8)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    y = delta(x, base)
    assert torch.allclose(y - base(x), x @ delta.change(base.weight).T, atol=1e-6)
    y.square().sum().backward()
    assert delta.coefficients.grad[1] != 0


def test_block_lora_is_a_lora_whose_a_repeats_and_keeps_only_the_summed_input() -> None:
    tune = BlockLora(rank=2, blocks=4, targets=("down_proj",))
    scramble(tune.select(llama(2)))
    delta = next(iter(tune.deltas.values()))
    assert isinstance(delta, Tiled)
    assert delta.tile.shape == (2, 3)
    base = nn.Linear(12, 8).requires_grad_(False)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = delta(x, base)
    a = torch.cat([delta.tile] * 4, dim=1)
    assert torch.allclose(y, base(x) + 8.0 * (x @ a.T) @ delta.b.T, atol=1e-5)
    assert not [shape for shape in saved if shape[-1:] == (12,) and shape[0] != 8]


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: MoS(rank=2, equivalent_rank=4), "or more"),
        (lambda: MoS(rank=2, private_rank=3), "private_rank 3"),
        (lambda: MoS(rank=4, equivalent_rank=2, private_rank=2), "or more"),
        (lambda: MoS(rank=4, shards=5), "does not divide"),
        (lambda: MoS(rank=8, private_rank=1, shards=1), "public ones"),
        (lambda: MoS(rank=9, private_rank=0, shards=1), "rank 9 does not fit"),
        (lambda: S2Lora(rank=0), "rank 0"),
        (lambda: S2Lora(penalty=-1.0), "must not be negative"),
        (lambda: BlockLora(blocks=3), "blocks must divide"),
        (lambda: BlockLora(rank=8, blocks=4), "at least 8"),
    ],
)
def test_mistakes_are_refused(make, word: str) -> None:
    with pytest.raises(ScrimpError, match=word):
        make().select(llama(4))
