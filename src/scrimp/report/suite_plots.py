"""A suite's pictures as files: loss against tokens and memory, memory by term, tokens/s.

Who has no result is left out, and a picture to which nobody has anything is not drawn. An SVG is the same
bytes for the same document and matplotlib, and names the document that it was drawn from (`fingerprint`).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scrimp.base import extras
from scrimp.base.files import explained, write_atomic
from scrimp.report.suite_cells import Contestant, Document, ranked
from scrimp.report.suite_draw import (
    INK,
    draw_loss,
    draw_memory,
    draw_memory_loss,
    draw_speed,
    over_seeds,
)

Kind = Literal["png", "svg"]
STYLE: Mapping[str, Any] = {
    "svg.hashsalt": "scrimp",
    "svg.fonttype": "none",  # text stays text: to be found, read aloud and scaled
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "hatch.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture.

    Attributes:
        name: Its file's name, without the suffix.
        shows: What it shows, for who cannot see it.
        has: Whether a contestant has something to show in it.
        draw: Draws contestants on an empty figure.
        height: Inches for some number of contestants.
    """

    name: str
    shows: str
    has: Callable[[Contestant], bool]
    draw: Callable[[Any, Document, Sequence[Contestant]], None]
    height: Callable[[int], float]


def write_plots(
    document: Document, folder: Path, *, prefix: str = "", kinds: Sequence[Kind] = ("png", "svg")
) -> list[Path]:
    """Draw a suite's pictures into a folder.

    Args:
        document: The suite's document.
        folder: An existing folder.
        prefix: What the files' names begin with.
        kinds: The formats, each a file.

    Returns:
        The files, in the order of `PICTURES`; none for a picture to which no contestant has anything.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ScrimpError: A file cannot be written.
    """
    matplotlib: Any = extras.load("matplotlib", extra="plots", purpose="a suite's pictures")
    figures: Any = extras.load("matplotlib.figure", extra="plots", purpose="a suite's pictures")
    written = []
    with matplotlib.rc_context(STYLE):
        for picture, shown in _drawable(document):
            figure = figures.Figure(figsize=(10, picture.height(len(shown))), layout="constrained")
            _sign(figure, document)
            picture.draw(figure, document, shown)
            for kind in kinds:
                path = folder / f"{prefix}{picture.name}.{kind}"
                with explained(path):
                    write_atomic(path, _drawn(figure, document, picture, kind))
                written.append(path)
    return written


def names(document: Document) -> list[str]:
    """Return the names of the pictures that a document has something for, without drawing."""
    return [picture.name for picture, _ in _drawable(document)]


def fingerprint(document: Document) -> str:
    """Return what tells a document from every other: the SHA-256 of its JSON, keys sorted."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _drawable(document: Document) -> Iterator[tuple[Picture, list[Contestant]]]:
    told = ABOUT.get(document["suite"], [picture.name for picture in PICTURES])
    for picture in PICTURES:
        if picture.name not in told:
            continue
        shown = [one for one in ranked(document) if picture.has(one)]
        if shown:
            yield picture, shown


def _drawn(figure: Any, document: Document, picture: Picture, kind: Kind) -> bytes:
    """Return a figure's file, without the date and the drawing program's version."""
    about = f"{picture.shows}; drawn from the document {fingerprint(document)}"
    metadata = (
        {"Date": None, "Creator": None, "Title": document["title"], "Description": about}
        if kind == "svg"
        else {"Software": None, "Title": document["title"], "Description": about}
    )
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=150, metadata=metadata)
    return file.getvalue()


def _sign(figure: Any, document: Document) -> None:
    """Write below what was measured where: a picture travels without its page."""
    job = document["job"]
    device = document["environment"]["device_name"]
    # A picture is as wide as its page: the job's length stands only where all have the same one.
    same = job["tokens"] is not None and document["protocol"].get("seconds") is None
    tokens = f", {job['tokens']:,} tokens" if same else ""
    text = f"{job['model']}{tokens}, {job['precision']}, {device}"
    busy = "  ·  the machine was busy: timings are not to be trusted" if document["busy"] else ""
    figure.supxlabel(
        f"{text}{busy}", x=0.995, ha="right", fontsize=7.5, color="#b00020" if busy else "#666666"
    )


# What these suites are about; the others have all pictures.
ABOUT: Mapping[str, Sequence[str]] = {"memory": ("memory",), "speed": ("speed",)}
PICTURES = (
    Picture(
        name="loss",
        shows="held-out loss against tokens",
        has=lambda one: bool(over_seeds(one["curves"])),
        draw=draw_loss,
        height=lambda rows: 5.2,
    ),
    Picture(
        name="memory-loss",
        shows="held-out loss against peak memory, with the Pareto front",
        has=lambda one: bool(one["loss"]) and bool(one["tensor_bytes"] or one["peak_bytes"]),
        draw=draw_memory_loss,
        height=lambda rows: 5.2,
    ),
    Picture(
        name="memory",
        shows="memory at the peak by term",
        has=lambda one: bool(one["memory"]),
        draw=draw_memory,
        height=lambda rows: 1.7 + 0.36 * rows,
    ),
    Picture(
        name="speed",
        shows="tokens per second",
        has=lambda one: bool(one["tokens_per_s"]),
        draw=draw_speed,
        height=lambda rows: 1.5 + 0.32 * rows,
    ),
)
