"""A run killed by SIGKILL and resumed ends in the same bits: 3 random moments, 3 places inside a save.

Every run is a process of its own, forked from one that has already imported torch. What matters is
the same as for a fresh one, whose first seconds are imports (benchmarks/kills.py has 30 of those).
"""

from __future__ import annotations

import multiprocessing
import random
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from tests.training.conftest import MEASURED, write_text

HARNESS = Path(__file__).with_name("kill_harness.py")
PRELOADED = ["transformers.models.llama.modeling_llama", "scrimp.training.run", "scrimp.cli.train"]
STEPS = 12
OPTIONS = ["--steps", str(STEPS), "--checkpoint.every", "3", "--batch", "2", "--seq", "32", "--threads", "1"]

pytestmark = [pytest.mark.kill, pytest.mark.slow]


class Bench:
    """Starts runs of one recipe, and holds the one that was left alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text, cache = write_text(folder / "text"), folder / "cache"
        self.options = [*OPTIONS, "--data", str(text), "--cache", str(cache)]
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        command = [sys.executable, str(HARNESS), "0", "--", *self.train_arguments("whole")]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
        self.operations = int(done.stderr.rpartition("operations: ")[2])

    def train_arguments(self, out: str) -> list[str]:
        return ["train", *self.options, "--out", str(self.folder / out)]

    def start(self, *arguments: str, fatal: int = 0) -> BaseProcess:
        """Start `scrimp` with arguments, which kills itself in operation `fatal` of its saves."""
        argv, sys.argv = sys.argv, [str(HARNESS), str(fatal), "--", *arguments]
        try:
            process = self.context.Process(target=runpy.run_path, args=(str(HARNESS), None, "__main__"))
            process.start()  # it takes this process's argv over
        finally:
            sys.argv = argv
        return process

    def steps(self, out: str) -> int:
        path = self.folder / out / "metrics.jsonl"
        return path.read_text().count('{"kind": "train"') if path.is_file() else 0

    def assert_resumes(self, out: str) -> None:
        """Resume a killed run, and compare it with the one that was left alone."""
        process = self.start("train", "--out", str(self.folder / out), "--resume", *self.options[-2:])
        process.join()
        assert process.exitcode == 0
        ours, whole = (self.folder / run for run in (out, "whole"))
        weights = "model/model.safetensors"
        assert (ours / weights).read_bytes() == (whole / weights).read_bytes()
        assert comparable(ours) == comparable(whole)
        last = f"checkpoints/step-{STEPS:08}/optimizer.safetensors"
        assert (ours / last).read_bytes() == (whole / last).read_bytes()
        assert not list(ours.rglob(".*-*"))  # nothing half-made was left


def comparable(run: Path) -> list[dict[str, Any]]:
    from scrimp.training.metrics import read_metrics

    rows = read_metrics(run / "metrics.jsonl")
    assert len(rows) > 2 * STEPS - 10
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("kills"))


def wait_until(condition: Callable[[], bool], process: BaseProcess) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.001)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_kill_at_a_random_moment_changes_nothing(bench: Bench, seed: int) -> None:
    rng = random.Random(seed)
    for attempt in range(5):
        out = f"random-{seed}-{attempt}"
        process = bench.start(*bench.train_arguments(out))
        step, delay = rng.randint(1, STEPS - 1), rng.uniform(0, 0.03)
        wait_until(lambda out=out, step=step: bench.steps(out) >= step, process)
        time.sleep(delay)
        process.kill()
        process.join()
        if process.exitcode == -9:  # otherwise it had ended before
            break
    assert process.exitcode == -9
    bench.assert_resumes(out)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_kill_inside_a_save_changes_nothing(bench: Bench, seed: int) -> None:
    operation = random.Random(f"save {seed}").randint(1, bench.operations)
    out = f"placed-{seed}"
    process = bench.start(*bench.train_arguments(out), fatal=operation)
    process.join()
    assert process.exitcode == -9
    assert any((bench.folder / out / "checkpoints").rglob("*"))
    bench.assert_resumes(out)
