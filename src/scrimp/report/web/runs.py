"""The words and tables of a report of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scrimp.base.units import format_bytes, format_count
from scrimp.report.run_table import peak_head
from scrimp.report.web.markup import (
    CHARTS,
    Cell,
    Column,
    Row,
    bullets,
    contents,
    facts,
    number,
    safe,
    section,
    signed,
    table,
    used,
    words,
)

SECTIONS = (
    ("runs", "Runs"),
    ("changes", "Changes"),
    ("charts", "Charts"),
    ("samples", "Samples"),
    ("recipe", "Recipe"),
    ("recorded", "Ran with"),
    ("notes", "Notes"),
)


def body(document: Mapping[str, Any]) -> str:
    """Write the page's body.

    Args:
        document: Runs, rounded.
    """
    rows: Sequence[Row] = document["runs"]
    parts = {
        "runs": _headlines(rows),
        "changes": _changes(document, rows),
        "charts": CHARTS,
        "samples": _samples(rows),
        "recipe": _recipe(rows),
        "recorded": _recorded(rows),
        "notes": _notes(rows),
    }
    shown = [(name, title) for name, title in SECTIONS if parts[name]]
    made = str(document.get("made") or "").replace("T", " ").removesuffix("Z")
    said = facts(
        [("made", f"{made} UTC" if made else None), ("runs", ", ".join(row["name"] for row in rows))]
    )
    return (
        f'<header>\n<p class="over">scrimp report</p>\n<h1>{safe(document["title"])}</h1>\n'
        f"{said}\n</header>\n"
        f"{contents(shown)}\n<main>\n{''.join(parts.values())}</main>"
    )


def _last(row: Row, part: str, name: str) -> float | None:
    found = [value for value in (row.get(part) or {}).get(name) or () if value is not None]
    return found[-1] if found else None


def _plan_error(row: Row) -> Cell | None:
    """How far the measured peak lies above the plan, as a share of what was measured."""
    measured, predicted = row.get("peak_bytes"), row.get("predicted_bytes")
    if not measured or not predicted:
        return None
    return number(100 * (predicted - measured) / measured, lambda value: f"{signed(value, 1)} %")


def _headlines(rows: Sequence[Row]) -> str:
    def head(row: Row) -> str:
        return f' data-name="{safe(row["name"])}" class="done"'

    def name(row: Row) -> Cell:
        tag = "" if row.get("finished") else '<span class="tag">not finished</span>'
        return Cell(f'<span class="name">{safe(row["name"])}</span>{tag}', row["name"])

    columns = [
        Column("run", "", name, words=True),
        Column(
            "held-out loss",
            "nats a token",
            lambda row: number(_last(row, "eval", "eval_loss"), "{:.4f}".format),
        ),
        Column(
            "bits per byte",
            "held-out",
            lambda row: number(_last(row, "eval", "bits_per_byte"), "{:.4f}".format),
        ),
        Column(
            "perplexity", "held-out", lambda row: number(_last(row, "eval", "perplexity"), "{:.4g}".format)
        ),
        Column("training loss", "last", lambda row: number(_last(row, "train", "loss"), "{:.4f}".format)),
        Column("steps", "", lambda row: number(row.get("steps"), "{:,}".format)),
        Column("tokens", "", lambda row: number(_last(row, "train", "tokens"), format_count)),
        Column("parameters", "", lambda row: number(row.get("parameters"), format_count)),
        Column("tokens/s", "median", lambda row: number(row.get("tokens_per_s"), "{:,.0f}".format)),
        Column(peak_head(rows), "measured", lambda row: number(row.get("peak_bytes"), format_bytes)),
        Column("planned", "", lambda row: number(row.get("predicted_bytes"), format_bytes)),
        Column("plan error", "of the measured", _plan_error),
        Column("budget", "", lambda row: number(row.get("budget_bytes"), format_bytes)),
    ]
    return section("runs", "Runs", table(used(columns, rows), rows, label="Runs", head=head))


def _shown(value: object) -> str:
    if value is None:
        return "not set"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _changes(document: Mapping[str, Any], rows: Sequence[Row]) -> str:
    changes = document.get("changes") or ()
    if not changes:
        return ""
    columns = [Column("field", "", lambda row: words(row["field"]), words=True)]
    columns += [
        Column(row["name"], "", lambda change, i=i: words(_shown(change["values"][i])), words=True)  # type: ignore[misc]
        for i, row in enumerate(rows)
    ]
    return section("changes", "What changed between the runs", table(columns, changes, label="Changes"))


def _matrix(rows: Sequence[Row], part: str, label: str) -> str:
    """Write the fields of each run's `part`, a column a run; fields that differ are marked."""
    fields = list(dict.fromkeys(name for row in rows for name in row.get(part) or {}))
    lines: list[Row] = [
        {"field": name, "values": [(row.get(part) or {}).get(name) for row in rows]} for name in fields
    ]
    columns = [Column("field", "", lambda line: words(line["field"]), words=True)]
    columns += [
        Column(row["name"], "", lambda line, i=i: words(_shown(line["values"][i])), words=True)  # type: ignore[misc]
        for i, row in enumerate(rows)
    ]

    def head(line: Row) -> str:
        return ' class="differs"' if len({str(value) for value in line["values"]}) > 1 else ""

    return table(columns, lines, label=label, head=head) if lines else ""


def _recipe(rows: Sequence[Row]) -> str:
    return section("recipe", "Recipe", _matrix(rows, "recipe", "Recipe"))


def _recorded(rows: Sequence[Row]) -> str:
    return section("recorded", "Ran with", _matrix(rows, "recorded", "Ran with"))


def _samples(rows: Sequence[Row]) -> str:
    said = [
        f'<figure class="sample"><figcaption>{safe(row["name"])}</figcaption><pre>'
        f"{chr(10).join(map(safe, str(row['sample']).split(chr(10))))}</pre></figure>"
        for row in rows
        if row.get("sample")
    ]
    return section("samples", "Samples", *said)


def _notes(rows: Sequence[Row]) -> str:
    return section(
        "notes", "Notes", bullets(f"{row['name']}: {note}" for row in rows for note in row.get("notes") or ())
    )
