"""A plan as text: a line on the model, a row for every recipe, the choice and why.

Bytes share one unit, which the table's caption names. A row says in a few words what its recipe gives up;
the whole sentence with its evidence stands once below. Where the terminal is narrow, the columns of single
terms leave first, then those a reader can best do without; off a terminal nothing is left out or folded.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scrimp.base.ledger import TERMS, Place, Term
from scrimp.base.units import format_bytes, format_count
from scrimp.memory.command import command_of
from scrimp.memory.planner import Candidate, Plan
from scrimp.memory.reasons import claim

ROWS = 12
WIDE = 100_000  # columns of a page that no terminal shows
GAP = 2
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
ON = {"cpu": "the CPU", "cuda": "one GPU (cuda)", "mps": "the GPU (mps)"}
SHORT: dict[Term, str] = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer state": "state",
    "activations": "acts",
    "temporaries": "temps",
    "fixed": "fixed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the table.

    Attributes:
        name: Its head.
        cell: What stands in it for a candidate.
        number: Whether it is a number, set flush right.
        fold: Columns that its text may be folded to; None is not at all.
        leaves: When it leaves a narrow table: those of the largest number first; 0 stays.
    """

    name: str
    cell: Callable[[Candidate], str]
    number: bool = False
    fold: int | None = None
    leaves: int = 0

    def width(self, rows: Sequence[Candidate], *, folded: bool) -> int:
        """Return how many columns of a terminal it takes, with the gap after it."""
        natural = max(len(text) for text in (self.name, *map(self.cell, rows)))
        narrow = max(self.longest_word(rows), self.fold or 0)
        return GAP + (min(natural, narrow) if folded and self.fold else natural)

    def longest_word(self, rows: Sequence[Candidate]) -> int:
        """Return the letters of its longest word, which is not broken."""
        return max(len(word) for text in (self.name, *map(self.cell, rows)) for word in [*text.split(), ""])


def shown(plan: Plan, *, everything: bool = False) -> tuple[Candidate, ...]:
    """Return the candidates to show, the one that needs most first.

    Those nearest the choice in bytes (where nothing fits: those that need least), besides the first and
    the last of all.

    Args:
        plan: The plan.
        everything: Show all.
    """
    found = plan.candidates
    if everything or len(found) <= ROWS:
        return found
    middle = len(found) - 1 if plan.chosen is None else found.index(plan.chosen)
    inner = ROWS - 2
    first = min(max(1, middle - inner // 2), len(found) - 1 - inner)
    return (found[0], *found[first : first + inner], found[-1])


def write(plan: Plan, stream: TextIO, *, everything: bool = False) -> None:
    """Write a plan: with colour and folded on a terminal, plain and whole elsewhere.

    Args:
        plan: The plan.
        stream: Where it goes.
        everything: Show every candidate.
    """
    console = Console(file=stream, highlight=False)
    if console.is_terminal:
        print_plan(plan, console, everything=everything)
        return
    page = io.StringIO()
    print_plan(
        plan, Console(file=page, highlight=False, width=WIDE, color_system=None), everything=everything
    )
    for line in page.getvalue().splitlines():
        print(line.rstrip(), file=stream)


def print_plan(plan: Plan, console: Console, *, everything: bool = False) -> None:
    """Write a plan on a console, as wide as that is."""
    rows = shown(plan, everything=everything)
    unit = _unit(max((c.ledger.peak.total for c in rows), default=0))
    console.print(_text(head_line(plan), "bold"))
    console.print()
    if rows:
        console.print(_table(plan, rows, unit, console.width))
        console.print()
    if rows:
        console.print(_text(_caption(plan, rows, unit), "dim"))
    for label, text in foot_lines(plan, rows):
        line = Text.assemble((f"{label}: ", "bold cyan"), _clean(text))
        # A command is there to be copied: the terminal may break it, no line end may.
        console.print(line, soft_wrap=label == "run")


def head_line(plan: Plan) -> str:
    """Write what is planned, and in what."""
    recipe = plan.recipe
    precisions = {c.recipe.precision for c in plan.candidates} or {recipe.precision}
    parts = [recipe.model.name]
    if plan.size is not None:
        parts.append(f"{format_count(plan.size.parameters)} parameters")
    if len(precisions) == 1:
        parts.append(precisions.pop())
    parts.append(f"{recipe.batch} x {recipe.seq} tokens")
    parts.append(f"budget {format_bytes(plan.budget)} on {ON.get(recipe.device, recipe.device)}")
    for name, limit in (("host", plan.host), ("disk", plan.disk)):
        if limit is not None:
            parts.append(f"{name} {format_bytes(limit)}")
    return "   ".join(map(_clean, parts))


def foot_lines(plan: Plan, rows: Sequence[Candidate]) -> Iterator[tuple[str, str]]:
    """Yield what stands below the table or picture of some candidates, as pairs of a label and a text."""
    for sentence in dict.fromkeys(text for c in rows for text in c.gives_up if ": " in text):
        yield "gives up", sentence
    for note in plan.notes:
        yield "note", note
    for answer in plan.answers.values():
        yield "largest", answer.text
    yield "why", plan.why
    if plan.chosen is not None:
        yield "run", command_of(plan.chosen, plan.asked)


def verdict(candidate: Candidate, plan: Plan) -> str:
    """Say whether a candidate fits, by how much, and where it is tightest."""
    place = _tightest(candidate, plan)
    where = "" if place == "device" else f" on {place}"
    return f"{format_bytes(abs(candidate.spare))} {'spare' if candidate.fits else 'over'}{where}"


def _tightest(candidate: Candidate, plan: Plan) -> Place:
    limits: tuple[tuple[Place, int | None], ...] = (("host", plan.host), ("disk", plan.disk))
    for place, limit in limits:
        if limit is not None and limit - candidate.ledger.peak_at(place) == candidate.spare:
            return place
    return "device"


def _table(plan: Plan, rows: Sequence[Candidate], unit: str, width: int) -> Table:
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    columns = _that_fit(_columns(plan, rows, unit), rows, width)
    for column in columns:
        table.add_column(
            column.name,
            justify="right" if column.number else "left",
            no_wrap=column.fold is None,
            min_width=column.longest_word(rows),
            overflow="fold",
        )
    for candidate in rows:
        style = "bold green" if candidate is plan.chosen else "" if candidate.fits else "dim"
        table.add_row(*(_text(column.cell(candidate)) for column in columns), style=style)
    return table


def _columns(plan: Plan, rows: Sequence[Candidate], unit: str) -> list[Column]:
    columns = [
        Column(name="recipe", cell=lambda c: c.name, fold=24),
        Column(name="micro", cell=lambda c: str(c.recipe.micro_batch), number=True, leaves=2),
        Column(name="peak", cell=lambda c: _peak(c, unit), number=True),
        Column(name="at", cell=lambda c: c.ledger.peak.name, fold=12, leaves=3),
        *(_term_column(term, unit) for term in TERMS[1:]),
        _term_column("fixed", unit),
    ]
    if plan.host is not None:
        columns.append(_place_column("host", unit))
    if plan.disk is not None:
        columns.append(_place_column("disk", unit))
    return [
        *columns,
        Column(
            name="tokens/s",
            cell=lambda c: "-" if c.tokens_per_s is None else f"{c.tokens_per_s:,.0f}",
            number=True,
            leaves=4 if any(c.tokens_per_s for c in rows) else 7,
        ),
        Column(name="gives up", cell=_gives_up, fold=18, leaves=1),
        Column(name="fits", cell=lambda c: verdict(c, plan), fold=10),
        Column(name="", cell=lambda c: "<- chosen" if c is plan.chosen else ""),
    ]


def _term_column(term: Term, unit: str) -> Column:
    return Column(
        name=SHORT[term],
        cell=lambda c: _amount(c.ledger.peak.terms.get(term, 0), unit),
        number=True,
        leaves=6,
    )


def _place_column(place: Place, unit: str) -> Column:
    return Column(name=place, cell=lambda c: _amount(c.ledger.peak_at(place), unit), number=True, leaves=5)


def _that_fit(columns: list[Column], rows: Sequence[Candidate], width: int) -> list[Column]:
    """Return the columns that a table of some width has room for."""
    for leaving in sorted({column.leaves for column in columns if column.leaves}, reverse=True):
        if sum(column.width(rows, folded=True) for column in columns) <= width:
            break
        columns = [column for column in columns if column.leaves != leaving]
    return columns


def _caption(plan: Plan, rows: Sequence[Candidate], unit: str) -> str:
    """Say what the numbers of the table are."""
    hidden = len(plan.candidates) - len(rows)
    parts = [f"in {unit}, at the peak; what fits does so with a margin for the peak's error"]
    if all(c.tokens_per_s is None for c in rows):
        parts.append("tokens/s with --calibrate, where this machine has the device")
    if hidden:
        parts.append(f"{hidden} more with --all")
    return "; ".join(parts)


def _gives_up(candidate: Candidate) -> str:
    return ", ".join(map(claim, candidate.gives_up)) or "nothing"


def _peak(candidate: Candidate, unit: str) -> str:
    found = candidate.ledger
    unsure = f" ±{found.error:.0%}" if found.basis == "formula" else ""
    return f"{_amount(found.peak.total, unit)}{unsure}"


def _unit(largest: int) -> str:
    """Return the unit that the largest amount is written in."""
    return next((unit for n, unit in enumerate(UNITS) if largest < 1000 * 1024**n), UNITS[-1])


def _amount(count: int, unit: str) -> str:
    """Write bytes in a unit with three digits, as its neighbours in the column."""
    value = count / 1024 ** UNITS.index(unit)
    digits = 0 if count == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"


def _text(text: str, style: str = "") -> Text:
    return Text(_clean(text), style=style)


def _clean(text: str) -> str:
    """Replace what a terminal would obey: a file's name may hold anything."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
