"""Runs trained together over one base are the runs that each would have been alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.conftest import Lab, Recorder, write_text

from scrimp.base.errors import ScrimpError
from scrimp.base.ledger import TERMS, Ledger, Moment
from scrimp.build import Base, build, inspect, make_base, prepare
from scrimp.memory.observer import PeakMeter
from scrimp.recipe import replace
from scrimp.training.loop import Loop
from scrimp.training.progress import Progress
from scrimp.training.shared_batches import Demand, pack, rounds_of, step_at
from scrimp.training.shared_loop import Together
from scrimp.training.start import choose_start
from scrimp.training.stopping import Stopper
from scrimp.training.together import Member, check, execute
from scrimp.training.watch import Watch
from scrimp.tuning.together import share

if TYPE_CHECKING:
    from scrimp.recipe import Recipe
    from scrimp.training.run import Run

TUNE = {
    # Below a large eps Adam would make a sign of a gradient that is rounding alone.
    "optimizer.eps": 1e-3,
    "tune.name": "lora",
    "tune.rank": 2,
    "checkpoint.every": 4,
    "evaluation.every": 100,
    "schedule.warmup": 1,
    "schedule.decay": 1,
    "device": "cpu",
}
NOTHING = Ledger((Moment("none", dict.fromkeys(TERMS, 0)),))


@pytest.fixture
def based(lab: Lab) -> Lab:
    """A lab whose model has weights, as an adapter's base must."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(lab.model)).save_pretrained(lab.model)
    return lab


def three(lab: Lab, **changes: Any) -> list[Recipe]:
    """Return recipes that differ in all that jobs may differ in."""
    other = str(write_text(lab.path / "other", seed=1))
    short = {**TUNE, "tune.rank": 3, "seq": 14, "data.path": [other], "seed": 5}
    many = {**TUNE, "tune.name": "rslora", "tune.targets": ["q_proj", "down_proj"], "steps": 15, "batch": 2}
    made = (lab.recipe(**{"steps": 6, **each, **changes}) for each in (TUNE, short, many))
    return [replace(each, {"model.init": "weights"}) for each in made]


def loop_of(lab: Lab, recipe: Recipe, base: Base) -> Loop:
    """Return a loop that writes nothing, over a base that it shares."""
    quiet = lab.reporter()
    prepared = prepare(inspect(recipe, cache=lab.cache), quiet.phase)
    own = Base(share(base.model), base.fingerprint)
    job = build(prepared, recipe, NOTHING, empty=True, say=quiet.phase, over=own)
    watch = Watch(job, PeakMeter(job.device))
    return Loop(job=job, progress=Progress(), watch=watch, reporter=quiet, stopper=Stopper())


def base_of(lab: Lab, recipe: Recipe) -> Base:
    return make_base(prepare(inspect(recipe, cache=lab.cache), lab.reporter().phase), recipe)


KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "logits": ({}, 60),
    "one-slot": ({}, 1000),
    "chunked": ({"activations.loss": "chunked", "activations.name": "recompute"}, 60),
    "isolated": ({"data.boundaries": "isolate"}, 60),
    "nf4": ({"weights.name": "nf4"}, 60),
}


@pytest.mark.parametrize(("changes", "tokens"), KINDS.values(), ids=KINDS)
def test_each_is_its_own_single_run(based: Lab, changes: dict[str, Any], tokens: int) -> None:
    # In fp64 nothing is left; in fp32 a run's own micro-batches, cut otherwise, differ as much.
    tolerance = 1e-4 if "weights.name" in changes else 1e-9
    given = three(based, **changes)
    base = base_of(based, given[0])
    if tolerance == 1e-9:
        base.model.double()
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    alone, shared = ([loop_of(based, recipe, base) for recipe in given] for _ in range(2))
    for loop in alone:
        loop.run(loop.job.recipe.steps or 0)
    rounds = rounds_of([6, 6, 15])
    Together.over(
        base.model, shared, tokens=tokens, rounds=rounds, reporter=based.reporter(), stopper=Stopper()
    ).run()
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours.progress.step == theirs.progress.step
        assert ours.progress.tokens == theirs.progress.tokens
        for name, expected in theirs.job.stored().items():
            difference = torch.linalg.norm(ours.job.stored()[name] - expected)
            assert difference <= tolerance * torch.linalg.norm(expected), name
        assert ours.progress.last is not None and theirs.progress.last is not None
        assert ours.progress.last.loss == pytest.approx(theirs.progress.last.loss, rel=1e-5)
        assert any("lora_B" in name and tensor.any() for name, tensor in ours.job.stored().items())
    assert all(torch.equal(p, before[name]) for name, p in base.model.named_parameters())


def train(
    lab: Lab,
    given: dict[str, Recipe],
    out: str,
    *,
    reporter: Recorder | None = None,
    resume: bool = False,
) -> list[Run]:
    members = []
    for name, recipe in given.items():
        start = choose_start(recipe, out=lab.path / out / name, resume=resume)
        members.append(Member(name=name, start=start, inputs=inspect(start.recipe, cache=lab.cache)))
    return execute(members, lab.path / out, reporter or lab.reporter(), tokens=100)


def test_a_killed_run_goes_on_with_the_same_bits(based: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "a": based.recipe(**{**TUNE, "memory": "auto", "steps": 6, "checkpoint.every": 2}),
        "b": based.recipe(**{**TUNE, "memory": "auto", "steps": 6, "checkpoint.every": 3, "seed": 3}),
    }
    train(based, given, "whole")

    real: Callable[..., Any] = Loop.save

    def save(loop: Loop, *, scheduled: bool) -> Any:
        if loop.progress.step == 4 and loop.job.recipe.seed == 3:
            raise KeyboardInterrupt  # the first run has saved step 4, and this one has not
        return real(loop, scheduled=scheduled)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "save", save)
        train(based, given, "run")
    train(based, given, "run", resume=True)
    for name in given:
        assert based.rows(f"run/{name}") == based.rows(f"whole/{name}")
        ours, theirs = (
            load_file(based.path / out / name / "adapter" / "adapter_model.safetensors")
            for out in ("run", "whole")
        )
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_what_cannot_be_shared_is_refused(based: Lab) -> None:
    for changes, message in (
        ({"tune.name": "dora"}, "tune.name dora"),
        ({"tune.dropout": 0.1}, "tune.dropout 0.1"),
        ({"tune.merge": True}, "tune.merge"),
        ({"optimizer.fused_backward": True}, "optimizer.fused_backward"),
    ):
        with pytest.raises(ScrimpError, match=message):
            check("a", based.recipe(**{**TUNE, **changes}))
    check("a", based.recipe(**TUNE))


def demands(*sizes: tuple[int, int, int]) -> list[Demand]:
    return [Demand(job, range(steps), batch, seq) for job, (steps, batch, seq) in enumerate(sizes)]


SIZES: dict[str, list[tuple[int, int, int]]] = {
    "alike": [(1, 4, 16)] * 4,
    "steps": [(1, 12, 16), (5, 2, 16), (3, 1, 16)],
    "lengths": [(1, 4, 64), (1, 4, 60), (2, 8, 16)],
    "one": [(2, 5, 16)],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("tokens", [1, 32, 100, 10_000])
def test_every_row_lies_in_one_slot_and_steps_follow_one_another(
    sizes: list[tuple[int, int, int]], tokens: int
) -> None:
    slots = pack(demands(*sizes), tokens)
    for job, (steps, batch, _seq) in enumerate(sizes):
        parts = [part for slot in slots for part in slot if part.job == job]
        rows = [(part.step, row) for part in parts for row in range(part.first, part.last)]
        assert rows == [(step, row) for step in range(steps) for row in range(batch)]
    for slot in slots:
        assert len({part.job for part in slot}) == len(slot)
        count = sum(part.last - part.first for part in slot)
        longest = max(sizes[part.job][2] for part in slot)
        assert count * longest <= tokens or count == 1
        assert all(sizes[part.job][2] >= 0.75 * longest for part in slot)


def test_slots_are_balanced_and_few() -> None:
    slots = pack(demands((1, 12, 16), (4, 3, 16), (2, 6, 16)), 16 * 9)
    counts = [sum(part.last - part.first for part in slot) for slot in slots]
    assert counts == [9, 9, 9, 9]


def test_rounds_end_together() -> None:
    steps = [10, 25, 13]
    rounds = rounds_of(steps)
    for count in steps:
        bounds = [step_at(turn, count, rounds) for turn in range(rounds + 1)]
        assert bounds[0] == 0 and bounds[-1] == count
        assert {b - a for a, b in itertools.pairwise(bounds)} <= {
            count // rounds,
            -(-count // rounds),
        }
