"""A run keeps its budget, or says and does what was promised."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.training.conftest import write_model

from scrimp.base.errors import ScrimpError
from scrimp.base.ledger import Ledger, Moment
from scrimp.base.platform import resident_bytes
from scrimp.training.budget import over_budget

if TYPE_CHECKING:
    from tests.training.conftest import Lab

MIB = 2**20


def make_ledger(**terms: int) -> Ledger:
    return Ledger((Moment("loss", {"fixed": 100 * MIB, **terms}),))  # type: ignore[dict-item]


def test_the_term_that_was_predicted_wrong_is_named() -> None:
    predicted = make_ledger(activations=10 * MIB, gradients=5 * MIB)
    measured = make_ledger(activations=90 * MIB, gradients=5 * MIB)
    said = over_budget(195 * MIB, 150 * MIB, predicted=predicted, measured=measured)
    assert said == ("195 MiB at 'loss' is over the budget of 150 MiB (activations: 90 MiB, predicted 10 MiB)")


def test_a_peak_that_no_tracked_moment_reached_is_said_to_be_none_of_them() -> None:
    said = over_budget(300 * MIB, 150 * MIB, predicted=make_ledger(), measured=make_ledger())
    assert "'a later step'" in said


@pytest.mark.parametrize("strict", [True, False])
def test_a_strict_run_stops_over_its_budget_with_a_checkpoint_and_another_goes_on(
    lab: Lab, strict: bool
) -> None:
    held = bytearray()

    def grow() -> None:
        held.extend(b"x" * (128 * MIB))  # what no prediction can know of

    reporter = lab.reporter(after={2: grow})
    recipe = lab.recipe(strict=strict, memory=f"{resident_bytes() // MIB + 100}MiB")
    if strict:
        with pytest.raises(ScrimpError, match=r"over the budget of .*stopped after step \d as strict asks"):
            lab.train(recipe, reporter=reporter)
        assert any((lab.path / "run" / "checkpoints").iterdir())
    else:
        assert lab.train(recipe, reporter=reporter).metrics.step == 6
        assert sum("over the budget" in note for note in reporter.notes) == 1
    assert len(held) == 128 * MIB
    ledgers = json.loads((lab.path / "run" / "memory.json").read_text())
    assert ledgers["predicted"]["moments"] and ledgers["measured"]["moments"]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private memory on Linux alone")
def test_out_of_memory_ends_in_one_sentence(lab: Lab) -> None:
    """The limit is one of the system's, so that torch's own allocator is refused memory."""
    limit = 1200 * 2**20
    code = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))\n"
        "from scrimp.cli import main\nmain()\n"
    )
    # Few wide layers, so that little is traced where a smaller recipe is looked for.
    model = write_model(lab.path / "wide", hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    words = ["train", "--model", str(model), "--steps", "1", "--threads", "1"]
    words += ["--seq", "64", "--batch", "512", "--micro-batch", "512"]
    words += ["--data", str(lab.text), "--out", str(lab.path / "big")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, timeout=120
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr[-2000:]
    assert "the memory of cpu ran out with micro-batches of 512 x 64 tokens" in last
    assert "would do for: scrimp train" in last or "lower --micro-batch" in last
    assert "Traceback" not in done.stderr
