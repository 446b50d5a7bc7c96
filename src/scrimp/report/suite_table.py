"""A suite's results as text: our table, who is missing, and the papers' figures in a table of their own.

Where the terminal is narrow, the names are folded first, then the columns leave that a reader can best do
without. The papers' table never mixes with ours: other models, other data, other machines; only the distance
from the reference's loss stands in both.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scrimp.report.suite_cells import (
    Column,
    Contestant,
    Document,
    absences,
    columns,
    is_measured,
    job_line,
    legend,
    protocol_line,
    ranked,
)
from scrimp.report.suite_papers import (
    PaperRow,
    metrics,
    nats,
    paper_cell,
    paper_models,
    paper_rows,
    paper_sources,
)

WIDE = 100_000  # columns of a page that no terminal shows
BUSY = "The machine was busy: seconds, tokens/s and ratios are not to be trusted"
STYLES = {"done": "", "partial": "yellow", "missing": "dim", "failed": "red"}


def write(document: Document, stream: TextIO) -> None:
    """Write a suite: with colour and as wide as it is on a terminal, plain and whole elsewhere.

    Args:
        document: The suite's document.
        stream: Where it goes.
    """
    console = Console(file=stream, highlight=False)
    if console.is_terminal:
        print_suite(document, console)
        return
    page = io.StringIO()
    print_suite(document, Console(file=page, highlight=False, width=WIDE, color_system=None))
    for line in page.getvalue().splitlines():
        print(line.rstrip(), file=stream)


def print_suite(document: Document, console: Console) -> None:
    """Write a suite on a console, as wide as that is."""
    console.print(_text(document["title"], "bold"))
    console.print(_text(job_line(document)))
    if rules := protocol_line(document):
        console.print(_text(rules, "dim"))
    if document["busy"]:
        console.print(_text(BUSY, "bold red"))
    console.print()
    console.print(table(document, console))
    console.print()
    console.print(_text(legend(document), "dim"))
    for label, text in _foot_lines(document):
        console.print(Text.assemble((f"{label}: ", "bold cyan"), _clean(text)))
    for metric in metrics(document)[:1]:
        _print_papers(document, metric, console)


def table(document: Document, console: Console) -> Table:
    """Return the contestants' table, as a console has room for.

    Args:
        document: The suite's document.
        console: Where it is to stand.
    """
    shown, rows = columns(document), ranked(document)
    tables = (_table(document, some, rows, gap=gap, fold=fold) for some, gap, fold in _layouts(shown))
    return _first_that_fits(tables, console)


def papers_table(document: Document, metric: str, console: Console) -> Table:
    """Return the table of what the papers report, as a console has room for: the last models leave first.

    Args:
        document: The suite's document.
        metric: One of the metrics they report.
        console: Where it is to stand.
    """
    rows = paper_rows(document, metric)
    models = paper_models(rows)
    tables = (_papers_table(rows, models[:count]) for count in range(len(models), 0, -1))
    return _first_that_fits(tables, console)


def _layouts(shown: Sequence[Column]) -> Iterator[tuple[Sequence[Column], int, bool]]:
    """Yield columns, gap and whether names are folded, the roomiest first."""
    yield shown, 2, False
    yield shown, 2, True
    yield shown, 1, True
    for leaving in sorted({column.leaves for column in shown if column.leaves}, reverse=True):
        shown = [column for column in shown if column.leaves != leaving]
        yield shown, 2, True


def _first_that_fits(tables: Iterator[Table], console: Console) -> Table:
    """Return the first table that a console is wide enough for; if none is, the last."""
    for candidate in tables:
        if console.measure(candidate, options=console.options.update(width=WIDE)).maximum <= console.width:
            break
    return candidate


def _table(
    document: Document, shown: Sequence[Column], rows: Sequence[Contestant], *, gap: int, fold: bool
) -> Table:
    found = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    for column in shown:
        # Marked in the head too, since a table may be copied without the lines around it.
        mark = "?" if column.timed and document["busy"] else ""
        found.add_column(
            _text(column.name + mark),
            justify="right" if column.number else "left",
            vertical="top",
            no_wrap=True,
        )
    for one in rows:
        cells = [column.cell(one) for column in shown]
        if fold:
            cells[0] = cells[0].replace(":", ":\n", 1).replace(" (", "\n(")
        style = "bold" if one["kind"] == "ours" and is_measured(one) else STYLES[one["status"]]
        found.add_row(*map(_text, cells), style=style)
    return found


def _papers_table(rows: Sequence[PaperRow], models: Sequence[str]) -> Table:
    found = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold italic", style="italic")
    found.add_column("contestant", no_wrap=True)
    found.add_column("here", justify="right", style="not italic", header_style="bold", no_wrap=True)
    for model in models:
        found.add_column(_text(model), justify="right", no_wrap=True)
    for row in rows:
        cells = [paper_cell(row, model) for model in models]
        found.add_row(_text(row.name), nats(row.here), *cells)
    return found


def _print_papers(document: Document, metric: str, console: Console) -> None:
    reference, rows = document["protocol"]["reference"], paper_rows(document, metric)
    console.print()
    console.print(
        _text(f"What the papers report: {metric}, on other models and other data than ours", "bold italic")
    )
    console.print(
        _text(
            f"signed: nats a token over {reference}'s, here on this suite's job, there in the same metric",
            "dim",
        )
    )
    console.print()
    console.print(papers_table(document, metric, console))
    console.print()
    for named, source in paper_sources(rows):
        console.print(Text.assemble((f"{named}: ", "italic"), _clean(source)))


def _foot_lines(document: Document) -> Iterator[tuple[str, str]]:
    yield from absences(document)
    for note in document["notes"]:
        yield "note", note


def _text(text: str, style: str = "") -> Text:
    return Text(_clean(text), style=style)


def _clean(text: str) -> str:
    """Replace what a terminal would obey: a package's error may hold anything."""
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)
