"""Going on with a run from the command line: what is refused, what is said, and what is never lost.

That a resumed run equals the uninterrupted one bit for bit is held by tests/training; here are the
user's mistakes and the disk's.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scrimp.base import files
from scrimp.methods import options_of, piece
from scrimp.recipe import fields
from scrimp.training import checkpoint

Cli = Callable[..., Any]
Refused = Callable[..., str]


@pytest.fixture
def stopped(run: Path) -> Path:
    """Return a run that stopped after its third step of four: checkpoints at 3 and 2, no model."""
    shutil.rmtree(run / "model")
    shutil.rmtree(checkpoint.checkpoint_path(run / "checkpoints", 4))
    assert [path.name for path in checkpoint.complete(run / "checkpoints")] == ["step-00000003"]
    return run


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _rewrite_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("checksum")
    manifest.update(changes)
    whole = {**manifest, "checksum": checkpoint._checksum(manifest)}
    (path / "manifest.json").write_text(json.dumps(whole))


OTHER = {
    "optimizer.store": "8bit",
    "schedule.exponent": "-0.25",
    "weights.name": "int8",
    "tune.name": "lisa",
    "optimizer.name": "lion",
    "activations.name": "recompute",
    "model.name": "llama-9m",
    "data.path": "other.txt",
    "optimizer.betas": "0.5,0.5",
    "weights.options": "blocks=2",
    "tune.options": "scale=2",
    "optimizer.options": "eps=1e-3",
    "data.packing": "padded",
    "data.boundaries": "isolate",
    "data.long": "cut",
    "model.init": "weights",
    "schedule.name": "linear",
    "precision": "bf16",
    "activations.loss": "chunked",
    "memory": "7GiB",
    "nonfinite": "skip",
    "device": "cuda",
    "data.text_key": "body",
    "data.tokenizer": "other",
    "data.held_out": "0.5",
    "tokens": "99999",
}
# Options of pieces that the run does not have, which are refused with or without a run to go on with.
FOREIGN = {
    f"{choice}.{name}"
    for choice, default in (("weights", "dense"), ("tune", "full"), ("optimizer", "adamw"))
    for name in options_of(choice)
    if name not in piece(choice, default).options
}
FREE = {"log", "checkpoint.every", "checkpoint.keep"}
FREE |= {"gradient.name", "placement.name"}  # which have one value yet


def test_every_other_option_is_named_and_refused(refused: Refused, stopped: Path) -> None:
    """A field that could be changed in silence would give a run that is neither the old one nor a new one."""
    checked = 0
    for name, info in fields().items():
        if name in FREE | FOREIGN:
            continue
        option = f"--{name.replace('_', '-')}"
        flag = info.annotation in (bool, bool | None)
        given = (option,) if flag else (f"{option}={OTHER.get(name, '0.875' if _is_share(info) else '77')}",)
        said = refused("train", "--out", "run", "--resume", *given)
        assert said.startswith(f"scrimp: {name}"), name
        assert "--out" in said
        checked += 1
    assert checked == len(fields()) - len(FREE | FOREIGN) > 25


def _is_share(info: Any) -> bool:
    return "float" in str(info.annotation) and "int" not in str(info.annotation)


def test_what_was_stored_may_be_said_again(cli: Cli, stopped: Path, small: tuple[str, ...]) -> None:
    outcome = cli("train", *small, "--out", "run", "--resume")
    assert outcome.code == 0, outcome.err
    assert "going on after step 3 of 4" in outcome.err


def test_a_run_goes_on_from_anywhere(
    cli: Cli, stopped: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = cli("train", "--out", stopped, "--resume", "--cache", cache, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["step"] == 4


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(cli: Cli, run: Path, cache: Path) -> None:
    shutil.rmtree(run / "model")
    newest = checkpoint.checkpoint_path(run / "checkpoints", 4)
    _damage(newest / "model.safetensors")
    outcome = cli("train", "--out", "run", "--resume", "--cache", cache)
    assert outcome.code == 0, outcome.err
    assert "step-00000004 is damaged" in outcome.err
    assert "going on after step 3 of 4" in outcome.err
    checkpoint.verify(newest)


def test_without_a_usable_checkpoint_the_run_starts_again_and_says_so(
    cli: Cli, run: Path, cache: Path, finished: Path
) -> None:
    shutil.rmtree(run / "model")
    for path in checkpoint.complete(run / "checkpoints"):
        _damage(path / "state.json")
    outcome = cli("train", "--out", "run", "--resume", "--cache", cache)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("is damaged") == 2
    assert "no usable checkpoint, so the run starts at step 0" in outcome.err
    weights = Path("model") / "model.safetensors"
    assert (run / weights).read_bytes() == (finished / weights).read_bytes()


@pytest.mark.parametrize("there", [True, False])
def test_an_empty_or_missing_folder_starts_at_step_0_and_says_so(
    cli: Cli, here: Path, small: tuple[str, ...], there: bool
) -> None:
    if there:
        (here / "out").mkdir()
    outcome = cli("train", *small, "--out", "out", "--resume")
    assert outcome.code == 0, outcome.err
    assert "starts at step 0" in outcome.err


@pytest.mark.parametrize("there", [True, False])
def test_nothing_to_go_on_with_and_nothing_else_said_is_refused(
    refused: Refused, here: Path, there: bool
) -> None:
    if there:
        (here / "out").mkdir()
    assert "out holds no run to go on with: correct --out" in refused("train", "--out", "out", "--resume")


def test_a_checkpoint_of_another_model_is_refused(refused: Refused, stopped: Path, cache: Path) -> None:
    _rewrite_manifest(checkpoint.checkpoint_path(stopped / "checkpoints", 3), model="0" * 32)
    said = refused("train", "--out", "run", "--resume", "--cache", cache)
    assert "step-00000003 is of another model" in said


def test_a_checkpoint_of_a_newer_format_is_refused(refused: Refused, stopped: Path, cache: Path) -> None:
    _rewrite_manifest(checkpoint.checkpoint_path(stopped / "checkpoints", 3), format=checkpoint.FORMAT + 1)
    said = refused("train", "--out", "run", "--resume", "--cache", cache)
    assert "install a newer scrimp" in said


def test_data_that_changed_since_are_refused(
    cli: Cli, refused: Refused, here: Path, stopped: Path, small: tuple[str, ...], cache: Path, text: Path
) -> None:
    stored = (stopped / "recipe.yaml").read_text()
    other = here / "text.jsonl"
    other.write_text(text.read_text() + '{"text": "one document more"}\n')
    (stopped / "recipe.yaml").write_text(stored.replace(str(text), str(other)))
    said = refused("train", "--out", "run", "--resume", "--cache", cache)
    assert "data has changed" in said


def test_a_broken_stored_recipe_is_refused(refused: Refused, stopped: Path) -> None:
    (stopped / "recipe.yaml").write_text("steps: [")
    assert "recipe.yaml: it is not YAML" in refused("train", "--out", "run", "--resume")


def test_two_programs_cannot_share_a_folder(refused: Refused, stopped: Path, cache: Path) -> None:
    from scrimp.base.lock import run_lock

    with run_lock(stopped):
        said = refused("train", "--out", "run", "--resume", "--cache", cache)
    assert "another program is working in run" in said


def test_a_full_disk_stops_the_run_and_keeps_the_earlier_checkpoint(
    cli: Cli, stopped: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = files.atomic_directory

    def failing(path: Path) -> Any:
        monkeypatch.setattr(files, "write", full)
        return real(path)

    monkeypatch.setattr(files, "atomic_directory", failing)
    outcome = cli("train", "--out", "run", "--resume", "--cache", cache)
    monkeypatch.undo()
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "no space left" in outcome.err.splitlines()[-1]
    assert [path.name for path in checkpoint.complete(stopped / "checkpoints")] == ["step-00000003"]
    checkpoint.verify(checkpoint.checkpoint_path(stopped / "checkpoints", 3))
    os.chdir(stopped.parent)
    again = cli("train", "--out", "run", "--resume", "--cache", cache)
    assert again.code == 0, again.err


def test_a_run_that_dies_before_its_first_step_leaves_no_folder(
    cli: Cli, here: Path, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scrimp.training.loop import Loop

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "_train_step", interrupted)
    outcome = cli("train", *small, "--out", "out")
    assert outcome.code == 130
    assert list(here.iterdir()) == []


def test_verify_needs_something_to_compare_with(refused: Refused, stopped: Path, cache: Path) -> None:
    shutil.rmtree(stopped / "checkpoints")
    assert "no checkpoint with a step after it" in refused("verify", "run", "--cache", cache)
