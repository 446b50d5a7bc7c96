"""A run that was stopped and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import transformers
from tests.training.conftest import write_gpt2, write_text

from scrimp.base import files
from scrimp.base.errors import ScrimpError
from scrimp.data import byte_tokenizer
from scrimp.optim import paging
from scrimp.training import loop
from scrimp.training.metrics import read_metrics

if TYPE_CHECKING:
    from tests.training.conftest import Lab


class PulledPlugError(Exception):
    """The end of a process, as far as a test in the same process can go (see test_kill for the real one)."""


def pull_the_plug() -> None:
    raise PulledPlugError


def stop_after(lab: Lab, step: int, recipe: Any, out: str = "run") -> None:
    """Let a run die while its step `step` is being reported: before that step's checkpoint."""
    with pytest.raises(PulledPlugError):
        lab.train(recipe, out, reporter=lab.reporter({step: pull_the_plug}))


def assert_same(lab: Lab, out: str, reference: str = "whole") -> None:
    assert lab.rows(out) == lab.rows(reference)
    assert lab.weights(out) == lab.weights(reference)
    # The optimizer's moments too: both runs hold the checkpoint of the last step.
    last = f"checkpoints/step-{lab.rows(out)[-1]['step']:08}"
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, expected = ((lab.path / run / last / name).read_bytes() for run in (out, reference))
        assert ours == expected


RECIPES: dict[str, dict[str, Any]] = {
    "every-step": {},
    "every-4": {"checkpoint.every": 4, "evaluation.every": 3},
    "padded": {"data.packing": "padded", "checkpoint.every": 2},
    "isolated": {"data.boundaries": "isolate", "checkpoint.every": 2},
    "bf16": {"precision": "bf16", "checkpoint.every": 2},
    "bf16-mixed": {"precision": "bf16-mixed", "checkpoint.every": 2},
    "several-epochs": {"batch": 16, "micro_batch": 16, "checkpoint.every": 2, "schedule.name": "wsd"},
}


@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(lab: Lab, changes: dict[str, Any]) -> None:
    recipe = lab.recipe(steps=8, **changes)
    lab.train(recipe, "whole")
    stop_after(lab, 6, recipe)
    reporter = lab.reporter()
    lab.train(recipe, resume=True, reporter=reporter)
    every = recipe.checkpoint.every or 1
    assert f"going on after step {(6 - 1) // every * every} of 8" in reporter.notes
    assert_same(lab, "run")


def test_paged_state_goes_on_exactly_and_changes_no_bit(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "SMALL", 1)
    lab.train(lab.recipe(steps=8), "whole")
    recipe = lab.recipe(steps=8, **{"placement.name": "paged-state", "checkpoint.every": 2})
    stop_after(lab, 6, recipe)
    lab.train(recipe, resume=True)
    assert lab.weights("run") == lab.weights("whole")


def test_dropout_goes_on_where_it_was(lab: Lab) -> None:
    recipe = lab.recipe(model=str(write_gpt2(lab.path / "gpt2", dropout=0.1)), checkpoint__every=2)
    lab.train(recipe, "whole")
    stop_after(lab, 4, recipe)
    lab.train(recipe, resume=True)
    assert_same(lab, "run")


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTConfig", {"word_embed_proj_dim": 16, "ffn_dim": 24, "dropout": 0.1, "layerdrop": 0.3}),
    "gemma3": ("Gemma3TextConfig", {"intermediate_size": 24, "head_dim": 8, "num_key_value_heads": 1}),
    "mamba": ("MambaConfig", {"state_size": 4}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_buffers_and_draws_of_their_own_go_on_exactly(lab: Lab, family: str) -> None:
    """A resumed model is made empty: what no checkpoint holds must be made all the same."""
    kind, values = FAMILIES[family]
    sizes = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = lab.path / family
    getattr(transformers, kind)(**sizes, **values, max_position_embeddings=64).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    recipe = lab.recipe(model=str(model), checkpoint__every=2, steps=4)
    lab.train(recipe, "whole")
    stop_after(lab, 4, recipe)
    lab.train(recipe, resume=True)
    assert_same(lab, "run")


def test_a_run_may_be_stopped_again_and_again(lab: Lab) -> None:
    recipe = lab.recipe(checkpoint__every=2)
    lab.train(recipe, "whole")
    stop_after(lab, 1, recipe)  # before there is any checkpoint
    for step in (3, 4, 6):
        with pytest.raises(PulledPlugError):
            lab.train(recipe, resume=True, reporter=lab.reporter({step: pull_the_plug}))
    lab.train(recipe, resume=True)
    assert_same(lab, "run")


def test_a_stop_between_a_checkpoint_and_its_line_leaves_no_gap(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.train(lab.recipe(), "whole")
    with monkeypatch.context() as patch:
        real = loop.checkpoint.prune

        def prune(folder: Path, *, step: int, keep: int, best: int | None) -> None:
            real(folder, step=step, keep=keep, best=best)
            if step == 4:
                pull_the_plug()

        patch.setattr(loop.checkpoint, "prune", prune)
        with pytest.raises(PulledPlugError):
            lab.train(lab.recipe())
    assert lab.rows()[-1]["kind"] == "eval"
    lab.train(lab.recipe(), resume=True)
    assert_same(lab, "run")


def test_a_stop_while_the_model_is_exported_loses_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.train(lab.recipe(), "whole")
    with monkeypatch.context() as patch:
        patch.setattr("scrimp.models.export", lambda *_: pull_the_plug())
        with pytest.raises(PulledPlugError):
            lab.train(lab.recipe())
    assert not (lab.path / "run" / "model").exists()
    lab.train(lab.recipe(), resume=True)
    assert_same(lab, "run")


def test_the_clock_saves_without_a_trace_in_the_numbers(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = lab.recipe(checkpoint__every=6)
    lab.train(recipe, "whole")
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)  # every step is late
    stop_after(lab, 4, recipe)
    assert lab.checkpoints() == [2, 3]
    lab.train(recipe, resume=True)
    assert_same(lab, "run")


def damage(lab: Lab, step: int, out: str = "run") -> Path:
    path = lab.path / out / "checkpoints" / f"step-{step:08}"
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    file.write_bytes(content)
    return path


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(lab: Lab) -> None:
    recipe = lab.recipe(checkpoint__every=2)
    lab.train(recipe, "whole")
    stop_after(lab, 5, recipe)
    path = damage(lab, 4)
    reporter = lab.reporter()
    lab.train(recipe, resume=True, reporter=reporter)
    assert any(
        str(path) in note and "damaged" in note and "model.safetensors" in note for note in reporter.notes
    )
    assert "going on after step 2 of 6" in reporter.notes
    assert_same(lab, "run")


def test_without_a_usable_checkpoint_a_run_starts_at_step_0_and_says_so(lab: Lab) -> None:
    lab.train(lab.recipe(), "whole")
    stop_after(lab, 4, lab.recipe())
    for step in lab.checkpoints():
        damage(lab, step)
    reporter = lab.reporter()
    lab.train(lab.recipe(), resume=True, reporter=reporter)
    assert any("no usable checkpoint, so the run starts at step 0" in note for note in reporter.notes)
    assert_same(lab, "run")


@pytest.mark.parametrize("exists", [False, True])
def test_to_resume_what_never_began_is_to_begin(lab: Lab, exists: bool) -> None:
    if exists:
        (lab.path / "run").mkdir()
    reporter = lab.reporter()
    lab.train(lab.recipe(), resume=True, reporter=reporter)
    assert any("starts at step 0" in note for note in reporter.notes)
    assert lab.rows()[-1]["kind"] == "end"


def test_a_failed_attempt_to_resume_deletes_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(lab, 3, lab.recipe())
    for step in lab.checkpoints():
        damage(lab, step)
    with monkeypatch.context() as patch:
        patch.setattr("scrimp.training.run._train", lambda *_: pull_the_plug())
        with pytest.raises(PulledPlugError):
            lab.train(lab.recipe(), resume=True)
    assert lab.checkpoints() == [1, 2] and (lab.path / "run" / "recipe.yaml").is_file()


def test_a_finished_run_says_so_and_stays_as_it_is(lab: Lab) -> None:
    run = lab.train(lab.recipe())
    before = {path: path.stat().st_mtime_ns for path in (lab.path / "run").rglob("*") if path.is_file()}
    reporter = lab.reporter()
    again = lab.train(lab.recipe(), resume=True, reporter=reporter)
    assert any("has finished all its 6 steps" in note for note in reporter.notes) and not reporter.ticks
    assert again == run
    del before[lab.path / "run" / ".lock"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 7),
        ("tokens", 10_000),
        ("optimizer.lr", 2e-2),
        ("seed", 1),
        ("micro_batch", 1),
        ("schedule.warmup", 0.5),
        ("schedule.decay", 0.5),
        ("data.path", ["elsewhere"]),
        ("model", "llama-1m"),
        ("precision", "bf16"),
    ],
)
def test_another_option_than_the_runs_is_named_and_refused(lab: Lab, name: str, value: Any) -> None:
    recipe = lab.recipe()
    stop_after(lab, 3, recipe)
    changes = {name: value, **({"steps": None} if name == "tokens" else {})}
    with pytest.raises(ScrimpError, match=name.replace(".", r"\.")):
        lab.train(lab.recipe(**changes), resume=True)
    lab.train(recipe, resume=True)  # and nothing was harmed


def test_the_same_option_in_other_words_is_accepted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = lab.recipe(schedule__warmup=0.34, schedule__decay=0.01, schedule__name="wsd")
    stop_after(lab, 3, recipe)
    monkeypatch.chdir(lab.path)
    tokens = {"steps": None, "tokens": 6 * 4 * 16 - 1}
    same = {"data.path": ["text"], "model": "tiny", "schedule.warmup": 0.34, "schedule.decay": 0.01}
    run = lab.train(lab.recipe(**tokens, **same, device="auto"), resume=True)
    assert run.metrics.step == run.recipe.steps


def test_logging_and_checkpointing_may_change(lab: Lab) -> None:
    lab.train(lab.recipe(), "whole")
    stop_after(lab, 3, lab.recipe())
    run = lab.train(lab.recipe(**{"checkpoint.every": 2, "checkpoint.keep": 3}), resume=True)
    assert run.recipe.checkpoint.every == 2 and run.recipe.checkpoint.keep == 3
    assert lab.weights() == lab.weights("whole")
    assert [row for row in lab.rows() if row["kind"] != "checkpoint"] == [
        row for row in lab.rows("whole") if row["kind"] != "checkpoint"
    ]


def test_other_data_than_the_run_began_with_are_refused(lab: Lab) -> None:
    stop_after(lab, 3, lab.recipe())
    (lab.text / "000.txt").write_text("something else")
    with pytest.raises(ScrimpError, match="data has changed since this run began"):
        lab.train(lab.recipe(), resume=True)
    assert lab.checkpoints() == [1, 2] and len(read_metrics(lab.path / "run" / "metrics.jsonl")) > 3


def test_a_moved_folder_and_a_copied_one_resume(lab: Lab) -> None:
    lab.train(lab.recipe(), "whole")
    stop_after(lab, 3, lab.recipe())
    shutil.copytree(lab.path / "run", lab.path / "copy")
    (lab.path / "run").rename(lab.path / "moved")
    for out in ("copy", "moved"):
        lab.train(lab.recipe(), out, resume=True)
        assert_same(lab, out)


def test_a_checkpoint_of_another_model_is_refused(lab: Lab) -> None:
    stop_after(lab, 3, lab.recipe())
    config = lab.model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 32}))
    with pytest.raises(ScrimpError, match="is of another model"):
        lab.train(lab.recipe(), resume=True)


def test_the_newest_checkpoints_and_the_best_one_stay(lab: Lab) -> None:
    # The rate is such that the model gets worse after its first steps.
    lab.train(lab.recipe(steps=9, optimizer__lr=0.1, schedule__name="constant", checkpoint__keep=2))
    held_out = {row["step"]: row["eval_loss"] for row in lab.rows(kind="eval")}
    best = min(held_out, key=held_out.__getitem__)
    assert best < 8, held_out
    assert lab.checkpoints() == [best, 8, 9]
    lab.train(lab.recipe(steps=9, checkpoint__keep=4, data__held_out=0), "without")
    assert lab.checkpoints("without") == [6, 7, 8, 9]


def test_a_full_disk_is_a_clear_sentence_and_costs_nothing_that_was_saved(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = lab.recipe(checkpoint__every=2)
    lab.train(recipe, "whole")
    real = files.write

    def write(file: Any, data: bytes | memoryview) -> None:
        if "step-00000004" in file.name and "optimizer" in file.name:
            real(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", write)
        with pytest.raises(ScrimpError, match=r"no space left to write .*step-00000004.*free some"):
            lab.train(recipe)
    assert lab.checkpoints() == [2]
    lab.train(recipe, resume=True)
    assert_same(lab, "run")


def test_the_lock_keeps_a_second_program_out(lab: Lab) -> None:
    def intrude() -> None:
        for resume in (False, True):
            with pytest.raises(ScrimpError, match="another program is working"):
                lab.train(lab.recipe(), resume=resume, overwrite=not resume)

    lab.train(lab.recipe(), reporter=lab.reporter({2: intrude}))
    assert lab.rows()[-1]["kind"] == "end"


def test_lost_metrics_are_said_and_not_filled_with_zeros(lab: Lab) -> None:
    stop_after(lab, 4, lab.recipe())
    (lab.path / "run" / "metrics.jsonl").unlink()
    reporter = lab.reporter()
    lab.train(lab.recipe(), resume=True, reporter=reporter)
    assert any("earlier lines are missing" in note for note in reporter.notes)
    assert [row["step"] for row in lab.rows(kind="train")] == [4, 5, 6]


def test_a_resumed_run_keeps_its_prediction(lab: Lab) -> None:
    stop_after(lab, 3, lab.recipe())
    ballast = b"x" * 2**26  # the process holds more now, the run does not
    lab.train(lab.recipe(), resume=True)
    rows = read_metrics(lab.path / "run" / "metrics.jsonl")
    assert len({row["predicted_bytes"] for row in rows}) == 1 and ballast


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
def test_a_deterministic_gpu_run_goes_on_exactly(lab: Lab, precision: str) -> None:
    changes = {"device": "cuda", "deterministic": True, "precision": precision, "checkpoint.every": 2}
    recipe = lab.recipe(**changes)
    lab.train(recipe, "whole")
    stop_after(lab, 4, recipe)
    lab.train(recipe, resume=True)
    assert_same(lab, "run")


def test_more_text_elsewhere_changes_nothing(lab: Lab) -> None:
    """The cache may hold other corpora, and may be gone: neither is part of a run."""
    lab.train(lab.recipe(), "whole")
    stop_after(lab, 3, lab.recipe())
    shutil.rmtree(lab.cache)
    lab.train(lab.recipe(data__path=[str(write_text(lab.path / "text-2", seed=1))]), "other")
    lab.train(lab.recipe(), resume=True)
    assert_same(lab, "run")
