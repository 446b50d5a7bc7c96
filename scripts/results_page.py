"""Write `docs/results.md`, its pictures and reports from the suites' committed documents.

`python scripts/results_page.py` reads `benchmarks/results/bench-SUITE.json`, each written by `scrimp bench`,
the suites inside `benchmarks/results/gpu*.json`, and for each a reading, `benchmarks/readings/NAME.md`
(`optimizers`, `gpu-pretrain`, `gpu-speed-llama-350m-bf16`): prose whose every figure is a placeholder.
`tests/test_docs.py` fails while the page differs.

A placeholder is `{WHAT}`, `{WHAT - WHAT}` or `{WHAT / WHAT}`, with `|FORMAT` after it where four significant
digits are not wanted. WHAT is a contestant's name and a field, or a path from the document's top, dotted:
`{fira.loss}`, `{adamw.loss.lowest}`, `{galore-torch.loss - adamw.loss|+.3f}`, `{job.tokens}`; a spread stands
for its median, and `fira.reported.60M` for the paper's perplexity. FORMAT is `bytes`, `count`, `duration`,
`percent` or Python's own, such as `.2f`. What is not there is an error, and so is a number that is typed:
small ones are written as words, and `TYPED` are names.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scrimp.base.units import format_bytes, format_count, format_duration
from scrimp.bench.suites import SUITES
from scrimp.report.page import write_page
from scrimp.report.suite_cells import (
    absences,
    columns,
    environment_line,
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
from scrimp.report.suite_plots import PICTURES, fingerprint, names, write_plots

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
ASSETS = ROOT / "docs" / "assets"
RESULTS = ROOT / "benchmarks" / "results"
READINGS = ROOT / "benchmarks" / "readings"

Document = dict[str, Any]
INTRODUCTION = """# Results

What `scrimp bench` measured: every method that this version has, beside the packages of other people, on the
same job, with the same search for a learning rate. Nothing here is typed by hand: tables, pictures and the
figures in the text come out of the documents in `benchmarks/results/`. The rules of a comparison stand in its
section; what the project promises of itself stands under [Benchmarks](benchmarks.md).

The papers' figures are set apart. They were measured on other models, other data and other machines; the one
quantity to compare is how far a method's loss lies from AdamW's, in nats a token: there, the logarithm of a
ratio of perplexities.
"""
BUSY = "**The machine was busy: seconds, tokens/s and ratios are not to be trusted.**"
PAPERS = (
    "Not measured by us, and not on this job. Signed: how far it lies from {reference}'s, in nats a token; "
    "in brackets: the memory that stands beside it there."
)
NUMBER = re.compile(r"(?<![\w-])\d[\w.,-]*")
PAPER = re.compile(r"arXiv \d{4}\.\d{5}")
CODE = re.compile(r"`[^`]*`")
TYPED = ("4-bit", "8-bit", "16-bit", "32-bit", "60M", "130M", "350M", "1B", "3B", "7B")
PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
SPECIFICATION = re.compile(r"[+]?,?(\.\d+)?[efg%]?")
FORMATS = {
    "bytes": format_bytes,
    "count": format_count,
    "duration": format_duration,
    "percent": lambda share: f"{100 * share:.3g} %",
}


class Suite(NamedTuple):
    """A suite's document.

    Attributes:
        name: What its pictures and reading bear.
        row: The row of a GPU result that holds it; empty where a file is its own.
        document: What `scrimp bench` wrote.
    """

    name: str
    row: str
    document: Document


def page(results: Path = RESULTS, readings: Path = READINGS) -> str:
    """Return the page's text.

    Args:
        results: Where the documents lie.
        readings: Where the readings lie.

    Raises:
        ValueError: A reading names something that its document lacks.
    """
    found = {one.name: one for one in documents(results)}
    parts = [INTRODUCTION]
    for suite in SUITES:
        one = found.pop(f"bench-{suite.name}", None)
        parts.append(_none_yet(suite.name, suite.title) if one is None else _section(one, readings))
    parts += [_section(one, readings) for one in found.values()]
    return "\n".join(parts)


def documents(results: Path = RESULTS) -> list[Suite]:
    """Return the suites' documents, each with a name of its own.

    Raises:
        ValueError: Two have the same name.
    """
    found = [
        Suite(path.stem, "", json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(results.glob("bench-*.json"))
    ]
    for path in sorted(results.glob("gpu*.json")):
        parts = json.loads(path.read_text(encoding="utf-8"))["results"]
        for part, made in parts.items():
            for row in made["rows"]:
                if row.get("document"):
                    # A part that is one suite has a row of its own name.
                    own = [] if row["name"] == part else [re.sub(r"[^\w.]+", "-", row["name"])]
                    found.append(Suite("-".join([path.stem, part, *own]), row["name"], row["document"]))
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise ValueError(f"two documents have one name: {', '.join(names)}")
    return found


def pictures(name: str, document: Document) -> list[Path]:
    """Return where a document's pictures belong."""
    return [ASSETS / f"{name}-{picture}.svg" for picture in names(document)]


def report(name: str) -> Path:
    """Return where a document's interactive report belongs."""
    return ASSETS / f"{name}.html"


def filled(reading: str, document: Document) -> str:
    """Return a reading with its placeholders filled in.

    Raises:
        ValueError: A placeholder cannot be read, or names something that is not there; or a number is typed.
    """
    if bare := bare_numbers(reading):
        raise ValueError(f"these numbers are typed, not filled in: {', '.join(bare)}")
    return PLACEHOLDER.sub(lambda place: _value(place[1], document), reading)


def bare_numbers(reading: str) -> list[str]:
    """Return the numbers that a reading types itself, those of names, code and papers apart."""
    prose = re.sub("|".join(each.pattern for each in (PLACEHOLDER, PAPER, CODE)), "", reading)
    found = [number.rstrip(".,-") for number in NUMBER.findall(prose)]
    return [number for number in found if number not in TYPED]


def _value(placeholder: str, document: Document) -> str:
    what, _, form = placeholder.partition("|")
    words = re.split(r" ([-/]) ", what)
    values = [_look_up(word.strip(), document) for word in words[::2]]
    value = values[0]
    if len(words) == 3:
        if any(isinstance(one, str) for one in values):
            raise ValueError(f"{{{placeholder}}}: only numbers can be compared")
        value = values[0] - values[1] if words[1] == "-" else values[0] / values[1]
    elif len(words) != 1:
        raise ValueError(f"{{{placeholder}}}: at most two things, with ' - ' or ' / ' between them")
    if isinstance(value, str):
        return value
    if form in FORMATS:
        return FORMATS[form](value)
    if not SPECIFICATION.fullmatch(form):
        raise ValueError(
            f"{{{placeholder}}}: no format {form!r}; known: {', '.join(FORMATS)}, or such as .2f"
        )
    return format(value, form) if form else _number(value)


def _look_up(path: str, document: Document) -> Any:
    """Return the number or text at a path: first of a contestant, else from the top."""
    contestants = sorted(document["contestants"], key=lambda one: -len(one["name"]))
    start = next((one for one in contestants if path.startswith(f"{one['name']}.")), None)
    found: Any = document if start is None else start
    keys = path if start is None else path.removeprefix(f"{start['name']}.")
    for key in keys.split("."):
        if isinstance(found, list):
            found = _perplexity(found, key)
        else:
            found = found.get(key) if isinstance(found, Mapping) else None
    if isinstance(found, Mapping):
        found = found.get("median")
    if isinstance(found, bool) or not isinstance(found, int | float | str):
        raise ValueError(f"{{{path}}}: the document has no such figure")
    return found


def _perplexity(entries: list[Document], model: str) -> float | None:
    """Return the perplexity that a paper reports on a model; of several, the first is the main one."""
    found = (
        one["value"]
        for one in entries
        if isinstance(one, Mapping)
        and one.get("model") == model
        and "perplexity" in one["metric"]
        and "log" not in one["metric"]
    )
    return next(found, None)


def _number(value: float) -> str:
    """Write a number with four significant digits, whole ones in full."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 10_000 else f"{value:.4g}"


def _none_yet(suite: str, title: str) -> str:
    return f"## {title}\n\nNo result yet: `scrimp bench {suite} --out DIR` makes one.\n"


def _section(suite: Suite, readings: Path) -> str:
    """Return a suite's heading, reading, table, pictures, papers' figures and what it was measured on."""
    name, row, document = suite
    where = f" ({row}, {document['environment']['device_name']})" if row else ""
    reading = readings / f"{name.removeprefix('bench-')}.md"
    parts = [f"## {_cell(document['title'] + where)}", *([BUSY] if document["busy"] else [])]
    if reading.is_file():
        try:
            parts.append(filled(reading.read_text(encoding="utf-8"), document).strip())
        except ValueError as error:
            raise ValueError(f"{reading}: {error}") from None
    parts += [f"{label}: {_cell(text)}." for label, text in _rules(document)]
    parts.append(_results(document))
    parts.append(f"In the table: {_cell(legend(document))}.")
    listed = [*absences(document), *(("note", note) for note in document["notes"])]
    parts += ["\n".join(f"- {label}: {_cell(text)}" for label, text in listed)] if listed else []
    parts.append(f"[All of it, to sort, filter and look closer](assets/{report(name).name})")
    parts += _shown(name, document)
    parts += _papers(document)
    parts.append(_measured_on(document))
    return "\n\n".join(parts) + "\n"


def _rules(document: Document) -> Iterator[tuple[str, str]]:
    yield "The job", job_line(document)
    if rules := protocol_line(document):
        yield "The rules", rules


def _results(document: Document) -> str:
    shown = columns(document)
    heads = [
        " ".join(column.name.split("\n")) + ("?" if column.timed and document["busy"] else "")
        for column in shown
    ]
    rules = ["---:" if column.number else "---" for column in shown]
    return _table([heads, rules, *([column.cell(one) for column in shown] for one in ranked(document))])


def _shown(name: str, document: Document) -> Iterator[str]:
    """Yield the pictures, each with what it shows for who cannot see it."""
    says = {picture.name: picture.shows for picture in PICTURES}
    for picture, path in zip(names(document), pictures(name, document), strict=True):
        yield f"![{_cell(document['title'])}: {says[picture]}](assets/{path.name})"


def _papers(document: Document) -> Iterator[str]:
    """Yield the papers' figures, a table a metric, each with its sources."""
    reference = document["protocol"]["reference"]
    for place, metric in enumerate(metrics(document)):
        if place == 0:
            yield f"### What the papers report\n\n{PAPERS.format(reference=reference)}"
        rows = paper_rows(document, metric)
        models, here = paper_models(rows), any(row.here is not None for row in rows)
        head = ["contestant", *([f"here, nats over {reference}"] if here else []), *models]
        body = [
            [row.name, *([nats(row.here)] if here else []), *(_paper_cell(row, model) for model in models)]
            for row in rows
        ]
        yield f"**{_cell(metric[0].upper() + metric[1:])}**"
        yield _table([head, ["---", *["---:"] * (len(head) - 1)], *body])
        yield "\n".join(f"- {_cell(named)}: {_cell(source)}" for named, source in paper_sources(rows))


def _paper_cell(row: PaperRow, model: str) -> str:
    memory = row.there[model][0]["memory"] if model in row.there else None
    return f"{paper_cell(row, model)} ({memory})" if memory else paper_cell(row, model)


def _measured_on(document: Document) -> str:
    command = " ".join(shlex.join(document["command"]).replace("`", "'").split())
    parts = [
        f"Measured on: {_cell(environment_line(document))}.",
        f"Command: `{command}`, {format_duration(document['seconds'])}, {document['made']}.",
        f"Document: SHA-256 `{fingerprint(document)[:16]}`.",
    ]
    return "\n".join([*parts, *([BUSY] if document["busy"] else [])])


def _table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\|*<\[\]`_])", r"\\\1", " ".join(text.split()))


def main() -> int:
    """Rewrite the page and the pictures; remove those that belong to no document."""
    wanted = []
    for name, _, document in documents():
        wanted += write_plots(document, ASSETS, prefix=f"{name}-", kinds=("svg",))
        wanted.append(report(name))
        write_page(document, wanted[-1])
    for path in [*ASSETS.glob("bench-*.*"), *ASSETS.glob("gpu*.*")]:
        if path not in wanted:
            path.unlink()
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)} and {len(wanted)} pictures and reports")
    return 0


if __name__ == "__main__":
    sys.exit(main())
