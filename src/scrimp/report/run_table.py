"""Runs as text: a row for each with what it came to, and the fields in which they differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scrimp.base.units import format_bytes
from scrimp.report.plan_svg import printable
from scrimp.report.plan_table import WIDE

NONE = "-"
HEADS = ("run", "steps", "training loss", "held-out loss", "bits per byte", "tokens/s")


def write(document: Mapping[str, Any], stream: TextIO) -> None:
    """Write runs: folded to the terminal where there is one, whole elsewhere.

    Args:
        document: Of kind `runs`, as `run_document` makes it.
        stream: Where it goes.
    """
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console = Console(file=stream, highlight=False, width=WIDE, color_system=None)
    heads = (*HEADS, peak_head(document["runs"]), "predicted", "error")
    console.print(_table(heads, map(_cells, document["runs"])))
    if document["changes"]:
        console.print()
        names = [run["name"] for run in document["runs"]]
        rows = [(change["field"], *map(_value, change["values"])) for change in document["changes"]]
        console.print(_table(("what differs", *names), rows))
    for run in document["runs"]:
        for note in run["notes"]:
            console.print(Text(printable(f"{run['name']}: {note}"), style="yellow"))


def peak_head(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return what a peak is called, by whether the process or CUDA's allocator was measured."""
    measured = {run.get("peak_of") for run in runs}
    return "peak allocated" if measured == {"allocator"} else "peak"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Make a table whose first column holds names and whose others hold values."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for number, head in enumerate(heads):
        table.add_column(Text(printable(head)), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _cells(run: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a run's row, as the heads name it."""
    train, found = run["train"], run["eval"]
    peak, predicted = run["peak_bytes"], run["predicted_bytes"]
    return (
        run["name"],
        f"{run['steps']:,}" if run["finished"] else f"{run['steps']:,} (not finished)",
        _number(train["loss"], ".4f"),
        _number(found["eval_loss"], ".4f"),
        _number(found["bits_per_byte"], ".4f"),
        _number([run["tokens_per_s"]], ",.0f"),
        format_bytes(peak),
        format_bytes(predicted),
        f"{(predicted - peak) / peak:+.1%}",
    )


def _number(values: Sequence[float | None], form: str) -> str:
    """Write the last of some values."""
    last = values[-1] if values else None
    return NONE if last is None else format(last, form)


def _value(value: object) -> str:
    """Write a field's value as it would stand in a recipe."""
    if value is None:
        return NONE
    return value if isinstance(value, str) else json.dumps(value)
