"""Sparse deltas: the dense computation at chosen entries, the weights untouched, and SFT's own ages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.tuning.small import PEFT_ASKS, llama, loss_of, tokens, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scrimp.base.errors import ScrimpError
from scrimp.optim.named import SGDM, AdamW
from scrimp.tuning.deltas.delta import AdaptedLinear
from scrimp.tuning.deltas.sparse import Sparse
from scrimp.tuning.deltas.tuning import DeltaTuning
from scrimp.tuning.sparse.masks import largest
from scrimp.tuning.sparse.methods import SFT, NeuroAda, Shira
from scrimp.tuning.sparse.selection import Reselected, Reselection, sm3_direction
from scrimp.weights.affine8 import Affine8
from scrimp.weights.int8_weight import Int8Weight

TALL = (130, 8192)  # three tiles of rows


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _adapted(
    shape: tuple[int, int], count: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> AdaptedLinear:
    """Make a layer with random values at random entries."""
    base = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    base.requires_grad_(False)
    base.weight.copy_(_random(*shape, seed=1))
    entries = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(2))[:count]
    delta = Sparse(shape, entries.sort().values)
    delta.values.data.copy_(_random(count, seed=3))
    return AdaptedLinear(base, delta)


def _changed(layer: AdaptedLinear) -> Tensor:
    """Return the weight with the change, as merging makes it."""
    merged = copy.deepcopy(layer)
    merged.delta.merge_into(merged.base_layer)
    return merged.base_layer.weight.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "count"), [((5, 7), 6), ((5, 7), 35), (TALL, 900)])
def test_output_and_gradients_are_the_dense_ones_at_the_entries(
    shape: tuple[int, int], count: int, dtype: torch.dtype
) -> None:
    layer = _adapted(shape, count, dtype)
    before = layer.weight.clone()
    x = _random(2, 3, shape[1], seed=4, dtype=dtype).requires_grad_()
    y = layer(x)
    dense, x2 = _changed(layer).requires_grad_(), x.detach().clone().requires_grad_()
    expected = F.linear(x2, dense, layer.bias)
    assert torch.equal(y, expected)
    dy = _random(*y.shape, seed=5, dtype=dtype)
    y.backward(dy)
    expected.backward(dy)
    assert torch.equal(layer.weight, before)
    assert torch.equal(x.grad, x2.grad)
    wanted = dense.grad.view(-1)[layer.delta.indices].float()
    torch.testing.assert_close(layer.delta.values.grad, wanted, rtol=1e-5, atol=1e-5)  # other sums in BLAS


def test_a_layer_may_run_twice_and_under_checkpointing_and_autocast() -> None:
    layer = _adapted((6, 6), 9)
    x = _random(4, 6, seed=4).requires_grad_()

    def twice(x: Tensor) -> Tensor:
        return layer(layer(x).tanh()).square().sum()

    dense = _changed(layer).requires_grad_()
    y = F.linear(F.linear(x, dense, layer.bias).tanh(), dense, layer.bias)
    dx, dw = torch.autograd.grad(y.square().sum(), (x, dense))
    for run in (twice, lambda x: checkpoint(twice, x, use_reentrant=False)):
        mine = torch.autograd.grad(run(x), (x, layer.delta.values))
        torch.testing.assert_close(mine, (dx, dw.view(-1)[layer.delta.indices]), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
        assert torch.equal(low, F.linear(x, dense, layer.bias))
        low.sum().backward()
    assert layer.delta.values.grad is not None and layer.delta.values.grad.dtype == torch.float32


def test_a_weight_is_put_back_when_the_product_fails() -> None:
    layer = _adapted((5, 7), 6)
    before = layer.weight.clone()
    with pytest.raises(RuntimeError):
        layer(torch.zeros(2, 8))
    assert torch.equal(layer.weight, before)


def test_nothing_of_a_weight_s_size_is_kept_for_the_backward_pass() -> None:
    layer = _adapted((64, 64), 16, bias=False)
    x = _random(2, 64, seed=4).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert sorted(t.numel() for t in kept) == [16, 16, 128]


def test_over_a_quantised_weight_the_change_is_added_to_what_it_decodes_to() -> None:
    layer = _adapted(TALL, 900)
    layer.base_layer.weight = nn.Parameter(
        Int8Weight.of(layer.weight.detach(), Affine8(group=64, dtype=torch.float32)), requires_grad=False
    )
    x = _random(3, TALL[1], seed=4).requires_grad_()
    y = layer(x)
    dense = (layer.weight.dequantize() + layer.delta.change(x)).requires_grad_()
    expected = F.linear(x, dense, layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    mine = torch.autograd.grad(y.square().sum(), (x, layer.delta.values))
    dx, dw = torch.autograd.grad(expected.square().sum(), (x, dense))
    scale = dx.abs().max()
    torch.testing.assert_close(mine[0] / scale, dx / scale, rtol=0, atol=1e-5)
    wanted = dw.view(-1)[layer.delta.indices]
    torch.testing.assert_close(mine[1] / wanted.abs().max(), wanted / wanted.abs().max(), rtol=0, atol=1e-5)


# ---- which entries --------------------------------------------------------------------------------------


def _mask(tune: DeltaTuning, **model: Any) -> dict[str, Tensor]:
    network = llama(1, **model)
    tune.select(network)
    train(network, tune, torch.optim.SGD([torch.zeros(1)]), range(1)) if tune.events else None
    return {name: _dense_mask(delta) for name, delta in tune.deltas.items() if isinstance(delta, Sparse)}


def _dense_mask(delta: Sparse) -> Tensor:
    mask = torch.zeros(delta.shape, dtype=torch.bool)
    mask.view(-1)[delta.indices] = True
    assert int(mask.sum()) == len(delta.indices) and torch.equal(delta.indices, delta.indices.unique())
    return mask


def _top(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, scores.topk(count, dim=-1).indices, True)


@pytest.mark.parametrize(("pick", "sign"), [("largest", 1), ("smallest", -1)])
def test_neuroada_takes_the_largest_of_every_row(pick: Any, sign: int) -> None:
    network = llama(1)
    for name, mask in _mask(NeuroAda(per_row=2, pick=pick)).items():
        weight = network.get_submodule(name).weight.detach()
        assert torch.equal(mask, _top(sign * weight.abs(), 2))


def test_random_entries_depend_on_the_seed_and_the_layer_alone() -> None:
    for make in (
        lambda seed: NeuroAda(per_row=2, pick="random", seed=seed),
        lambda seed: Shira(rank=1, seed=seed),
    ):
        first, again, other = (list(_mask(make(seed)).values()) for seed in (0, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        assert not torch.equal(first[0], first[3])  # both 8 x 8
    assert all(bool((mask.sum(1) == 2).all()) for mask in _mask(NeuroAda(per_row=2, pick="random")).values())


@pytest.mark.parametrize("mask", ["magnitude", "gradient", "snip"])
def test_shira_takes_the_highest_scores_of_the_whole_matrix(mask: Any) -> None:
    network = llama(1)
    loss_of(network, 0).backward()
    for name, found in _mask(Shira(rank=1, mask=mask)).items():
        weight = network.get_submodule(name).weight
        scores = {"magnitude": weight, "gradient": weight.grad, "snip": weight * weight.grad}[mask]
        assert torch.equal(found.view(-1), _top(scores.detach().abs().view(-1), sum(weight.shape)))


def test_scoring_in_tiles_is_scoring_at_once() -> None:
    scores = _random(600, 4096)
    found = largest((600, 4096), 1000, lambda rows: scores[rows])
    assert torch.equal(found, scores.view(-1).topk(1000).indices.sort().values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeuroAda(per_row=9), r"9 entries do not fit .*q_proj \(8 x 8\), which has 8"),
        (lambda: Shira(rank=5), "80 entries do not fit .* has 64"),
    ],
)
def test_more_entries_than_there_are_are_refused(make: Callable[[], DeltaTuning], message: str) -> None:
    with pytest.raises(ScrimpError, match=message):
        make().select(llama(1))


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (NeuroAda, {"per_row": 0}),
        (NeuroAda, {"pick": "best"}),
        (Shira, {"rank": True}),
        (SFT, {"density": 0.0}),
        (SFT, {"share": 1.5}),
        (SFT, {"every": 4, "accumulate": 5}),
    ],
)
def test_nonsense_is_refused(build: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ScrimpError, match=r"^tune "):
        build(**options)


# ---- training -------------------------------------------------------------------------------------------


def test_all_entries_without_replacement_are_full_training_of_the_matrix() -> None:
    layer = _adapted((5, 7), 35)
    layer.delta.values.data.zero_()
    whole = nn.Linear(7, 5)
    whole.load_state_dict(layer.base_layer.state_dict())
    whole.bias.requires_grad_(False)
    layer.delta = Reselected(layer.delta, "rigl")
    event = Reselection(every=10**9)
    # Decay is towards the pre-trained weights, so none here; steps of 1e-2 are lost in fp32's rounding alone.
    mine, theirs = (
        AdamW([p], lr=1e-2, eps=1e-6, weight_decay=0.0) for p in (layer.delta.values, whole.weight)
    )
    for step in range(20):
        event.before_step(step, {"": layer.delta}, mine, None)
        x = _random(4, 7, seed=step)
        for module, optimizer in ((layer, mine), (whole, theirs)):
            module(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(_changed(layer), whole.weight.detach(), rtol=1e-5, atol=1e-6)


class _Reference:
    """SFT-AG with dense tensors, an age for each element, and loops that read as the paper does."""

    def __init__(self, delta: Sparse, weight: Tensor, rule: Reselection, lr: float, eps: float) -> None:
        self.weight, self.rule, self.lr, self.eps = weight, rule, lr, eps
        self.active = _dense_mask(delta)
        self.value, self.m, self.v, self.age = (
            torch.zeros_like(weight, dtype=torch.float64) for _ in range(4)
        )

    def step(self, step: int, x: Tensor) -> None:
        rule, count = self.rule, int(self.active.sum())
        if step and step % rule.every == 0:
            self._replace(count if step == rule.every else rule.replaced_at(step, count))
        weight = (self.weight + self.value * self.active).float().requires_grad_()
        F.linear(x, weight).square().sum().backward()
        g = weight.grad.double()
        into = step % rule.every - (rule.every - rule.accumulate)
        if into == 0:
            self.candidates = _top(g.abs().view(-1), count).view_as(g)
            self.sums, self.squares = torch.zeros_like(g), torch.zeros_like(g)
        if into >= 0:
            self.sums += g * self.candidates
            self.squares += g * g * self.candidates
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        self.age += self.active
        age = self.age.clamp(min=1)
        direction = self.m / (1 - 0.9**age) / ((self.v / (1 - 0.999**age)).sqrt() + self.eps)
        self.value -= self.lr * direction * self.active

    def _replace(self, drop: int) -> None:
        values = self.value.abs().masked_fill(~self.active, float("inf")).view(-1)
        dropped = _top(-values, drop).view_as(self.active)
        remaining = self.active & ~dropped
        scores = self.sums.abs().masked_fill(~self.candidates | remaining, -1.0).view(-1)
        grown = _top(scores, drop).view_as(self.active)
        new, age = grown & ~self.active, self.rule.accumulate
        self.active = remaining | grown
        self.value = self.value.masked_fill(new | ~self.active, 0.0)
        self.m = torch.where(new, self.sums / age * (1 - 0.9**age), self.m)
        self.v = torch.where(new, self.squares / age * (1 - 0.999**age), self.v)
        self.age = self.age.masked_fill(new, age)


def _problem(**rule: Any) -> tuple[AdaptedLinear, Reselection]:
    layer = _adapted((9, 11), 20, bias=False)
    layer.delta = Reselected(layer.delta, rule.get("select", "rigl"))
    return layer, Reselection(**rule)


def _advance(layer: AdaptedLinear, event: Reselection, optimizer: Any, steps: range) -> None:
    for step in steps:
        event.before_step(step, {"": layer.delta}, optimizer, None)
        layer(_random(6, 11, seed=100 + step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("build", [AdamW, torch.optim.AdamW])
def test_sft_is_the_reference_with_an_age_for_each_element(build: Any) -> None:
    layer, event = _problem(every=6, accumulate=3, share=0.4, steps=40)
    lr, eps = 3e-2, 1e-6
    reference = _Reference(layer.delta, layer.weight.double(), event, lr, eps)
    optimizer = build([layer.delta.values], lr=lr, eps=eps, weight_decay=0.0)
    seen = set()
    for step in range(36):
        _advance(layer, event, optimizer, range(step, step + 1))
        reference.step(step, _random(6, 11, seed=100 + step))
        mine = layer.delta.change(layer.weight)
        assert torch.equal(_dense_mask(layer.delta), reference.active), step
        torch.testing.assert_close(mine.double(), reference.value * reference.active, rtol=1e-3, atol=2e-5)
        seen.add(tuple(layer.delta.indices.tolist()))
    assert len(seen) == 6
    ages = (36 - layer.delta.birth).unique()
    assert len(ages) >= 3  # elements of several ages


def test_what_is_dropped_reverts_and_what_grows_starts_at_zero() -> None:
    layer, event = _problem(every=4, accumulate=2, share=0.5)
    optimizer = AdamW([layer.delta.values], lr=1e-2)
    _advance(layer, event, optimizer, range(8))
    before, old = _dense_mask(layer.delta), layer.delta.change(layer.weight)
    event.before_step(8, {"": layer.delta}, optimizer, None)
    after, new = _dense_mask(layer.delta), layer.delta.change(layer.weight)
    assert 0 < int((before & ~after).sum()) <= 10 and int(after.sum()) == 20
    assert torch.equal(new[before & after], old[before & after])
    assert bool((new[~(before & after)] == 0).all())
    smallest = old.abs()[before].sort().values[10]
    assert bool((old.abs()[before & ~after] < smallest).all())
    assert torch.equal(_changed(layer)[~after], layer.weight[~after])


@pytest.mark.parametrize("select", ["rigl", "sm3"])
@pytest.mark.parametrize("stop", [7, 8, 9])
def test_a_run_stopped_within_a_phase_goes_on_exactly(select: Any, stop: int) -> None:
    def begin() -> tuple[AdaptedLinear, Reselection, Any]:
        layer, event = _problem(select=select, every=4, accumulate=2, share=0.5)
        values = [layer.delta.values]
        optimizer = AdamW(values, lr=1e-2) if select == "rigl" else torch.optim.SGD(values, lr=1e-2)
        return layer, event, optimizer

    layer, event, optimizer = begin()
    _advance(layer, event, optimizer, range(stop))
    saved = {name: t.clone() for name, t in layer.delta.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    _advance(layer, event, optimizer, range(stop, 16))
    again, event, optimizer = begin()
    for name, tensor in again.delta.state_dict().items():
        tensor.copy_(saved[name])
    optimizer.load_state_dict(state)
    _advance(again, event, optimizer, range(stop, 16))
    for name, tensor in again.delta.state_dict().items():
        assert torch.equal(tensor, layer.delta.state_dict()[name]), name


def test_sm3_keeps_the_largest_of_every_row_and_column_and_grows_their_product() -> None:
    layer, event = _problem(select="sm3", every=5, share=0.5)
    delta = layer.delta
    row, column = torch.zeros(9), torch.zeros(11)
    for seed in range(3):
        g = _random(20, seed=seed)
        expected = torch.empty(20)
        entries = [divmod(int(i), 11) for i in delta.indices]
        nu = torch.tensor([min(row[i], column[j]) + g[k] ** 2 for k, (i, j) in enumerate(entries)])
        for k, (i, j) in enumerate(entries):
            expected[k] = g[k] / (nu[k] + 1e-8).sqrt()
            row[i], column[j] = max(row[i], nu[k]), max(column[j], nu[k])
        torch.testing.assert_close(sm3_direction(delta, g), expected)
        torch.testing.assert_close(delta.row[:, 0], row)
        torch.testing.assert_close(delta.column[0], column)
    before = _dense_mask(delta)
    delta.values.data.copy_(torch.arange(1, 21))
    event.before_step(5, {"": delta}, torch.optim.SGD([delta.values], lr=1e-2), None)
    after = _dense_mask(delta)
    assert set(delta.values[delta.values > 0].tolist()) >= set(range(11, 21))
    product = (row[:, None] * column).masked_fill(before, -1)
    grown = after & ~before
    assert grown.any() and bool((product[grown] >= product[~after & ~before].max()).all())


def test_sft_says_which_optimizers_it_goes_with() -> None:
    for select, build, message in (
        ("rigl", torch.optim.RMSprop, "adamw"),
        ("sm3", AdamW, "sgd-m"),
        ("sm3", lambda values: SGDM(values, momentum=0.9), "sgd-m"),
    ):
        layer, event = _problem(select=select, every=4, accumulate=2)
        with pytest.raises(ScrimpError, match=message):
            _advance(layer, event, build([layer.delta.values]), range(6))


# ---- on disk --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.parametrize(
    "make",
    [lambda: NeuroAda(per_row=2), lambda: SFT(density=0.1, every=2, accumulate=1), lambda: Shira(rank=4)],
)
def test_peft_and_transformers_read_what_is_saved_and_it_merges_to_the_same(
    make: Callable[[], DeltaTuning], tmp_path: Path
) -> None:
    from peft import PeftModel

    model, tune = llama(2), make()
    train(model, tune, AdamW(tune.select(model).values(), lr=1e-1), range(5))
    tune.save(model, tmp_path, "a/base")
    ids = tokens(99)
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        assert not torch.allclose(trained, llama(2)(input_ids=ids).logits, atol=1e-2)
        loaded = PeftModel.from_pretrained(llama(2), tmp_path)
        assert torch.equal(loaded(input_ids=ids).logits, trained)
        assert torch.equal(loaded.merge_and_unload()(input_ids=ids).logits, trained)
        plain = llama(2)
        plain.load_adapter(str(tmp_path))
        assert torch.equal(plain(input_ids=ids).logits, trained)
        tune.merge(model)
        assert torch.equal(model(input_ids=ids).logits, trained)
        assert not [name for name in model.state_dict() if "delta" in name]
