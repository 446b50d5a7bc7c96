"""A run leaves its process as it found it, and may be started again, in any thread."""

from __future__ import annotations

import os
import random
import signal
import threading
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from scrimp.base.errors import ScrimpError
from scrimp.recipe import Recipe
from scrimp.training.environment import differences, process_state

if TYPE_CHECKING:
    from pathlib import Path

    from tests.training.conftest import Lab


def process_wide_state() -> dict[str, Any]:
    """Return what a library could change for its caller."""
    return {
        "threads": torch.get_num_threads(),
        "torch's random state": torch.get_rng_state().tolist(),
        "python's random state": random.getstate(),
        "numpy's random state": str(np.random.get_state()),
        "determinism": torch.get_deterministic_debug_mode(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109 - as the process has it
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "verbosity": transformers.logging.get_verbosity(),
        "bars": transformers.logging.is_progress_bar_enabled(),
        "warnings": list(warnings.filters),
        "living threads": threading.active_count(),
    }


@pytest.fixture
def odd_state() -> Any:
    """Put the process into a state that a run would not choose, and back."""
    threads, debug = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    torch.set_num_threads(3)
    torch.set_deterministic_debug_mode("warn")
    torch.manual_seed(99)
    yield
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(debug)


@pytest.mark.usefixtures("odd_state")
def test_a_run_leaves_no_process_wide_state_behind(lab: Lab) -> None:
    lab.train(lab.recipe(), "first")  # imports of the first run add handlers and filters of their own
    before = process_wide_state()
    lab.train(lab.recipe(threads=1), "second")
    after = process_wide_state()
    assert {name for name in before if before[name] != after[name]} == set()


@pytest.mark.usefixtures("odd_state")
def test_a_failed_run_leaves_none_either(lab: Lab) -> None:
    before = process_wide_state()
    with pytest.raises(ScrimpError):
        lab.train(lab.recipe(seq=128))
    with pytest.raises(ZeroDivisionError):
        lab.train(lab.recipe(), reporter=lab.reporter({2: lambda: 1 // 0}))
    after = process_wide_state()
    assert {name for name in before if before[name] != after[name]} == set()


def test_the_callers_random_state_decides_nothing(lab: Lab) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        lab.train(lab.recipe(), f"run-{seed}")
    assert lab.rows("run-1") == lab.rows("run-2") and lab.weights("run-1") == lab.weights("run-2")


def test_the_public_function_may_be_called_twice(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import scrimp

    monkeypatch.chdir(lab.path)
    runs = [scrimp.train(lab.recipe()) for _ in range(2)]
    assert [str(run.out) for run in runs] == ["runs/tiny-1", "runs/tiny-2"]
    assert lab.weights("runs/tiny-1") == lab.weights("runs/tiny-2")
    assert runs[0].metrics.loss == runs[1].metrics.loss and runs[0].model.is_dir()
    again = scrimp.train(lab.recipe(), out=lab.path / "runs" / "tiny-1", resume=True)
    assert again.metrics == runs[0].metrics
    assert capsys.readouterr().out == ""  # all that a run says goes to standard error


def test_a_run_works_in_a_thread_that_is_not_the_main_one(lab: Lab) -> None:
    lab.train(lab.recipe(), "main")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=lambda: lab.train(lab.recipe(), "other"))
    thread.start()
    thread.join()
    assert lab.rows("main") == lab.rows("other") and lab.weights("main") == lab.weights("other")
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_threads_are_those_of_the_recipe_during_a_run(lab: Lab) -> None:
    seen: list[int] = []
    reporter = lab.reporter({1: lambda: seen.append(torch.get_num_threads())})
    outside = torch.get_num_threads()
    lab.train(lab.recipe(threads=2, steps=1), reporter=reporter)
    assert seen == [2] and torch.get_num_threads() == outside


def test_determinism_on_cuda_is_asked_for_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: torch.no_grad())  # needs a device
    recipe = Recipe(deterministic=True, threads=1)
    before = torch.get_deterministic_debug_mode()
    with process_state(recipe, torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.get_deterministic_debug_mode() == before and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # a user's own setting wins
    with process_state(recipe, torch.device("cuda")):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_more_than_one_process_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ScrimpError, match="one device for now"):
        lab.train(lab.recipe())
    monkeypatch.setenv("WORLD_SIZE", "1")
    lab.train(lab.recipe(steps=1))


def test_differences_name_what_changes_bits() -> None:
    before = {"torch": "2.12.0", "cpu": "AVX2", "fixed_bytes": 1}
    now = {"torch": "2.13.0", "cpu": "AVX2", "fixed_bytes": 2, "new": "x"}
    assert differences(before, now) == ["torch 2.13.0, was 2.12.0"]


def test_a_recipe_recorded_elsewhere_is_said_and_run(lab: Lab, tmp_path: Path) -> None:
    from dataclasses import replace

    from scrimp.build import inspect
    from scrimp.training.run import execute
    from scrimp.training.start import choose_start

    start = replace(
        choose_start(lab.recipe(steps=1), out=tmp_path / "run", resume=False), recorded={"torch": "1.0"}
    )
    reporter = lab.reporter()
    execute(start, inspect(start.recipe, cache=lab.cache), reporter)
    assert any("was 1.0" in note and "bits may differ" in note for note in reporter.notes)
