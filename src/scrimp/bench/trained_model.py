"""What the fine-tuning suite starts from where no model is named: the default run, and another kind of text.

The model is trained on the code of Python's standard library, and tuned on the prose of Python's own
reference (`pydoc_data.topics`), so that nothing is downloaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scrimp.base import files
from scrimp.base.errors import ScrimpError

TINY_LR = 1e-3  # AdamW's for a model of a million parameters; the default for real ones hardly moves it


def trained_model(folder: Path, stated: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Return the fields of a recipe that a user left open: the model, its text and the rate to search around.

    Args:
        folder: Where the model and the text are made.
        stated: What the user gave, by dotted field.
        say: Told what is going on.

    Raises:
        ScrimpError: The model could not be made.
    """
    found: dict[str, Any] = {}
    if "data.path" not in stated:
        found["data.path"] = [str(_write_topics(folder / "topics.jsonl").absolute())]
    if "model.name" not in stated:
        found["model.name"] = str(_train(folder / "run", say).absolute())
        found["optimizer.lr"] = TINY_LR
    return found


def _write_topics(path: Path) -> Path:
    from pydoc_data.topics import topics

    with files.explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) for _, text in sorted(topics.items())]
    files.write_atomic(path, "\n".join(lines) + "\n")
    return path


def _train(out: Path, say: Callable[[str], None]) -> Path:
    """Make the default run, or finish it."""
    if not (out / "model").is_dir():
        say("training the model to start from: scrimp train, about a minute")
        done = subprocess.run(
            [sys.executable, "-m", "scrimp", "train", "--out", str(out), "--resume"], check=False
        )
        if done.returncode != 0:
            raise ScrimpError(
                "the model to start from could not be trained: see above, or name one with --model"
            )
    return out
