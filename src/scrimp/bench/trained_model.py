"""What the fine-tuning suite starts from where no model is named: the default run, and another kind of text.

The model is trained on the code of Python's standard library, and tuned on the prose of Python's own
reference (`pydoc_data.topics`), so that nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scrimp.base import files
from scrimp.base.errors import ScrimpError
from scrimp.bench.entries import Ask
from scrimp.bench.pool import Pool
from scrimp.bench.tasks import Task

TINY_LR = 1e-3  # AdamW's for a model of a million parameters; the default for real ones hardly moves it
HELD = ("device", "threads", "deterministic")


def trained_model(folder: Path, ask: Ask, pool: Pool) -> Mapping[str, Any]:
    """Return the fields of a recipe that a user left open: the model, its text and the rate to search around.

    Args:
        folder: Where the text is written.
        ask: What was asked for.
        pool: Trains the model, once.

    Raises:
        ScrimpError: The model could not be made.
    """
    found: dict[str, Any] = {}
    if "data.path" not in ask.stated:
        found["data.path"] = [str(_write_topics(folder / "topics.jsonl").absolute())]
    if "model.name" not in ask.stated:
        found["model.name"] = str(_train(ask, pool).absolute())
        found["optimizer.lr"] = TINY_LR
    return found


def _write_topics(path: Path) -> Path:
    from pydoc_data.topics import topics

    lines = [json.dumps({"text": text}) for _, text in sorted(topics.items())]
    content = "\n".join(lines) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        with files.explained(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, content)
    return path


def _train(ask: Ask, pool: Pool) -> Path:
    """Make the default run."""
    task = Task(
        mode="base",
        contestant="base",
        suite=ask.suite.name,
        recipe={name: ask.stated[name] for name in HELD if name in ask.stated},
        cache=None if ask.cache is None else str(ask.cache),
    )
    pool.say("making the model to start from, by the default run; --model names another one")
    for _, found in pool.do([task]):
        if found["status"] != "done":
            raise ScrimpError(f"the model to start from: {found['why']}; name one with --model")
    return pool.place(task).run
