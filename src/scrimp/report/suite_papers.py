"""What the papers report on a suite's contestants, as rows and cells of text, apart from what we measured.

The papers had other models, other data and other machines, so their figures never stand in our columns. The
one quantity that both have is the loss's distance from the reference's: the logarithm of a ratio of
perplexities there, a difference of held-out losses here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scrimp.report.suite_cells import NONE, Contestant, Document, median, ranked


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRow:
    """What the papers report on a contestant in one metric.

    Attributes:
        name: The contestant.
        here: Our held-out loss less the reference's, in nats a token; None where it cannot be told.
        there: By model, the paper's entry and, where it is a loss, its distance from the reference's in nats.
    """

    name: str
    here: float | None
    there: Mapping[str, tuple[Mapping[str, Any], float | None]]


def metrics(document: Document) -> list[str]:
    """Return the metrics that papers report on the contestants, the one of most figures first."""
    found = [entry["metric"] for one in document["contestants"] for entry in one["reported"]]
    return sorted(dict.fromkeys(found), key=lambda metric: -found.count(metric))


def paper_rows(document: Document, metric: str) -> list[PaperRow]:
    """Return the papers' figures in one metric, in our own order."""
    reference = next(
        (o for o in document["contestants"] if o["name"] == document["protocol"]["reference"]), None
    )
    base = {} if reference is None else _first_by_model(reference, metric)
    own = math.nan if reference is None else median(reference, "loss", math.nan)
    rows = []
    for one in ranked(document):
        there = {
            model: (entry, _nats(metric, entry, base.get(model)))
            for model, entry in _first_by_model(one, metric).items()
        }
        gap = median(one, "loss", math.nan) - own
        if there:
            told = "perplexity" in metric and math.isfinite(gap) and one is not reference
            rows.append(PaperRow(name=one["name"], here=gap if told else None, there=there))
    return rows


def paper_models(rows: list[PaperRow]) -> list[str]:
    """Return the models of some rows, in the order in which most of them stand in the papers."""
    return list(
        dict.fromkeys(model for row in sorted(rows, key=lambda r: -len(r.there)) for model in row.there)
    )


def paper_sources(rows: list[PaperRow]) -> Iterator[tuple[str, str]]:
    """Yield where the papers' figures come from, as pairs of the contestants and source with set-up."""
    together: dict[str, list[str]] = {}
    for row in rows:
        for entry, _ in row.there.values():
            detail = "; ".join(filter(None, (entry["source"], entry["setup"], entry["device"])))
            named = together.setdefault(detail, [])
            if row.name not in named:
                named.append(row.name)
    for detail, named in together.items():
        yield ", ".join(named), detail


def paper_cell(row: PaperRow, model: str) -> str:
    """Write a paper's figure, with two decimals where it is a perplexity, and its distance in nats."""
    if model not in row.there:
        return ""
    entry, gap = row.there[model]
    value = f"{entry['value']:.2f}" if "perplexity" in entry["metric"] else f"{entry['value']:,.4g}"
    return value if gap is None else f"{value} {nats(gap)}"


def nats(gap: float | None) -> str:
    """Write a distance between losses."""
    return NONE if gap is None else f"{gap:+.3f}"


def _first_by_model(contestant: Contestant, metric: str) -> dict[str, Mapping[str, Any]]:
    """Return a contestant's figures in a metric by model; of several, the first is the main one."""
    found: dict[str, Mapping[str, Any]] = {}
    for entry in contestant["reported"]:
        if entry["metric"] == metric:
            found.setdefault(entry["model"], entry)
    return found


def _nats(metric: str, entry: Mapping[str, Any], base: Mapping[str, Any] | None) -> float | None:
    if base is None or base is entry or "perplexity" not in metric:
        return None
    if "log" in metric:
        return float(entry["value"] - base["value"])
    return math.log(entry["value"] / base["value"])
