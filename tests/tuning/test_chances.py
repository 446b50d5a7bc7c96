"""Chances: outlier ratios are OWL's, and importances learn what damping tells."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.tuning.small import PEFT_ASKS, llama, loss_of, tokens, train
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from scrimp.base.errors import ScrimpError
from scrimp.tuning.chances import Importance, OutlierRatio
from scrimp.tuning.layer_sampling import IST, OwLore
from scrimp.tuning.layers import find_layers
from scrimp.tuning.measure import damped_loss, outlier_ratios


def _inputs_of(model: nn.Module, module: nn.Module, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with module.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0])), torch.no_grad():
        model(input_ids=ids)
    return torch.cat([x.flatten(0, -2) for x in seen])


@pytest.mark.parametrize("threshold", [2.0, 4.0])
def test_outlier_ratios_are_owl_s(threshold: float) -> None:
    model = llama(3)
    found = find_layers(model, tune="owlore")
    expected = []
    for layer in model.model.layers:
        linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        metric = torch.cat(
            [
                (m.weight.abs() * _inputs_of(model, m, tokens(0)).norm(dim=0)).flatten().detach()
                for m in linears
            ]
        )
        expected.append(100 * (metric > threshold * metric.mean()).float().mean().item())
    measured = outlier_ratios(found, lambda: loss_of(model, 0), threshold=threshold)
    assert measured == pytest.approx(expected, rel=1e-6)
    assert len(set(measured)) > 1
    assert measured != outlier_ratios(found, None, threshold=threshold)


def test_a_transposed_matrix_is_weighed_by_its_inputs() -> None:
    """GPT-2 keeps (in, out); with one input column enlarged, its row holds the outliers."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    found = find_layers(model, tune="owlore")
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight[3] = 1e4
        for name, parameter in model.transformer.h[0].named_parameters():
            if "attn.c_attn.weight" in name:
                parameter.fill_(1.0)
            elif parameter.ndim == 2:
                parameter.zero_()
    (ratio,) = outlier_ratios(found, lambda: loss_of(model, 0), threshold=5.0)
    numel = sum(p.numel() for p in model.transformer.h[0].parameters() if p.ndim == 2)
    assert ratio == pytest.approx(100 * 24 / numel)  # the 24 outputs of that one input


def test_owlore_measures_once_and_draws_by_what_it_measured() -> None:
    model = llama(4)
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[0, 0] = 50.0  # the model's one outlier
    tune = OwLore(layers=1, every=1)
    optimizer = torch.optim.AdamW(tune.select(model).values(), lr=1e-3)
    train(model, tune, optimizer, range(6))
    assert isinstance(tune.chances, OutlierRatio)
    assert [ratio > 0 for ratio in tune.chances.ratios] == [False, False, True, False]
    assert {tune.awake(step) for step in range(100)} == {(2,)}
    assert tune.state() == {"ratios": tune.chances.ratios}


def test_a_resumed_run_draws_by_what_the_first_weights_said() -> None:
    model, fresh = llama(4), llama(4)
    tune = OwLore(layers=1, every=1, threshold=2.0)
    optimizer = torch.optim.AdamW(tune.select(model).values(), lr=0.1)
    train(model, tune, optimizer, range(6))

    def ratios(of: nn.Module) -> list[float]:
        return outlier_ratios(find_layers(of, tune="owlore"), lambda: loss_of(of, 0), threshold=2.0)

    assert tune.state() == {"ratios": ratios(fresh)} != {"ratios": ratios(model)}


def test_measuring_leaves_no_trace() -> None:
    model = llama(2).train()
    found = find_layers(model, tune="owlore")
    before = torch.random.get_rng_state()
    compiled = torch.compile(model, backend="eager")
    outlier_ratios(found, lambda: loss_of(compiled, 0))
    damped_loss(found, [0], 0.25, lambda: loss_of(compiled, 0))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_compiled_model_is_measured_like_a_plain_one_and_not_compiled_anew() -> None:
    model, graphs = llama(2), []

    def compile_nothing(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    found = find_layers(model, tune="owlore")
    compiled = torch.compile(model, backend=compile_nothing)
    with torch.no_grad():
        loss_of(compiled.eval(), 0)
    before = len(graphs)
    assert before > 0
    plain = outlier_ratios(found, lambda: loss_of(model, 0), threshold=2.0)
    assert outlier_ratios(found, lambda: loss_of(compiled, 0), threshold=2.0) == plain
    assert len(graphs) == before


def test_all_that_a_probe_runs_counts() -> None:
    model = llama(2)
    found = find_layers(model, tune="owlore")

    def both() -> Tensor:
        return loss_of(model, 0) + loss_of(model, 1)

    def one_batch() -> Tensor:
        ids = torch.cat([tokens(0), tokens(1)])
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    assert outlier_ratios(found, both, threshold=2.0) == outlier_ratios(found, one_batch, threshold=2.0)


def test_dropout_is_off_while_measuring() -> None:
    model = llama(2)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    found = find_layers(model.train(), tune="ist")
    measured = damped_loss(found, [], 0.25, lambda: loss_of(model, 0))
    assert measured == loss_of(model.eval(), 0).item() != loss_of(model.train(), 0).item()


# --- importance -------------------------------------------------------------------------------------


def test_a_damped_layer_adds_a_share_of_what_it_adds() -> None:
    model = llama(2)
    found = find_layers(model, tune="ist")
    with torch.no_grad():
        whole = loss_of(model, 0).item()
        # Both branches of a layer end in a projection, but the MLP reads what attention added.
        model.model.layers[1].mlp.down_proj.weight.zero_()
        no_mlp = loss_of(model, 0).item()
        damped = damped_loss(found, [1], 0.25, lambda: loss_of(model, 0))
        model.model.layers[1].self_attn.o_proj.weight.mul_(0.25)
        assert damped == pytest.approx(loss_of(model, 0).item(), rel=1e-6)
    assert len({whole, no_mlp, damped}) == 3
    assert damped_loss(found, [0, 1], 1.0, lambda: loss_of(model, 0)) == pytest.approx(
        loss_of(model, 0).item(), rel=1e-6
    )


@pytest.mark.filterwarnings(PEFT_ASKS)
def test_a_damped_adapter_is_one_with_a_smaller_scale() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(2), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    found = find_layers(model, tune="ist")
    damped = damped_loss(found, [1], 0.25, lambda: loss_of(model, 0))
    whole = loss_of(model, 0).item()
    for module in found.modules[1].modules():
        if isinstance(getattr(module, "scaling", None), dict):  # attention has one that is a number
            module.scaling["default"] *= 0.25
    assert damped == pytest.approx(loss_of(model, 0).item(), rel=1e-6)
    assert abs(damped - whole) > 1e-4


def test_an_update_is_the_authors_formula() -> None:
    importance = Importance(rate=10.0, importance=[0.5, -0.5, 0.0])
    importance._learn([(0,), (1,), (0, 2)], [1.0, 2.0, 3.0])
    rewards = [math.exp(-1), math.exp(-2), math.exp(-3)]
    mean = sum(rewards) / 3
    r = [reward - mean for reward in rewards]
    before = torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64)
    p = before.sigmoid()
    gained = torch.tensor([r[0] + r[2], r[1], r[2]], dtype=torch.float64)
    expected = before - 10 * p * (1 - p) * gained
    assert importance.importance == pytest.approx(expected.tolist(), rel=1e-12)


def test_a_loss_that_is_not_a_number_counts_as_infinite() -> None:
    importance = Importance(importance=[0.0, 0.0])
    importance._learn([(0,), (1,)], [math.nan, 1.0])
    assert importance.importance[0] > 0 > importance.importance[1]
    assert all(map(math.isfinite, importance.importance))


def test_unimportant_layers_are_suppressed_more_often() -> None:
    importance = Importance(importance=[3.0, 3.0, -3.0, -3.0], candidates=1)
    sets = [chosen for step in range(300) for chosen in importance._draw_sets(step)]
    assert sets.count((2, 3)) > 250


def test_candidates_differ_and_are_as_many_as_there_can_be() -> None:
    assert len(set(Importance(importance=[0.0] * 6)._draw_sets(10))) == 3
    assert sorted(Importance(importance=[0.0] * 2)._draw_sets(10)) == [(0,), (1,)]


def test_the_layer_that_matters_is_drawn_most() -> None:
    """In a model of which one layer alone does anything, that layer's importance rises above all others."""
    model = llama(4)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.mul_(index == 1)
            layer.self_attn.o_proj.weight.mul_(index == 1)
        model.model.embed_tokens.weight.mul_(50)  # the final norm would undo the damping of all there is
        model.lm_head.weight.mul_(20)
    optimizer = torch.optim.AdamW(model.model.layers[1].parameters(), lr=2e-2)
    for _ in range(60):
        loss_of(model, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    tune = IST(layers=1, update_every=1, seed=2)
    tune.select(model)
    for step in range(40):
        tune.chances.renew(find_layers(model, tune="ist"), step, lambda: loss_of(model, 0))
    values = tune.state()["importance"]
    assert max(range(4), key=values.__getitem__) == 1
    assert values[1] > 1
    assert max(values[0], values[2], values[3]) < 0


def test_importance_learns_only_when_due_and_says_what_it_misses() -> None:
    model, tune = llama(4), IST(update_every=4)
    optimizer = torch.optim.AdamW(tune.select(model).values(), lr=1e-3)
    train(model, tune, optimizer, range(4))
    assert tune.state() == {"importance": [0.0] * 4}
    with pytest.raises(ScrimpError, match="give before_step a probe"):
        tune.before_step(4, optimizer)
    train(model, tune, optimizer, range(4, 5))
    assert any(tune.state()["importance"])


def test_ist_keeps_state_and_frees_gradients_by_default() -> None:
    model, tune = llama(4), IST(layers=0.25)
    optimizer = torch.optim.AdamW(tune.select(model).values(), lr=1e-3)
    train(model, tune, optimizer, range(40))
    assert {tune.awake(step) for step in range(40)} == {(0,), (1,), (2,), (3,)}
    assert all(optimizer.state[p] for p in model.parameters())
    tune.before_step(40, optimizer, lambda: loss_of(model, 0))
    loss_of(model, 0).backward()
    with_gradient = [layer for layer in model.model.layers if layer.mlp.up_proj.weight.grad is not None]
    assert len(with_gradient) == 1
