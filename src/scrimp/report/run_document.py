"""Runs as one plain document: what `scrimp report` shows, prints as JSON and hands to the page.

Everything is read from the runs' folders, and torch is not asked for, so a run can be looked at while it
goes. A curve holds at most `POINTS` points: its first and last, and of every stretch of equal length the
lowest and the highest of each watched column. What stands out in a curve is so never thinned away.

A number that was not finite is null in `metrics.jsonl` and here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from scrimp import recipe_file
from scrimp.base.errors import ScrimpError
from scrimp.base.ledger import Ledger
from scrimp.base.units import parse_bytes
from scrimp.recipe import flat
from scrimp.training.folder import RunFolder
from scrimp.training.metrics import read_metrics

SCHEMA = 1
POINTS = 2000
TRAIN = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "peak_bytes")
EVALUATED = ("step", "tokens", "eval_loss", "perplexity", "bits_per_byte")
# The columns whose extremes are kept; the others rise or fall with the steps.
WATCHED = ("loss", "grad_norm", "tokens_per_s", "eval_loss")
# Measured anew by every run, so that a difference says nothing.
UNCOMPARED = ("recorded.fixed_bytes",)

Columns = dict[str, list[Any]]


def run_document(paths: Sequence[Path]) -> dict[str, Any]:
    """Read runs, finished or not, into one document of kind `runs`.

    Args:
        paths: The runs' folders.

    Returns:
        Plain data for JSON; `docs/guide/formats.md` describes it.

    Raises:
        ScrimpError: A folder holds no run or one without a step, one is named twice, or a file of one is
            missing or damaged; the message names it.
    """
    _check_different(paths)
    runs = [_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    names = [run["name"] for run in runs]
    return {
        "schema": SCHEMA,
        "kind": "runs",
        "title": f"Run {names[0]}" if len(names) == 1 else f"Runs {', '.join(names[:-1])} and {names[-1]}",
        "made": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "runs": runs,
        "changes": _changes(runs),
    }


def thinned(columns: Columns, limit: int = POINTS) -> Columns:
    """Return columns of equal length with at most `limit` points each, the same ones of all.

    Args:
        columns: By name; the extremes of those in `WATCHED` are kept. A null counts as the highest.
        limit: At least 2, plus 2 for each watched column.
    """
    watched = [columns[name] for name in WATCHED if name in columns]
    count = len(next(iter(columns.values())))
    if count <= limit:
        return columns
    stretches = (limit - 2) // (2 * len(watched))
    kept = {0, count - 1}
    for number in range(stretches):
        stretch = range(number * count // stretches, (number + 1) * count // stretches)
        for values in watched:
            heights = [math.inf if values[n] is None else values[n] for n in stretch]
            kept.add(stretch[heights.index(min(heights))])
            kept.add(stretch[heights.index(max(heights))])
    return {name: [values[n] for n in sorted(kept)] for name, values in columns.items()}


def _check_different(paths: Sequence[Path]) -> None:
    """Raise if two paths are the same folder."""
    seen: dict[Path, Path] = {}
    for path in paths:
        place = path.resolve()
        if place in seen:
            raise ScrimpError(f"{path} is the same run as {seen[place]}: name each run once")
        seen[place] = path


def _names(paths: Sequence[Path]) -> list[str]:
    """Return a run's folder's name, or as much of its path as tells it from the others."""
    places = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, places)) + 1):
        names = ["/".join(place[-length:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def _run(path: Path, name: str) -> dict[str, Any]:
    """Read one run."""
    folder = RunFolder(path)
    rows = _rows(folder)
    stored = recipe_file.read(folder.recipe)
    recipe, last = stored.recipe, rows[-1]
    train = [row for row in rows if row["kind"] == "train"]
    curve = thinned(_columns(train, TRAIN))
    return {
        "name": name,
        "finished": last["kind"] == "end",
        "steps": last["step"],
        "parameters": _parameters(folder.model),
        "recorded": stored.recorded,
        "recipe": {
            name: list(value) if isinstance(value, tuple) else value for name, value in flat(recipe).items()
        },
        "tokens_per_s": _median(row["tokens_per_s"] for row in train),  # of all steps, thinned or not
        "train": curve,
        "eval": thinned(_columns([row for row in rows if row["kind"] == "eval"], EVALUATED)),
        "predicted_bytes": last["predicted_bytes"],
        "budget_bytes": None if recipe.memory is None else parse_bytes(recipe.memory),
        "memory": _memory(folder.memory),
        "sample": _text(folder.sample),
        "notes": list(_notes(last, recipe.steps, points=len(train), shown=len(curve["step"]))),
    }


def _rows(folder: RunFolder) -> list[dict[str, Any]]:
    """Read the metrics of a run.

    Raises:
        ScrimpError: It is no run, has no step yet, or its metrics are damaged.
    """
    if not folder.is_run:
        what = "this folder holds no run" if folder.path.is_dir() else "there is no such folder"
        raise ScrimpError(
            f"{folder.path}: {what}; name a run's folder, such as runs/llama-1m-1, "
            "which holds a recipe.yaml and a metrics.jsonl"
        )
    rows = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    if not any(row["kind"] == "train" for row in rows):
        raise ScrimpError(
            f"{folder.metrics}: no step of this run is written there yet; try again after its first"
        )
    return rows


def _columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Columns:
    return {name: [row.get(name) for row in rows] for name in names}


def _median(values: Iterable[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return median(finite) if finite else None


def _notes(last: Mapping[str, Any], steps: int | None, *, points: int, shown: int) -> Iterator[str]:
    """Say what a reader of the figures should know."""
    if last["kind"] != "end":
        planned = "" if steps is None else f" of {steps:,}"
        yield f"this run is not finished: {last['step']:,}{planned} steps are done"
    if last.get("skipped"):
        yield f"{last['skipped']:,} steps with a non-finite gradient were skipped"
    if shown < points:
        yield (
            f"the curves show {shown:,} of {points:,} steps: the first, the last, and the extremes of every "
            "stretch between"
        )


def _memory(path: Path) -> dict[str, list[dict[str, Any]]] | None:
    """Read the predicted and the measured moments; None where the run was killed before it wrote them."""
    with _explained(path):
        if not path.is_file():
            return None
        found = json.loads(path.read_bytes())
        ledgers = {basis: Ledger.from_plain(found[basis]) for basis in ("predicted", "measured")}
    return {
        basis: [{"name": moment.name, "terms": dict(moment.terms)} for moment in ledger.moments]
        for basis, ledger in ledgers.items()
    }


def _text(path: Path) -> str | None:
    with _explained(path):
        return path.read_text(encoding="utf-8") if path.is_file() else None


def _parameters(model: Path) -> int | None:
    """Count the parameters of the finished model, tied ones once, by the headers of its files alone."""
    files = sorted(model.glob("*.safetensors"))
    return sum(map(_stored, files)) if files else None


def _stored(path: Path) -> int:
    """Count the numbers in a safetensors file: eight bytes with the header's length, then its JSON."""
    with _explained(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("the header is longer than the file")
        header = json.loads(file.read(length))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a file into a sentence.

    Raises:
        ScrimpError: It cannot be read, or does not hold what a run writes.
    """
    try:
        yield
    except OSError as error:
        raise ScrimpError(f"{path}: it cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ScrimpError(
            f"{path}: this file is damaged: it is not what a run writes; bring it back, or delete it"
        ) from error


def _changes(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the fields in which runs differ, what they ran with included; null where a run has none."""
    found = [
        {**run["recipe"], **{f"recorded.{name}": value for name, value in run["recorded"].items()}}
        for run in runs
    ]
    fields = dict.fromkeys(field for facts in found for field in facts if field not in UNCOMPARED)
    compared = {field: [facts.get(field) for facts in found] for field in fields}
    return [
        {"field": field, "values": values}
        for field, values in compared.items()
        if any(value != values[0] for value in values)
    ]
