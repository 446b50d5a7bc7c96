"""Panels as SVG and HTML, written by hand: no library, no script, nothing from the network.

Both follow the reader's light or dark theme, say every number in words to a screen reader, and can be read
without colour: each term has a pattern of its own, and a segment that has room for it says its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from textwrap import shorten

from scrimp.base.ledger import TERMS, Term
from scrimp.base.units import format_bytes
from scrimp.report.plan_bars import COLOURS, Bar, Panel

PATTERNS: dict[Term, str] = {  # each a path on a tile of 8 x 8
    "fixed": "M0 4h8",
    "weights": "",
    "gradients": "M0 8l8 -8",
    "optimizer state": "M0 0l8 8",
    "activations": "M4 0v8",
    "temporaries": "M0 4h8M4 0v8",
}
WIDTH, LEFT, RIGHT = 1040, 360, 130  # of the picture, of the labels and of the verdicts, in pixels
BAR, STEP = 24, 40  # height of a bar, and from one to the next
LETTER = 6.4  # pixels of a letter at 12 pixels, on average
TICKS = 6
STYLE = """
svg.plan{font:12px system-ui,sans-serif}
.plan .page{fill:#fff}.plan text{fill:#1b1b1b}.plan .quiet{fill:#5a5a5a}.plan .strong{font-weight:700}
.plan .grid{stroke:#dcdcdc}.plan .limit{stroke:#b00020;stroke-width:2;stroke-dasharray:6 3}
.plan .over{fill:#b00020}.plan .segment{stroke:#fff}.plan .tile{stroke:#fff;stroke-opacity:.6;fill:none}
.plan .value{paint-order:stroke;stroke:#fff;stroke-width:3px;stroke-linejoin:round}
@media (prefers-color-scheme:dark){
.plan .page{fill:#16181d}.plan text{fill:#ececec}.plan .quiet{fill:#b0b4bb}.plan .grid{stroke:#3a3e46}
.plan .limit{stroke:#ff8a80}.plan .over{fill:#ff8a80}.plan .segment{stroke:#16181d}
.plan .tile{stroke:#000}.plan .value{stroke:#16181d}
}
"""


def svg(title: str, panels: Sequence[Panel]) -> str:
    """Draw panels as an SVG document, complete in itself.

    Args:
        title: What it is, in a line.
        panels: From the top.
    """
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{_drawing(title, panels, f"<style>{STYLE}</style>")}\n'


def html(title: str, panels: Sequence[Panel], notes: Sequence[tuple[str, str]]) -> str:
    """Draw panels as an HTML page, complete in itself, with their numbers as tables.

    Args:
        title: What it is, in a line.
        panels: From the top.
        notes: What else to say, as pairs of a label and a text.
    """
    page = (
        "body{margin:2rem auto;max-width:1000px;padding:0 1rem;font:15px/1.5 system-ui,sans-serif;"
        "background:#fff;color:#1b1b1b}svg{width:100%;height:auto}.scroll{overflow-x:auto}"
        "table{border-collapse:collapse;font-size:13px}caption{text-align:left;font-weight:700}"
        "th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #8885}"
        "th:first-child,td:first-child{text-align:left}code{overflow-wrap:anywhere}"
        "@media (prefers-color-scheme:dark){body{background:#16181d;color:#ececec}}"
    )
    said = "\n".join(
        f"<p><b>{_safe(label)}:</b> <{tag}>{_safe(text)}</{tag}></p>"
        for label, text in notes
        for tag in ["code" if label == "run" else "span"]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{_safe(title)}</title>\n<style>{page}{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Memory plan</h1>\n{_drawing(title, panels, '')}\n{said}\n"
        f"{''.join(map(_numbers, panels))}</body>\n</html>\n"
    )


def printable(text: str) -> str:
    """Replace control characters, which XML does not allow."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _safe(text: str) -> str:
    return escape(printable(text))


def _drawing(title: str, panels: Sequence[Panel], style: str) -> str:
    top = 84
    body: list[str] = []
    for panel in panels:
        body += _panel(panel, top)
        top += _height(panel)
    words = " ".join(f"{panel.title}: {'; '.join(map(_words, panel.bars))}." for panel in panels)
    return "\n".join(
        [
            f'<svg class="plan" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" '
            f'width="{WIDTH}" height="{top}" role="img" aria-labelledby="plan-title plan-words">',
            f'<title id="plan-title">{_safe(title)}</title>',
            f'<desc id="plan-words">{_safe(words)}</desc>',
            f"{style}<defs>{''.join(map(_pattern, TERMS))}</defs>",
            f'<rect class="page" width="{WIDTH}" height="{top}" fill="#fff"/>',
            f'<text class="strong" x="12" y="26" font-size="14">{_cut(title, WIDTH - 24, 7.6)}</text>',
            *_legend(),
            *body,
            "</svg>",
        ]
    )


def _pattern(term: Term) -> str:
    tile = f'<path class="tile" d="{PATTERNS[term]}" stroke="#fff" fill="none"/>' if PATTERNS[term] else ""
    return (
        f'<pattern id="{_name(term)}" width="8" height="8" patternUnits="userSpaceOnUse">'
        f'<rect width="8" height="8" fill="{COLOURS[term]}"/>{tile}</pattern>'
    )


def _legend() -> Iterator[str]:
    x = 12.0
    for term in TERMS:
        yield f'<rect class="segment" x="{x:.0f}" y="44" width="26" height="16" fill="url(#{_name(term)})"/>'
        yield f'<text x="{x + 32:.0f}" y="56">{term}</text>'
        x += 52 + LETTER * len(term)
    yield f'<path class="limit" d="M{x:.0f} 52h26" stroke="#b00020"/>'
    yield f'<text x="{x + 32:.0f}" y="56">budget</text>'


def _height(panel: Panel) -> int:
    return 72 + STEP * len(panel.bars)


def _panel(panel: Panel, top: int) -> Iterator[str]:
    pixels = (WIDTH - LEFT - RIGHT) / panel.scale
    first, last = top + 48, top + 48 + STEP * len(panel.bars)
    yield f'<text class="strong" x="12" y="{top + 12}">{_cut(panel.title, WIDTH - 24)}</text>'
    for tick in _ticks(panel.scale):
        x = LEFT + pixels * tick
        yield f'<path class="grid" d="M{x:.1f} {first - 8}V{last}" stroke="#dcdcdc"/>'
        yield f'<text class="quiet" x="{x:.1f}" y="{first - 13}" text-anchor="middle">{_round(tick)}</text>'
    for row, bar in enumerate(panel.bars):
        yield from _bar(bar, first + STEP * row, pixels)
    x = LEFT + pixels * panel.budget
    yield f'<path class="limit" d="M{x:.1f} {first - 8}V{last}" stroke="#b00020">'
    yield f"<title>budget {format_bytes(panel.budget)}</title></path>"


def _bar(bar: Bar, y: int, pixels: float) -> Iterator[str]:
    yield f"<g><title>{_safe(_words(bar))}</title>"
    weight = ' class="strong"' if bar.marked else ""
    mark = "▸ " if bar.marked else ""
    yield f'<text{weight} x="12" y="{y + 11}">{mark}{_cut(bar.label, LEFT - 40)}</text>'
    yield f'<text class="quiet" x="12" y="{y + 25}" font-size="10">{_cut(bar.detail, LEFT - 24, 5.6)}</text>'
    x = float(LEFT)
    for term in TERMS:
        size = bar.terms.get(term, 0)
        width, text = pixels * size, format_bytes(size)
        if width < 0.05:
            continue
        yield (
            f'<rect class="segment" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" '
            f'fill="url(#{_name(term)})"><title>{term} {text}</title></rect>'
        )
        if width > LETTER * len(text) + 8:
            yield (
                f'<text class="value" x="{x + width / 2:.1f}" y="{y + 16}" text-anchor="middle">{text}</text>'
            )
        x += width
    style = "" if bar.fits else ' class="over"'
    verdict = f'<tspan x="{WIDTH - RIGHT + 12}" dy="14"{style}>{_safe(bar.verdict)}</tspan>'
    yield f'<text x="{WIDTH - RIGHT + 12}" y="{y + 11}">{format_bytes(bar.total)}{verdict}</text></g>'


def _numbers(panel: Panel) -> str:
    """Write a panel as a table."""
    heads = ("", "total", *TERMS, "")
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    rows = "".join(
        f"<tr><td>{_safe(bar.label)}</td><td>{format_bytes(bar.total)}</td>"
        + "".join(f"<td>{format_bytes(bar.terms.get(term, 0))}</td>" for term in TERMS)
        + f"<td>{_safe(bar.verdict)}</td></tr>\n"
        for bar in panel.bars
    )
    return (
        f'<div class="scroll"><table><caption>{_safe(panel.title)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n"
    )


def _words(bar: Bar) -> str:
    terms = ", ".join(f"{term} {format_bytes(bar.terms[term])}" for term in TERMS if bar.terms.get(term))
    verdict = f", {bar.verdict}" if bar.verdict else ""
    return f"{bar.label}: {format_bytes(bar.total)}{verdict} ({terms})"


def _ticks(scale: float) -> list[int]:
    """Return round amounts of bytes from 0 up to `scale`, a handful of them."""
    unit = 1024 ** max(0, math.floor(math.log(max(scale, 1), 1024)))
    raw = scale / unit / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(power * n for n in (1, 2, 5, 10) if power * n >= raw)
    return [round(step * n) for n in range(int(scale / step) + 1)]


def _round(count: int) -> str:
    return "0" if count == 0 else format_bytes(count)


def _cut(text: str, pixels: float, letter: float = LETTER) -> str:
    return _safe(shorten(printable(text), max(8, int(pixels / letter)), placeholder=" …"))


def _name(term: Term) -> str:
    return f"plan-{term.replace(' ', '-')}"
