"""Every adapter of the catalogue by name: it trains, is saved and merged, and goes on from what is stored."""

from __future__ import annotations

import copy
import warnings
from inspect import signature
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.tuning.small_adapted import llama, tokens
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from scrimp import adapted, own_adapter
from scrimp.assembly import load_function
from scrimp.base.protocols import Adapter
from scrimp.methods.adapters import ADAPTER_METHODS, ADAPTERS

# What fits two layers of width 32; else rank 4.
SMALL: dict[str, dict[str, Any]] = {
    "series-adapter": {"bottleneck": 4},
    "parallel-adapter": {"bottleneck": 4},
    "dept": {"prompt": 3, "length": 12},
    "vera": {"rank": 8},
    "randlora": {"alpha": 20},
    "adalora": {"rank": 2},
    "flylora": {"rank": 16},
    "mos": {"rank": 4, "equivalent_rank": 3, "shards": 4},
    "increlora": {"rank": 1, "warmup": 2, "interval": 2, "measure_every": 1, "largest": 4},
    "triadapt-lora": {"rank": 4, "largest": 4, "first": 1, "last": 4, "every": 1},
    "neuroada": {"per_row": 4},
    "sft": {"density": 0.1, "every": 3, "accumulate": 1},
    "sft-ma": {"density": 0.1},
    "lamda": {"rank": 8, "pieces": 2},
    "lamda-plus": {"rank": 8, "pieces": 2},
    "peqa": {"group": 16},
    "l4q": {"group": 16},
}
STEPS = 6
KNOWN = {"seed": 3, "steps": STEPS}


class Run:
    """An adapter in training, as the training loop has it."""

    def __init__(self, name: str) -> None:
        entry = next(each for each in ADAPTERS if each.name == name)
        options = {**({"rank": 4} if "rank" in entry.options else {}), **SMALL.get(name, {})}
        if "dropout" in entry.options:
            options["dropout"] = 0.0  # draws of torch's own state are the run's to keep
        builder = load_function(entry.builder)
        taken = signature(builder).parameters
        self.model: LlamaForCausalLM = llama().eval()
        self.tune = cast("Adapter", builder(**options, **{k: v for k, v in KNOWN.items() if k in taken}))
        trained = self.tune.select(self.model)
        assert self.tune.select(self.model).keys() == trained.keys(), "a plan selects twice"
        self.running: Any = self.tune.wrap(self.model)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
        if {method.name: method for method in ADAPTER_METHODS}[name].settings:  # SFT-MA wants plain SGD
            self.optimizer = torch.optim.SGD(trained.values(), lr=1.0)

    def loss(self, step: int = 0) -> Tensor:
        """Return the mean loss on a step's tokens."""
        ids = tokens(step)
        logits = self.running(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def train(self, steps: range) -> None:
        """Do steps."""
        for step in steps:
            self.tune.before_step(step, self.optimizer, self.loss)
            self.loss(step).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def take_over(self, other: Run) -> None:
        """Go on from what a checkpoint of another run holds."""
        mine = self.tune.stored(self.model)
        with torch.no_grad():
            for name, tensor in other.tune.stored(other.model).items():
                mine[name].copy_(tensor)
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
        self.tune.load_state(other.tune.state())


def logits(model: Any) -> Tensor:
    """Return the logits for tokens that no training saw."""
    ids = tokens(99)
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]
    return found


@pytest.mark.parametrize("name", [entry.name for entry in ADAPTERS])
def test_it_learns_and_comes_back_from_disk_and_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    run = Run(name)
    run.train(range(4))
    trained = logits(run.running)
    assert not torch.allclose(trained, logits(llama().eval()), atol=1e-4), "it learnt nothing"

    run.tune.save(run.model, tmp_path, "some/base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of AdaLoRA's own ranks and of norms
        read = adapted.lay_over(llama().eval(), tmp_path)
    torch.testing.assert_close(logits(read), trained, rtol=1e-4, atol=2e-5)

    resumed = Run(name)
    resumed.take_over(run)
    run.train(range(4, STEPS))
    resumed.train(range(4, STEPS))
    assert torch.equal(logits(resumed.running), logits(run.running)), "a resumed run went another way"


@pytest.mark.parametrize("name", [entry.name for entry in ADAPTERS])
def test_a_merged_model_says_the_same_and_is_a_plain_one(name: str) -> None:
    run = Run(name)
    if not run.tune.is_mergeable:
        pytest.skip("no weight can hold what it does")
    run.train(range(3))
    before = logits(run.running)
    run.tune.merge(run.model)
    torch.testing.assert_close(logits(run.model), before, rtol=1e-4, atol=2e-5)
    plain = llama().state_dict()
    assert run.model.state_dict().keys() - {"lm_head.bias"} == plain.keys()


def test_ours_say_so_on_disk(tmp_path: Path) -> None:
    run = Run("flylora")
    run.tune.save(run.model, tmp_path, "some/base")
    assert own_adapter.is_ours(tmp_path)
