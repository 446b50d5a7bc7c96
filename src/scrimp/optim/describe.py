"""What an optimizer does to each parameter, as a table to be read.

    parameter                             shape        role       piece    state     left unprojected because
    model.embed_tokens.weight             32000 x 512  embedding  AdamW    125 MiB
    model.layers.{0..7}.mlp.up_proj...    1376 x 512   linear     GaLore   14.7 MiB
    ...

Rows alike but for the numbers in their names are one row, where those numbers are a whole grid
(layers 0..7, or layers 0..7 times experts 0..3); the count stands beside the name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from scrimp.base.units import format_bytes, format_count
from scrimp.optim.pieces import Role

# A number that is a part of a name by itself, unlike the 1 of `w1`.
_NUMBER = re.compile(r"(?<!\w)\d+(?!\w)")
_COLUMNS = ("parameter", "shape", "role", "piece", "state", "left unprojected because")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One parameter.

    Attributes:
        name: Its name.
        shape: Its own shape.
        role: What it is in the model.
        piece: What treats it.
        state_bytes: What is kept for it between steps.
        why: Why it is left unprojected, in a clause; empty where it is projected or nothing would project it.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    piece: str
    state_bytes: int
    why: str = ""


def describe_table(rows: Iterable[Row]) -> str:
    """Return an aligned table of plain text: a line for parameters alike, then totals by piece."""
    all_rows = list(rows)
    if not all_rows:
        return "no parameters"
    lines = [_line(name, alike) for name, alike in _folded(all_rows)]
    return "\n".join([*_aligned([_COLUMNS, *lines]), "", *_totals(all_rows)])


def _line(name: str, alike: Sequence[Row]) -> tuple[str, ...]:
    row = alike[0]
    count = f" ({len(alike)})" if len(alike) > 1 else ""
    shape = " x ".join(map(str, row.shape)) or "scalar"
    state = format_bytes(sum(each.state_bytes for each in alike))
    return (name + count, shape, row.role, row.piece, state, row.why)


def _totals(rows: Sequence[Row]) -> list[str]:
    pieces = list(dict.fromkeys(row.piece for row in rows))
    parts = [(piece, [row for row in rows if row.piece == piece]) for piece in pieces]
    return _aligned([_total(*part) for part in [*parts, ("total", rows)]])


def _total(name: str, rows: Sequence[Row]) -> tuple[str, ...]:
    numel = sum(math.prod(row.shape) for row in rows)
    held = sum(row.state_bytes for row in rows)
    each = f"{held / numel:.2f} B a number" if numel else ""
    plural = "" if len(rows) == 1 else "s"
    return (
        name,
        f"{len(rows)} parameter{plural}",
        f"{format_count(numel)} numbers",
        format_bytes(held),
        f"{held:,} bytes",
        each,
    )


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]


def _folded(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield a name for rows alike, and the rows, in the order in which the first of each came."""
    alike: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        pattern = tuple(_NUMBER.split(row.name))
        alike.setdefault((pattern, row.shape, row.role, row.piece, row.state_bytes, row.why), []).append(row)
    for group in alike.values():
        yield from _grids(group)


def _grids(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield rows with one pattern as a whole grid of numbers, or divided by their first number into such."""
    numbers = [tuple(map(int, _NUMBER.findall(row.name))) for row in rows]
    axes = [sorted(set(axis)) for axis in zip(*numbers, strict=True)]
    if math.prod(map(len, axes)) == len(rows):
        shown = iter([_span(axis) for axis in axes])
        yield _NUMBER.sub(lambda _: next(shown), rows[0].name), rows
        return
    first = next(position for position, axis in enumerate(axes) if len(axis) > 1)
    for value in axes[first]:
        yield from _grids([row for row, found in zip(rows, numbers, strict=True) if found[first] == value])


def _span(values: list[int]) -> str:
    """Return sorted numbers as `7`, `{0..31}` or `{0..3,5}`."""
    if len(values) == 1:
        return str(values[0])
    starts = [values[0], *(after for before, after in pairwise(values) if after != before + 1)]
    ends = [*(before for before, after in pairwise(values) if after != before + 1), values[-1]]
    runs = [str(a) if a == b else f"{a}..{b}" for a, b in zip(starts, ends, strict=True)]
    return "{" + ",".join(runs) + "}"
