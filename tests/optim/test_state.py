"""What an optimizer keeps: saved, loaded, copied, refused, and counted to the byte."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from tests.optim import methods
from tests.optim.methods import EVERY, NAMED, differing, gradients, make, parameters, run, values
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.optim import SGDM, AdamW, AdamW8bit, Frugal, GaLore, GaLore8bit, Lion, QGaLore
from scrimp.optim.compat import apollo_torch, fira, galore_torch

SPLIT = 5  # between refreshes at 3 and 6, where every matrix but one has taken five steps


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in EVERY), *((name, torch.float64) for name in NAMED)],
    ids=str,
)
def test_a_resumed_run_computes_the_same_bits(name: str, dtype: torch.dtype) -> None:
    ps, steps = parameters(dtype), gradients(parameters(dtype), 8)
    optimizer = make(name, ps)
    run(optimizer, ps, steps[:SPLIT])
    resumed = parameters(dtype)
    for key, p in resumed.items():
        p.data.copy_(ps[key])
    other = make(name, resumed)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert differing(methods.state(other, resumed), methods.state(optimizer, ps)) == []
    run(optimizer, ps, steps[SPLIT:])
    run(other, resumed, steps[SPLIT:])
    assert differing(values(resumed), values(ps)) == []
    assert differing(methods.state(other, resumed), methods.state(optimizer, ps)) == []


@pytest.mark.parametrize("name", EVERY)
def test_state_is_named_tensors_and_whole_numbers_of_the_bytes_that_were_announced(name: str) -> None:
    ps = parameters(torch.bfloat16)
    optimizer = make(name, ps)
    run(optimizer, ps, gradients(ps, 5))
    for p in ps.values():
        held, found = optimizer.state[p], optimizer.plan_of(p)
        assert {type(value) for value in held.values()} <= {Tensor, int}
        tensors = [value for value in held.values() if isinstance(value, Tensor)]
        assert all(value.is_contiguous() for value in tensors)
        kept = sum(value.untyped_storage().nbytes() for value in tensors)
        assert kept == found.state_bytes(held.get("refreshed", 0)), found.target.name
        layout = found.layout(held.get("refreshed", 0))
        assert {key: held[key].dtype for key in layout} == {key: dtype for key, (_, dtype) in layout.items()}


def test_describe_states_the_bytes_of_every_parameter() -> None:
    ps = parameters()
    optimizer = GaLore([{"params": list(ps.values())[:3], "rank": 4}])
    run(optimizer, ps, gradients(ps, 1))
    held = [v for each in optimizer.state.values() for v in each.values() if isinstance(v, Tensor)]
    assert f"{sum(value.nbytes for value in held):,} bytes" in optimizer.describe()


def test_a_loaded_state_is_a_copy_and_leaves_the_file_as_it_was() -> None:
    ps = parameters()
    optimizer = make("GaLore", ps)
    run(optimizer, ps, gradients(ps, 2))
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    run(optimizer, ps, gradients(ps, 2))
    for number, entries in before["state"].items():
        assert differing(saved["state"][number], entries) == []


def test_a_copied_optimizer_goes_its_own_way_to_the_same_bits() -> None:
    ps = parameters()
    optimizer = make("GaLore", ps)
    steps = gradients(ps, 6)
    run(optimizer, ps, steps[:2])
    others, other = copy.deepcopy((ps, optimizer))
    assert vars(other).keys() == vars(optimizer).keys()
    run(optimizer, ps, steps[2:])
    assert differing(values(others), values(ps)) != []
    run(other, others, steps[2:])
    assert differing(values(others), values(ps)) == []


@pytest.mark.parametrize("name", EVERY)
def test_a_pickled_optimizer_goes_on_to_the_same_bits(name: str) -> None:
    ps = parameters()
    optimizer = make(name, ps)
    steps = gradients(ps, 4)
    run(optimizer, ps, steps[:2])
    others, other = pickle.loads(pickle.dumps((ps, optimizer)))  # noqa: S301 - our own
    run(optimizer, ps, steps[2:])
    assert differing(values(others), values(ps)) != []
    run(other, others, steps[2:])
    assert differing(values(others), values(ps)) == []


@pytest.mark.parametrize("kind", [galore_torch.GaLoreAdamW, apollo_torch.APOLLOAdamW, fira.FiraAdamW])
def test_optimizers_by_their_authors_names_are_pickled(kind: Any) -> None:
    group = {"rank": 4, "update_proj_gap": 3, "scale": 0.25, "alpha": 0.25, "proj_type": "std"}
    own = {"scale_type": "channel", "proj": "random"} if kind is apollo_torch.APOLLOAdamW else {}
    del group["scale" if kind is fira.FiraAdamW else "alpha"]
    optimizer = kind([{"params": [parameters()["tall"]], **group, **own}])
    assert pickle.loads(pickle.dumps(optimizer)).describe() == optimizer.describe()  # noqa: S301


def test_a_state_under_fp32_weights_goes_on_under_fp64_ones_and_back() -> None:
    narrow, wide = parameters(), parameters(torch.float64)
    one, two = make("GaLore", narrow), make("GaLore", wide)
    run(one, narrow, gradients(narrow, 2))
    two.load_state_dict(one.state_dict())
    assert two.state[wide["tall"]]["exp_avg"].dtype == torch.float64
    run(two, wide, gradients(wide, 1))
    one.load_state_dict(two.state_dict())
    run(one, narrow, gradients(narrow, 1))
    assert one.state[narrow["tall"]]["exp_avg"].dtype == torch.float32


def test_options_come_with_the_state() -> None:
    ps = parameters()
    optimizer, other = make("AdamW", ps, lr=0.5), make("AdamW", ps, lr=0.25)
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.5, 0.5]


REFUSED = {
    "another rule": (AdamW, Lion, r"group 0.*Adam \+ Full.*is Lion \+ Full"),
    "torch's": (
        torch.optim.AdamW,
        AdamW,
        "group 0 of the state dict is of another optimizer",
    ),
    "another store": (AdamW8bit, AdamW, r"Adam \+ Dynamic8.*is Adam \+ Full"),
    "other options": (
        lambda ps: QGaLore(ps, rank=4),
        lambda ps: GaLore8bit(ps, rank=4),
        "with other options",
    ),
    "another lift": (
        Frugal,
        lambda ps: Frugal(ps, residual="none"),
        r"SignResidual.*ProjectBack.*build it as it was",
    ),
    "another momentum": (
        SGDM,
        lambda ps: SGDM(ps, momentum=0.0),
        "parameter 0: 'momentum_buffer' is not kept both in the state dict and here",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_state_of_another_composition_is_refused_and_nothing_is_loaded(case: str) -> None:
    theirs, ours, message = REFUSED[case]
    ps = parameters(shapes={"w": (24, 16)})
    source, optimizer = theirs(list(ps.values())), ours(list(ps.values()))
    run(source, ps, gradients(ps, 1))
    run(optimizer, ps, gradients(ps, 1))
    before, groups = methods.state(optimizer, ps), copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ScrimpError, match=message):
        optimizer.load_state_dict(source.state_dict())
    assert differing(methods.state(optimizer, ps), before) == []
    assert [{**g, "params": 0} for g in optimizer.param_groups] == [{**g, "params": 0} for g in groups]
    run(optimizer, ps, gradients(ps, 1))


def test_the_state_of_other_shapes_is_refused_by_parameter() -> None:
    small, large = (parameters(shapes={"w": shape}) for shape in ((24, 16), (48, 16)))
    source, optimizer = (AdamW(list(ps.items())) for ps in (small, large))
    run(source, small, gradients(small, 1))
    with pytest.raises(
        ScrimpError, match=r"^w: 'exp_avg' has the shape \(24, 16\) in the state dict and \(48, 16\)"
    ):
        optimizer.load_state_dict(source.state_dict())


def test_a_refused_state_leaves_the_ranks_as_they_were() -> None:
    small, large = (parameters(shapes={"w": shape}) for shape in ((24, 16), (48, 16)))
    source, optimizer = (
        GaLore([{"params": [*ps.items()], "rank": rank}]) for ps, rank in ((small, 4), (large, 6))
    )
    run(source, small, gradients(small, 1))
    before = optimizer.describe()
    with pytest.raises(ScrimpError, match=r"^w: "):
        optimizer.load_state_dict(source.state_dict())
    assert optimizer.describe() == before
    run(optimizer, large, gradients(large, 1))
    assert optimizer.state[large["w"]]["basis"].shape == (16, 6)


def test_the_state_of_other_groups_is_refused() -> None:
    ps = parameters()
    whole, divided = AdamW(list(ps.values())), make("AdamW", ps)
    with pytest.raises(ScrimpError, match=r"groups of \[10\] parameters.*groups of \[6, 4\]"):
        divided.load_state_dict(whole.state_dict())


def test_a_frugal_block_that_falls_asleep_frees_quantised_moments_and_wakes_up_with_them() -> None:
    ps = parameters(shapes={f"w{i}": (96, 64) for i in range(2)})
    optimizer = Frugal(list(ps.values()), density=0.5, order="ascending", refresh_every=1, store="8bit")
    for step, grads in enumerate(gradients(ps, 3)):
        run(optimizer, ps, [{**gradients(ps, 1)[0], **grads}])
        sizes = [optimizer.plan_of(p).state_bytes(optimizer.state[p]["refreshed"]) for p in ps.values()]
        assert [bool(size) for size in sizes] == [step % 2 == 0, step % 2 == 1]
        held = [
            sum(v.nbytes for v in optimizer.state[p].values() if isinstance(v, Tensor)) for p in ps.values()
        ]
        assert held == sizes


def test_a_method_that_draws_blocks_can_be_saved_after_a_group_was_added() -> None:
    ps = parameters(shapes={f"w{i}": (24, 16) for i in range(5)})
    held = list(ps.values())
    optimizer = Frugal([{"params": held[:3], "density": 0.4}], refresh_every=4, order="ascending")
    run(optimizer, ps, gradients(ps, 2))
    optimizer.add_param_group({"params": held[3:], "density": 0.4})
    other = Frugal(
        [{"params": held[:3], "density": 0.4}, {"params": held[3:], "density": 0.4}],
        refresh_every=4,
        order="ascending",
    )
    other.load_state_dict(optimizer.state_dict())
    assert [optimizer.state[p].keys() for p in held] == [other.state[p].keys() for p in held]
    before = [other.state[p].get("step", 0) for p in held]
    assert before == [optimizer.state[p].get("step", 0) for p in held] and any(before)
    run(other, ps, gradients(ps, 4))
    assert all(other.state[p]["step"] > step for p, step in zip(held, before, strict=True))
