"""A plan as a picture: each recipe's peak, and the chosen one at every moment, against the budget line.

SVG and HTML are our own (`plan_svg`); PNG is drawn from the same bars by matplotlib, an optional package.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from scrimp.base import extras
from scrimp.base.errors import ScrimpError
from scrimp.base.files import explained, write_atomic
from scrimp.base.ledger import TERMS, Term
from scrimp.base.suggest import did_you_mean
from scrimp.base.units import format_bytes
from scrimp.memory.planner import Candidate, Plan
from scrimp.report.plan_bars import COLOURS, Panel, panels
from scrimp.report.plan_svg import html, printable, svg
from scrimp.report.plan_table import foot_lines, head_line

SUFFIXES = (".svg", ".html", ".png")
HATCHES: dict[Term, str] = {
    "fixed": "--",
    "weights": "",
    "gradients": "//",
    "optimizer state": "\\\\",
    "activations": "||",
    "temporaries": "++",
}
LABEL_LETTERS = 60


def check(path: Path) -> None:
    """Find out before any work whether a picture can be written.

    Args:
        path: Where it is to go; the suffix says what kind it is.

    Raises:
        ScrimpError: Its kind is unknown, its folder is missing or closed, or an optional package is missing.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ScrimpError(
            f"picture {path}: its name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
            f"{did_you_mean(suffix, SUFFIXES)}"
        )
    if path.is_dir():
        raise ScrimpError(f"picture {path}: this is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ScrimpError(f"picture {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ScrimpError(f"picture {path}: its folder may not be written to; choose another one")
    if suffix == ".png":
        extras.require("matplotlib", extra="plots", purpose="a picture in PNG")


def write(plan: Plan, candidates: Sequence[Candidate], path: Path) -> None:
    """Write a plan's picture, of the kind that the file's name asks for.

    Args:
        plan: The plan.
        candidates: Those to show, from the top.
        path: The file; `check` took it.

    Raises:
        ScrimpError: It cannot be written.
    """
    title, shown = head_line(plan).replace("   ", " · "), panels(plan, candidates)
    content: str | bytes
    match path.suffix.lower():
        case ".png":
            content = png(title, shown)
        case ".svg":
            content = svg(title, shown)
        case _:
            content = html(title, shown, list(foot_lines(plan, candidates)))
    with explained(path):
        write_atomic(path, content)


def png(title: str, shown: Sequence[Panel]) -> bytes:
    """Draw panels as a PNG with matplotlib.

    Args:
        title: What it is, in a line.
        shown: The panels, from the top.

    Raises:
        MissingExtraError: It is not installed.
    """
    figures: Any = extras.load("matplotlib.figure", extra="plots", purpose="a picture in PNG")
    rows = [1.5 + len(panel.bars) for panel in shown]
    figure = figures.Figure(figsize=(11, 1 + 0.38 * sum(rows)), layout="constrained")
    figure.suptitle(printable(title), fontsize=10, parse_math=False)
    axes = figure.subplots(len(shown), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axis, panel in zip(axes, shown, strict=True):
        _draw(axis, panel)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    return drawn.getvalue()


def _draw(axis: Any, panel: Panel) -> None:
    """Draw one panel on matplotlib's axes."""
    unit = 1024 ** (3 if panel.scale >= 2**30 else 2)
    places = range(len(panel.bars))
    left = [0.0] * len(panel.bars)
    for term in TERMS:
        widths = [bar.terms.get(term, 0) / unit for bar in panel.bars]
        colour, hatch = COLOURS[term], HATCHES[term]
        axis.barh(places, widths, left=left, color=colour, hatch=hatch, edgecolor="white", label=term)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    for place, bar, end in zip(places, panel.bars, left, strict=True):
        text = f" {format_bytes(bar.total)}  {bar.verdict}"
        weight = "bold" if bar.marked else "normal"
        axis.text(end, place, text, va="center", fontsize=8, fontweight=weight)
    axis.axvline(panel.budget / unit, color="#b00020", linestyle="--", label="budget")
    labels = [shorten(printable(bar.label), LABEL_LETTERS, placeholder=" …") for bar in panel.bars]
    axis.set_yticks(places, labels, fontsize=8, parse_math=False)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * panel.scale / unit)  # room for what stands to the right of a bar
    axis.set_xlabel("GiB" if unit == 2**30 else "MiB", fontsize=8)
    axis.set_title(printable(panel.title), fontsize=9, loc="left", parse_math=False)
