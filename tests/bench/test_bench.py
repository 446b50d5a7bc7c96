"""What a suite makes of what its tasks find, with tasks that find what a test wants them to.

Whole suites of real processes run in tests/cli/test_bench.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from scrimp.base.errors import ScrimpError
from scrimp.bench import bench as suites
from scrimp.bench.bench import TURN_LR, Bench
from scrimp.bench.contestants import contestants
from scrimp.bench.document import document
from scrimp.bench.entries import Ask
from scrimp.bench.machine import LoadWatch
from scrimp.bench.pool import Pool
from scrimp.bench.suites import suite
from scrimp.bench.tasks import Place, Task
from scrimp.bench.turns import PlayerError
from scrimp.recipe import Recipe, flat

Answer = Callable[[Task], dict[str, Any]]
METHODS = ("adamw", "torch:SGD", "torch:Adafactor")


def described(**changes: Any) -> dict[str, Any]:
    recipe = {**flat(Recipe()), "steps": 100, "batch": 8, "micro_batch": 8, "seq": 128, "threads": 2}
    return {
        "status": "done",
        "recipe": {**recipe, "model.init": "scratch"},
        "non_embedding": 800_000,
        "data": "a text",
        "fingerprint": "f",
        "facts": "facts",
        "held_out": 3,
        "predicted_bytes": 1,
        "device": "cpu",
        "device_name": "an abacus",
        **changes,
    }


def trained(task: Task) -> dict[str, Any]:
    """Return a run whose loss is lowest at AdamW's centre and grows with the seed."""
    loss = 2.0 + task.recipe["optimizer.lr"] + 0.01 * task.recipe["seed"]
    tokens = task.recipe["steps"] * 1024
    return {
        "status": "done",
        "why": "",
        "seconds": 1.0,
        "loss": loss,
        "bits_per_byte": loss,
        "evaluation_tokens": 1000,
        "settings": {},
        "parameters": 10,
        "trained": 10,
        "state_bytes": 80,
        "peak_bytes": 1000,
        "predicted_bytes": None,
        "tensor_bytes": 100,
        "memory": None,
        "curve": {"tokens": [tokens], "train": [loss], "eval_tokens": [tokens], "eval": [loss]},
    }


def lost(task: Task, status: str, why: str) -> dict[str, Any]:
    """Return a run that came to nothing."""
    if status == "failed":
        return {"status": "failed", "why": why}
    return {**trained(task), "status": "diverged", "why": why, "loss": None, "bits_per_byte": None}


class ReadyPool(Pool):
    """Has the results at hand."""

    def __init__(self, folder: Path, answer: Answer, job: dict[str, Any]) -> None:
        super().__init__(folder, lambda _: None)
        self.answer, self.job = answer, job
        self.tasks: list[Task] = []

    def now(self, task: Task) -> dict[str, Any]:
        return self.job

    def do(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        self.tasks += tasks
        yield from ((number, self.answer(task)) for number, task in enumerate(tasks))


def run(
    tmp_path: Path,
    answer: Answer = trained,
    *,
    job: dict[str, Any] | None = None,
    methods: Sequence[str] = METHODS,
    **ask: Any,
) -> tuple[dict[str, Any], list[Task]]:
    """Run a suite and return its document and the tasks it had done."""
    chosen = suite("optimizers")
    numbers: dict[str, Any] = {"trials": 3, "seeds": 3, "pairs": 0, "stated": {}, **ask}
    pool = ReadyPool(tmp_path, answer, job or described())
    bench = Bench(
        Ask(suite=chosen, contestants=contestants(methods, chosen), **numbers),
        pool,
        lambda _: None,
        LoadWatch(),
    )
    for _ in bench.run():
        document(bench)
    return document(bench), pool.tasks


def row(found: dict[str, Any], name: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = found["contestants"]
    return next(one for one in rows if one["name"] == name)


def test_everybody_has_the_same_number_of_runs_and_the_same_seeds(tmp_path: Path) -> None:
    found, tasks = run(tmp_path)
    assert len(tasks) == 3 * (3 + 2)
    for name in METHODS:
        mine = [task.recipe for task in tasks if task.contestant == name]
        assert [recipe["seed"] for recipe in mine] == [0, 0, 0, 1, 2]
        assert row(found, name)["status"] == "done"
        assert len(row(found, name)["loss"]["all"]) == 3


def test_each_round_of_the_search_begins_with_another_contestant(tmp_path: Path) -> None:
    _, tasks = run(tmp_path)
    assert [task.contestant for task in tasks[:9:3]] == list(METHODS)


def test_searches_differ_by_the_stated_ratio_alone(tmp_path: Path) -> None:
    found, _ = run(tmp_path)
    rates = {name: sorted(trial["lr"] for trial in row(found, name)["trials"]) for name in METHODS}
    assert rates["torch:SGD"] == pytest.approx([10 * rate for rate in rates["adamw"]], rel=0.01)
    assert found["protocol"]["lr_law"].startswith("Step Law")


def test_a_stated_rate_is_the_centre(tmp_path: Path) -> None:
    found, _ = run(tmp_path, stated={"optimizer.lr": 0.004})
    assert found["protocol"]["lr_centre"] == 0.004
    assert row(found, "adamw")["trials"][0]["lr"] == 0.004


def test_one_failed_trial_costs_that_trial_alone(tmp_path: Path) -> None:
    def answer(task: Task) -> dict[str, Any]:
        smallest = task.contestant == "torch:SGD" and task.recipe["optimizer.lr"] < 0.03
        return lost(task, "failed", "SVD did not converge") if smallest else trained(task)

    found, _ = run(tmp_path, answer)
    sgd = row(found, "torch:SGD")
    assert sgd["status"] == "done"
    assert [trial["loss"] is None for trial in sgd["trials"]].count(True) == 1
    assert "SVD did not converge" in sgd["why"]
    assert len(sgd["loss"]["all"]) == 3


def test_who_fails_every_trial_has_failed_and_costs_nobody_else(tmp_path: Path) -> None:
    def answer(task: Task) -> dict[str, Any]:
        return lost(task, "failed", "no such kernel") if task.contestant == "torch:SGD" else trained(task)

    found, tasks = run(tmp_path, answer)
    assert row(found, "torch:SGD")["status"] == "failed"
    assert row(found, "torch:SGD")["why"] == "no such kernel"
    assert row(found, "torch:Adafactor")["status"] == row(found, "adamw")["status"] == "done"
    assert sum(task.contestant == "torch:SGD" for task in tasks) == 3


def test_who_diverges_at_every_rate_says_so_and_shows_what_it_held(tmp_path: Path) -> None:
    def answer(task: Task) -> dict[str, Any]:
        return lost(task, "diverged", "nan") if task.contestant == "torch:SGD" else trained(task)

    found, _ = run(tmp_path, answer)
    sgd = row(found, "torch:SGD")
    assert (sgd["status"], sgd["why"]) == ("done", "diverged at every learning rate tried")
    assert sgd["loss"] is sgd["lr"] is None
    assert sgd["state_bytes"] == 80


def test_a_seed_that_diverged_is_no_survivor_s_luck(tmp_path: Path) -> None:
    def answer(task: Task) -> dict[str, Any]:
        return lost(task, "diverged", "nan") if task.recipe["seed"] == 2 else trained(task)

    found, _ = run(tmp_path, answer)
    adamw = row(found, "adamw")
    assert adamw["why"] == "1 of 3 seeds diverged"
    assert adamw["loss"]["median"] == adamw["loss"]["highest"]
    assert [curve["loss"] is None for curve in adamw["curves"]] == [False, False, True]


def test_the_target_is_the_reference_s_median_and_two_percent(tmp_path: Path) -> None:
    found, _ = run(tmp_path)
    expected = 1.02 * row(found, "adamw")["loss"]["median"]
    assert found["protocol"]["target_loss"] == pytest.approx(expected, rel=1e-5)
    assert row(found, "adamw")["to_target"]["reached"] == 3


def _speeds(
    monkeypatch: pytest.MonkeyPatch, play: Callable[[Task, Task], dict[str, list[float]]]
) -> list[tuple[Task, Task]]:
    """Let turns come out as `play` says."""
    played: list[tuple[Task, Task]] = []

    def compare(contestant: Place, reference: Place, *, pairs: int, steps: int) -> dict[str, Any]:
        tasks = Task.read(contestant.path), Task.read(reference.path)
        played.append(tasks)
        return {"settings": {}, "speeds": play(*tasks)}

    monkeypatch.setattr(suites, "compare", compare)
    return played


def test_turns_are_with_the_reference_and_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played = _speeds(monkeypatch, lambda *_: {"contestant": [100.0, 300.0], "reference": [200.0, 200.0]})
    found, _ = run(tmp_path, pairs=2)
    assert [tasks[0].contestant for tasks in played] == list(METHODS)
    assert {tasks[1].contestant for tasks in played} == {"adamw"}
    assert {task.recipe["optimizer.lr"] for tasks in played for task in tasks} == {TURN_LR}
    assert row(found, "torch:SGD")["speed_ratio"]["all"] == [0.5, 1.5]
    assert row(found, "torch:SGD")["to_target"]["seconds"] == pytest.approx(102_400 / 200, rel=0.01)


def test_a_reference_that_fails_is_replaced_and_blames_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(_: Task, reference: Task) -> dict[str, list[float]]:
        if reference.contestant == "adamw":
            raise PlayerError("out of memory", is_reference=True)
        return {"contestant": [1.0], "reference": [1.0]}

    _speeds(monkeypatch, play)
    found, _ = run(tmp_path, pairs=1)
    assert row(found, "adamw")["status"] == "failed"
    assert row(found, "torch:SGD")["status"] == row(found, "torch:Adafactor")["status"] == "done"
    assert found["protocol"]["reference"] == "torch:SGD"


def test_turns_with_another_reference_or_number_are_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = _speeds(monkeypatch, lambda *_: {"contestant": [1.0], "reference": [1.0]})
    run(tmp_path, pairs=1)
    run(tmp_path, pairs=1)
    assert len(played) == 3
    run(tmp_path, pairs=2)
    assert len(played) == 6
    run(tmp_path, pairs=1, methods=METHODS[1:])
    assert len(played) == 8


def test_equal_seconds_are_the_steps_that_each_makes_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"adamw": 1024.0, "torch:SGD": 2048.0, "torch:Adafactor": 512.0}
    _speeds(monkeypatch, lambda mine, other: {"contestant": [speeds[mine.contestant]], "reference": [1024.0]})
    found, tasks = run(tmp_path, pairs=1, seconds=50)
    assert {task.contestant: task.recipe["steps"] for task in tasks} == {
        "adamw": 50,
        "torch:SGD": 100,
        "torch:Adafactor": 25,
    }
    assert found["job"]["steps"] is found["job"]["tokens"] is None
    assert row(found, "torch:SGD")["steps"] == 100


def test_another_text_or_device_is_another_run(tmp_path: Path) -> None:
    _, first = run(tmp_path)
    _, same = run(tmp_path)
    _, other = run(tmp_path, job=described(facts="another text"))
    keys = [[task.key(None) for task in tasks] for tasks in (first, same, other)]
    assert keys[0] == keys[1]
    assert not set(keys[0]) & set(keys[2])


def test_nothing_held_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScrimpError, match="raise --data"):
        run(tmp_path, job=described(held_out=0))


def test_nobody_who_can_compete_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScrimpError, match="nobody can compete"):
        run(tmp_path, methods=["q-galore-torch"])
