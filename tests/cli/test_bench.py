"""`scrimp bench`: whole suites of tiny runs, each in a process of its own.

One suite is run once and looked at by several tests. A process takes some four seconds to start, so the
suites are as small as they can be.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

Cli = Callable[..., Any]
METHODS = "adamw,transformers,q-galore-torch"  # the last works on CUDA alone, and is in no test environment


@dataclass(frozen=True)
class Done:
    """A finished suite: its folder, the options of its job, and its document."""

    out: Path
    options: tuple[str, ...]
    document: dict[str, Any]

    def row(self, name: str) -> dict[str, Any]:
        rows: list[dict[str, Any]] = self.document["contestants"]
        return next(row for row in rows if row["name"] == name)


def _bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scrimp", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def options(small: tuple[str, ...]) -> tuple[str, ...]:
    return (*small, "--device", "cpu", "--lr", "0.01")


@pytest.fixture(scope="module")
def suite(options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = tmp_path_factory.mktemp("bench") / "suite"
    words = f"--methods {METHODS} --trials 2 --seeds 2 --pairs 1 --jobs 1 --json".split()
    done = _bench("optimizers", *options, *words, "--out", out)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((out / "bench.json").read_text())
    return Done(out, options, document)


@pytest.mark.slow
def test_every_contestant_has_the_same_trials_seeds_and_evaluations(suite: Done) -> None:
    for name in ("adamw", "transformers"):
        row = suite.row(name)
        assert row["status"] == "done"
        assert len(row["trials"]) == 2
        assert {trial["seed"] for trial in row["trials"]} == {0}
        assert [curve["seed"] for curve in row["curves"]] == [0, 1]
        assert {len(curve["eval"]) for curve in row["curves"]} == {4}
        assert row["lr"] == min(row["trials"], key=lambda trial: trial["loss"])["lr"]
        assert row["loss"]["all"] == [pytest.approx(curve["eval"][-1], rel=1e-5) for curve in row["curves"]]
        assert len(row["tokens_per_s"]["all"]) == len(row["speed_ratio"]["all"]) == 1
    assert suite.document["protocol"]["reference"] == "adamw"
    assert suite.row("adamw")["to_target"]["reached"] == 2


@pytest.mark.slow
def test_a_peer_s_own_loop_does_the_same_job(suite: Done) -> None:
    """Trainer's AdamW is ours, so that another row, rate or weight would show in its losses."""
    ours, theirs = suite.row("adamw"), suite.row("transformers")
    assert theirs["loss"]["all"] == pytest.approx(ours["loss"]["all"], rel=1e-5)
    assert theirs["curves"][0]["train"] == pytest.approx(ours["curves"][0]["train"], rel=1e-4)
    assert theirs["curves"][0]["eval_tokens"] == ours["curves"][0]["eval_tokens"]


@pytest.mark.slow
def test_state_is_counted_to_the_byte(suite: Done) -> None:
    """Two fp32 moments, and in torch's AdamW a step count a tensor."""
    counts = {
        name: suite.row(name)["state_bytes"] - 8 * suite.row(name)["trained"]
        for name in ("adamw", "transformers")
    }
    assert counts["adamw"] == 0
    assert 0 < counts["transformers"] < 80 and counts["transformers"] % 4 == 0


@pytest.mark.slow
def test_terms_add_up_to_the_tensors_at_the_peak(suite: Done) -> None:
    row = suite.row("adamw")
    terms = row["memory"]["terms"]
    assert sum(terms.values()) - terms["fixed"] == row["tensor_bytes"]
    assert 0 <= terms["weights"] - 4 * row["trained"] < 1024  # the rest are the buffers of positions
    assert row["peak_bytes"] > row["tensor_bytes"]


@pytest.mark.slow
def test_who_cannot_compete_is_a_row_with_the_reason_and_no_failure(suite: Done) -> None:
    row = suite.row("q-galore-torch")
    assert row["status"] == "missing"
    assert row["why"] in ("pip install 'scrimp[oracles]'", "works on CUDA alone")
    assert row["loss"] is row["peak_bytes"] is row["tokens_per_s"] is None
    assert [figure["source"] for figure in row["reported"]]


@pytest.mark.slow
def test_the_report_lies_beside_the_document(suite: Done) -> None:
    page = (suite.out / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("adamw", "transformers", "q-galore-torch"))


@pytest.mark.slow
def test_a_run_in_the_suite_is_the_run_that_the_recipe_describes(suite: Done, cli: Cli, here: Path) -> None:
    trial = suite.row("adamw")["trials"][0]
    arguments = [*suite.options, "--lr", str(trial["lr"]), "--evaluation.every", "1"]
    alone = cli("train", *arguments, "--out", "run", "--json")
    assert alone.code == 0, alone.err
    assert alone.document["eval_loss"] == trial["loss"]


@pytest.mark.slow
def test_the_same_command_does_nothing_twice_and_finds_the_same(suite: Done, cli: Cli, here: Path) -> None:
    results = _results(suite.out)
    assert len(results) == 8  # two in turns, four trials, two more seeds
    words = f"--methods {METHODS} --trials 2 --seeds 2 --pairs 1 --jobs 1".split()
    again = cli("bench", "optimizers", *suite.options, *words, "--out", suite.out, "--json")
    assert again.code == 0
    assert _results(suite.out) == results
    assert again.document["contestants"] == suite.document["contestants"]


@pytest.mark.kill
@pytest.mark.slow
def test_a_killed_suite_leaves_no_process_and_goes_on_with_what_is_missing(
    suite: Done, cli: Cli, tmp_path: Path
) -> None:
    """The same suite elsewhere, killed and gone on with, has the same losses bit for bit."""
    out = tmp_path / "suite"
    words = ["--methods", "adamw", "--trials", "2", "--seeds", "1", "--pairs", "0", "--jobs", "1"]
    arguments = ["optimizers", *suite.options, *words, "--out", str(out), "--json"]
    # In a session of its own, so that every process of it can be found after its death.
    process = subprocess.Popen(
        [sys.executable, "-m", "scrimp", "bench", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    trained = _wait_for(lambda: _results(out))
    _wait_for(lambda: len(_of_session(process.pid)) > 1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _wait_for(lambda: not _of_session(process.pid))
    done = cli("bench", *arguments)
    assert done.code == 0, done.err
    assert trained.items() <= _results(out).items()
    (row,) = done.document["contestants"]
    assert row["status"] == "done" and len(row["trials"]) == 2
    losses = {trial["lr"]: trial["loss"] for trial in suite.row("adamw")["trials"]}
    assert {trial["lr"]: trial["loss"] for trial in row["trials"]} == losses


def _results(out: Path) -> dict[Path, int]:
    """Return when each task was done; what the job is is looked up every time."""
    found = {}
    for path in out.rglob("result.json"):
        if json.loads((path.parent / "task.json").read_text())["mode"] != "describe":
            found[path] = path.stat().st_mtime_ns
    return found


def _of_session(session: int) -> list[psutil.Process]:
    """Return the living processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def _wait_for(look: Callable[[], Any], *, seconds: float = 90) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError("it never came")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["optimisers"], "did you mean 'optimizers'"),
        (["optimizers", "--methods", "adamv"], "there is no 'adamv'"),
        (["optimizers", "--methods", "adamw,adamw"], "named twice"),
        (["optimizers", "--optimizer", "adamw"], "name them with --methods"),
        (["optimizers", "--seconds", "5", "--steps", "5"], "give one of them"),
        (["optimizers", "--seconds", "5", "--pairs", "0"], "add --pairs"),
        (["optimizers", "--steps", "none"], "steps"),
        (["speed", "--seq", "0"], "seq"),
    ],
)
def test_a_mistake_is_refused_in_one_sentence(
    refused: Callable[..., str], arguments: list[str], said: str, tmp_path: Path
) -> None:
    assert said in refused("bench", *arguments, "--out", tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(refused: Callable[..., str], here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("years of work")
    assert "something else" in refused("bench", "optimizers", "--out", "mine")
    (here / "file").write_text("a file")
    assert "is a file" in refused("bench", "optimizers", "--out", "file")
