"""`metrics.jsonl`: one JSON object a line, the same lines whether or not the run was interrupted.

Every line holds `kind` (`train`, `eval`, `checkpoint`, `end`) and the keys of `Metrics`; `eval` and
`end` add `eval_loss`, `perplexity` and `bits_per_byte`. A number that is not finite is null.
A checkpoint remembers how long the file was when it was made, and a resumed run cuts it back to that.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from scrimp.base import files, platform
from scrimp.base.errors import ScrimpError

Kind = Literal["train", "eval", "checkpoint", "end"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """The numbers of the last optimizer step.

    Attributes:
        step: Optimizer steps done.
        tokens: Targets trained on so far.
        loss: Mean cross-entropy of the step in nats a token.
        lr: Learning rate of the step.
        grad_norm: Global norm before clipping.
        tokens_per_s: Targets of the step over its time.
        peak_bytes: Highest memory use so far.
        predicted_bytes: The peak that was predicted.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    peak_bytes: int
    predicted_bytes: int


NUMBERS = frozenset(entry.name for entry in fields(Metrics))


class MetricsFile:
    """An append-only file of metrics that keeps every whole line through a kill.

    Args:
        path: The file; made where it is missing.
        length: Bytes to keep of what is there; a file that is shorter stays as it is.
    """

    def __init__(self, path: Path, *, length: int = 0) -> None:
        with files.explained(path):
            # Unbuffered, so that a line a full disk did not take is not tried again when the file is closed.
            self._file = path.open("ab", buffering=0)
            self._file.truncate(min(length, self._file.seek(0, os.SEEK_END)))
        self._path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, kind: Kind, metrics: Metrics, extra: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Append a line and return it as plain data."""
        row = {"kind": kind, **asdict(metrics), **(extra or {})}
        row = {name: as_json(value) for name, value in row.items()}
        with files.explained(self._path):
            files.write(self._file, json.dumps(row).encode() + b"\n")
        return row

    def synced_length(self) -> int:
        """Make all lines durable and return the length of the file in bytes."""
        with files.explained(self._path):
            platform.fsync_file(self._file.fileno())
            return self._file.seek(0, os.SEEK_END)


def as_json(value: Any) -> Any:
    """Return a value of a row as it stands in the file."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file; a last line that a kill cut short is left out.

    Raises:
        ScrimpError: The file is missing or cannot be read, or a line is not what a run writes.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ScrimpError(f"{path}: the metrics cannot be read ({error.strerror})") from None
    return [_row(line, f"{path}:{number}") for number, line in enumerate(lines[:-1], start=1)]


def _row(line: bytes, where: str) -> dict[str, Any]:
    """Read a line.

    Raises:
        ScrimpError: It is damaged.
    """
    try:
        row = json.loads(line)
    except ValueError:  # neither JSON nor UTF-8
        row = None
    if not isinstance(row, dict) or row.get("kind") not in KINDS or not row.keys() >= NUMBERS:
        raise ScrimpError(
            f"{where}: this line is damaged: it is no line that a run writes; "
            "bring the file back, or delete the line"
        )
    return row
