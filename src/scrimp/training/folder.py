"""A run's folder: how it is chosen, refused, locked, and left clean.

RUN/recipe.yaml      the resolved recipe and what it ran with
RUN/metrics.jsonl    one line a step
RUN/memory.json      what was predicted and what was measured, moment by moment
RUN/sample.txt       a short text of the finished model's
RUN/checkpoints/     see scrimp.training.checkpoint
RUN/model/           the finished model, an ordinary Hugging Face folder
RUN/adapter/         the finished adapter in peft's form, in place of a model or beside the merged one
RUN/tensorboard/     what a logger writes, where one was asked for
RUN/report.html      what `scrimp report` writes, where it was asked for
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from scrimp.base import files
from scrimp.base.errors import ScrimpError
from scrimp.base.lock import run_lock

RUNS = Path("runs")
RECIPE = "recipe.yaml"
# In the order in which they go: as long as there is a recipe, the folder counts as a run.
OURS = (
    "checkpoints",
    "model",
    "adapter",
    "tensorboard",
    "wandb",
    "report.html",
    "sample.txt",
    "memory.json",
    "metrics.jsonl",
    RECIPE,
)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The places of a run.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / RECIPE

    @property
    def metrics(self) -> Path:
        """The metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def memory(self) -> Path:
        """The predicted and the measured ledger."""
        return self.path / "memory.json"

    @property
    def sample(self) -> Path:
        """A short text of the finished model's."""
        return self.path / "sample.txt"

    @property
    def report(self) -> Path:
        """The page that `scrimp report` writes."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The finished model."""
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """The finished adapter."""
        return self.path / "adapter"

    @property
    def finished(self) -> Path | None:
        """What a finished run left, the merged model before the adapter; None where it has not finished."""
        return next((path for path in (self.model, self.adapter) if path.is_dir()), None)

    @property
    def is_run(self) -> bool:
        """Whether a run was started here."""
        return self.recipe.is_file()

    def check_free(self, *, overwrite: bool) -> None:
        """Refuse a folder that a new run may not take.

        Raises:
            ScrimpError: It holds a run and `overwrite` is off, or it holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ScrimpError(f"out {self.path}: a file is in the way; choose another --out")
        if self.is_run and not overwrite:
            raise ScrimpError(
                f"out {self.path}: this folder holds another run; go on with it by --resume, "
                "replace it by --overwrite, or choose another --out"
            )
        if not self.is_run and self._strangers():
            raise ScrimpError(
                f"out {self.path}: this folder holds {self._strangers()[0]!r}, which is no run of scrimp; "
                "choose an empty or a new --out"
            )

    def clear(self) -> None:
        """Delete what a run of scrimp wrote here, and nothing else.

        Raises:
            ScrimpError: It may not be deleted.
        """
        with files.explained(self.path):
            for path in (self.path / name for name in OURS):
                if path.exists():
                    files.remove_tree(path)

    def _strangers(self) -> list[str]:
        if not self.path.is_dir():
            return []
        names = (entry.name for entry in self.path.iterdir())
        return sorted(name for name in names if name not in (*OURS, ".lock", f".partial-{RECIPE}"))


def next_free(name: str) -> RunFolder:
    """Return `runs/NAME-N` with the first free N, made so that no other program takes it."""
    plain = re.sub(r"[^\w.-]+", "-", Path(name).stem if name.endswith(".gguf") else Path(name).name).strip(
        "-"
    )
    number = 1
    with files.explained(RUNS):
        while True:
            try:
                (RUNS / f"{plain}-{number}").mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                return RunFolder(RUNS / f"{plain}-{number}")


@contextmanager
def claimed(folder: RunFolder) -> Iterator[None]:
    """Hold a run's folder against other programs; one that was made and stayed empty is removed."""
    existed = folder.path.exists() and any(folder.path.iterdir())
    with files.explained(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
    try:
        with run_lock(folder.path):
            yield
    finally:
        if not existed and not folder.is_run:
            (folder.path / ".lock").unlink(missing_ok=True)
            if not any(folder.path.iterdir()):
                folder.path.rmdir()
                if folder.path.parent == RUNS:
                    with suppress(OSError):  # it holds other runs
                        RUNS.rmdir()
