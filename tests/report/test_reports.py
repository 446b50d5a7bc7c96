"""A run's story on every screen: complete, plain where it must be, and never more than a line at a time."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaConfig

from scrimp.base.ledger import Ledger, Moment
from scrimp.build import inspect
from scrimp.data import byte_tokenizer
from scrimp.recipe import parse
from scrimp.report import lines as lines_module
from scrimp.report.console import ConsoleReporter
from scrimp.report.lines import LineReporter
from scrimp.report.summary import memory_line
from scrimp.training.reporter import Reporter, Tick
from scrimp.training.run import Run, execute
from scrimp.training.sample import kept_sample
from scrimp.training.start import choose_start

ESCAPE = "\x1b"
TICK = Tick(
    step=3,
    steps=10,
    loss=2.5,
    tokens_per_s=1234.5,
    peak_bytes=300 * 2**20,
    predicted_bytes=310 * 2**20,
    budget_bytes=2**30,
    left_s=65.0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and a text."""
    root = tmp_path_factory.mktemp("report")
    widths = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=264, max_position_embeddings=64, **widths).save_pretrained(root / "tiny")
    byte_tokenizer().save_pretrained(root / "tiny")
    (root / "text.txt").write_text("a text to learn from, again and again\n" * 60)
    return root


@pytest.fixture
def story(folder: Path, tmp_path: Path) -> Callable[..., Run]:
    """Return a function that runs three steps and tells a reporter."""

    def tell(reporter: Reporter, **changes: Any) -> Run:
        numbers = {"steps": 3, "batch": 2, "micro_batch": 1, "seq": 16, "threads": 1, **changes}
        recipe = parse({"model": str(folder / "tiny"), "data": str(folder / "text.txt"), **numbers})
        start = choose_start(recipe, out=tmp_path / "run", resume=False)
        return execute(start, inspect(recipe, cache=folder / "cache"), reporter)

    return tell


def _console(**options: Any) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=120, **options), stream


def test_a_terminal_sees_the_plan_the_bar_and_the_end(story: Callable[..., Run]) -> None:
    console, stream = _console(force_terminal=True)
    run = story(ConsoleReporter(console))
    shown = re.sub(rf"{ESCAPE}\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    for label in ("model", "data", "steps", "recipe", "device", "memory", "held out", "peak memory"):
        assert label in shown
    assert "step 3/3" in shown
    assert "a sample" in shown
    assert str(run.model) in re.sub(r"\s+", "", shown)
    assert run.evaluation is not None
    assert f"{run.evaluation.bits_per_byte:.3f} bits per byte" in shown
    assert shown.count("try") == 3
    assert f"scrimp generate {run.out}" in shown


def test_the_bar_is_taken_away_at_the_end(story: Callable[..., Run]) -> None:
    console, stream = _console(force_terminal=True)
    story(ConsoleReporter(console))
    hidden, shown = f"{ESCAPE}[?25l", f"{ESCAPE}[?25h"
    assert stream.getvalue().count(hidden) == stream.getvalue().count(shown) > 0


def test_no_color_leaves_colours_out(story: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console, stream = _console(force_terminal=True)
    story(ConsoleReporter(console))
    colours = re.findall(rf"{ESCAPE}\[(?:\d+;)*(?:3[0-9]|9[0-7]|4[0-9])(?:;\d+)*m", stream.getvalue())
    assert colours == []


def test_without_a_terminal_every_line_is_plain(story: Callable[..., Run]) -> None:
    stream = io.StringIO()
    run = story(LineReporter(stream))
    shown = stream.getvalue()
    assert not {ESCAPE, "\r", "\b"} & set(shown)
    for label in ("model", "data", "steps", "recipe", "device", "memory", "held out", "peak memory"):
        assert re.search(rf"^ *{label}  ", shown, re.MULTILINE)
    assert shown.count("step 3/3") == 1
    assert f"try: scrimp generate {run.out}" in shown


def test_steps_make_one_line_in_ten_seconds_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(lines_module.time, "monotonic", lambda: now)
    stream = io.StringIO()
    reporter = LineReporter(stream)
    reporter._training = True
    reporter._last = 0.0
    for step in range(1, 1001):
        now = step * 0.05  # fifty seconds in all
        reporter.tick(replace(TICK, step=step, steps=1000))
    written = [int(line.split()[1].partition("/")[0]) for line in stream.getvalue().splitlines()]
    assert written == [200, 400, 600, 800, 1000]


def test_a_long_phase_says_how_far_it_is_and_a_short_one_only_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(lines_module.time, "monotonic", lambda: now)
    stream = io.StringIO()
    reporter = LineReporter(stream)
    for percent in range(101):
        now = percent * 0.25
        reporter.phase("tokenising", percent / 100)
    assert stream.getvalue().splitlines() == ["tokenising", "tokenising: 40%", "tokenising: 80%"]


def test_a_tick_carries_units_and_comparison() -> None:
    assert (
        str(TICK) == "step 3/10  loss 2.500  1,234 tokens/s  peak 300 MiB of 310 MiB planned  1 min 05 s left"
    )


def test_the_memory_line_says_where_it_goes_and_whether_it_fits() -> None:
    moment = Moment("backward", {"fixed": 100 * 2**20, "weights": 50 * 2**20, "gradients": 0})
    assert Ledger((moment,)).peak is moment
    assert memory_line(moment, 2**30) == (
        "about 150 MiB at the backward (fixed 100 MiB, weights 50 MiB); fits the budget of 1 GiB"
    )
    assert "is over the budget of 1 MiB" in memory_line(moment, 2**20)


def test_a_note_and_a_path_are_shown_as_they_are() -> None:
    """Square brackets are markup to rich, and a path may hold them."""
    console, stream = _console()
    reporter = ConsoleReporter(console)
    reporter.note("runs/[bold]x[/bold]-1 is damaged")
    reporter.phase("reading /tmp/[red]", None)
    assert "runs/[bold]x[/bold]-1 is damaged" in stream.getvalue()
    assert "/tmp/[red]" in stream.getvalue()


def test_a_budget_that_is_passed_is_told_once(
    story: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scrimp.memory.observer.PeakMeter.read", lambda _: 2**40)
    stream = io.StringIO()
    story(LineReporter(stream), memory="64GiB")
    assert stream.getvalue().count("is over the budget of 64 GiB") == 1
    assert "memory: 1 TiB at 'a later step'" in stream.getvalue()


def test_what_a_model_says_cannot_command_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scrimp.training.sample.sample", lambda *_, **__: f"a{ESCAPE}[2J\x07\r\n\tb\x9b")
    monkeypatch.setattr("scrimp.training.sample.text_prompt", lambda *_: [0])
    model: Any = None
    assert kept_sample(model, None) == "a\ufffd[2J\ufffd\ufffd\n\tb\ufffd"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_sample_is_made_once_and_what_is_shown_is_what_is_kept(
    story: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    made: list[str] = []

    def counted(*arguments: Any) -> str:
        made.append(kept_sample(*arguments))
        return made[-1]

    monkeypatch.setattr("scrimp.training.run.kept_sample", counted)
    console, stream = _console(force_terminal=terminal)
    run = story(ConsoleReporter(console) if terminal else LineReporter(stream))
    assert len(made) == 1
    assert (run.out / "sample.txt").read_bytes().decode() == run.sample == made[0]
    first = made[0].split("\n")[0][:20]  # a terminal folds what is longer
    assert first and first in stream.getvalue()


def test_a_reader_that_left_stops_no_run() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    LineReporter(stream).note("x")
    with pytest.raises(BrokenPipeError):
        stream.close()
