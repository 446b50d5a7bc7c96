"""The words and tables of a suite's report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from scrimp.base.units import format_bytes, format_count, format_duration
from scrimp.report.suite_cells import has_diverged, prediction_error, threads
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
    spread,
    table,
    used,
    words,
)

SECTIONS = (
    ("contestants", "Contestants"),
    ("charts", "Charts"),
    ("reported", "The papers"),
    ("protocol", "Protocol"),
    ("notes", "Notes"),
)
BUSY = (
    "The machine was busy with other work while this was measured: seconds, tokens/s and what follows from "
    "them may be off. Losses and bytes are not affected."
)
ORIENTATION = (
    "Reported by the papers, each in its own set-up: other models, data and devices. For orientation; these "
    "figures do not compare with those above."
)
SAME_JOB = (
    "Every contestant does the same job, in a process of its own: the model, the data and their order, and "
    "{length} are the same; only the method differs."
)
TUNING = "Equal tuning: as many learning rates for each ({trials}), a factor of {lr_factor:.4g} apart."
NO_TUNING = "No tuning: one learning rate for each, {lr_centre:.3g} for the reference ({lr_law})."
CENTRE = "The search is centred at {lr_centre:.3g} for the reference ({lr_law})."
SEEDS = (
    "The best of them is run with every seed ({seeds}); the median is shown with the lowest and the highest."
)
TARGET = "The target is a held-out loss of {target_loss:.4g}: {target_rule}."
EVALUATION = (
    "Held-out loss: over {evaluation_tokens:,} tokens; steps from one to the next: {evaluation_every}."
)
PAIRS = (
    "Speed is compared with {reference}, in turns of {turn_steps} steps: the ratio is the median of the "
    "pairs ({pairs}), each taken side by side, so that a noisy machine slows both."
)


def body(document: Mapping[str, Any]) -> str:
    """Write the page's body.

    Args:
        document: A suite, rounded.
    """
    parts = {
        "contestants": _contestants(document),
        "charts": CHARTS,
        "reported": _reported(document),
        "protocol": _protocol(document),
        "notes": section("notes", "Notes", bullets(document.get("notes") or ())),
    }
    shown = [(name, title) for name, title in SECTIONS if parts[name]]
    return f"{_header(document)}\n{contents(shown)}\n<main>\n{''.join(parts.values())}</main>"


def _header(document: Mapping[str, Any]) -> str:
    environment = document.get("environment") or {}
    versions = environment.get("versions") or {}
    device = ", ".join(
        str(part)
        for part in (
            environment.get("device_name") or environment.get("device"),
            f"{environment['cores']} cores" if environment.get("cores") else None,
            f"{environment['memory_gib']:.4g} GiB" if environment.get("memory_gib") else None,
            environment.get("system"),
        )
        if part
    )
    said = facts(
        [
            ("made", str(document.get("made") or "").replace("T", " ").removesuffix("Z") + " UTC"),
            ("took", format_duration(document["seconds"]) if document.get("seconds") else None),
            ("device", device),
            ("load before, after", _load(document.get("load") or {})),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ]
    )
    command = shlex.join(map(str, document.get("command") or ()))
    return (
        f'<header>\n<p class="over">scrimp bench {safe(document.get("suite") or "")}</p>\n'
        f'<h1>{safe(document["title"])}</h1>\n<p class="lead">{safe(_job(document))}</p>\n'
        + (f'<p class="warning"><b>Busy machine.</b> {BUSY}</p>\n' if document.get("busy") else "")
        + said
        + (f'\n<p class="command"><code>{safe(command)}</code></p>' if command else "")
        + "\n</header>"
    )


def _load(load: Mapping[str, Any]) -> str:
    """Write the load averages of one minute, and the share of the processor that others took."""
    ends = [load.get(name) for name in ("before", "after")]
    said = ", ".join(f"{end[0]:.2g}" for end in ends if end)
    share = load.get("others_share_of_cpu")
    return said + (f"; others took {share:.1%} of the processor" if said and share is not None else "")


def _job(document: Mapping[str, Any]) -> str:
    job, seconds = document.get("job") or {}, (document.get("protocol") or {}).get("seconds")

    def said(text: str, *names: str) -> str:
        return text.format(**job) if all(job.get(name) is not None for name in names) else ""

    same_steps = seconds is None and job.get("steps") is not None
    parts = (
        said("{model}", "model"),
        f"{format_count(job['parameters'])} parameters" if job.get("parameters") else "",
        {"scratch": "from scratch", None: ""}.get(job.get("init"), f"from {job.get('init')}"),
        said("{data}", "data"),
        f"{format_count(job['tokens'])} tokens" if same_steps and job.get("tokens") else "",
        f"{format_duration(seconds)} of training each" if seconds is not None else "",
        said(f"{'{steps} ' * same_steps}steps of {{batch}} × {{seq}}", "batch", "seq"),
        said("{precision}", "precision"),
        said("on {device}", "device"),
        threads(document),
    )
    return " · ".join(part for part in parts if part)


def _reference(document: Mapping[str, Any]) -> str | None:
    return (document.get("protocol") or {}).get("reference")


def columns(document: Mapping[str, Any]) -> list[Column]:
    """Return the columns of the table of contestants; those in which nothing was measured too.

    Args:
        document: A suite.
    """
    reference = _reference(document)
    losses = {row["name"]: (row.get("loss") or {}).get("median") for row in document["contestants"]}
    base = losses.get(reference or "")
    parameters = (document.get("job") or {}).get("parameters")

    def name(row: Row) -> Cell:
        return Cell(_name(row, reference), row["name"])

    def difference(row: Row) -> Cell | None:
        loss = losses[row["name"]]
        return None if loss is None or base is None else number(loss - base, signed)

    def per_parameter(row: Row) -> Cell | None:
        size = row.get("state_bytes")
        return None if size is None or not parameters else number(size / parameters, "{:.3g}".format)

    # The loss after the few steps of the memory suite says nothing.
    only_memory = document.get("suite") == "memory"
    learning = [
        Column("held-out loss", "nats a token", _loss),
        Column("difference", f"to {reference}", difference),
        Column("best lr", "of the search", _lr),
        Column("tokens to target", "fewer is better", lambda row: _to_target(row, "tokens")),
        Column("seconds to target", "fewer is better", lambda row: _to_target(row, "seconds")),
    ]
    prediction = [
        Column("predicted", "whole process", lambda row: number(row.get("predicted_bytes"), format_bytes)),
        Column("error", "of the measured", lambda row: number(prediction_error(row), _percent)),
    ]
    return [
        Column("contestant", "", name, words=True),
        *([] if only_memory else learning),
        Column("optimizer state", "bytes", lambda row: number(row.get("state_bytes"), format_bytes)),
        Column("state", "bytes a parameter", per_parameter),
        Column("peak tensors", "bytes", lambda row: number(row.get("tensor_bytes"), format_bytes)),
        Column("peak resident", "whole process", lambda row: number(row.get("peak_bytes"), format_bytes)),
        *(prediction if only_memory else []),
        Column("tokens/s", "more is faster", lambda row: spread(row.get("tokens_per_s"), _rate)),
        Column("speed", f"× {reference}", lambda row: spread(row.get("speed_ratio"), "{:.3f}".format)),
    ]


def _loss(row: Row) -> Cell | None:
    # It sorts behind any loss.
    return Cell("diverged", 1e300) if has_diverged(row) else spread(row.get("loss"), "{:.4f}".format)


def _percent(share: float) -> str:
    return f"{signed(100 * share, 1)} %"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _name(row: Row, reference: str | None) -> str:
    tag = '<span class="tag">reference</span>' if row["name"] == reference else ""
    why = row.get("why") or ""
    said = {"partial": f"only in part: {why or 'not all of its runs are done'}", "done": why}
    peer = f"peer: {row.get('package') or row['name']}" if row.get("kind") == "peer" else row.get("package")
    below = " · ".join(str(part) for part in (row.get("title"), peer, said.get(row["status"])) if part)
    return f'<span class="name">{safe(row["name"])}</span>{tag}<small>{safe(below)}</small>'


def _lr(row: Row) -> Cell | None:
    if row.get("lr") is None:
        return None
    edge = (
        ' <abbr class="edge" title="the best rate tried is the smallest or the largest: a wider search '
        'may find a better one">edge</abbr>'
        if row.get("lr_at_edge")
        else ""
    )
    return Cell(f"{row['lr']:.3g}{edge}", row["lr"])


def _to_target(row: Row, what: str) -> Cell | None:
    target = row.get("to_target")
    if target is None:
        return None
    reached, of = target.get("reached"), target.get("of")
    if what == "seconds" and target.get("seconds") is None and not row.get("tokens_per_s"):
        return None
    if target.get("tokens") is None:
        # Never there sorts behind late.
        return Cell(f"not reached<small>({reached} of {of})</small>", 1e300)
    some = f"<small>{reached} of {of} seeds</small>" if reached != of else ""
    if target.get(what) is None:
        return None
    text = format_count(target[what]) if what == "tokens" else f"{target[what]:.3g}"
    return Cell(safe(text) + some, target[what])


def _contestants(document: Mapping[str, Any]) -> str:
    rows: Sequence[Row] = document["contestants"]
    absent = {"missing": "not installed", "failed": "failed"}

    def head(row: Row) -> str:
        status = row.get("status") or "done"
        return f' data-name="{safe(row["name"])}" class="{safe(status)}"'

    def why(row: Row) -> str:
        status = absent.get(row.get("status") or "")
        return f"{status}: {row.get('why') or 'no reason was recorded'}" if status else ""

    seeds = (document.get("protocol") or {}).get("seeds") if _learns(document) else None
    below = "Medians of the seeds; below them, from the lowest to the highest." if seeds and seeds > 1 else ""
    made = table(used(columns(document), rows), rows, label="Contestants", head=head, why=why)
    said = f'<p class="quiet">{below}</p>' if below else ""
    return section("contestants", "Contestants", said, made, _settings(rows))


def _settings(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row.get("settings")]
    if not found:
        return ""
    made = table(
        [
            Column("contestant", "", lambda row: words(row["name"]), words=True),
            Column("settings", "", lambda row: words(_pairs(row["settings"])), words=True),
        ],
        found,
        label="Settings of the contestants",
    )
    return f"<details><summary>Settings of each contestant</summary>{made}</details>"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _merged(contestants: Sequence[Row]) -> list[Row]:
    """Return the papers' figures, each once: contestants of one method share them."""
    names: dict[str, list[str]] = {}
    figures: dict[str, Row] = {}
    for row in contestants:
        for figure in row.get("reported") or ():
            key = repr(sorted(figure.items()))
            figures[key] = figure
            names.setdefault(key, []).append(row["name"])
    return [{"contestant": ", ".join(names[key]), **figure} for key, figure in figures.items()]


def _reported(document: Mapping[str, Any]) -> str:
    rows = _merged(document["contestants"])

    def column(key: str, title: str = "") -> Column:
        return Column(title or key, "", lambda row: words(row.get(key)), words=True)

    kinds = [
        column("contestant"),
        column("model"),
        column("metric"),
        Column("value", "", lambda row: _value(row.get("value"))),
        column("memory"),
        column("tokens"),
        column("device"),
        column("setup", "set-up"),
        column("source"),
    ]
    if not rows:
        return ""
    made = table(used(kinds, rows), rows, label="Figures that the papers report")
    return section("reported", "What the papers report", f'<p class="other">{ORIENTATION}</p>', made)


def _value(value: object) -> Cell | None:
    is_number = isinstance(value, int | float)
    return number(value, "{:g}".format) if is_number else words(value)  # type: ignore[arg-type]


def _learns(document: Mapping[str, Any]) -> bool:
    """Tell whether losses were compared, and not memory or speed alone."""
    return (document.get("protocol") or {}).get("trials") != 0 and document.get("suite") != "memory"


def _protocol(document: Mapping[str, Any]) -> str:
    protocol, job = document.get("protocol") or {}, document.get("job") or {}
    if not protocol:
        return ""

    def said(text: str, *names: str) -> str:
        found = {**job, **protocol}
        return text.format(**found) if all(found.get(name) is not None for name in names) else ""

    seconds = protocol.get("seconds")
    length = "the steps" if seconds is None else f"the seconds of training ({seconds:.4g} s each)"
    learning = [
        said(TUNING, "trials", "lr_factor") if protocol.get("trials") != 1 else "",
        said(CENTRE if protocol.get("trials") != 1 else NO_TUNING, "lr_centre", "lr_law"),
        said(SEEDS, "seeds") if (protocol.get("seeds") or 0) > 1 else "",
        said(EVALUATION, "evaluation_tokens", "evaluation_every"),
        said(TARGET, "target_loss", "target_rule").replace("..", "."),
    ]
    sentences = [
        SAME_JOB.format(length=length),
        *(learning if _learns(document) else []),
        said(PAIRS, "reference", "turn_steps", "pairs") if protocol.get("pairs") else "",
    ]
    return section("protocol", "Protocol", bullets(text for text in sentences if text))
