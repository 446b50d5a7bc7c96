"""The one JSON of all parts: read where it is there already, and written anew after every process."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _tasks import Part, Row, Setting

from scrimp.base import files
from scrimp.bench.machine import LoadWatch, environment

SAME = ("device", "tiny", "device_name", "versions")  # what a result must agree in to be gone on with
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_VISIBLE_DEVICES")


@dataclass(slots=True)
class Document:
    """The result.

    Attributes:
        path: Where it lies.
        environment: On what it is made.
        parts: What each part found: `rows`, `summary`, `seconds`, `finished`.
        targets: What was promised, beside what was found, by part.
        command: As typed.
    """

    path: Path
    environment: dict[str, Any]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    targets: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    _load: LoadWatch = field(default_factory=LoadWatch)

    @classmethod
    def open(
        cls, path: Path, setting: Setting, gpu: dict[str, Any] | None, *, again: bool, parts: list[Part]
    ) -> Document:
        """Begin a result, or go on with the one that is there.

        Args:
            path: The file.
            setting: What is to be measured on.
            gpu: The card.
            again: Forget what `parts` found.
            parts: Those that are to be measured.
        """
        found = _here(setting, gpu)
        document = cls(path, found)
        if not path.is_file():
            return document
        before = json.loads(path.read_text(encoding="utf-8"))
        if {name: before["environment"][name] for name in SAME} != {name: found[name] for name in SAME}:
            raise SystemExit(
                f"{path} was made on another machine, with other versions or in the other form: "
                "name another file with --json, or move it away"
            )
        forgotten = {part.name for part in parts} if again else set()
        document.parts = {name: part for name, part in before["results"].items() if name not in forgotten}
        document.targets = {
            name: [target for target in before["targets"] if target["part"] == name]
            for name in document.parts
        }
        return document

    def finished(self, name: str) -> bool:
        """Tell whether every process of a part has found something."""
        return bool(self.parts.get(name, {}).get("finished"))

    def rows(self, name: str) -> list[Row]:
        """Return what the processes of a part found so far."""
        rows: list[Row] = self.parts.get(name, {}).get("rows", [])
        return rows

    def put(self, part: Part, rows: list[Row], *, took: float = 0.0, finished: bool = False) -> None:
        """Put in what a part found, and write the whole."""
        targets: list[dict[str, Any]] = []

        def expect(
            what: str, value: float, *, at_least: float | None = None, below: float | None = None
        ) -> None:
            met = (at_least is None or value >= at_least) and (below is None or value < below)
            limit = {"at_least": at_least} if at_least is not None else {"below": below}
            shown = {"what": what, "value": round(value, 4), **limit, "met": met}
            targets.append({"part": part.name, **shown})

        before = self.parts.get(part.name, {}).get("seconds", 0.0)
        self.parts[part.name] = {
            "finished": finished,
            "seconds": round(before + took, 2),
            "summary": part.summary(rows, expect),
            "rows": rows,
        }
        self.targets[part.name] = targets
        self.write()

    def write(self) -> None:
        """Write the file, all or nothing."""
        load, busy = self._load.end()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "benchmark": "gpu",
            "made": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "command": self.command,
            "busy": busy,
            "environment": self.environment,
            "load": load,
            "seconds": round(sum(part["seconds"] for part in self.parts.values()), 1),
            "targets": [target for targets in self.targets.values() for target in targets],
            "results": self.parts,
        }
        files.write_json(self.path, whole)

    def tell(self) -> None:
        """Say what was promised and what came out."""
        for targets in self.targets.values():
            for target in targets:
                limit = ", ".join(
                    f"{name.replace('_', ' ')} {target[name]:g}"
                    for name in ("at_least", "below")
                    if name in target
                )
                word = "met   " if target["met"] else "MISSED"
                print(f"{word} {target['what']}: {target['value']:g} ({limit})", file=sys.stderr)
        print(self.path, file=sys.stderr, flush=True)


def _here(setting: Setting, gpu: dict[str, Any] | None) -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    found = environment(device=setting.device)
    if gpu is not None:
        found |= {"device_name": gpu["name"], "gpu": gpu}
    allocator = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
    return {**found, "tiny": setting.tiny, "allocator": allocator}
