"""One run of one contestant: what it is, where it lies, and how its process is started.

A task is plain data, written where its process reads it. Its folder is named by a hash over all that decides
its result, so that a task that was done before is found, and one that differs in anything is not.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from scrimp.base import files
from scrimp.bench.machine import clean_env, installed_version

Mode = Literal["describe", "base", "train", "turns"]
DECIDES = ("scrimp", "torch", "transformers", "accelerate", "bitsandbytes", "numpy")
ANSWER = "scrimp-bench: "  # begins a line that is meant for the suite
LONGEST_LINE = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run of one contestant in a process of its own.

    Attributes:
        mode: Describe the job, make the model it starts from, train to the end, or do steps whenever asked.
        contestant: Its name.
        suite: The suite's name.
        recipe: The recipe, by dotted field.
        peer: The peer's name; None runs scrimp alone.
        facts: What the files, the text and the device are that the recipe only names.
        against: Of turns: whom they are taken with, and how many.
        cache: Folder of the token files; None is the platform's.
        trust_remote_code: Whether the model's own code may run.
    """

    mode: Mode
    contestant: str
    suite: str
    recipe: Mapping[str, Any]
    peer: str | None = None
    facts: str = ""
    against: str = ""
    cache: str | None = None
    trust_remote_code: bool = False

    def key(self, package: str | None) -> str:
        """Return the name of its folder: readable, and different where the result may be.

        Args:
            package: The distribution of the peer.
        """
        decides = {name: value for name, value in asdict(self).items() if name != "cache"}
        versions = {name: installed_version(name) for name in (*DECIDES, *filter(None, [package]))}
        text = json.dumps([decides, versions], sort_keys=True, default=str)
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return f"{re.sub('[^a-zA-Z0-9-]+', '-', self.contestant)}-{digest}"

    @classmethod
    def read(cls, folder: Path) -> Task:
        """Read the task of a folder."""
        return cls(**json.loads((folder / "task.json").read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a task's process finds it and leaves what it found.

    Attributes:
        path: Its folder.
    """

    path: Path

    def prepare(self, task: Task) -> None:
        """Write the task into an empty folder."""
        if self.path.exists():
            files.remove_tree(self.path)
        with files.explained(self.path):
            self.path.mkdir(parents=True)
        files.write_json(self.path / "task.json", asdict(task))

    @property
    def result(self) -> dict[str, Any] | None:
        """What was found; None where it is not finished, or the file is not what we wrote."""
        path = self.path / "result.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
            return None
        return found if isinstance(found, dict) and "status" in found else None

    def write_result(self, found: Mapping[str, Any]) -> None:
        """Write what was found, all or nothing."""
        files.write_json(self.path / "result.json", found)

    @property
    def run(self) -> Path:
        """The run of a model that a suite starts from: beside the folder, so that it outlives a stop."""
        return self.path.with_name(f"{self.path.name}-run")

    @property
    def metrics(self) -> Path:
        """The metrics of its run."""
        return self.path / "metrics.jsonl"

    def last_words(self) -> str:
        """Return the last line that its process said."""
        path = self.path / "log.txt"
        said = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
        lines = [line.strip() for line in said if line.strip()]
        return lines[-1][:LONGEST_LINE] if lines else "not a word from its process"

    def start(self, *, talks: bool = False) -> subprocess.Popen[str]:
        """Start its process; what it says goes to log.txt.

        It ends when its standard input does, so that nothing goes on behind a suite that was killed.

        Args:
            talks: Whether it is asked and answers, line by line, over its standard streams.
        """
        # -P: what lies in the working folder is not to stand in for a package.
        command = [sys.executable, "-P", "-m", "scrimp.bench.worker", str(self.path)]
        with (self.path / "log.txt").open("w", encoding="utf-8") as log:
            return subprocess.Popen(
                command,
                env=clean_env(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if talks else log,
                stderr=log,
                text=True,
            )
