"""What gradient transforms do to LoRA's pairs, by the identities of their papers and by peft's optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft.optimizers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tuning.small import PEFT_ASKS, llama, loss_of, train
from torch import Tensor, nn

from scrimp.base.errors import ScrimpError
from scrimp.optim import SGDM, AdamW
from scrimp.tuning.deltas.low_rank import LowRank, lora_start
from scrimp.tuning.deltas.tuning import DeltaTuning
from scrimp.tuning.full import Full
from scrimp.tuning.pairs.algebra import gram_a, gram_b, inverse, lora_pro, spectrum, sylvester
from scrimp.tuning.pairs.methods import AltLora, LoraFA, LoraPlus, LoraPro, Riemannian
from scrimp.tuning.pairs.pairs import Paired, PairTransform, find_pairs
from scrimp.tuning.pairs.transforms import Alternating, Equivalent, EquivalentAdam, Preconditioned, RateRatio
from scrimp.tuning.targets import Place

pytestmark = pytest.mark.filterwarnings(PEFT_ASKS)
S = 1.7


class Bare(Full):
    """Everything trains, and nothing of an adapter is asked for."""

    is_mergeable = False

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def stored(self, model: nn.Module) -> dict[str, Tensor]:
        return dict(model.state_dict())

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        raise NotImplementedError

    def merge(self, model: nn.Module) -> None:
        raise NotImplementedError


class Product(nn.Module):
    """s B A, which is to become a target."""

    def __init__(self, a: Tensor, b: Tensor, target: Tensor) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.scale, self.target = S, target

    def change(self) -> Tensor:
        return self.scale * self.lora_B @ self.lora_A

    def loss(self) -> Tensor:
        return (self.change() - self.target).square().sum() / 2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(rank: int = 3, stack: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    return draw(*stack, rank, 7, seed=1), draw(*stack, 5, rank, seed=2), draw(*stack, 5, 7, seed=3)


def small_gradients(a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return S * b.mT @ grad, S * grad @ a.mT


def pro(a: Tensor, b: Tensor, grad: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    aa, bb = spectrum(gram_a(a), damping), spectrum(gram_b(b), damping)
    return lora_pro(a, b, *small_gradients(a, b, grad), scale=S, aa=aa, bb=bb)


def moved(a: Tensor, b: Tensor, g_a: Tensor, g_b: Tensor) -> Tensor:
    return S * (b @ g_a + g_b @ a)


def onto_columns(b: Tensor) -> Tensor:
    return b @ torch.linalg.pinv(b)


def run(
    product: Product,
    transform: PairTransform,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    after: Callable[[int], None] = lambda step: None,
) -> list[Tensor]:
    """Train, and return the changes after each step."""
    tune = Paired(Bare(), transform, name="test")
    tune.select(product)
    changes = []
    for step in range(steps):
        tune.before_step(step, optimizer)
        product.loss().backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad()
        changes.append(product.change().detach())
    return changes


# ---- LoRA-Pro ------------------------------------------------------------------------------------------


def test_lora_pro_moves_the_weight_by_both_projections_whatever_x_is() -> None:
    a, b, grad = problem()
    g_a, g_b = pro(a, b, grad)
    p_b, p_a = onto_columns(b), onto_columns(a.mT)
    wanted = p_b @ grad + grad @ p_a - p_b @ grad @ p_a
    x = draw(3, 3, seed=9)
    torch.testing.assert_close(moved(a, b, g_a, g_b), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(moved(a, b, g_a + x @ a, g_b - b @ x), wanted, rtol=0, atol=1e-12)


def test_the_solution_of_sylvesters_equation_leaves_no_residual() -> None:
    a, b, _ = problem()
    constant = draw(3, 3, seed=5)
    x = sylvester(spectrum(gram_b(b), 0.0), spectrum(gram_a(a), 0.0), constant)
    torch.testing.assert_close(gram_b(b) @ x + x @ gram_a(a), constant, rtol=0, atol=1e-12)


def test_lora_pro_is_the_nearest_to_the_plain_gradients_of_all_that_move_the_weight_so() -> None:
    a, b, grad = problem()
    plain_a, plain_b = small_gradients(a, b, grad)
    g_a, g_b = pro(a, b, grad)

    def distance(x: Tensor) -> Tensor:
        return (g_a + x @ a - plain_a).square().sum() + (g_b - b @ x - plain_b).square().sum()

    least = distance(torch.zeros(3, 3, dtype=torch.float64))
    assert all(least < distance(0.01 * draw(3, 3, seed=seed)) for seed in range(20))


def test_lora_pro_does_not_depend_on_how_the_product_is_factored() -> None:
    a, b, grad = problem()
    mix = draw(3, 3, seed=6)
    other_a, other_b = torch.linalg.solve(mix, a), b @ mix
    here = moved(a, b, *pro(a, b, grad))
    there = moved(other_a, other_b, *pro(other_a, other_b, grad))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-11)


def test_lora_pro_of_full_rank_is_the_gradient_of_the_weight() -> None:
    a, b, grad = problem(rank=5)
    torch.testing.assert_close(moved(a, b, *pro(a, b, grad)), grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lora_pro_begins_with_b_alone(dtype: torch.dtype) -> None:
    a, b, grad = (tensor.to(dtype) for tensor in problem())
    g_a, g_b = pro(a, torch.zeros_like(b), grad, damping=1e-6)
    torch.testing.assert_close(g_a, torch.zeros_like(a))
    torch.testing.assert_close(S * g_b @ a, grad @ onto_columns(a.mT), rtol=1e-4, atol=1e-5)


def test_full_lora_pro_is_adam_on_the_weight_where_the_rank_is_full() -> None:
    # A first-order step s (dB A + B dA) is what Adam on W does; the second order is lr^2.
    a, b, target = problem(rank=5)
    product, lr = Product(a, b, target), 1e-6
    weight = nn.Parameter(product.change().detach().clone())
    transform = EquivalentAdam(damping=0.0, betas=(0.9, 0.999), eps=1e-8, name="test")
    start = weight.detach().clone()
    changes = run(product, transform, SGDM(product, lr=lr, momentum=0.0), 3)
    oracle = torch.optim.Adam([weight], lr=lr)
    for _ in range(3):
        weight.grad = weight.detach() - target
        oracle.step()
    torch.testing.assert_close((changes[-1] - start) / lr, (weight - start) / lr, rtol=0, atol=1e-3)


def test_full_lora_pro_leaves_its_moments_alone_at_a_gradient_that_is_not_finite() -> None:
    product = Product(*problem())
    transform = EquivalentAdam(damping=0.0, betas=(0.9, 0.999), eps=1e-8, name="test")
    optimizer = SGDM(product, lr=0.1, momentum=0.0)
    run(product, transform, optimizer, 1)
    before = copy.deepcopy(product.state_dict())
    product.lora_A.grad, product.lora_B.grad = product.lora_A.detach() * torch.inf, torch.ones(5, 3).double()
    optimizer.step()
    for name, tensor in product.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ---- AltLoRA -------------------------------------------------------------------------------------------


def test_a_projected_gradient_is_the_least_squares_step_on_the_other_factor() -> None:
    a, b, target = problem()
    product, grad = Product(a, b, target), S * b @ a - target
    found: list[Tensor] = []

    def keep(step: int) -> None:
        found.extend(p.grad for p in product.parameters() if p.grad is not None)

    run(product, Preconditioned(damping=0.0), torch.optim.SGD(product.parameters()), 1, after=keep)
    best_a = torch.linalg.lstsq(S * b, grad).solution
    best_b = torch.linalg.lstsq(S * a.mT, grad.mT).solution.mT
    torch.testing.assert_close(found[0], best_a, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], best_b, rtol=0, atol=1e-12)


def test_momentum_follows_the_factors_by_least_squares() -> None:
    product = Product(*problem())
    optimizer = torch.optim.SGD(product.parameters(), lr=0.05, momentum=0.9)
    transform = Alternating(damping=0.0, mode="joint", plus=False, name="test")
    run(product, transform, optimizer, 1)  # the momentum is the first gradient, re-expressed
    a, b, target = problem()
    grad = S * b @ a - target
    first_a = torch.linalg.lstsq(S * b, grad).solution
    first_b = torch.linalg.lstsq(S * a.mT, grad.mT).solution.mT
    wanted_a = torch.linalg.lstsq(product.lora_B, b @ first_a).solution
    wanted_b = torch.linalg.lstsq(product.lora_A.mT, (first_b @ a).mT).solution.mT
    held = [optimizer.state[p]["momentum_buffer"] for p in (product.lora_A, product.lora_B)]
    torch.testing.assert_close(held[0], wanted_a, rtol=0, atol=1e-12)
    torch.testing.assert_close(held[1], wanted_b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["alternate", "joint"])
def test_altlora_does_not_depend_on_how_the_product_is_factored(mode: Any) -> None:
    a, b, target = problem()
    mix = draw(3, 3, seed=6)
    paths = []
    for factors in ((a, b), (torch.linalg.solve(mix, a), b @ mix)):
        product = Product(*factors, target)
        optimizer = torch.optim.SGD(product.parameters(), lr=0.05, momentum=0.9)
        transform = Alternating(damping=0.0, mode=mode, plus=False, name="test")
        paths.append(torch.stack(run(product, transform, optimizer, 8)))
    torch.testing.assert_close(*paths, rtol=0, atol=1e-10)


def test_a_step_of_altlora_with_a_square_factor_is_a_whole_gradient_step() -> None:
    a, b, target = draw(7, 7, seed=1), draw(7, 7, seed=2), draw(7, 7, seed=3)
    product, lr = Product(a, b, target), 0.1
    before = product.change().detach()
    transform = Alternating(damping=0.0, mode="alternate", plus=False, name="test")
    first, second = run(product, transform, torch.optim.SGD(product.parameters(), lr=lr), 2)
    torch.testing.assert_close(first, before - lr * (before - target), rtol=0, atol=1e-9)
    torch.testing.assert_close(second, first - lr * (first - target), rtol=0, atol=1e-9)


def test_strict_alternation_trains_b_in_even_steps_and_a_in_odd_ones() -> None:
    product = Product(*problem())
    held = [product.lora_A.detach().clone(), product.lora_B.detach().clone()]

    def look(step: int) -> None:
        asleep = product.lora_B if step % 2 else product.lora_A
        moves = [not torch.equal(p, old) for p, old in zip(product.parameters(), held, strict=True)]
        assert moves == [step % 2 == 1, step % 2 == 0] and asleep.grad is None
        held[:] = [product.lora_A.detach().clone(), product.lora_B.detach().clone()]

    transform = Alternating(damping=1e-5, mode="alternate", plus=True, name="test")
    run(product, transform, AdamW(product, lr=0.01), 4, after=look)


# ---- all of them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transform", "optimizer"),
    [
        (Equivalent(damping=1e-6), AdamW),
        (EquivalentAdam(damping=1e-6, betas=(0.9, 0.999), eps=1e-8, name="test"), None),
        (Alternating(damping=1e-5, mode="joint", plus=True, name="test"), AdamW),
        (Preconditioned(damping=1e-2, form="scaled"), AdamW),
    ],
)
def test_a_stack_of_pairs_trains_as_each_pair_alone(transform: PairTransform, optimizer: Any) -> None:
    def make(product: Product) -> torch.optim.Optimizer:
        return SGDM(product, lr=0.01, momentum=0.0) if optimizer is None else optimizer(product, lr=0.01)

    a, b, target = problem(stack=(2,))
    whole = Product(a, b, target)
    together = run(whole, transform, make(whole), 3)[-1]
    for index in range(2):
        single = Product(a[index], b[index], target[index])
        alone = run(single, copy.deepcopy(transform), make(single), 3)[-1]
        torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-10)


BUILD: dict[str, Callable[..., Paired]] = {
    "lora-pro": LoraPro,
    "lora-pro-full": lambda **more: LoraPro(variant="full", **more),
    "altlora": lambda **more: AltLora(mode="joint", plus=False, dropout=0.0, **more),
    "altlora-plus": lambda **more: AltLora(dropout=0.0, **more),
    "lora-fa": LoraFA,
    "lora-plus": LoraPlus,
    "riemannian": Riemannian,
}


def optimizer_for(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name in ("lora-pro-full", "altlora"):
        return SGDM(model, lr=1e-3, momentum=0.0 if name == "lora-pro-full" else 0.9)
    return AdamW(model, lr=1e-3)


def build(name: str, seed: int = 0) -> tuple[Any, Paired, torch.optim.Optimizer]:
    model = llama(2)
    tune = BUILD[name](rank=2, alpha=4, seed=seed)
    tune.select(model)
    return model, tune, optimizer_for(name, model)


@pytest.mark.parametrize("name", BUILD)
def test_a_resumed_run_computes_the_same_bits(name: str) -> None:
    model, tune, optimizer = build(name)
    train(model, tune, optimizer, range(3))
    held = copy.deepcopy((tune.stored(model), optimizer.state_dict()))
    train(model, tune, optimizer, range(3, 6))

    resumed, again, anew = build(name, seed=1)
    resumed.load_state_dict(held[0], strict=False)
    anew.load_state_dict(held[1])
    train(resumed, again, anew, range(3, 6))
    for (key, one), two in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), key


@pytest.mark.parametrize("name", BUILD)
def test_every_method_learns_a_batch(name: str) -> None:
    model, tune, optimizer = build(name)
    before = loss_of(model, 0).item()
    for group in optimizer.param_groups:
        group["lr"] = 0.3 if "full" in name else 1e-2
    for step in range(12):
        tune.before_step(step, optimizer)
        loss_of(model, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model, 0).item() < before - 0.01


def saved_elements(model: nn.Module) -> int:
    """Return the elements that the forward pass keeps for the backward pass, besides the parameters."""
    own = {p.data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            seen[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, 0)
    del loss
    return sum(seen.values())


def test_a_frozen_factor_a_spares_the_inputs() -> None:
    plain, frozen = build("riemannian")[0], build("lora-fa")[0]
    assert saved_elements(frozen) < saved_elements(plain)


def own_lora(*, rank: int, alpha: float, seed: int, targets: tuple[str, ...], dropout: float) -> DeltaTuning:
    def make(places: Sequence[Place]) -> list[LowRank]:
        starts = [lora_start(place.module, rank, seed=seed + place.number) for place in places]
        return [LowRank(start, scale=alpha / rank) for start in starts]

    return DeltaTuning(name="own", make=make, targets=targets)


@pytest.mark.parametrize("name", ["lora-pro", "altlora-plus", "lora-fa", "lora-plus"])
def test_pairs_of_our_own_train_as_pefts(name: str) -> None:
    model, tune, optimizer = build(name)
    own = llama(2)
    own_tune = BUILD[name](rank=2, alpha=4, inner=own_lora)
    own_tune.select(own)
    pairs = list(zip(find_pairs(model, tune=name), find_pairs(own, tune=name), strict=True))
    with torch.no_grad():
        for theirs, ours in pairs:
            ours.a.copy_(theirs.a)
            assert ours.scale == theirs.scale == 2
    train(model, tune, optimizer, range(4))
    train(own, own_tune, optimizer_for(name, own), range(4))
    for theirs, ours in pairs:
        torch.testing.assert_close(ours.b, theirs.b, rtol=0, atol=1e-5)
        assert ours.b.abs().max() > 1e-4


# ---- peft's own optimizers -----------------------------------------------------------------------------


def peft_model() -> Any:
    torch.manual_seed(5)
    config = LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(llama(2), config)


def adapters(model: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}


class Injected(Bare):
    """What peft has injected already."""

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in model.named_parameters() if p.requires_grad}


def against_peft(
    transform: PairTransform,
    ours: Callable[[Any], torch.optim.Optimizer],
    theirs: Callable[[Any], torch.optim.Optimizer],
    *,
    steps: int = 3,
    atol: float = 1e-7,
) -> None:
    model, oracle = peft_model(), peft_model()
    start = adapters(copy.deepcopy(model))
    tune = Paired(Injected(), transform, name="test")
    tune.select(model)
    train(model, tune, ours(model), range(steps))
    train(oracle, Injected(), theirs(oracle), range(steps))
    wanted = adapters(oracle)
    for name, found in adapters(model).items():
        torch.testing.assert_close(found, wanted[name], rtol=0, atol=atol, msg=name)
    assert any((wanted[name] - start[name]).abs().max() > 1e-3 for name in wanted)


def test_riemannian_is_pefts() -> None:
    against_peft(
        Preconditioned(damping=1e-2, form="scaled"),
        lambda model: AdamW(model, lr=1e-2, weight_decay=0.1),
        lambda model: peft.optimizers.create_riemannian_optimizer(
            model, torch.optim.AdamW, lr=1e-2, reg=1e-2, weight_decay=0.1
        ),
        atol=2e-6,
    )


def test_lora_plus_is_pefts() -> None:
    against_peft(
        RateRatio(ratio=16.0),
        lambda model: AdamW(model, lr=1e-3, weight_decay=0.1),
        lambda model: peft.optimizers.create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
        ),
        atol=2e-6,
    )


def test_lora_plus_leaves_the_groups_as_they_were() -> None:
    model, tune, optimizer = build("lora-plus")
    before = [(group["params"], group["lr"]) for group in optimizer.param_groups]
    train(model, tune, optimizer, range(2))
    assert [(group["params"], group["lr"]) for group in optimizer.param_groups] == before


def test_lora_fa_is_pefts_without_its_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)

    def theirs(model: Any) -> torch.optim.Optimizer:
        made = peft.optimizers.create_lorafa_optimizer(model, r=2, lora_alpha=6, lr=1e-2)
        made.param_groups[0]["eps"] = 0.0  # it is added before the bias correction there, and after it here
        return made

    transform = Preconditioned(damping=1e-8, trained="b")
    against_peft(transform, lambda model: AdamW(model, lr=1e-2, eps=0.0, weight_decay=0.0), theirs, atol=1e-5)


# ---- refusals ------------------------------------------------------------------------------------------


def test_updates_inside_the_backward_pass_are_refused() -> None:
    model, tune, optimizer = build("lora-pro")
    assert tune.needs_step
    assert isinstance(optimizer, AdamW)
    optimizer.fuse_backward()
    with pytest.raises(ScrimpError, match="fused-backward"):
        train(model, tune, optimizer, range(1))


def test_what_is_no_product_of_two_factors_is_refused() -> None:
    config = LoraConfig(r=2, target_modules="all-linear", use_dora=True)
    with pytest.raises(ScrimpError, match=r"DoraLinearVariant.*plain LoRA"):
        find_pairs(get_peft_model(llama(1), config), tune="lora-pro")
    with pytest.raises(ScrimpError, match="no LoRA pairs"):
        find_pairs(llama(1), tune="lora-pro")
    with pytest.raises(ScrimpError, match="rank 6 does not fit"):
        find_pairs(Product(*problem(rank=6)), tune="lora-pro")


@pytest.mark.parametrize("name", ["altlora", "altlora-plus", "lora-pro-full"])
def test_an_optimizer_that_is_not_the_methods_is_refused(name: str) -> None:
    model, tune, _ = build(name)
    wrong = SGDM(model) if name == "altlora-plus" else AdamW(model)
    with pytest.raises(ScrimpError, match="use --optimizer"):
        train(model, tune, wrong, range(2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoraPro(damping=-1.0),
        lambda: LoraPro(variant="half"),  # type: ignore[arg-type]
        lambda: LoraPro(variant="full", betas=(1.0, 0.9)),
        lambda: AltLora(mode="both"),  # type: ignore[arg-type]
        lambda: LoraPlus(ratio=0.0),
        lambda: Riemannian(damping=0.0),
    ],
)
def test_options_that_make_no_sense_are_refused(make: Callable[[], Paired]) -> None:
    with pytest.raises(ScrimpError, match=r"^tune "):
        make()


def test_the_inverse_of_nothing_is_finite_and_damping_is_relative() -> None:
    gram = gram_a(draw(3, 7).float())
    assert inverse(torch.zeros(2, 3, 3), 1e-5).isfinite().all()
    torch.testing.assert_close(inverse(1e-8 * gram, 1e-3), 1e8 * inverse(gram, 1e-3), rtol=1e-4, atol=0.0)
