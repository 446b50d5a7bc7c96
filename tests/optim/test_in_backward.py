"""Updates inside the backward pass compute what updates at the step do, or are refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.optim import methods
from tests.optim.methods import (
    EVERY,
    apart,
    differing,
    gradients,
    is_projecting,
    loss,
    make,
    parameters,
    run,
    values,
)
from torch import nn

from scrimp.base.errors import ScrimpError
from scrimp.optim import AdamW, DCTAdamW, Fira, Frugal, GaLore, Optimizer
from scrimp.weights.affine8 import Affine8
from scrimp.weights.int8_weight import Int8Weight

SHAPES = {"tall": (24, 16), "wide": (16, 24), "experts": (3, 18, 12), "vector": (7,)}


def waits_in_the_subspace(name: str) -> bool:
    """Tell whether a method only projects back, so that micro-batches may be summed in the subspace."""
    ps = parameters(shapes=SHAPES)
    lift = make(name, ps).plan_of(ps["tall"]).composition.lift
    return lift is not None and not lift.needs_gradient


PROJECTING_BACK = [name for name in EVERY if waits_in_the_subspace(name)]


@pytest.mark.parametrize("name", EVERY)
def test_one_micro_batch_is_the_plain_step_bit_for_bit(name: str) -> None:
    plain, fused = (parameters(torch.bfloat16) for _ in range(2))
    steps = gradients(plain, 5)
    ours, theirs = make(name, fused), make(name, plain)
    ours.fuse_backward()
    run(theirs, plain, steps)
    for step in steps:
        loss(fused, step).backward()
        assert all(p.grad is None for p in fused.values())
        ours.step()
    assert differing(values(fused), values(plain)) == []
    assert differing(methods.state(ours, fused), methods.state(theirs, plain)) == []


@pytest.mark.parametrize(
    ("name", "maximize"),
    [*((name, False) for name in EVERY), *((name, True) for name in ("AdamW", *PROJECTING_BACK))],
)
def test_micro_batches_are_the_plain_step_on_their_sum(name: str, maximize: bool) -> None:
    # What is summed in the subspace is rounded elsewhere, which codes of few bits would blow up.
    options = {"maximize": maximize} | ({"store": "fp32"} if name in PROJECTING_BACK else {})
    plain, fused = (parameters(torch.float64) for _ in range(2))
    ours, theirs = make(name, fused, **options), make(name, plain, **options)
    ours.fuse_backward(micro_batches=3)
    for number in range(4):
        parts = gradients(plain, 3, seed=number)
        for p in plain.values():
            p.grad = None
        for part in parts:
            loss(plain, part).backward()
            loss(fused, part).backward()
        theirs.step()
        ours.step()
        assert all(p.grad is None for p in fused.values())
    if name in PROJECTING_BACK:
        assert apart(values(fused), values(plain)) < 1e-12
    else:
        assert differing(values(fused), values(plain)) == []


@pytest.mark.parametrize("name", PROJECTING_BACK)
def test_between_refreshes_no_gradient_outlives_its_micro_batch(name: str) -> None:
    ps = parameters(shapes=SHAPES)
    optimizer = make(name, ps, refresh_every=2)
    needs = optimizer.plan_of(ps["tall"]).composition.projector.refresh_needs_gradient  # type: ignore[union-attr]
    optimizer.fuse_backward(micro_batches=2)
    for step in range(4):
        for part in range(2):
            loss(ps, gradients(ps, 1)[0]).backward()
            is_held = part == 0 and needs and step % 2 == 0
            assert [ps[key].grad is not None for key in SHAPES] == [is_held] * 3 + [part == 0]
        optimizer.step()


def chain(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 12)).to(
        dtype
    )


def batch(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(3), dtype=dtype)


@pytest.mark.parametrize(
    "make_it", [AdamW, lambda model: GaLore(model, rank=4), lambda model: Fira(model, rank=4)]
)
def test_one_gradient_is_alive_at_a_time(make_it: type) -> None:
    model, alive = chain(), list[int]()

    def count(p: nn.Parameter) -> None:
        alive.append(sum(q.grad is not None for q in model.parameters()))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)
    optimizer: Optimizer = make_it(model)
    model(batch()).square().sum().backward()
    assert alive == [1, 2, 3, 4, 5, 6]
    optimizer.zero_grad()
    alive.clear()
    optimizer.fuse_backward()
    model(batch()).square().sum().backward()
    assert alive == [1] * 6


@pytest.mark.parametrize("limit", [1e-2, 1e6])
@pytest.mark.parametrize("name", [name for name in PROJECTING_BACK if name != "QGaLore"])
def test_clipping_by_the_global_norm_is_that_of_torch(name: str, limit: float) -> None:
    # The released methods decompose in float32, in which a scaled gradient is rounded otherwise.
    tolerance = 1e-12 if limit > 1 else 1e-5
    plain, fused = (parameters(torch.float64) for _ in range(2))
    ours, theirs = (make(name, ps, store="fp32") for ps in (fused, plain))
    updates = ours.fuse_backward(clip=limit)
    for step in gradients(plain, 5):
        loss(fused, step).backward()
        norm = updates.clip()
        updates.apply()
        for key, p in plain.items():
            p.grad = step[key].clone() if key in step else None
        expected = nn.utils.clip_grad_norm_(list(plain.values()), limit)
        theirs.step()
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
        assert norm is updates.norm
    assert apart(values(fused), values(plain)) < tolerance


def test_while_they_wait_to_be_clipped_projected_gradients_are_small() -> None:
    ps = parameters(shapes=SHAPES)
    optimizer = make("GaLore", ps)
    optimizer.fuse_backward(clip=1.0)
    loss(ps, gradients(ps, 1)[0]).backward()
    assert [p.grad is None for p in ps.values()] == [True, True, True, False]


REFUSED = {
    "several, clipped": ("GaLore", {"micro_batches": 2, "clip": 1.0}, "cannot be exact.*one micro-batch"),
    "clipped without a subspace": ("AdamW", {"clip": 1.0}, "would keep every gradient.*updates at the step"),
    "clipped with a lift that reads all": ("Fira", {"clip": 1.0}, "would keep every gradient"),
    "no micro-batch": (
        "AdamW",
        {"micro_batches": 0},
        "micro_batches must be a whole number of at least 1, not 0",
    ),
    "half a micro-batch": ("AdamW", {"micro_batches": 1.5}, "micro_batches must be a whole number"),
    "a truth value": ("AdamW", {"micro_batches": True}, "micro_batches must be a whole number.*not True"),
    "a negative limit": ("GaLore", {"clip": -1.0}, "clip must be a finite number of at least 0"),
    "no limit": ("GaLore", {"clip": float("nan")}, "clip must be a finite number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused_and_changes_nothing(case: str) -> None:
    name, options, message = REFUSED[case]
    ps = parameters(shapes=SHAPES)
    optimizer = make(name, ps)
    with pytest.raises(ScrimpError, match=message):
        optimizer.fuse_backward(**options)  # type: ignore[arg-type]
    step = gradients(ps, 1)[0]
    loss(ps, step).backward()
    assert all(p.grad is not None for p in ps.values())
    before = values(ps)
    optimizer.step()
    assert sorted(differing(values(ps), before)) == sorted(ps)


def test_a_parameter_that_is_used_twice_is_updated_once_by_both_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.inner(self.embed(tokens)))
            return logits

    torch.manual_seed(0)
    plain = Tied().double()
    fused = copy.deepcopy(plain)
    ours, theirs = AdamW(fused), AdamW(plain)
    ours.fuse_backward()
    tokens = torch.tensor([1, 2, 3, 1])
    for model, optimizer in ((fused, ours), (plain, theirs)):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(tokens), tokens).backward()
            optimizer.step()
    assert differing(dict(fused.named_parameters()), dict(plain.named_parameters())) == []
    assert ours.state[fused.embed.weight]["step"] == 3


@pytest.mark.parametrize("name", ["AdamW", "GaLore", "Fira"])
def test_an_expert_that_misses_a_micro_batch_is_updated_at_the_end(name: str) -> None:
    plain, fused = (parameters(torch.float64, SHAPES) for _ in range(2))
    ours, theirs = make(name, fused), make(name, plain)
    ours.fuse_backward(micro_batches=2)
    for number in range(4):
        first, second = gradients(plain, 2, seed=number)
        missed = ("tall", "wide", "vector")[number % 3]
        second = {key: g for key, g in second.items() if key != missed}
        loss(fused, first).backward()
        loss(fused, second).backward()
        ours.step()
        both = {key: g + second[key] if key in second else g for key, g in first.items()}
        run(theirs, plain, [both])
    assert {ours.state[p]["step"] for p in fused.values()} == {4}
    assert apart(values(fused), values(plain)) < 1e-12


def test_a_layer_that_sleeps_stays_and_is_updated_when_it_wakes_up() -> None:
    ps = parameters(shapes=SHAPES)
    ps["tall"].requires_grad_(False)
    optimizer = make("GaLore", ps)
    optimizer.fuse_backward()
    assert not ps["tall"].requires_grad
    before = values(ps)
    steps = gradients(ps, 1) * 2
    loss(ps, steps[0]).backward()
    optimizer.step()
    assert sorted(differing(values(ps), before)) == ["experts", "vector", "wide"]
    ps["tall"].requires_grad_(True)
    loss(ps, steps[1]).backward()
    assert differing(values(ps), before) == sorted(ps)
    assert optimizer.state[ps["tall"]]["step"] == 1


def test_more_backward_passes_than_were_announced_are_an_error_that_says_what_to_do() -> None:
    ps = parameters(shapes=SHAPES)
    optimizer = make("AdamW", ps)
    optimizer.fuse_backward()
    step = gradients(ps, 1)[0]
    loss(ps, step).backward()
    with pytest.raises(ScrimpError, match=r"got more than the 1 backward passes.*call step"):
        loss(ps, step).backward()
    optimizer.zero_grad()
    loss(ps, step).backward()
    optimizer.step()


@pytest.mark.parametrize("options", [{"micro_batches": 2}, {"clip": 1.0}], ids=str)
def test_gradients_that_are_dropped_leave_no_trace(options: dict[str, float]) -> None:
    plain, fused = (parameters(torch.float64, SHAPES) for _ in range(2))
    ours, theirs = make("GaLore", fused), make("GaLore", plain)
    updates, other = (optimizer.fuse_backward(**options) for optimizer in (ours, theirs))  # type: ignore[arg-type]
    loss(fused, gradients(fused, 1, seed=9)[0]).backward()
    ours.zero_grad()
    for step in gradients(plain, 2):
        for ps, optimizer in ((fused, ours), (plain, theirs)):
            for _ in range(updates.micro_batches):
                loss(ps, step).backward()
            optimizer.step()
    assert float(updates.norm) == float(other.norm)
    # The basis that was chosen for what was dropped is chosen again.
    assert apart(values(fused), values(plain)) < 1e-12


def test_an_error_within_the_model_leaves_what_was_not_reached() -> None:
    ps = parameters(shapes={"a": (24, 16), "b": (16, 24)})
    optimizer = make("AdamW", ps)
    optimizer.fuse_backward()

    def fail(g: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no more")

    before = values(ps)
    middle = torch.ones(8, 24, dtype=torch.float32) @ ps["a"]
    middle.register_hook(fail)
    with pytest.raises(RuntimeError, match="no more"):
        (middle @ ps["b"]).sum().backward()
    assert differing(values(ps), before) == ["b"]
    optimizer.zero_grad()
    ((torch.ones(8, 24) @ ps["a"]) @ ps["b"]).sum().backward()
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in ps.values()] == [1, 2]


def test_the_norm_is_that_of_all_gradients() -> None:
    ps = parameters(shapes=SHAPES)
    ps["wide"] = nn.Parameter(ps["wide"].detach().double())
    optimizer = make("Fira", ps)
    updates = optimizer.fuse_backward()
    for step in gradients(ps, 2):
        loss(ps, step).backward()
        optimizer.step()
        expected = torch.stack([g.double().norm() for g in step.values()]).norm()
        assert float(updates.norm) == pytest.approx(float(expected), rel=1e-6)


def test_the_norm_counts_an_expert_that_missed_a_micro_batch() -> None:
    ps = parameters(torch.float64, SHAPES)
    optimizer = make("AdamW", ps)
    updates = optimizer.fuse_backward(micro_batches=2)
    step = gradients(ps, 1)[0]
    loss(ps, step).backward()
    loss(ps, {"tall": step["tall"]}).backward()
    optimizer.step()
    both = {**step, "tall": 2 * step["tall"]}
    expected = torch.stack([g.norm() for g in both.values()]).norm()
    assert float(updates.norm) == pytest.approx(float(expected), rel=1e-12)


def test_two_optimizers_inside_one_backward_pass_are_an_error() -> None:
    ps = parameters(shapes=SHAPES)
    first, second = make("AdamW", ps), make("GaLore", ps)
    first.fuse_backward()
    second.fuse_backward()
    with pytest.raises(ScrimpError, match="no gradient left: another optimizer took it"):
        loss(ps, gradients(ps, 1)[0]).backward()


def test_what_sleeps_in_a_subspace_keeps_no_gradient_alive() -> None:
    ps = parameters(shapes={f"w{i}": (24, 16) for i in range(4)})
    optimizer = Frugal(list(ps.items()), density=0.5, residual="none")
    updates = optimizer.fuse_backward(clip=1.0)
    loss(ps, gradients(ps, 1)[0]).backward()
    kept = [small.untyped_storage().nbytes() for small in updates._small.values()]
    assert sorted(kept) == [0, 0, 4 * 24 * 16, 4 * 24 * 16]


def test_rates_are_read_from_the_groups_as_they_are_after_loading_and_adding() -> None:
    ps = parameters(shapes=SHAPES)
    optimizer = make("AdamW", ps, weight_decay=0.0)
    optimizer.fuse_backward()
    step = gradients(ps, 1)[0]
    loss(ps, step).backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    new = nn.Parameter(torch.ones(5))
    optimizer.add_param_group({"params": [("new", new)], "lr": 0.5, "weight_decay": 0.0})
    for group in optimizer.param_groups[:2]:
        group["lr"] = 0.0
    before = values(ps)
    (loss(ps, step) + new.sum()).backward()
    optimizer.step()
    assert differing(values(ps), before) == []
    assert torch.allclose(new, torch.full((5,), 0.5))


def test_updates_go_back_to_the_step() -> None:
    ps = parameters(shapes=SHAPES)
    optimizer = make("AdamW", ps)
    optimizer.fuse_backward()
    optimizer.fuse_backward(micro_batches=2)  # instead of the first
    optimizer.unfuse_backward()
    before = values(ps)
    loss(ps, gradients(ps, 1)[0]).backward()
    assert differing(values(ps), before) == []
    optimizer.step()
    assert differing(values(ps), before) == sorted(ps)


@pytest.mark.parametrize("name", PROJECTING_BACK)
def test_a_bad_gradient_among_micro_batches_spoils_nothing(name: str) -> None:
    ps = parameters(shapes=SHAPES)
    optimizer = make(name, ps)
    optimizer.fuse_backward(micro_batches=2)
    steps = gradients(ps, 2) + gradients(ps, 2, seed=5)
    for step in steps[:2]:
        loss(ps, steps[0]).backward()
        loss(ps, {**steps[0], **step}).backward()
        optimizer.step()
    before = values(ps)
    for first, second in ((steps[0]["tall"], float("inf")), (float("nan"), steps[0]["tall"])):
        for part in (first, second):
            (ps["tall"] * part).sum().backward()
        optimizer.step()
        assert differing(values(ps), before) == []
    loss(ps, steps[0]).backward()
    loss(ps, steps[0]).backward()
    optimizer.step()
    assert "tall" in differing(values(ps), before)
    assert all(p.isfinite().all() for p in ps.values())


@pytest.mark.parametrize("name", PROJECTING_BACK)
def test_micro_batches_reach_weights_that_are_held_in_codes(name: str) -> None:
    shapes = {"tall": (48, 32), "wide": (32, 48)}
    codec = Affine8(group=32, dtype=torch.float32)
    coded = {
        key: nn.Parameter(Int8Weight.of(p.detach(), codec)) for key, p in parameters(shapes=shapes).items()
    }
    plain = {key: nn.Parameter(p.detach().dequantize()) for key, p in coded.items()}
    optimizers = [make(name, ps, store="fp32", lr=0.01) for ps in (coded, plain)]
    for optimizer in optimizers:
        optimizer.fuse_backward(micro_batches=2)
    for number in range(4):
        parts = gradients(plain, 2, seed=number)
        for ps, optimizer in zip((coded, plain), optimizers, strict=True):
            for part in parts:
                torch.autograd.backward([ps[key] for key in part], list(part.values()))
            optimizer.step()
    # Each of four steps rounds to a neighbour among 256 numbers from one end of a group to the other.
    for key, p in plain.items():
        step = 2 * p.detach().abs().max() / 255
        assert (coded[key].detach().dequantize() - p.detach()).abs().max() < 6 * step


def test_dct_with_feedback_keeps_whole_gradients_and_without_it_does_not() -> None:
    for feedback, expected in ((True, [False]), (False, [True])):
        ps = parameters(shapes={"tall": (24, 16)})
        optimizer = DCTAdamW(
            [{"params": list(ps.values()), "rank": 4}], refresh_every=5, error_feedback=feedback
        )
        run(optimizer, ps, gradients(ps, 1))
        ps["tall"].grad = None
        optimizer.fuse_backward(micro_batches=2)
        loss(ps, gradients(ps, 1)[0]).backward()
        assert [p.grad is None for p in ps.values()] == expected


def test_every_projecting_method_is_counted_among_one_kind_or_the_other() -> None:
    rest = {name for name in EVERY if is_projecting(name)} - set(PROJECTING_BACK)
    assert {name.split()[0] for name in PROJECTING_BACK} == {
        "GaLore", "GaLore8bit", "QGaLore", "NaturalGaLore", "DCTAdamW", "Frugal",
    }  # fmt: skip
    assert {name.split()[0] for name in rest} == {"Fira", "Apollo", "ApolloMini", "Frugal", "DCTAdamW"}
