"""Changes of low rank: plain LoRA is peft's, frozen factors save no input, and each start is the paper's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tuning.small_adapted import (
    adapted,
    begin,
    best,
    change,
    core,
    llama,
    logits,
    loss_of,
    reload,
    train,
)
from torch import Tensor, nn
from torch.nn import functional

from scrimp.base.errors import ScrimpError
from scrimp.tuning.deltas.low_rank import CoreStart, LowRank, LowRankCore, Start, lora_start
from scrimp.tuning.deltas.tuning import DeltaTuning
from scrimp.tuning.low_rank.cores import LoraSB, LoraXS, SVFit
from scrimp.tuning.low_rank.gradient_statistics import each_gradient
from scrimp.tuning.low_rank.lamda import LaMDA, LaMDAPlusPlus, spectral_ranks
from scrimp.tuning.low_rank.lora_ga import LoraGA, LoraOne
from scrimp.tuning.low_rank.spectra import leading_triplets
from scrimp.tuning.targets import Place

EPS = torch.finfo(torch.float32).eps

METHODS: dict[str, Callable[[], DeltaTuning]] = {
    "lora-ga": lambda: LoraGA(rank=4),
    "lora-one": lambda: LoraOne(rank=4),
    "lora-xs": lambda: LoraXS(rank=4, alpha=8),
    "lora-sb": lambda: LoraSB(rank=4, alpha=8, eta=1e-2),
    "svfit": lambda: SVFit(rank=8),
    "lamda": lambda: LaMDA(rank=8, steps=5),
    "lamda-plus-plus": lambda: LaMDAPlusPlus(rank=8, steps=5, pieces=4),
}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _make(places: Sequence[Place]) -> list[LowRank]:
    starts = [Start(_random(4, p.module.in_features), _random(p.module.out_features, 4)) for p in places]
    return [LowRank(start, scale=0.02) for start in starts]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_plain_lora_has_peft_s_outputs_and_gradients() -> None:
    ours, theirs = llama(), llama()
    trained = DeltaTuning(name="lora", make=_make).select(ours)
    config = LoraConfig(r=4, lora_alpha=0.08, target_modules="all-linear", task_type="CAUSAL_LM")
    other: Any = get_peft_model(theirs, config)
    for name, layer in adapted(ours).items():
        target = other.get_submodule(f"base_model.model.{name}")
        for part in ("lora_A", "lora_B"):
            getattr(target, part).default.weight.data.copy_(getattr(layer.delta, part))
    torch.testing.assert_close(logits(ours), logits(other), rtol=1e-5, atol=1e-5)
    loss_of(ours).backward()
    loss_of(other).backward()
    assert len(trained) == 2 * 2 * 7
    for name, parameter in trained.items():
        path, _, part = name.rpartition(".delta.")
        target = getattr(other.get_submodule(f"base_model.model.{path}"), part).default.weight
        torch.testing.assert_close(parameter.grad, target.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subtracting_the_start_leaves_the_output_to_the_last_bit(dtype: torch.dtype) -> None:
    base = nn.Linear(24, 40, dtype=dtype)
    x = _random(2, 5, 24, seed=3).to(dtype)
    start, scale = Start(_random(4, 24), _random(40, 4)), 1.7
    plain = LowRank(start, scale=scale, subtracts_start=True)
    cored = LowRankCore(
        CoreStart(*start, _random(4, 4)), scale=scale, trains=("core", "lora_B"), subtracts_start=True
    )
    for delta in (plain, cored):
        y = delta(x, base)
        assert y.dtype == dtype
        assert torch.equal(y, base(x))


@pytest.mark.parametrize("trains_a", [True, False])
def test_only_a_trained_a_has_the_input_saved(trains_a: bool) -> None:
    base = nn.Linear(24, 40).requires_grad_(False)
    x = _random(7, 24).requires_grad_(True)
    parts: Any = ("core", "lora_B", *(("lora_A",) if trains_a else ()))
    cored = LowRankCore(CoreStart(_random(4, 24), _random(40, 4), _random(4, 4)), scale=1.0, trains=parts)
    plain = LowRank(Start(_random(4, 24), _random(40, 4)), scale=1.0, trains_a=trains_a)
    for delta in (plain, cored):
        saved: list[tuple[int, ...]] = []

        def pack(tensor: Tensor, saved: list[tuple[int, ...]] = saved) -> Tensor:
            saved.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            delta(x, base)
        assert ((7, 24) in saved) == trains_a
        assert (7, 4) in saved


@pytest.mark.parametrize("lead", [(), (3,)])
def test_a_half_precision_input_is_saved_as_it_is_and_has_the_gradients_of_its_fp32_copy(
    lead: tuple[int, ...],
) -> None:
    base = nn.Linear(24, 40, dtype=torch.bfloat16).requires_grad_(False)
    delta = LowRank(Start(_random(4, 24), _random(40, 4)), scale=0.7)
    x = _random(*lead, 7, 24).bfloat16().requires_grad_(True)
    ups = _random(*lead, 7, 40, seed=2).bfloat16()
    saved: list[tuple[torch.dtype, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = delta(x, base)
    assert (torch.float32, x.numel()) not in saved
    assert (torch.bfloat16, x.numel()) in saved
    found = torch.autograd.grad(y, [x, delta.lora_A, delta.lora_B], ups)

    change = functional.linear(functional.linear(x.float(), delta.lora_A), delta.lora_B) * 0.7
    expected = torch.autograd.grad((base(x) + change).bfloat16(), [x, delta.lora_A, delta.lora_B], ups)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2**-7 if a is found[0] else 1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", ["full", "diagonal", "triangular"])
@pytest.mark.parametrize("subtracts", [True, False])
def test_a_core_s_factors_are_what_its_forward_adds(shape: Any, subtracts: bool) -> None:
    base, x = nn.Linear(24, 40, bias=False), _random(3, 5, 24)
    start = CoreStart(_random(4, 24), _random(40, 4), _random(4, 4) if shape != "diagonal" else _random(4))
    delta = LowRankCore(start, scale=0.5, shape=shape, subtracts_start=subtracts)
    before = delta.core.detach().clone()
    with torch.no_grad():
        delta.core.copy_(delta.core * 2 + 0.1)
    as_matrix = {"full": lambda r: r, "diagonal": torch.diag, "triangular": torch.tril}[shape]
    moved = as_matrix(delta.core.detach()) - (as_matrix(before) if subtracts else 0)
    expected = 0.5 * start.b @ moved @ start.a
    torch.testing.assert_close(delta(x, base) - base(x), x @ expected.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(delta.change(base.weight), expected, rtol=1e-5, atol=1e-5)


def test_dropout_spares_what_is_subtracted() -> None:
    start = Start(_random(4, 24), _random(40, 4))
    delta = LowRank(start, scale=1.0, dropout=0.999999, subtracts_start=True)
    base, x = nn.Linear(24, 40), _random(5, 24)
    torch.testing.assert_close(base(x) - delta(x, base), x @ (start.b @ start.a).mT, rtol=1e-4, atol=1e-4)
    assert torch.equal(delta.eval()(x, base), base(x))


def test_lora_begins_at_zero_with_kaiming_s_spread() -> None:
    start = lora_start(nn.Linear(400, 10), 8, seed=1)
    assert not start.b.any()
    assert 0.049 < start.a.abs().max() <= 0.05
    assert start.a.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.03)  # 3,200 draws
    assert not torch.equal(start.a, lora_start(nn.Linear(400, 10), 8, seed=2).a)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", METHODS)
def test_a_trained_adapter_is_a_plain_lora_to_peft_and_merges(name: str, tmp_path: Path) -> None:
    model, tune = llama(), METHODS[name]()
    _, optimizer = begin(model, tune)
    untouched = {n: p for n, p in llama().named_parameters() if p.ndim == 2}
    train(model, tune, optimizer, range(3))
    expected = logits(model)
    assert (expected - logits(llama())).abs().max() > 1e-3
    for layer_name, layer in adapted(model).items():
        assert torch.equal(layer.base_layer.weight, untouched[f"{layer_name}.weight"])
    tune.save(model, tmp_path, base="small")
    torch.testing.assert_close(logits(reload(tmp_path)), expected, rtol=1e-4, atol=1e-4)
    tune.merge(model)
    assert not adapted(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_stored_resumes_to_the_bit(name: str) -> None:
    whole, tune = llama(), METHODS[name]()
    _, optimizer = begin(whole, tune)
    train(whole, tune, optimizer, range(2))
    stored = {key: value.clone() for key, value in tune.stored(whole).items()}
    state = copy.deepcopy(optimizer.state_dict())
    train(whole, tune, optimizer, range(2, 4))

    resumed, again = llama(), METHODS[name]()
    other = torch.optim.AdamW(again.select(resumed).values(), lr=1e-2)
    missing, unexpected = resumed.load_state_dict(stored, strict=False)
    assert not unexpected
    assert not any(".delta." in key for key in missing)
    other.load_state_dict(state)
    train(resumed, again, other, range(2, 4))
    assert torch.equal(logits(resumed), logits(whole))


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_on_meta_has_the_real_shapes(name: str) -> None:
    real = METHODS[name]().select(llama())
    with torch.device("meta"):
        planned = METHODS[name]().select(llama().to("meta"))
    assert {p.device.type for p in planned.values()} == {"meta"}
    if name != "lamda-plus-plus":  # whose ranks the spectra decide
        assert {n: p.shape for n, p in planned.items()} == {n: p.shape for n, p in real.items()}


def test_lora_xs_trains_a_matrix_about_zero_between_the_weight_s_singular_vectors() -> None:
    model = llama()
    trained, _ = begin(model, LoraXS(rank=4))
    assert {tuple(p.shape) for p in trained.values()} == {(4, 4)}
    for layer in adapted(model).values():
        delta = core(layer)
        torch.testing.assert_close(delta.parts[0].mT @ delta.parts[0], torch.eye(4), atol=1e-5, rtol=0)
        product = (delta.parts[0] @ delta.lora_A).double()
        torch.testing.assert_close(product, best(layer.base_layer.weight, 4), atol=1e-5, rtol=0)
    drawn = torch.cat([core(layer).core.detach().flatten() for layer in adapted(model).values()])
    assert drawn.std().item() == pytest.approx(1e-5, rel=0.2)  # 224 draws


@pytest.mark.parametrize(
    ("alpha", "variant", "size"), [(4, "paper", 1), (16, "paper", 1), (4, "released", 1), (16, "released", 4)]
)
def test_lora_sb_begins_at_the_best_approximation_of_the_first_update(
    alpha: float, variant: Any, size: float
) -> None:
    model = llama()
    gradients: dict[str, Tensor] = {}
    LoraSB(rank=4, alpha=alpha).select(model)
    layers = adapted(model)
    each_gradient(layers, lambda: loss_of(model), gradients.__setitem__)

    model = llama()
    begin(model, LoraSB(rank=4, alpha=alpha, eta=1e-3, variant=variant))
    assert len(gradients) == 14
    for name, layer in adapted(model).items():
        delta = core(layer)
        torch.testing.assert_close(delta.parts[0].mT @ delta.parts[0], torch.eye(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(delta.lora_A @ delta.lora_A.mT, torch.eye(4), atol=1e-5, rtol=0)
        update = -1e-3 * gradients[name].sign()
        torch.testing.assert_close(change(layer).double(), size * best(update, 4), atol=1e-7, rtol=1e-3)
    assert loss_of(model) < loss_of(llama())


def test_svfit_moves_the_leading_singular_values_and_nothing_else() -> None:
    model = llama()
    trained, _ = begin(model, SVFit(rank=6))
    assert torch.equal(logits(model), logits(llama()))
    assert {tuple(p.shape) for p in trained.values()} == {(6,)}
    layer = next(iter(adapted(model).values()))
    sigma = torch.linalg.svdvals(layer.base_layer.weight)
    with torch.no_grad():
        core(layer).core.copy_(0.1 * sigma[:6])  # order kept
    moved = torch.linalg.svdvals(layer.base_layer.weight + change(layer))
    torch.testing.assert_close(moved, torch.cat([1.1 * sigma[:6], sigma[6:]]), rtol=1e-4, atol=1e-6)


def test_lamda_begins_as_the_base_on_the_weight_s_leading_part() -> None:
    model = llama()
    begin(model, LaMDA(rank=8, alpha=16))
    assert torch.equal(logits(model), logits(llama()))
    for layer in adapted(model).values():
        delta = core(layer)
        assert not isinstance(delta.lora_A, nn.Parameter)
        part = 2 * torch.cat(delta.parts, dim=1) @ delta.core @ delta.lora_A
        torch.testing.assert_close(part.double(), best(layer.base_layer.weight, 8), atol=1e-5, rtol=0)


def test_lamda_s_columns_freeze_over_the_first_share_of_the_run() -> None:
    model, tune = llama(), LaMDA(rank=8, steps=40, freeze=0.25, pieces=8)
    trained, optimizer = begin(model, tune)
    parts = core(next(iter(adapted(model).values()))).parts
    for step in range(12):
        before = [part.detach().clone() for part in parts]
        train(model, tune, optimizer, range(step, step + 1))
        moved = [not torch.equal(a, b) for a, b in zip(before, parts, strict=True)]
        frozen = min(8, 8 * step // 10)
        assert moved == [False] * frozen + [True] * (8 - frozen)
        assert [part in optimizer.state for part in parts] == moved
    cores = {p for name, p in trained.items() if name.endswith("core")}
    assert set(optimizer.state) == cores == {p for p in trained.values() if p.requires_grad}


def test_a_b_of_few_columns_freezes_in_as_many_pieces() -> None:
    for tune, pieces in ((LaMDA(rank=3), 3), (LaMDAPlusPlus(rank=8), 4), (LaMDAPlusPlus(rank=1), 1)):
        model = llama()
        begin(model, tune)
        assert {len(core(layer).parts) for layer in adapted(model).values()} == {pieces}


def test_lamda_plus_plus_spends_the_budget_where_the_spectrum_is_flat() -> None:
    steep = torch.tensor([0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995, 0.999])
    flat = torch.arange(1, 9) / 20
    assert spectral_ranks([steep, flat], 4) == [2, 6]
    assert spectral_ranks([flat, flat, flat], 4) == [4, 4, 4]
    model = llama()
    begin(model, LaMDAPlusPlus(rank=8, pieces=4))
    assert torch.equal(logits(model), logits(llama()))
    ranks = [core(layer).core.shape[0] for layer in adapted(model).values()]
    assert min(ranks) >= 4
    assert max(ranks) <= 16
    assert 6 < sum(ranks) / len(ranks) <= 8
    assert len(set(ranks)) > 1


def test_the_random_subspace_finds_what_the_exact_decomposition_finds() -> None:
    u, v = torch.linalg.qr(_random(90, 90)).Q, torch.linalg.qr(_random(120, 90, seed=1)).Q
    matrix = u @ torch.diag(0.8 ** torch.arange(90)) @ v.mT
    found = leading_triplets(matrix, 4, seed=3)  # a subspace of 16 in 90
    torch.testing.assert_close(found.s, 0.8 ** torch.arange(4), rtol=1e-4, atol=0)
    torch.testing.assert_close((found.u * found.s) @ found.vt, best(matrix, 4).float(), rtol=0, atol=2e-4)
    assert torch.equal(found.u, leading_triplets(matrix, 4, seed=3).u)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraXS(rank=0), "rank 0 must be above 0"),
        (lambda: LoraXS(rank=8, alpha=-1), "alpha -1 must be above 0"),
        (lambda: LoraSB(rank=8, eta=0.0), "eta 0.0 must be above 0"),
        (lambda: SVFit(rank=0), "rank 0"),
        (lambda: LaMDA(pieces=0), "pieces 0 must be above 0"),
        (lambda: LaMDA(freeze=1.5), "freeze 1.5"),
        (lambda: LoraXS(rank=33).select(llama()), "the largest allowed is"),
        (lambda: LoraSB(rank=33).select(llama()), "the largest allowed is"),
        (lambda: LaMDA(rank=33).select(llama()), "the largest allowed is"),
    ],
)
def test_nonsense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ScrimpError, match=message):
        make()
