"""Runs as one plain document: what `scrimp report` shows, prints as JSON and hands to the page.

Everything is read from the runs' folders, and torch is not asked for, so a run can be looked at while it
goes. A curve holds its first and last point, and of every stretch of equal length the lowest, the highest
and the first non-finite of each watched column: what stands out is never thinned away. Averages are taken of
all steps before that, since an average of extremes is of nothing.

A number that was not finite is null in `metrics.jsonl` and here. On CUDA a run is measured by its allocator,
which knows nothing of the context; so what is predicted for the context is taken off the prediction here.
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
POINTS = 2000  # of a curve
PAGE_POINTS = 12_000  # of all runs' curves together, so that a page of many stays small
LEAST_POINTS = 50
REACH = 0.01  # of the run: how far an average looks to either side
TRAIN = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "peak_bytes")
EVALUATED = ("step", "tokens", "eval_loss", "perplexity", "bits_per_byte")
# The columns whose extremes are kept; the others rise or fall with the steps.
WATCHED = ("loss", "grad_norm", "tokens_per_s", "eval_loss")
AVERAGED = ("loss", "grad_norm")
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
    limit = min(POINTS, max(LEAST_POINTS, PAGE_POINTS // len(paths)))
    runs = [_run(path, name, limit) for path, name in zip(paths, _names(paths), strict=True)]
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
        columns: By name; of those in `WATCHED` the finite extremes and the first null of a stretch are kept.
        limit: At least 2, plus 3 for each watched column.
    """
    watched = [columns[name] for name in WATCHED if name in columns]
    count = len(next(iter(columns.values())))
    if count <= limit:
        return columns
    stretches = (limit - 2) // (3 * len(watched))
    kept = {0, count - 1}
    for number in range(stretches):
        stretch = range(number * count // stretches, (number + 1) * count // stretches)
        for values in watched:
            kept |= _standing_out(values, stretch)
    return {name: [values[n] for n in sorted(kept)] for name, values in columns.items()}


def _standing_out(values: Sequence[float | None], stretch: range) -> set[int]:
    """Return where a stretch is lowest, highest, and for the first time not finite."""
    finite = [(value, n) for n in stretch if (value := values[n]) is not None]
    lost = next((n for n in stretch if values[n] is None), None)
    found = {min(finite)[1], max(finite)[1]} if finite else set()
    return found if lost is None else found | {lost}


def averaged(steps: Sequence[int], values: Sequence[float | None]) -> list[float | None]:
    """Return the exponential average to both sides, so that a falling curve is not shown late.

    Args:
        steps: Where the values lie, ascending.
        values: As many; what is null is null in the average too, and does not count.
    """
    reach = max(1.0, REACH * (steps[-1] - steps[0])) if steps else 1.0
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    ways = (_one_sided(known, reach), reversed(_one_sided(known[::-1], reach)))
    means = iter(  # each way counts the value itself
        (before[0] + after[0] - value) / (before[1] + after[1] - 1)
        for (_, value), before, after in zip(known, *ways, strict=True)
    )
    return [None if value is None else next(means) for value in values]


def _one_sided(points: Sequence[tuple[int, float]], reach: float) -> list[tuple[float, float]]:
    """Return the weighted sum of the values up to each, and the sum of the weights."""
    found, total, weight, last = [], 0.0, 0.0, points[0][0] if points else 0
    for step, value in points:
        kept = math.exp(-abs(step - last) / reach)
        total, weight, last = kept * total + value, kept * weight + 1, step
        found.append((total, weight))
    return found


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


def _run(path: Path, name: str, limit: int) -> dict[str, Any]:
    """Read one run, with curves of at most `limit` points."""
    folder = RunFolder(path)
    rows = _rows(folder)
    stored = recipe_file.read(folder.recipe)
    recipe, last = stored.recipe, rows[-1]
    train = [row for row in rows if row["kind"] == "train"]
    whole = _columns(train, TRAIN)
    averages = {f"{column}_average": averaged(whole["step"], whole[column]) for column in AVERAGED}
    curve = thinned(whole | averages, limit)
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
        "eval": thinned(_columns([row for row in rows if row["kind"] == "eval"], EVALUATED), limit),
        # Of all rows: a run that was resumed measures anew.
        "peak_bytes": max(row["peak_bytes"] for row in rows),
        "peak_of": "allocator" if recipe.device == "cuda" else "process",
        "predicted_bytes": last["predicted_bytes"] - _context(recipe.device, stored.recorded),
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
            f"the curves show {shown:,} of {points:,} steps: the first, the last, and of every stretch "
            "between the extremes and the first that was not finite; averages are of all steps"
        )


def _context(device: str, recorded: Mapping[str, Any]) -> int:
    """Return what a prediction holds besides tensors where the measurement does not, in bytes."""
    return int(recorded.get("fixed_bytes") or 0) if device == "cuda" else 0


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
