"""Ctrl-C and SIGTERM: finish the step, save, say how to go on; a second Ctrl-C stops at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from scrimp.base import files
from scrimp.base.errors import Interrupted
from scrimp.training.stopping import Stopper

if TYPE_CHECKING:
    from pathlib import Path

    from tests.training.conftest import Lab


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(lab: Lab, number: int) -> None:
    recipe = lab.recipe(checkpoint__every=6)
    lab.train(recipe, "whole")
    with pytest.raises(Interrupted, match=r"after step 3 of 6.*scrimp train --out .*run --resume") as stop:
        lab.train(recipe, reporter=lab.reporter({3: lambda: send(number)}))
    assert stop.value.signal_number == number and stop.value.out == lab.path / "run"
    assert isinstance(stop.value, KeyboardInterrupt)
    assert lab.checkpoints() == [3] and not (lab.path / "run" / "model").exists()
    assert [row["kind"] for row in lab.rows()].count("train") == 3
    lab.train(recipe, resume=True)
    assert lab.rows() == lab.rows("whole") and lab.weights() == lab.weights("whole")


def test_a_signal_at_a_scheduled_checkpoint_leaves_its_line_once(lab: Lab) -> None:
    lab.train(lab.recipe(), "whole")
    with pytest.raises(Interrupted):
        lab.train(lab.recipe(), reporter=lab.reporter({4: lambda: send(signal.SIGINT)}))
    lab.train(lab.recipe(), resume=True)
    assert lab.rows() == lab.rows("whole") and lab.weights() == lab.weights("whole")


def test_a_signal_in_the_last_step_lets_the_run_finish(lab: Lab) -> None:
    lab.train(lab.recipe(), reporter=lab.reporter({6: lambda: send(signal.SIGINT)}))
    assert lab.rows()[-1]["kind"] == "end"


def test_a_second_ctrl_c_stops_at_once_and_the_run_goes_on_from_before(lab: Lab) -> None:
    recipe = lab.recipe(checkpoint__every=2)
    lab.train(recipe, "whole")

    def twice() -> None:
        send(signal.SIGINT)
        send(signal.SIGINT)

    with pytest.raises(Interrupted, match=r"stopped at once.*--resume") as stop:
        lab.train(recipe, reporter=lab.reporter({5: twice}))
    assert stop.value.signal_number == signal.SIGINT
    assert lab.checkpoints() == [2, 4]
    lab.train(recipe, resume=True)
    assert lab.rows() == lab.rows("whole") and lab.weights() == lab.weights("whole")


def test_a_second_ctrl_c_inside_a_save_keeps_the_checkpoint_before(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = lab.recipe(checkpoint__every=2)
    lab.train(recipe, "whole")
    real = files.fsync

    def fsync(path: Path) -> None:
        real(path)
        if ".partial-step-00000004" in str(path):
            send(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(files, "fsync", fsync)
        with pytest.raises(Interrupted, match="stopped at once"):
            lab.train(recipe)
    assert lab.checkpoints() == [2]
    lab.train(recipe, resume=True)
    assert lab.rows() == lab.rows("whole") and lab.weights() == lab.weights("whole")


def test_a_ctrl_c_while_the_model_is_written_stops_at_once_and_the_rest_is_done_later(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.train(lab.recipe(), "whole")
    with monkeypatch.context() as patch:
        patch.setattr("scrimp.models.export", lambda *_: send(signal.SIGINT))
        with pytest.raises(Interrupted, match="stopped at once; go on with"):
            lab.train(lab.recipe())
    lab.train(lab.recipe(), resume=True)
    assert lab.rows() == lab.rows("whole") and lab.weights() == lab.weights("whole")


@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupt_before_the_first_step_leaves_no_run(lab: Lab, existed: bool) -> None:
    out = lab.path / "run"
    if existed:
        out.mkdir()
    with pytest.raises(Interrupted) as stop:
        lab.train(lab.recipe(), reporter=lab.reporter({0: lambda: send(signal.SIGINT)}))
    assert stop.value.out is None or not stop.value.out.exists()
    assert not out.exists() or not any(out.iterdir())


def test_an_interrupt_before_the_first_step_of_a_resume_keeps_the_run(lab: Lab) -> None:
    with pytest.raises(Interrupted):
        lab.train(lab.recipe(), reporter=lab.reporter({3: lambda: send(signal.SIGINT)}))
    with pytest.raises(Interrupted, match="--resume"):
        lab.train(lab.recipe(), resume=True, reporter=lab.reporter({0: lambda: send(signal.SIGTERM)}))
    assert lab.checkpoints() == [2, 3]
    lab.train(lab.recipe(), resume=True)


def test_the_callers_handlers_come_back(lab: Lab) -> None:
    def mine(*_: Any) -> None:
        raise AssertionError("the run's own handler should have it")

    before = {number: signal.signal(number, mine) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(Interrupted):
            lab.train(lab.recipe(), reporter=lab.reporter({2: lambda: send(signal.SIGINT)}))
        lab.train(lab.recipe(), resume=True)
        assert all(signal.getsignal(number) is mine for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_stopper_defers_only_during_the_steps() -> None:
    stopper = Stopper()
    with stopper.listening():
        with stopper.deferring():
            send(signal.SIGINT)
            assert stopper.requested == signal.SIGINT
            with pytest.raises(Interrupted, match="at once"):
                send(signal.SIGINT)
        with pytest.raises(Interrupted, match="outside"):
            send(signal.SIGTERM)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_line_exits_as_the_signal_says(lab: Lab, number: int, code: int) -> None:
    out = lab.path / "run"
    options = ["--model", str(lab.model), "--data", str(lab.text), "--steps", "2000", "--batch", "2"]
    rest = ["--seq", "16", "--threads", "1", "--cache", str(lab.cache), "--out", str(out)]
    command = [sys.executable, "-m", "scrimp", "train", *options, *rest]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        wait_for_steps(process, out / "metrics.jsonl")
        process.send_signal(number)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == code and said == ""
    last = errors.strip().splitlines()[-1]
    assert "stopped after step" in last and last.endswith(f"--out {out} --resume")
    assert lab.checkpoints() and lab.rows()[-1]["step"] == lab.checkpoints()[-1]


def wait_for_steps(process: subprocess.Popen[str], metrics: Path) -> None:
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up and process.poll() is None:
        if metrics.is_file() and metrics.stat().st_size > 1000:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step was done: {process.poll()}")
