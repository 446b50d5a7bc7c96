"""The laws that every optimizer obeys, whatever its pieces, and what it says to what it cannot do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.optim import methods
from tests.optim.methods import (
    EVERY,
    MATRICES,
    apart,
    differing,
    gradients,
    is_projecting,
    make,
    parameters,
    run,
    values,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from scrimp.base.errors import ScrimpError
from scrimp.optim import (
    Adafactor,
    AdamW,
    Composition,
    Fira,
    Frugal,
    GaLore,
    Lion,
    Optimizer,
)
from scrimp.optim.lifts.back import ProjectBack
from scrimp.optim.projectors.identity import Identity
from scrimp.optim.rules.adam import Adam
from scrimp.optim.stores.full import Full
from scrimp.weights.affine8 import Affine8
from scrimp.weights.int8_weight import Int8Weight

SHAPES = {"tall": (24, 16), "wide": (16, 24), "experts": (3, 18, 12), "vector": (7,)}

# Apollo draws by torch's generators where it is to draw what was released, which goes by layout and device.
OURS = [name for name in EVERY if name != "Apollo released"]


# ---- laws ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_moves_by_finite_amounts_as_its_gradient_says(name: str, dtype: torch.dtype) -> None:
    ps = parameters(dtype)
    before = values(ps)
    optimizer = make(name, ps, lr=0.01)
    run(optimizer, ps, gradients(ps, 5))
    assert all(p.isfinite().all() and p.dtype == dtype for p in ps.values())
    assert ps.keys() - differing(values(ps), before) <= {"scalar"}  # whose steps may round to nothing


@pytest.mark.parametrize("name", EVERY)
def test_climbing_is_descending_on_the_negative(name: str) -> None:
    up, down = parameters(), parameters()
    steps = gradients(up, 5)
    run(make(name, up, maximize=True), up, steps)
    run(make(name, down), down, [{key: -g for key, g in step.items()} for step in steps])
    # Torch's kernel treats what is descended alone; it rounds elsewhere.
    assert apart(values(up), values(down)) < 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_a_rate_of_zero_moves_the_state_and_not_the_weights(name: str) -> None:
    still, plain = parameters(), parameters()
    steps = gradients(still, 4)
    waiting, other = make(name, still, lr=0.0), make(name, plain, lr=0.01)
    before = values(still)
    run(waiting, still, steps[:1])
    run(other, plain, steps[:1])
    assert {waiting.state[p]["step"] for p in still.values()} == {1}
    if name != "Adafactor with momentum":  # which averages what the rate was multiplied with
        assert differing(methods.state(waiting, still), methods.state(other, plain)) == []
    assert differing(values(still), before) == []


@pytest.mark.parametrize("name", EVERY)
def test_a_rate_in_a_tensor_is_the_rate(name: str) -> None:
    tensor, number = parameters(), parameters()
    steps = gradients(tensor, 4)
    first, second = make(name, tensor, lr=torch.tensor(0.015625)), make(name, number, lr=0.015625)
    run(first, tensor, steps)
    run(second, number, steps)
    assert differing(values(tensor), values(number)) == []


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("name", EVERY)
def test_a_gradient_that_is_not_finite_changes_nothing_and_the_run_goes_on(name: str, bad: float) -> None:
    resets = "reset_every" in EVERY[name] or name.startswith("Frugal")  # by the calendar
    ps = parameters()
    optimizer = make(name, ps, lr=0.01)
    steps = gradients(ps, 5)
    run(optimizer, ps, steps[:2])
    for _ in range(2):  # the first at a refresh
        before, kept = values(ps), tensors(optimizer, ps)
        run(optimizer, ps, [{key: torch.full_like(p, bad) for key, p in ps.items()}])
        assert differing(values(ps), before) == []
        assert resets or differing(tensors(optimizer, ps), kept) == []
    run(optimizer, ps, steps[2:])
    assert all(p.isfinite().all() for p in ps.values())
    assert all(v.isfinite().all() for v in tensors(optimizer, ps).values() if v.is_floating_point())
    assert set(differing(values(ps), before)) == set(ps)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("name", EVERY)
def test_an_element_that_is_not_finite_stays_as_it_is_and_spoils_no_other(name: str, bad: float) -> None:
    ps = parameters()
    optimizer = make(name, ps, lr=0.01)
    steps = gradients(ps, 5)
    run(optimizer, ps, steps[:2])
    before = values(ps)
    for g in steps[2].values():
        g.view(-1)[g.numel() // 2] = bad
    run(optimizer, ps, steps[2:3])
    assert all(p.view(-1)[p.numel() // 2] == before[key].view(-1)[p.numel() // 2] for key, p in ps.items())
    run(optimizer, ps, steps[3:])
    assert all(p.isfinite().all() for p in ps.values())
    assert all(v.isfinite().all() for v in tensors(optimizer, ps).values() if v.is_floating_point())


def tensors(optimizer: Optimizer, ps: methods.Parameters) -> dict[str, Tensor]:
    """Return the tensors that are kept."""
    found = methods.state(optimizer, ps).items()
    return {key: value for key, value in found if isinstance(value, Tensor)}


@pytest.mark.parametrize("name", EVERY)
def test_one_bad_gradient_stops_no_other_matrix(name: str) -> None:
    ps = parameters()
    optimizer = make(name, ps, lr=0.01)
    step = gradients(ps, 1)[0]
    run(optimizer, ps, [step])
    before = values(ps)
    run(optimizer, ps, [{**step, "tall": torch.full_like(ps["tall"], math.nan)}])
    moved = set(differing(values(ps), before))
    assert "tall" not in moved
    # Torch's kernel takes all parameters of a group at once, or none.
    assert {"wide", "experts", "long"} <= moved or optimizer.plan_of(ps["wide"]).composition == plain_adamw()


def plain_adamw() -> Composition:
    return Composition(rule=Adam(), store=Full(), basis_store=Full())


@pytest.mark.parametrize("name", EVERY)
def test_zero_gradients_are_gradients_and_poison_nothing(name: str) -> None:
    ps = parameters()
    optimizer = make(name, ps, lr=0.01)
    zeros = [{key: torch.zeros_like(p) for key, p in ps.items()}]
    run(optimizer, ps, zeros * 2 + gradients(ps, 3) + zeros)
    assert all(p.isfinite().all() for p in ps.values())
    assert all(v.isfinite().all() for v in tensors(optimizer, ps).values() if v.is_floating_point())


@pytest.mark.parametrize("name", OURS)
def test_how_weights_and_gradients_lie_in_memory_does_not_matter(name: str) -> None:
    dense, strided = (parameters(torch.float64) for _ in range(2))
    lying = {
        "tall": lambda t: t.t().contiguous().t(),
        "wide": lambda t: torch.stack([t, t], -1)[..., 0],
        "experts": lambda t: t.mT.contiguous().mT,
        "kernel": lambda t: t.contiguous(memory_format=torch.channels_last),
        "table": lambda t: t.t().contiguous().t(),
    }
    for key, lay in lying.items():
        strided[key].data = lay(strided[key].data)
        assert not strided[key].is_contiguous()
    ours, theirs = make(name, strided), make(name, dense)
    steps = gradients(dense, 3)  # until a second subspace, whose vectors have other signs when released
    for step in steps:
        for key, p in strided.items():
            p.grad = None if key not in step else step[key].clone()
            if p.grad is not None and key in ("square", *lying):
                p.grad = lying.get(key, lambda t: t.t().contiguous().t())(p.grad)
        ours.step()
    run(theirs, dense, steps)
    strides = {key: p.stride() for key, p in strided.items()}
    assert strides["kernel"] != dense["kernel"].stride() and strides["tall"] != dense["tall"].stride()
    # A matrix is decomposed in float32 as it lies, to other last places, which four bits may blow up.
    tolerance = 1e-2 if name.startswith("QGaLore") else 1e-5 if is_projecting(name) else 1e-12
    assert apart(values(strided), values(dense)) < tolerance


@pytest.mark.parametrize(
    "name",
    ["AdamW", "Lion", "SM3", "AdamMini", "StableSPAM", "GaLore", "Fira", "NaturalGaLore paper", "DCTAdamW"],
)
def test_stacked_experts_are_matrices_of_their_own(name: str) -> None:
    stack = parameters(torch.float64, {"experts": (3, 18, 12)})
    alone = {f"expert {i}": nn.Parameter(w.detach().clone()) for i, w in enumerate(stack["experts"])}
    steps = gradients(stack, 7)
    run(make(name, stack), stack, [step for step in steps if step])
    parts = [{f"expert {i}": g for i, g in enumerate(step["experts"])} for step in steps if step]
    run(make(name, alone), alone, parts)
    whole = {f"expert {i}": w for i, w in enumerate(stack["experts"].detach())}
    # Under "paper" each matrix has random columns of its own.
    assert apart(whole, values(alone)) < (1e-2 if "paper" in name else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_weights_that_are_held_in_codes_are_moved_by_good_gradients_alone(
    name: str, dtype: torch.dtype
) -> None:
    codec = Affine8(group=32, dtype=dtype)
    plain = parameters(dtype, {"tall": (48, 32), "wide": (32, 48)})
    ps = {key: nn.Parameter(Int8Weight.of(p.detach(), codec)) for key, p in plain.items()}
    optimizer = make(name, ps, lr=0.05)
    for bad in (False, True):
        before = {key: p.detach().dequantize() for key, p in ps.items()}
        for step in gradients(plain, 1) * 3:
            for key, p in ps.items():
                p.grad = step[key] * (math.nan if bad else 1.0)
            optimizer.step()
        after = {key: p.detach().dequantize() for key, p in ps.items()}
        assert differing(after, before) == ([] if bad else ["tall", "wide"])


@pytest.mark.parametrize("name", ["Lion", "Frugal"])
def test_narrow_weights_move_by_steps_far_below_their_spacing(name: str) -> None:
    # Signs alone move them, by 1/50 of what is between neighbours in bfloat16 above 1, 200 times.
    spacing, steps = 2.0**-7, 200
    p = nn.Parameter(torch.full((32, 32), 1.5, dtype=torch.bfloat16))
    option: dict[str, Any] = {"density": 0.0} if name == "Frugal" else {}
    optimizer = methods.method(name)([{"params": [p], **option}], lr=spacing / 50)
    p.grad = torch.ones_like(p)
    for _ in range(steps):
        optimizer.step()
    moved = (1.5 - p.detach().double()) / spacing
    deviation = math.sqrt(steps * 0.02 * 0.98)  # of a count of 200 chances of 1 in 50
    assert abs(float(moved.mean()) - 4) < 5 * deviation / 32
    assert deviation / 1.1 < float(moved.std()) < deviation * 1.1


def test_parameters_without_elements_are_left_alone() -> None:
    for name in EVERY:
        empty = nn.Parameter(torch.zeros(0, 3))
        optimizer = methods.method(name)([{"params": [empty]}], **EVERY[name])
        empty.grad = torch.zeros(0, 3)
        optimizer.step()
        assert optimizer.state[empty]["step"] == 1


def test_parameters_without_gradients_have_no_state_and_do_not_move() -> None:
    ps = parameters(shapes=SHAPES)
    frozen = nn.Parameter(torch.ones(5, 5), requires_grad=False)
    optimizer = AdamW([*ps.values(), frozen])
    run(optimizer, ps, [{"tall": torch.ones(24, 16)}])
    assert list(optimizer.state) == [ps["tall"]]
    assert torch.equal(frozen, torch.ones(5, 5))


# ---- identities ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["torch", "hf"])
def test_the_identity_projected_back_is_the_plain_rule(convention: Any) -> None:
    rule = Adam(convention=convention)
    plain = Composition(rule=rule, store=Full(), basis_store=Full())
    through = Composition(
        rule=rule, projector=Identity(), lift=ProjectBack(1.0), store=Full(), basis_store=Full()
    )
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = (parameters(torch.float64, MATRICES) for _ in range(2))
    steps = gradients(ours, 10)
    run(Optimizer(list(ours.items()), compose=lambda _: through, options=options), ours, steps)
    run(Optimizer(list(theirs.items()), compose=lambda _: plain, options=options), theirs, steps)
    assert apart(values(ours), values(theirs)) < 1e-14
    if convention == "torch":
        other = parameters(torch.float64, MATRICES)
        run(torch.optim.AdamW(other.values(), **options, fused=False), other, steps)
        assert apart(values(ours), values(other)) < 1e-13


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, where it compiles
def test_compiled_arithmetic_is_the_eager_one_but_for_rounding() -> None:
    tall, wide = {"tall": (24, 16)}, {"wide": (20, 30)}  # projected from either side; Lion projects nothing
    for name, shapes in (("Lion", tall), ("GaLore paper", tall), ("Fira", wide)):
        eager, compiled = (parameters(shapes=shapes) for _ in range(2))
        steps = gradients(eager, 4)
        for params, compiles in ((eager, False), (compiled, True)):
            optimizer = make(name, params, weight_decay=0.1, compile=compiles)
            optimizer.leave_kernels_out()
            run(optimizer, params, steps)
        assert apart(values(compiled), values(eager)) < 1e-5


# ---- what torch's optimizers can do -------------------------------------------------------------------


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("fused", [False, True])
def test_schedulers_move_rates_and_betas_as_they_do_torchs(schedule: str, fused: bool) -> None:
    ours, theirs = (parameters(torch.float64, SHAPES) for _ in range(2))
    steps = gradients(ours, 6)
    optimizer = AdamW(list(ours.values()), lr=0.1, weight_decay=0.1)
    other = torch.optim.AdamW(theirs.values(), lr=0.1, weight_decay=0.1)
    if fused:
        optimizer.fuse_backward()
    clocks = [SCHEDULES[schedule](each) for each in (optimizer, other)]
    for step in steps:
        if fused:
            methods.loss(ours, step).backward()
            optimizer.step()
        else:
            run(optimizer, ours, [step])
        run(other, theirs, [step])
        for clock in clocks:
            clock.step()
    assert optimizer.param_groups[0]["betas"] == other.param_groups[0]["betas"]
    assert apart(values(ours), values(theirs)) < 1e-12


@pytest.mark.parametrize("name", ["AdamW", "GaLore", "Fira", "Lion"])
def test_a_grad_scaler_is_obeyed_at_the_step(name: str) -> None:
    scaled, plain = (parameters(shapes=SHAPES) for _ in range(2))
    ours, theirs = make(name, scaled), make(name, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, step in enumerate(gradients(scaled, 3)):
        overflows = number == 1  # so that the step is left out
        if not overflows:
            run(theirs, plain, [step])
        ours.zero_grad()
        scaler.scale(methods.loss(scaled, step) * (math.inf if overflows else 1.0)).backward()
        scaler.step(ours)
        scaler.update()
    assert differing(values(scaled), values(plain)) == []


@pytest.mark.parametrize("options", [{}, {"micro_batches": 2}, {"clip": 1.0}], ids=str)
def test_a_grad_scaler_is_refused_inside_the_backward_pass(options: Any) -> None:
    ps = parameters(shapes=SHAPES)
    optimizer = make("GaLore", ps)
    optimizer.fuse_backward(**options)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(methods.loss(ps, gradients(ps, 1)[0])).backward()
    with pytest.raises(ScrimpError, match=r"GradScaler finds no gradients.*unfuse_backward"):
        scaler.step(optimizer)


def test_a_group_that_is_added_is_treated_by_its_own_options() -> None:
    ps = parameters(shapes=SHAPES)
    optimizer = GaLore([{"params": [ps["tall"]], "rank": 4}], lr=0.01)
    run(optimizer, ps, gradients({"tall": ps["tall"]}, 1))
    optimizer.add_param_group({"params": [ps["wide"]], "rank": 2, "update_proj_gap": 7})
    optimizer.add_param_group({"params": [ps["vector"]], "lr": 0.5})
    assert [group["rank"] for group in optimizer.param_groups] == [4, 2, None]
    assert optimizer.param_groups[1]["refresh_every"] == 7
    before = values(ps)
    run(optimizer, ps, gradients(ps, 1))
    assert differing(values(ps), before) == ["tall", "vector", "wide"]
    assert optimizer.state[ps["wide"]]["exp_avg"].shape == (24, 2)
    assert [optimizer.state[ps[key]]["step"] for key in ("tall", "wide")] == [2, 1]


def test_a_group_that_is_refused_is_not_added() -> None:
    ps = parameters(shapes=SHAPES)
    optimizer = GaLore([{"params": [ps["tall"]], "rank": 4}])
    with pytest.raises(ScrimpError, match=r"parameter 0.*16"):
        optimizer.add_param_group({"params": [ps["wide"]], "rank": 17})
    assert len(optimizer.param_groups) == 1
    run(optimizer, ps, gradients(ps, 1))


def test_a_closure_is_called_with_gradients_enabled_and_its_loss_returned() -> None:
    ps = parameters(shapes=SHAPES)
    step = gradients(ps, 1)[0]
    for fused in (False, True):
        optimizer = make("AdamW", ps)
        if fused:
            optimizer.fuse_backward()
        before = values(ps)

        def closure(optimizer: Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = methods.loss(ps, step)
            value.backward()
            return value

        expected = methods.loss(ps, step).item()
        assert optimizer.step(closure).item() == expected
        assert sorted(differing(values(ps), before)) == sorted(ps)


def test_gradients_are_set_to_none_or_to_zero() -> None:
    ps = parameters(shapes=SHAPES)
    optimizer = make("AdamW", ps)
    run(optimizer, ps, gradients(ps, 1))
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in ps.values())
    optimizer.zero_grad()
    assert all(p.grad is None for p in ps.values())


def test_a_step_without_any_gradient_does_nothing() -> None:
    ps = parameters(shapes=SHAPES)
    for name in ("AdamW", "GaLore"):
        optimizer = make(name, ps)
        before = values(ps)
        optimizer.step()
        assert differing(values(ps), before) == [] and not optimizer.state


class NoReads(TorchDispatchMode):
    """Fails where a tensor's values are read on the host, for which a GPU would have to be waited for."""

    READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.READS, f"{func} reads a tensor"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OURS)
def test_no_step_waits_for_a_gpu(name: str) -> None:
    ps = parameters()
    optimizer = make(name, ps)
    steps = gradients(ps, 7)
    with NoReads():
        run(optimizer, ps, steps)
        with pytest.raises(AssertionError, match="reads a tensor"):
            ps["scalar"].item()


@pytest.mark.parametrize("name", OURS)
def test_all_that_a_step_makes_is_on_the_device_of_its_parameter(name: str) -> None:
    # Tensors without values go by the rules of a GPU: nothing but scalars may come from the CPU.
    ps = {key: nn.Parameter(p.detach().to("meta")) for key, p in parameters(shapes=SHAPES).items()}
    optimizer = make(name, ps)
    for _ in range(4):
        for p in ps.values():
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert {value.device.type for value in tensors(optimizer, ps).values()} <= {"meta"}


def test_rates_of_groups_are_their_own() -> None:
    ps = parameters(shapes={"a": (4, 4), "b": (4, 4)})
    before = values(ps)
    optimizer = AdamW([{"params": [ps["a"]], "lr": 0.5}, {"params": [ps["b"]]}], lr=0.0)
    run(optimizer, ps, gradients(ps, 1))
    assert differing(values(ps), before) == ["a"]


# ---- bad input ----------------------------------------------------------------------------------------


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (24, 16)))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "rank 0": (lambda: GaLore([matrix()], rank=0), "rank must be a whole number of at least 1, not 0"),
    "rank -1": (lambda: Fira([matrix()], rank=-1), "rank must be a whole number of at least 1, not -1"),
    "rank 2.5": (lambda: GaLore([matrix()], rank=2.5), r"rank must be a whole number.*not 2.5 \(float\)"),  # type: ignore[arg-type]
    "rank True": (lambda: GaLore([matrix()], rank=True), r"rank must be a whole number.*not True \(bool\)"),
    "rank '8'": (lambda: GaLore([matrix()], rank="8"), r"rank must be a whole number.*not '8' \(str\)"),  # type: ignore[arg-type]
    "rank too large": (
        lambda: GaLore([{"params": [("q_proj", matrix())], "rank": 17}]),
        "q_proj.*16",
    ),
    "rank too large, paper": (
        lambda: Fira([{"params": [("q_proj", matrix(8, 30))], "rank": 9}], variant="paper"),
        "q_proj.*8",
    ),
    "rank of a vector": (
        lambda: GaLore([{"params": [("bias", matrix(7))], "rank": 4}]),
        "bias has 1 dimension, and only matrices can be projected: put it into a group without rank",
    ),
    "period 0": (
        lambda: GaLore([matrix()], refresh_every=0),
        "refresh_every must be a whole number of at least 1",
    ),
    "density 2": (lambda: Frugal([matrix()], density=2.0), "density must be a number from 0 to 1"),
    "store": (lambda: AdamW([matrix()], store="8bits"), "store: there is no '8bits'.*8bit"),
    "words of two packages": (
        lambda: GaLore([{"params": [matrix()], "rank": 4, "update_proj_gap": 3, "side": "std"}]),
        "group 0 has 'side' and 'update_proj_gap'.*write 'refresh_every'",
    ),
    "an option that is not": (
        lambda: AdamW([{"params": [matrix()], "rnk": 4}]),
        "'rnk', which this optimizer",
    ),
    "negative rate": (lambda: AdamW([matrix()], lr=-1.0), "lr must be a finite number of at least 0, not -1"),
    "rate nan": (lambda: AdamW([matrix()], lr=math.nan), "lr must be a finite number"),
    "beta 1": (lambda: Lion([matrix()], betas=(0.9, 1.0)), "betas must be numbers"),
    "negative decay": (lambda: Adafactor([matrix()], weight_decay=-0.1), "weight_decay must be"),
    "complex": (lambda: AdamW([nn.Parameter(torch.ones(3, dtype=torch.complex64))]), "is complex.*real view"),
    "no parameters": (lambda: AdamW([]), "no parameters"),
    "twice": (lambda: AdamW([p := matrix(), p]), "same parameter"),
    "side": (lambda: GaLore([matrix()], side="up"), "side must be one of std"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_at_construction_in_one_sentence(case: str) -> None:
    build, message = REFUSED[case]
    with pytest.raises(ScrimpError, match=message) as refused:
        build()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_sparse_gradients_are_refused_by_name(name: str, fused: bool) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = methods.method(name)(table)
    if fused:
        optimizer.fuse_backward()
    with pytest.raises(ScrimpError, match="weight: sparse gradients are not supported"):
        table(torch.tensor([1])).sum().backward()
        optimizer.step()


def test_a_rank_above_some_matrix_of_a_model_leaves_that_one_whole() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 4))
    optimizer = GaLore(
        [("layers.0.q_proj.weight", model[0].weight), ("layers.0.v_proj.weight", model[1].weight)], rank=8
    )
    assert optimizer.plan_of(model[0].weight).composition.projector is not None
    assert optimizer.plan_of(model[1].weight).composition.projector is None
    assert "layers.0.v_proj" in optimizer.describe() and "side, 4" in optimizer.plan_of(model[1].weight).why
