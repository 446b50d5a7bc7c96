"""PEQA and L4Q: what they compute, what trains, and the quantised model that comes out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from scrimp.base.errors import ScrimpError
from scrimp.tuning.deltas import sparse
from scrimp.tuning.deltas.delta import AdaptedLinear
from scrimp.tuning.deltas.low_rank import Start, lora_start
from scrimp.tuning.deltas.quant_aware import QuantAware
from scrimp.tuning.deltas.quantised import OnGrid, TrainedScales, grouped, round_to_nearest, spread
from scrimp.tuning.deltas.tuning import DeltaTuning
from scrimp.tuning.quantised_tuning import L4Q, PEQA

IN, OUT, GROUP, RANK = 40, 24, 16, 3  # the last group of a row is of 8


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of rows even in small matrices, the last one shorter."""
    monkeypatch.setattr(sparse, "ROWS", 1)
    monkeypatch.setattr(sparse.row_tiles, "__defaults__", (7 * IN,))


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)


def peqa(layer: nn.Linear, bits: int = 4, group: int | None = GROUP) -> TrainedScales:
    """Return a delta whose scales have moved."""
    delta = TrainedScales(layer.weight, bits=bits, group=group)
    with torch.no_grad():
        delta.change_of_scale.copy_(0.1 * delta.scale * torch.randn(delta.scale.shape))
    return delta


def l4q(layer: nn.Linear, bits: int = 4, scale: float = 2.0) -> QuantAware:
    """Return a delta of which everything has moved, so far that some of the weight leaves the grid."""
    delta = QuantAware(layer.weight, lora_start(layer, RANK, seed=1), scale=scale, bits=bits, group=GROUP)
    with torch.no_grad():
        delta.lora_B.normal_(std=0.05)
        delta.step.mul_(0.7)
        delta.offset.normal_(std=0.01)
    return delta


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(forward: Any, x: Tensor, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = forward(x)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
    found = torch.autograd.grad(loss, [x, *trained.values()])
    return {"y": y.detach(), "x": found[0], **dict(zip(trained, found[1:], strict=True))}


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


# ---- PEQA -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [GROUP, IN, 7])
def test_rounding_to_nearest_is_within_half_a_step(bits: int, group: int) -> None:
    weight = linear().weight
    codes, scale, zero = round_to_nearest(weight, bits, group)
    wide = spread(scale, group, IN)
    value = (codes.float() - spread(zero.float(), group, IN)) * wide
    # The zero point is rounded, which may cut off half a step at one end.
    assert ((value - weight).abs() <= wide * 1.0001).all()
    assert ((value - weight).abs() <= wide * 0.5001).float().mean() > 0.9
    assert int(codes.max()) == 2**bits - 1 and scale.shape == (OUT, -(-IN // group))


def test_a_group_on_one_side_of_zero_keeps_zero_in_its_range() -> None:
    weight = torch.linspace(1, 2, 16)[None]
    codes, scale, zero = round_to_nearest(weight, 4, 16)
    assert zero.item() == 0
    assert ((codes.float() * scale - weight).abs() <= scale / 2 + 1e-6).all()


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [None, GROUP])
def test_peqa_computes_and_derives_as_the_weight_written_out(bits: int, group: int | None) -> None:
    layer = linear()
    delta = peqa(layer, bits, group)
    size = IN if group is None else group

    def plainly(x: Tensor) -> Tensor:
        scale = delta.scale + delta.change_of_scale
        weight = delta.differences(slice(None)) * spread(scale, size, IN)
        return nn.functional.linear(x, weight, layer.bias)

    trained = {"change": delta.change_of_scale}
    found = gradients(lambda x: delta(x, layer), inputs(), trained)
    for name, wanted in gradients(plainly, inputs(), trained).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5, msg=name)


def test_peqa_of_whole_rows_keeps_no_input() -> None:
    layer = linear()
    delta, kept = peqa(layer, group=None), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        delta(inputs().requires_grad_(), layer)
    assert kept and (2, 3, IN) not in kept


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_peqa_stores_two_codes_a_byte_in_up_to_four_bits(bits: int) -> None:
    layer = nn.Linear(IN + 1, OUT)
    delta = TrainedScales(layer.weight, bits=bits, group=None)
    assert delta.packed.shape == (OUT, IN + 1 if bits > 4 else IN // 2 + 1)
    codes, _, _ = round_to_nearest(layer.weight.detach(), bits, IN + 1)
    assert torch.equal(delta.grid(layer.weight).codes, codes)


# ---- L4Q --------------------------------------------------------------------------------------------


class _Round(torch.autograd.Function):
    """Rounding that passes gradients as if it were not there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def test_l4q_derives_as_autograd_through_a_straight_rounding() -> None:
    layer = linear()
    delta = l4q(layer)

    def plainly(x: Tensor) -> Tensor:
        moved = layer.weight + delta.scale * delta.lora_B @ delta.lora_A
        step, offset = (spread(each, GROUP, IN) for each in (delta.step, delta.offset))
        exact = (moved - offset) / step
        kept = exact.clamp(delta.lowest, delta.highest)
        assert 0.02 < (kept != exact).float().mean() < 0.5  # both cases occur
        value = step * _Round.apply(kept) + offset  # type: ignore[no-untyped-call]
        return nn.functional.linear(x, value, layer.bias)

    trained = dict(delta.named_parameters())
    found = gradients(lambda x: delta(x, layer), inputs(), trained)
    wanted = gradients(plainly, inputs(), trained)
    assert found.keys() == wanted.keys() == {"y", "x", "lora_A", "lora_B", "step", "offset"}
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_l4q_of_16_bits_is_a_lora() -> None:
    layer = linear()
    start = Start(torch.randn(RANK, IN), torch.randn(OUT, RANK) * 0.02)
    delta = QuantAware(layer.weight, start, scale=2.0, bits=16, group=GROUP)
    with torch.no_grad():
        delta.step.mul_(4)  # so that the sum with the LoRA stays on the grid
    trained = {"a": delta.lora_A, "b": delta.lora_B}
    found = gradients(lambda x: delta(x, layer), inputs(), trained)

    def lora(x: Tensor) -> Tensor:
        return nn.functional.linear(x, layer.weight + 2 * delta.lora_B @ delta.lora_A, layer.bias)

    for name, wanted in gradients(lora, inputs(), trained).items():
        torch.testing.assert_close(found[name], wanted, rtol=2e-3, atol=2e-3, msg=name)


def test_l4q_begins_with_a_grid_that_holds_the_weight() -> None:
    layer = linear()
    delta = QuantAware(layer.weight, lora_start(layer, RANK, seed=1), scale=1, bits=4, group=GROUP)
    value = delta.grid(layer.weight).decode()
    assert ((value - layer.weight).abs() <= spread(delta.step, GROUP, IN) / 2 + 1e-6).all()


# ---- both -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [peqa, l4q])
def test_the_quantised_form_is_what_was_computed_with(make: Any) -> None:
    layer = linear()
    delta: OnGrid = make(layer)
    grid = delta.grid(layer.weight)
    assert grid.codes.dtype == torch.uint8 and int(grid.codes.max()) <= 15
    assert grid.scale.shape == grid.offset.shape == (OUT, -(-IN // GROUP))
    wanted = nn.functional.linear(inputs(), grid.decode(), layer.bias)
    torch.testing.assert_close(delta(inputs(), layer), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight + delta.change(layer.weight), grid.decode(), rtol=1e-6, atol=1e-6)
    assert all(len(row.unique()) <= 16 for group in grouped(grid.decode(), GROUP) for row in group)


@pytest.mark.parametrize("make", [peqa, l4q])
def test_low_precision_and_autocast_compute_in_their_dtype(make: Any) -> None:
    layer = linear()
    delta: OnGrid = make(layer)
    x, weight = inputs(torch.bfloat16), delta.grid(layer.weight).decode().bfloat16()
    wanted = nn.functional.linear(x, weight, layer.bias.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        found = delta(inputs(), layer)
    assert found.dtype == delta(x, layer).dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-8)
    torch.testing.assert_close(delta(x, layer), wanted, rtol=2**-7, atol=2**-8)


TUNINGS = [PEQA(), PEQA(bits=3, group=16), L4Q(rank=2, group=16)]


@pytest.mark.parametrize("tuning", TUNINGS, ids=["peqa", "peqa-3-bits", "l4q"])
def test_training_a_model_and_merging_it_gives_the_same_quantised_model(tuning: DeltaTuning) -> None:
    tuning, model, ids = copy.deepcopy(tuning), llama(), torch.arange(12)[None]
    untouched = llama()
    trained = tuning.select(model)
    kinds = {name.rpartition(".")[2] for name in trained}
    assert kinds == ({"change_of_scale"} if tuning.name == "peqa" else {"lora_A", "lora_B", "step", "offset"})
    optimizer = torch.optim.Adam(trained.values(), lr=1e-4)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.004
    with torch.no_grad():
        before = model(input_ids=ids).logits
        tuning.merge(model)
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert model.state_dict().keys() == untouched.state_dict().keys()


def test_peqa_lets_go_of_the_weight_and_saves_what_makes_it_anew() -> None:
    first, second = PEQA(), PEQA()
    model, other = llama(), llama()
    first.select(model)
    second.select(other)
    assert model.get_parameter("model.layers.0.mlp.up_proj.base_layer.weight").numel() == 0
    with torch.no_grad():
        for delta in first.deltas.values():
            delta.get_parameter("change_of_scale").uniform_(0, 1e-3)
    missing, unexpected = other.load_state_dict(first.stored(model), strict=False)
    assert not unexpected and not any(".delta." in name for name in missing)
    ids = torch.arange(12)[None]
    assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda: PEQA(bits=1), "bits must be a whole number from 2 to 8, not 1"),
        (lambda: PEQA(group=1), "group must be a whole number from 2, not 1"),
        (lambda: L4Q(bits=9), "bits must be"),
        (lambda: L4Q(group=0), "group must be"),
        (lambda: L4Q(rank=0), "rank 0 must be above 0"),
        (lambda: L4Q(rank=33).select(llama()), "rank 33 does not fit"),
    ],
)
def test_options_out_of_their_range_are_refused(build: Any, what: str) -> None:
    with pytest.raises(ScrimpError, match=what):
        build()
