"""Every adapter of peft by name: it starts as the base, trains, and comes back from disk by plain peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from scrimp.assembly import load_function
from scrimp.base.errors import ScrimpError
from scrimp.methods.adapters import ADAPTERS
from scrimp.methods.peft_adapters import PEFT_ENTRIES
from scrimp.tuning.from_peft.adalora import AdaLoRA
from scrimp.tuning.from_peft.lora import LoRA, PiSSA
from scrimp.tuning.from_peft.tuning import PeftTuning

SMALL: dict[str, dict[str, Any]] = {
    "vera": {"rank": 8},
    "randlora": {"rank": 4, "alpha": 20},
    "miss": {"rank": 4},
    "adalora": {"rank": 2, "steps": 9},
}
MOVING = ("pissa", "olora", "corda")
PEFTS = [entry.name for entry in PEFT_ENTRIES]


def base(seed: int = 0) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return cast("Tensor", model(input_ids=ids).logits)[:, -ids.shape[1] :]


def tuned(name: str, model: nn.Module, steps: int = 2) -> tuple[PeftTuning, Any]:
    """Return an adapter that trained for some steps, and what runs."""
    entry = next(each for each in ADAPTERS if each.name == name)
    options = SMALL.get(name, {"rank": 4} if "rank" in entry.options else {})
    tune = cast("PeftTuning", load_function(entry.builder)(**options, seed=3))
    trained = tune.select(model)
    running = tune.wrap(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)

    def loss() -> Tensor:
        out = cast("Any", running)(input_ids=tokens(), use_cache=False).logits[:, -12:]
        return nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())

    for step in range(steps):
        tune.before_step(step, optimizer, loss)
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    return tune, running


@pytest.mark.parametrize("name", PEFTS)
def test_an_adapter_trains_and_plain_peft_reads_it_over_the_untouched_base(name: str, tmp_path: Path) -> None:
    ids = tokens(2)
    model = base()
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    tune, running = tuned(name, model)
    trained = logits(running.eval(), ids)
    assert not torch.allclose(trained, logits(base(), ids), atol=1e-4), "it learnt nothing"
    tune.save(model, tmp_path, "some/base")
    other = base()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of AdaLoRA's own ranks and of norms
        read = PeftModel.from_pretrained(cast("Any", other), str(tmp_path)).eval()
    torch.testing.assert_close(logits(read, ids), trained, rtol=1e-4, atol=2e-5)
    if name not in MOVING:
        now = {n.replace("base_layer.", ""): p for n, p in model.named_parameters()}
        same = {n for n, p in frozen.items() if n in now and torch.equal(now[n], p)}
        assert len(same) >= len(frozen) - 5, "the base changed"  # five norms may train
    if tune.is_mergeable:
        tune.merge(model)
        assert {n for n, _ in model.named_parameters()} >= set(frozen)
        torch.testing.assert_close(logits(model.eval(), ids), trained, rtol=1e-4, atol=2e-5)
    else:
        with pytest.raises(ScrimpError, match="cannot be merged"):
            tune.merge(model)


@pytest.mark.parametrize("name", ["lora", "pissa", "vera", "prompt"])
def test_what_a_checkpoint_holds_brings_a_fresh_adapter_to_the_same_place(name: str) -> None:
    ids = tokens(2)
    model, fresh = base(), base()
    tune, running = tuned(name, model)
    again, other = tuned(name, fresh, steps=0)
    kept = {n: t.clone() for n, t in tune.stored(model).items()}
    into = again.stored(fresh)
    assert kept.keys() == into.keys()
    for n, tensor in into.items():
        tensor.copy_(kept[n])
    assert torch.equal(logits(running.eval(), ids), logits(other.eval(), ids))
    held = sum(t.numel() for t in kept.values())
    assert held < sum(p.numel() for p in base().parameters()) or name == "pissa"


@pytest.mark.parametrize("name", ["lora", "pissa", "olora", "eva"])
def test_a_new_adapter_leaves_the_model_as_it_is(name: str) -> None:
    ids, model = tokens(2), base()
    _, running = tuned(name, model, steps=0)
    torch.testing.assert_close(logits(running, ids), logits(base(), ids), rtol=1e-4, atol=1e-5)


def test_draws_come_from_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = (LoRA(rank=4, seed=7).select(base()) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(p, second[name]) for name, p in first.items())
    third = LoRA(rank=4, seed=8).select(base())
    assert not all(torch.equal(p, third[name]) for name, p in first.items())


def test_adalora_moves_its_ranks_to_the_budget() -> None:
    model = base()
    tuned("adalora", model, steps=8)
    ranks = [int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n]
    assert sum(ranks) == 2 * len(ranks) < 3 * len(ranks)


def test_nonsense_is_refused_with_what_there_is() -> None:
    with pytest.raises(ScrimpError, match=r"'attn' matches no linear layer .* there are: q_proj, k_proj"):
        LoRA(targets=("attn",)).select(base())
    with pytest.raises(ScrimpError, match=r"rank 17 does not fit model.layers.0.self_attn.k_proj .* is 16"):
        LoRA(rank=17).select(base())
    with pytest.raises(ScrimpError, match="rank 0 must be a whole number"):
        AdaLoRA(rank=0)
    with pytest.raises(ScrimpError, match="alpha 0 must be above 0"):
        PiSSA(alpha=0)
