"""`scrimp verify` says that a run repeats, and notices when it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.training.conftest import write_gpt2

from scrimp.base.errors import ScrimpError
from scrimp.training.checkpoint import checkpoint_path
from scrimp.training.verify import Verdict, verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.training.conftest import Lab


def check(lab: Lab, *, steps: int | None = None, out: str = "run") -> Verdict:
    return verify(lab.path / out, steps=steps, reporter=lab.reporter(), cache=lab.cache)


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bf16"}, {"data.boundaries": "isolate"}, {"data.packing": "padded"}],
    ids=["fp32", "bf16", "isolated", "padded"],
)
def test_an_untouched_run_repeats_and_is_left_as_it_is(lab: Lab, changes: dict[str, Any]) -> None:
    lab.train(lab.recipe(checkpoint__every=3, **changes))
    before = snapshot(lab.path / "run")
    assert check(lab) == Verdict(first=3, last=6, differing=(), weights_equal=True)
    assert check(lab).repeats
    assert snapshot(lab.path / "run") == before


def test_a_run_with_dropout_repeats(lab: Lab) -> None:
    lab.train(lab.recipe(model=str(write_gpt2(lab.path / "gpt2", dropout=0.1)), checkpoint__every=3))
    assert check(lab).repeats


def test_a_number_of_steps_may_be_given(lab: Lab) -> None:
    lab.train(lab.recipe(checkpoint__every=3))
    assert check(lab, steps=2) == Verdict(first=3, last=5, differing=(), weights_equal=None)
    assert check(lab, steps=100).last == 6


def edit_metrics(lab: Lab, change: Callable[[dict[str, Any]], None]) -> None:
    path = lab.path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["loss", "grad_norm", "lr", "tokens"])
def test_a_changed_number_is_noticed_at_its_step(lab: Lab, name: str) -> None:
    lab.train(lab.recipe(checkpoint__every=3))

    def nudge(row: dict[str, Any]) -> None:
        if row["kind"] == "train" and row["step"] == 5:
            row[name] *= 1 + 1e-12  # less than any rounding of fp32 (and a fraction of a token)

    edit_metrics(lab, nudge)
    verdict = check(lab)
    assert verdict.differing == (5,) and verdict.weights_equal and not verdict.repeats


def test_another_runs_weights_are_noticed(lab: Lab) -> None:
    lab.train(lab.recipe(checkpoint__every=3))
    lab.train(lab.recipe(checkpoint__every=3, optimizer__lr=2e-2), "other")
    last = [checkpoint_path(lab.path / run / "checkpoints", 6) for run in ("run", "other")]
    shutil.rmtree(last[0])
    shutil.copytree(last[1], last[0])
    assert check(lab) == Verdict(first=3, last=6, differing=(), weights_equal=False)
    assert not check(lab).repeats


def test_a_start_from_other_weights_is_noticed(lab: Lab) -> None:
    lab.train(lab.recipe(checkpoint__every=3))
    lab.train(lab.recipe(checkpoint__every=3, optimizer__lr=2e-2), "other")
    first = [checkpoint_path(lab.path / run / "checkpoints", 3) for run in ("run", "other")]
    shutil.rmtree(first[0])
    shutil.copytree(first[1], first[0])
    verdict = check(lab)
    assert verdict.differing == (4, 5, 6) and verdict.weights_equal is False


def test_a_damaged_checkpoint_is_passed_over(lab: Lab) -> None:
    lab.train(lab.recipe(checkpoint__every=2, checkpoint__keep=3))
    (checkpoint_path(lab.path / "run" / "checkpoints", 2) / "model.safetensors").write_bytes(b"")
    assert check(lab).first == 4


def test_a_run_that_left_steps_out_repeats(lab: Lab) -> None:
    lab.train(lab.recipe(nonfinite="skip", optimizer__lr=1e30, schedule__warmup=0, checkpoint__every=3))
    assert lab.rows()[-1]["skipped"] > 0
    assert check(lab).repeats


def test_an_interrupted_run_can_be_verified(lab: Lab) -> None:
    from scrimp.base.errors import Interrupted

    with pytest.raises(Interrupted):
        lab.train(lab.recipe(checkpoint__every=2), reporter=lab.reporter({5: lambda: raise_signal(2)}))
    assert check(lab) == Verdict(first=4, last=5, differing=(), weights_equal=True)


def raise_signal(number: int) -> None:
    import signal

    signal.raise_signal(number)


def test_what_cannot_be_verified_is_refused(lab: Lab) -> None:
    with pytest.raises(ScrimpError, match="holds no run"):
        check(lab, out="nothing")
    lab.train(lab.recipe(checkpoint__every=6))
    with pytest.raises(ScrimpError, match=r"no checkpoint with a step after it.*--checkpoint\.keep"):
        check(lab)
