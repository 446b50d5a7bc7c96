"""Words and tables as HTML, shared by the reports.

A cell has a text for people and a value for sorting; a column in which nothing was measured is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from scrimp.report.plan_svg import printable

Row = Mapping[str, Any]

# Where the script puts its charts.
CHARTS = """<section id="charts"><h2>Charts</h2>
<noscript><p>The charts need JavaScript; the tables do without.</p></noscript></section>
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in a cell.

    Attributes:
        html: For people.
        value: To sort by.
    """

    html: str
    value: float | str


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its heading.
        unit: A second, quieter line of the heading.
        cell: Makes its cell of a row; `None` where there is nothing to say.
        words: Whether it holds words, which stand to the left.
    """

    title: str
    unit: str
    cell: Callable[[Row], Cell | None]
    words: bool = False


def safe(text: object) -> str:
    """Escape a text for HTML; control characters are replaced."""
    return escape(printable(str(text)))


def number(value: float | None, text: Callable[[float], str]) -> Cell | None:
    """Make a cell of a number, if there is one.

    Args:
        value: The number.
        text: Writes it.
    """
    return None if value is None else Cell(safe(text(value)), value)


def words(text: object) -> Cell | None:
    """Make a cell of a text, if there is one."""
    return None if text in (None, "") else Cell(safe(text), str(text))


def spread(value: Mapping[str, Any] | None, text: Callable[[float], str]) -> Cell | None:
    """Make a cell of a median, with its lowest and highest below.

    Args:
        value: A spread: `median`, `lowest`, `highest`, `all`.
        text: Writes a number.
    """
    if value is None or value.get("median") is None:
        return None
    html = safe(text(value["median"]))
    ends = [end for end in (value.get("lowest"), value.get("highest")) if end is not None]
    if len(value.get("all") or ()) > 1 and len(ends) == 2:
        html += f"<small>{'–'.join(safe(text(end)) for end in ends)}</small>"
    return Cell(html, value["median"])


def signed(value: float, digits: int = 4) -> str:
    """Write a number with its sign, as in `+0.0123`."""
    return f"{value:+.{digits}f}".replace("-", "−")


def used(columns: Iterable[Column], rows: Sequence[Row]) -> list[Column]:
    """Return the columns that say something in at least one of the rows."""
    return [column for column in columns if any(column.cell(row) for row in rows)]


def table(
    columns: Sequence[Column],
    rows: Sequence[Row],
    *,
    label: str,
    head: Callable[[Row], str] = lambda row: "",
    why: Callable[[Row], str] = lambda row: "",
) -> str:
    """Write a table in a box of its own to scroll in. The first column names the row.

    Args:
        columns: From the left.
        rows: From the top.
        label: What it is, for those who cannot see it.
        head: The attributes of a row.
        why: Instead of a row's cells, why it has none; empty where it has.
    """
    heads = "".join(
        f'<th scope="col"{_side(column)}>{safe(column.title)}'
        + (f"<small>{safe(column.unit)}</small>" if column.unit else "")
        + "</th>"
        for column in columns
    )
    lines = "\n".join(f"<tr{head(row)}>{_cells(columns, row, why(row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{safe(label)}"><table>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>"
    )


def _side(column: Column) -> str:
    return ' class="words"' if column.words else ""


def _cells(columns: Sequence[Column], row: Row, why: str) -> str:
    name = columns[0].cell(row)
    assert name is not None, "a row without a name"
    first = f'<th scope="row" data-value="{safe(name.value)}">{name.html}</th>'
    if why:
        return f'{first}<td class="why" colspan="{max(1, len(columns) - 1)}">{safe(why)}</td>'
    return first + "".join(_cell(column, column.cell(row)) for column in columns[1:])


def _cell(column: Column, cell: Cell | None) -> str:
    if cell is None:
        return f'<td class="none{" words" if column.words else ""}">–</td>'
    return f'<td{_side(column)} data-value="{safe(cell.value)}">{cell.html}</td>'


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Write pairs of a name and a value as a list; those without a value are left out."""
    lines = (
        f"<div><dt>{safe(name)}</dt><dd>{safe(value)}</dd></div>"
        for name, value in pairs
        if value not in (None, "", [])
    )
    return f"<dl class='facts'>{''.join(lines)}</dl>"


def section(name: str, title: str, *parts: str) -> str:
    """Write a section with its heading; none where it has nothing to say.

    Args:
        name: Its anchor.
        title: Its heading.
        parts: HTML.
    """
    inner = "\n".join(part for part in parts if part)
    return f'<section id="{name}">\n<h2>{safe(title)}</h2>\n{inner}\n</section>\n' if inner else ""


def bullets(texts: Iterable[object]) -> str:
    """Write texts as a list; nothing where there are none."""
    lines = "".join(f"<li>{safe(text)}</li>" for text in texts)
    return f"<ul>{lines}</ul>" if lines else ""


def contents(sections: Iterable[tuple[str, str]]) -> str:
    """Write the links to the page's sections.

    Args:
        sections: Anchors and their words.
    """
    links = "".join(f'<a href="#{name}">{safe(text)}</a>' for name, text in sections)
    return f'<nav aria-label="Contents">{links}</nav>'
