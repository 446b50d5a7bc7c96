"""What `import scrimp` promises: the public names, their types, and a process left as it was found."""

from __future__ import annotations

import ast
import inspect
import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from transformers import LlamaConfig

import scrimp
from scrimp.data import byte_tokenizer
from scrimp.recipe import parse

PACKAGE = Path(scrimp.__file__).parent


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> scrimp.Recipe:
    """Return the recipe of a run of two steps on a tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    widths = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=264, max_position_embeddings=64, **widths).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text("a text to learn from, again and again\n" * 60)
    numbers = {"steps": 2, "batch": 2, "micro_batch": 1, "seq": 16}
    return parse({"model": str(folder), "data": str(folder / "text.txt"), **numbers})


def _stub() -> ast.Module:
    return ast.parse((PACKAGE / "__init__.pyi").read_text())


def test_the_stub_names_what_the_package_gives() -> None:
    imported = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in _stub().body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name: f"{where}.{name}" for name, where in scrimp._WHERE.items()} == imported
    assert {*imported, "__version__"} == set(scrimp.__all__)
    assigned = next(node for node in _stub().body if isinstance(node, ast.Assign))
    assert ast.literal_eval(assigned.value) == scrimp.__all__


def test_every_public_name_is_there_and_documented() -> None:
    assert len(scrimp.__all__) == len(set(scrimp.__all__)) > 5
    for name in scrimp.__all__:
        value = getattr(scrimp, name)
        assert name == "__version__" or inspect.getdoc(value)
    assert set(scrimp.__all__) <= set(dir(scrimp))


def test_any_other_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = scrimp.trian  # type: ignore[attr-defined]
    assert not hasattr(scrimp, "__wrapped__")


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert get_type_hints(scrimp.load_recipe)["return"] is scrimp.Recipe


def test_train_has_the_signature_that_was_promised() -> None:
    parameters = inspect.signature(scrimp.train).parameters
    assert list(parameters) == ["recipe", "out", "resume"]
    assert [parameters[name].kind for name in ("out", "resume")] == [inspect.Parameter.KEYWORD_ONLY] * 2
    assert (parameters["out"].default, parameters["resume"].default) == (None, False)


def test_train_returns_the_finished_run(recipe: scrimp.Recipe, tmp_path: Path) -> None:
    run = scrimp.train(recipe, out=tmp_path / "run")
    assert isinstance(run, scrimp.Run)
    assert run.out == tmp_path / "run"
    assert run.metrics.step == 2
    assert run.evaluation is not None
    assert scrimp.load_recipe(run.out / "recipe.yaml") == run.recipe
    again = scrimp.train(recipe, out=str(tmp_path / "run"), resume=True)
    assert again == run


def _process() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "folder": Path.cwd(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "running threads": threading.active_count(),
    }


def test_training_leaves_the_process_as_it_found_it_and_may_be_called_twice(
    recipe: scrimp.Recipe, tmp_path: Path
) -> None:
    before = _process()
    losses = [scrimp.train(recipe, out=tmp_path / name).metrics.loss for name in ("a", "b")]
    assert losses[0] == losses[1]
    assert _process() == before


def test_a_failed_run_leaves_the_process_as_it_found_it(recipe: scrimp.Recipe, tmp_path: Path) -> None:
    before = _process()
    with pytest.raises(scrimp.ScrimpError, match="positions for 64"):
        scrimp.train(parse({**_plain(recipe), "seq": 65}), out=tmp_path / "run")
    assert _process() == before
    assert list(tmp_path.iterdir()) == []


def _plain(recipe: scrimp.Recipe) -> dict[str, Any]:
    return recipe.model_dump(exclude_unset=True)


def test_training_works_in_another_thread(recipe: scrimp.Recipe, tmp_path: Path) -> None:
    """Where no signal handler can be set; a notebook's server may call it so."""
    found: list[scrimp.Run] = []
    thread = threading.Thread(target=lambda: found.append(scrimp.train(recipe, out=tmp_path / "run")))
    thread.start()
    thread.join(60)
    assert found[0].metrics.step == 2


def test_an_interrupt_in_a_notebook_saves_and_is_a_keyboard_interrupt(
    recipe: scrimp.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scrimp.training.loop import Loop

    real: Callable[[Loop], None] = Loop._train_step

    def train_step(loop: Loop) -> None:
        real(loop)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Loop, "_train_step", train_step)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(scrimp.Interrupted, match="stopped after step 1 of 2") as caught:
        scrimp.train(recipe, out=tmp_path / "run")
    assert isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.out == tmp_path / "run"
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    whole = scrimp.train(recipe, out=tmp_path / "whole")
    assert scrimp.train(recipe, out=tmp_path / "run", resume=True).metrics.loss == whole.metrics.loss


def test_a_notebook_without_a_terminal_gets_plain_lines(
    recipe: scrimp.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    scrimp.train(recipe, out=tmp_path / "run")
    assert "step 2/2" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()
