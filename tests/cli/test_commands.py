"""What every command prints, where, and how it ends.

A few tests start the program: what happens before our code runs, and the exit code a shell sees, can
be seen in no other way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import scrimp
from scrimp.base.errors import Interrupted
from scrimp.cli import guard, methods, train
from scrimp.methods import METHODS, PIECES
from scrimp.recipe import fields
from scrimp.recipe_file import read

Cli = Callable[..., Any]


def start(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m scrimp` as a program of its own."""
    return subprocess.run(
        [sys.executable, "-m", "scrimp", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def test_version_is_that_of_the_package(cli: Cli) -> None:
    outcome = cli("--version")
    assert (outcome.code, outcome.out) == (0, f"scrimp {scrimp.__version__}\n")
    assert scrimp.__version__ == version("scrimp")


def test_python_m_scrimp_is_the_program() -> None:
    done = start("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"scrimp {scrimp.__version__}\n", "")


def test_without_a_command_the_help_is_shown(cli: Cli) -> None:
    outcome = cli()
    assert outcome.code == 0
    for name in ("train", "eval", "generate", "verify", "methods", "doctor"):
        assert name in outcome.out


def test_completion_offers_commands_and_options() -> None:
    environment = {
        "_SCRIMP_COMPLETE": "complete_bash",
        "COMP_WORDS": "scrimp train --optimizer.",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from scrimp.cli import main; main()"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **environment},
    )
    offered = done.stdout.split()
    assert {f"--{name.replace('_', '-')}" for name in fields() if name.startswith("optimizer.")} <= set(
        offered
    )


def test_colour_is_left_out_where_no_color_asks_for_it() -> None:
    plain = start("methods", NO_COLOR="1", FORCE_COLOR="")
    assert plain.returncode == 0
    assert "adamw" in plain.stdout
    assert "\x1b[3" not in plain.stdout


@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_debug_is_taken_anywhere_and_shows_the_traceback(cli: Cli, here: Path, place: str) -> None:
    arguments = ["train", "--steps", "0"]
    arguments.insert({"before": 0, "between": 1, "after": 3}[place], "--debug")
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("scrimp: ")


def test_methods_shows_every_piece_and_method(cli: Cli) -> None:
    shown = cli("methods")
    assert shown.code == 0
    for entry in (*PIECES, *METHODS):
        assert entry.name in shown.out
    document = cli("methods", "--json").document
    assert [method["name"] for method in document["methods"]] == [method.name for method in METHODS]
    assert len(document["pieces"]) == len(PIECES)


def test_doctor_says_what_is_there_and_how_to_get_what_is_missing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scrimp.base.extras.is_installed", lambda module: module != "gguf")
    (tmp_path / "a.tokens").write_bytes(bytes(2048))
    found = cli("doctor", "--json", "--cache", str(tmp_path)).document
    assert found["versions"]["torch"] == version("torch")
    assert found["cache"] == {"folder": str(tmp_path), "size": "2 KiB"}
    assert found["extras"]["gguf"] == "missing: pip install 'scrimp[gguf]'"
    assert found["extras"]["tensorboard"] == "installed"
    assert {"machine", "memory", "threads"} <= found.keys()
    plain = cli("doctor", "--cache", str(tmp_path))
    assert plain.code == 0
    assert all(topic in plain.out for topic in found)


def test_a_run_leaves_what_others_rely_on(run: Path) -> None:
    assert {path.name for path in run.iterdir()} - {".lock"} == {
        "recipe.yaml",
        "metrics.jsonl",
        "memory.json",
        "sample.txt",
        "checkpoints",
        "model",
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"train", "eval", "checkpoint", "end"}
    keys = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "peak_bytes", "predicted_bytes"}
    for row in rows:
        assert keys <= row.keys()
        assert {"eval_loss", "perplexity", "bits_per_byte"} <= row.keys() or row["kind"] in (
            "train",
            "checkpoint",
        )
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
    stored = read(run / "recipe.yaml")
    assert (stored.recipe.seed, stored.recipe.threads, stored.recipe.device) == (0, 1, "cpu")
    assert None not in (stored.recipe.memory, stored.recipe.precision, stored.recipe.compile)
    assert stored.recorded["torch"] == version("torch")


def test_json_is_one_document_and_all_else_goes_to_standard_error(
    cli: Cli, here: Path, small: tuple[str, ...]
) -> None:
    outcome = cli("train", *small, "--out", "run", "--json")
    document = outcome.document
    assert outcome.code == 0
    assert document["step"] == 4
    assert document["out"] == "run"
    assert document["recipe"].keys() == fields().keys()
    assert "step 4/4" in outcome.err
    rows = (here / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["bits_per_byte"] == document["bits_per_byte"]


def test_without_json_nothing_of_a_run_goes_to_standard_output(
    cli: Cli, here: Path, small: tuple[str, ...]
) -> None:
    assert cli("train", *small, "--out", "run").out == ""


def test_the_folder_is_the_first_free_one_by_the_model_s_name(
    cli: Cli, here: Path, small: tuple[str, ...]
) -> None:
    folders = [cli("train", *small, "--json").document["out"] for _ in range(2)]
    assert folders == [str(Path("runs") / "tiny-1"), str(Path("runs") / "tiny-2")]


@pytest.mark.parametrize("as_json", [True, False])
def test_a_dry_run_says_what_would_happen_and_does_nothing(
    cli: Cli, here: Path, small: tuple[str, ...], as_json: bool
) -> None:
    outcome = cli("train", *small, "--dry-run", *(["--json"] if as_json else []))
    assert outcome.code == 0
    assert "fits the budget" in outcome.err
    assert list(here.iterdir()) == []
    if as_json:
        assert outcome.document["recipe"]["steps"] == 4
        assert outcome.document["predicted_bytes"] == max(
            sum(moment["terms"].values()) for moment in outcome.document["memory"]["moments"]
        )


def test_a_recipe_file_may_be_changed_by_options(cli: Cli, here: Path, small: tuple[str, ...]) -> None:
    Path("recipe.yaml").write_text("seed: 5\noptimizer: {lr: 0.25}\nclip: 0.5\n")
    found = cli("train", "recipe.yaml", *small, "--lr", "0.125", "--dry-run", "--json").document["recipe"]
    assert (found["seed"], found["optimizer.lr"], found["clip"]) == (5, 0.125, 0.5)


def test_a_stored_recipe_repeats_its_run_bit_for_bit(cli: Cli, run: Path, cache: Path) -> None:
    outcome = cli("train", run / "recipe.yaml", "--out", "again", "--cache", cache)
    assert outcome.code == 0, outcome.err
    first, second = (folder / "model" / "model.safetensors" for folder in (run, Path("again")))
    assert first.read_bytes() == second.read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, Path("again"))
    ]
    assert losses[0] == losses[1]


def test_eval_of_a_run_is_the_number_of_its_loop(cli: Cli, run: Path, cache: Path) -> None:
    rows = (run / "metrics.jsonl").read_text().splitlines()
    outcome = cli("eval", "run", "--json", "--cache", cache)
    assert outcome.code == 0, outcome.err
    assert outcome.document["bits_per_byte"] == json.loads(rows[-1])["bits_per_byte"]
    plain = cli("eval", "run", "--cache", cache)
    assert f"{outcome.document['bits_per_byte']:.4f}" in plain.out


def test_generate_continues_a_prompt(cli: Cli, run: Path) -> None:
    options = ("generate", "run", "--prompt", "def ", "--tokens", "8", "--seed", "3")
    plain = cli(*options)
    assert plain.code == 0, plain.err
    assert plain.out.startswith("def ")
    assert cli(*options, "--json").document == {"text": plain.out.removesuffix("\n")}


def test_generate_stops_where_the_context_ends(cli: Cli, run: Path) -> None:
    outcome = cli("generate", "run", "--prompt", "a", "--tokens", "500", "--temperature", "0", "--json")
    assert outcome.code == 0, outcome.err
    assert 1 < len(outcome.document["text"].encode()) <= 3 * 64  # an odd byte is written as U+FFFD


def test_verify_says_that_a_run_repeats(cli: Cli, run: Path, cache: Path) -> None:
    outcome = cli("verify", "run", "--json", "--cache", cache)
    assert outcome.code == 0, outcome.err
    assert outcome.document["repeats"] is True
    assert cli("verify", "run", "--cache", cache).code == 0


def test_verify_says_where_a_run_does_not_repeat(cli: Cli, run: Path, cache: Path) -> None:
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    changed = [{**row, "loss": row["loss"] + (row["step"] == 4)} for row in rows]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in changed))
    outcome = cli("verify", "run", "--json", "--cache", cache)
    assert outcome.code == 2
    assert outcome.document["differing"] == [4]


def test_a_finished_run_says_so_and_is_done(cli: Cli, run: Path, cache: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    outcome = cli("train", "--out", "run", "--resume", "--cache", cache)
    assert outcome.code == 0
    assert "has finished all its 4 steps" in outcome.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_output_logging_and_checkpointing_may_change_on_resume(cli: Cli, run: Path, cache: Path) -> None:
    options = ("--checkpoint.every", "1", "--checkpoint.keep", "1")
    outcome = cli("train", "--out", "run", "--resume", "--cache", cache, *options)
    assert outcome.code == 0, outcome.err


def test_resume_takes_options_that_agree_with_the_run(cli: Cli, run: Path, small: tuple[str, ...]) -> None:
    outcome = cli("train", *small, "--out", "run", "--resume", "--lr", "auto")
    assert outcome.code == 0, outcome.err


def test_overwrite_replaces_a_run(cli: Cli, run: Path, small: tuple[str, ...]) -> None:
    outcome = cli("train", *small, "--out", "run", "--overwrite", "--seed", "7")
    assert outcome.code == 0, outcome.err
    assert read(run / "recipe.yaml").recipe.seed == 7


def _raising(error: BaseException) -> Callable[..., None]:
    def command(*, as_json: bool) -> None:
        raise error

    return guard.guarded(command)


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (Interrupted("go on with X", signal_number=2, out=None), 130, "go on with X"),
        (Interrupted("go on with X", signal_number=15, out=None), 143, "go on with X"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (scrimp.ScrimpError("no such thing"), 2, "no such thing"),
        (ZeroDivisionError("ours"), 1, "this is a bug in scrimp"),
    ],
)
def test_every_end_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, sentence: str
) -> None:
    with pytest.raises(guard.typer.Exit) as stop:
        _raising(error)(as_json=True)
    assert stop.value.exit_code == code
    printed = capsys.readouterr()
    assert sentence in printed.err.splitlines()[-1]
    assert json.loads(printed.out)["exit_code"] == code
    assert ("Traceback" in printed.err) == (code == 1)


def test_json_of_a_command_is_plain_data(capsys: pytest.CaptureFixture[str]) -> None:
    methods.methods(as_json=True)
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_what_json_has_no_word_for_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    guard.print_json({"loss": float("nan"), "of": [float("inf"), 1.5], "path": Path("a")})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "of": [None, 1.5], "path": "a"}


def test_a_terminal_gets_a_bar_and_anything_else_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []
    for is_terminal in (True, False):
        monkeypatch.setattr("sys.stderr.isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        kinds.append(type(train.make_reporter()).__name__)
    assert kinds == ["ConsoleReporter", "LineReporter"]
