"""Layer sampling: what trains is drawn as it should be, and what sleeps holds nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tuning.small import PEFT_ASKS, llama, loss_of, train
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from scrimp.activations.recompute import recompute
from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import Trainable
from scrimp.memory.state_bytes import state_bytes
from scrimp.tuning.badam import BAdam
from scrimp.tuning.chances import draw
from scrimp.tuning.full import full
from scrimp.tuning.layer_sampling import IST, LISA, OwLore
from scrimp.tuning.layers import find_layers

SCHEDULES: dict[str, Callable[[], Trainable]] = {
    "lisa": lambda: LISA(layers=2, every=3, seed=1),
    "owlore": lambda: OwLore(layers=2, every=3, threshold=2.0, seed=1),
    "ist": lambda: IST(layers=2, every=2, update_every=4, asleep="drop", seed=1),
    "badam": lambda: BAdam(every=3, include_head=True, seed=1),
}


def _adamw(trained: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained.values(), lr=1e-2)


def _names_awake(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def _layer(index: int) -> str:
    return f"model.layers.{index}."


# --- places -----------------------------------------------------------------------------------------


def test_every_parameter_has_its_place() -> None:
    model = llama(3)
    found = find_layers(model, tune="lisa")
    names = {p: name for name, p in model.named_parameters()}
    assert [{names[p].split(".")[2] for p in layer} for layer in found.decoder] == [{"0"}, {"1"}, {"2"}]
    assert [names[p] for p in found.embedding] == ["model.embed_tokens.weight"]
    assert [names[p] for p in found.head] == ["model.norm.weight", "lm_head.weight"]
    assert sum(map(len, (*found.decoder, found.embedding, found.head))) == len(found.trainable) == len(names)


def test_a_tied_head_is_in_both_places_and_learnt_positions_are_embeddings() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=2, n_head=1))
    found = find_layers(model, tune="lisa")
    names = {p: name for name, p in model.named_parameters()}
    assert [names[p] for p in found.embedding] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert [names[p] for p in found.head] == [
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
        "transformer.wte.weight",
    ]


def test_an_embedding_within_a_layer_is_the_layer_s_and_the_largest_list_holds_the_layers() -> None:
    layer = nn.ModuleDict({"bias": nn.Embedding(3, 2), "experts": nn.ModuleList([nn.Linear(2, 2)] * 3)})
    model = nn.ModuleDict({"few": nn.ModuleList([nn.Linear(2, 2)]), "layers": nn.ModuleList([layer])})
    found = find_layers(model, tune="lisa")
    assert found.modules == (layer,)
    assert found.embedding == ()
    assert set(found.decoder[0]) == set(layer.parameters())
    assert set(found.head) == set(model["few"].parameters())


@pytest.mark.filterwarnings(PEFT_ASKS)
def test_adapters_keep_what_they_froze_asleep() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(4), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    given = _names_awake(model)
    tune = LISA(layers=1, every=1)
    assert set(tune.select(model)) == given
    tune.before_step(0, _adamw(tune.select(model)))
    (awake,) = tune.awake(0)
    assert _names_awake(model) == {name for name in given if f".layers.{awake}." in name}


@pytest.mark.parametrize("schedule", [LISA(), OwLore(), IST(), BAdam()], ids=lambda tune: type(tune).__name__)
def test_a_model_without_layers_is_refused(schedule: Trainable) -> None:
    with pytest.raises(ScrimpError, match="Sequential has no list of decoder layers"):
        schedule.select(nn.Sequential(nn.Linear(2, 2)))


def test_more_layers_than_there_are_is_refused_with_their_number() -> None:
    with pytest.raises(ScrimpError, match="layers 5 of a model that has 4"):
        LISA(layers=5).select(llama(4))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: LISA(every=0), "every 0 must be"),
        (lambda: LISA(layers=0), "layers 0 must be"),
        (lambda: OwLore(layers=-1), "layers -1 must be"),
        (lambda: IST(layers=1.5), "layers 1.5 must be"),
        (lambda: IST(every=3, update_every=10), "multiple of every 3"),
        (lambda: BAdam(every=0), "every 0 must be"),
        (lambda: BAdam(start=1), "random order has no start"),
    ],
)
def test_options_out_of_range_are_refused(build: Callable[[], Trainable], words: str) -> None:
    with pytest.raises(ScrimpError, match=words):
        build()


# --- draws ------------------------------------------------------------------------------------------


def test_draws_follow_the_weights_without_replacement() -> None:
    """Against the exact probabilities of drawing one after another."""
    weights, count = [0.5, 0.3, 0.15, 0.05], 20_000
    found = Counter(draw(weights, 2, seed) for seed in range(count))
    total = 0.0
    for i in range(4):
        for j in range(i + 1, 4):
            p = weights[i] * weights[j] * (1 / (1 - weights[i]) + 1 / (1 - weights[j]))
            total += p
            assert abs(found[i, j] - count * p) < 4 * math.sqrt(count * p * (1 - p))
    assert math.isclose(total, 1)


def test_lisa_draws_every_layer_alike_and_never_one_twice() -> None:
    tune = LISA(layers=2, every=20, seed=3)
    tune.select(llama(4))
    draws = [tune.awake(20 * interval) for interval in range(6000)]
    assert all(len(set(drawn)) == 2 for drawn in draws)
    counts = Counter(layer for drawn in draws for layer in drawn)
    assert all(abs(counts[layer] - 3000) < 4 * math.sqrt(6000 / 4) for layer in range(4))


def test_lisa_draws_at_multiples_of_every_from_step_zero() -> None:
    tune = LISA(layers=2, every=5, seed=0)
    tune.select(llama(4))
    draws = [tune.awake(step) for step in range(200)]
    changes = {step for step in range(1, 200) if draws[step] != draws[step - 1]}
    assert changes and all(step % 5 == 0 for step in changes)
    assert len(set(draws)) == 6  # all pairs of four


def test_layers_without_weight_come_last_and_evenly() -> None:
    assert all(0 in draw([1e-300, 0, 0, 0], 2, seed) for seed in range(100))
    rest = Counter(draw([1.0, 0, 0, 0], 2, seed) for seed in range(900))
    assert all(abs(rest[0, layer] - 300) < 4 * math.sqrt(200) for layer in (1, 2, 3))


# --- what sleeps holds nothing ------------------------------------------------------------------------


def test_lisa_wakes_the_drawn_layers_and_all_outside_them() -> None:
    model, tune = llama(4), LISA(layers=2, every=3)
    optimizer = _adamw(tune.select(model))
    for step in range(12):
        tune.before_step(step, optimizer)
        asleep = {f"{_layer(i)}" for i in range(4) if i not in tune.awake(step)}
        expected = {n for n, _ in model.named_parameters() if not n.startswith(tuple(asleep))}
        assert _names_awake(model) == expected


def test_memory_is_flat_over_fifty_switches() -> None:
    model, tune = llama(4), LISA(layers=1, every=2)
    optimizer = _adamw(tune.select(model))
    held, gradients = [], []

    def measure(step: int) -> None:
        held.append(state_bytes(optimizer))
        gradients.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    train(model, tune, optimizer, range(100), after=measure)
    layer = [p for n, p in model.named_parameters() if n.startswith(_layer(0))]
    outside = [p for n, p in model.named_parameters() if ".layers." not in n]
    numbers = sum(p.numel() for p in layer + outside)
    assert set(held) == {8 * numbers + 4 * len(layer + outside)}
    assert set(gradients) == {4 * numbers}
    assert {tune.awake(step) for step in range(100)} == {(0,), (1,), (2,), (3,)}


def test_gradients_left_over_are_freed_and_hooks_stay() -> None:
    model, tune = llama(4), LISA(layers=1, every=1)
    optimizer = _adamw(tune.select(model))
    seen: list[nn.Parameter] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(seen.append)
    for step in range(8):
        tune.before_step(step, optimizer)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        seen.clear()
        loss_of(model, step).backward()
        assert {id(p) for p in seen} == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_layer_that_wakes_begins_its_moments_anew_and_one_that_stays_goes_on() -> None:
    model, tune = llama(2), LISA(layers=1, every=1, seed=0)
    optimizer = _adamw(tune.select(model))
    ages: list[int] = []

    def age(step: int) -> None:
        (awake,) = tune.awake(step)
        ages.append(int(optimizer.state[model.model.layers[awake].mlp.up_proj.weight]["step"]))

    train(model, tune, optimizer, range(30), after=age)
    draws = [tune.awake(step) for step in range(30)]
    for step in range(1, 30):
        assert ages[step] == (ages[step - 1] + 1 if draws[step] == draws[step - 1] else 1)
    assert max(ages) > 1 and ages.count(1) > 2
    assert int(optimizer.state[model.lm_head.weight]["step"]) == 30


def test_every_layer_awake_is_plain_adamw() -> None:
    models = [llama(3, seed=1) for _ in range(2)]
    for model, tune in zip(models, (LISA(layers=3, every=2), full()), strict=True):
        train(model, tune, _adamw(tune.select(model)), range(7))
    for ours, plain in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, plain)


# --- resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [5, 6, 7, 8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_resuming_at_any_step_gives_the_same_bits(name: str, stop: int) -> None:
    whole = llama(4)
    tune = SCHEDULES[name]()
    train(whole, tune, _adamw(tune.select(whole)), range(13))

    first, tune = llama(4), SCHEDULES[name]()
    optimizer = _adamw(tune.select(first))
    train(first, tune, optimizer, range(stop))
    saved = {"model": first.state_dict(), "optimizer": optimizer.state_dict(), "tune": tune.state()}

    second, tune = llama(4, seed=9), SCHEDULES[name]()
    optimizer = _adamw(tune.select(second))
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    tune.load_state(saved["tune"])
    train(second, tune, optimizer, range(stop, 13))
    for ours, expected in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_seed_decides(name: str) -> None:
    tune, other = SCHEDULES[name](), SCHEDULES[name]()
    other.seed = 2  # type: ignore[attr-defined]
    draws = []
    for schedule in (tune, other):
        model = llama(4)
        optimizer, seen = _adamw(schedule.select(model)), []
        train(model, schedule, optimizer, range(24), after=lambda _: seen.append(_names_awake(model)))  # noqa: B023
        draws.append(seen)
    assert draws[0] != draws[1]


# --- recomputation, and where the backward pass ends --------------------------------------------------


def _with_recompute(model: Any, how: str) -> None:
    if how == "scrimp":
        recompute().apply(model)
    else:
        model.activation_checkpointing_enable()


@pytest.mark.parametrize("how", ["scrimp", "transformers"])
@pytest.mark.parametrize("name", ["lisa", "badam"])
def test_recomputation_changes_no_bit_with_whatever_asleep(name: str, how: str) -> None:
    models = [llama(4).train() for _ in range(2)]
    _with_recompute(models[1], how)
    for model in models:
        tune = SCHEDULES[name]()
        train(model, tune, _adamw(tune.select(model)), range(13))
    for plain, recomputed in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("how", ["nothing", "scrimp"])
def test_the_backward_pass_ends_at_the_lowest_layer_awake(how: str) -> None:
    model, tune = llama(4).train(), BAdam(every=1, order="ascending")
    if how != "nothing":
        _with_recompute(model, how)
    optimizer, differentiated = _adamw(tune.select(model)), []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda _, inputs, output, index=index: (
                differentiated.append(index) if output.requires_grad else None
            )
        )
    for block in range(4):
        tune.before_step(block, optimizer)
        differentiated.clear()
        loss_of(model, block).backward()
        assert differentiated == list(range(block, 4))
        model.zero_grad()
