"""A suite's document as rows and cells of text, whatever shows them: a terminal, the documentation.

The document is plain data (`scrimp bench` writes it); any number may be missing and is then a dash. A spread
`1.912 ±0.006` is the median and the distance of the value farthest from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scrimp.base.units import format_count, format_duration

Document = Mapping[str, Any]
Contestant = Mapping[str, Any]
NONE = "-"
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the table.

    Attributes:
        name: Its head; a line break divides it where it is narrow.
        cell: What stands in it for a contestant.
        number: Whether it is a number, set flush right.
        timed: Whether a busy machine spoils it.
        leaves: When it leaves a narrow table: those of the largest number first; 0 stays.
    """

    name: str
    cell: Callable[[Contestant], str]
    number: bool = True
    timed: bool = False
    leaves: int = 0


def ranked(document: Document) -> list[Contestant]:
    """Return the contestants, the best first: by held-out loss, or by what the suite is about.

    Those without that figure follow in the document's order, those without any result are the last.
    """
    orders = {"memory": _by_memory, "speed": _by_speed}
    order = orders.get(document["suite"], _by_loss)
    return sorted(document["contestants"], key=lambda one: (not is_measured(one), order(one)))


def is_measured(contestant: Contestant) -> bool:
    """Tell whether there are results to show, if only some."""
    return contestant["status"] in ("done", "partial")


def has_diverged(contestant: Contestant) -> bool:
    """Tell whether there is no loss to compare because too many of a contestant's runs diverged."""
    runs = [*(contestant.get("trials") or ()), *(contestant.get("curves") or ())]
    return not contestant.get("loss") and any("loss" in run and run["loss"] is None for run in runs)


def median(contestant: Contestant, field: str, otherwise: float) -> float:
    """Return the median of one of a contestant's spreads."""
    found = contestant.get(field)
    return otherwise if found is None or found["median"] is None else float(found["median"])


def columns(document: Document) -> list[Column]:
    """Return the columns in which at least one contestant has something to say."""
    fields = ("state_bytes", "tensor_bytes", "peak_bytes")
    unit = byte_unit(one.get(field) for one in document["contestants"] for field in fields)
    training = [
        Column(name="held-out\nloss", cell=_loss),
        Column(name="lr", cell=_rate, leaves=2),
        Column(name="tokens to\ntarget", cell=_tokens_to_target, leaves=3),
        Column(name="seconds\nto it", cell=_seconds_to_target, timed=True, leaves=4),
    ]
    holding = [
        Column(name=f"state\n{unit}", cell=_bytes("state_bytes", unit)),
        Column(name=f"tensors\n{unit}", cell=_bytes("tensor_bytes", unit), leaves=1),
        Column(name=f"resident\n{unit}", cell=_bytes("peak_bytes", unit), leaves=5),
    ]
    running = [
        Column(name="tokens/s", cell=_speed, timed=True, leaves=6),
        Column(name=f"speed over\n{document['protocol']['reference']}", cell=_ratio, timed=True),
    ]
    # The loss after the few steps of the memory suite says nothing.
    if document["suite"] == "memory":
        training = []
        holding.append(Column(name=f"predicted\n{unit}", cell=_bytes("predicted_bytes", unit)))
        holding.append(Column(name="error", cell=_error, leaves=3))
    found = [Column(name="contestant", cell=_name, number=False), *training, *holding, *running]
    rows = document["contestants"]
    return [column for column in found if any(column.cell(one) != NONE for one in rows)]


def job_line(document: Document) -> str:
    """Write what every contestant had to do, and on what."""
    job, where = document["job"], document["environment"]
    size = job.get("parameters")
    shape = f"{job['batch']} x {job['seq']}"
    parts = [
        job["model"] if size is None else f"{job['model']}, {format_count(size)} parameters",
        "from scratch" if job["init"] == "scratch" else f"from {job['init']}",
        *_amount_of_training(document, shape),
        f"{job['precision']} on {where['device_name']}",
        threads(document),
    ]
    return ", ".join(filter(None, parts))


def _amount_of_training(document: Document, shape: str) -> Iterator[str]:
    """Yield how much each learnt from what: the same steps, the same seconds, or nothing at all."""
    job, seconds = document["job"], document["protocol"].get("seconds")
    if seconds is not None:
        yield f"{format_duration(seconds)} of training each on {job['data']}"
        yield f"steps of {shape}"
    elif job["steps"] is None:
        yield f"steps of {shape} on {job['data']}"
    else:
        yield f"{job['tokens']:,} tokens of {job['data']}"
        yield f"{job['steps']:,} steps of {shape}"


def threads(document: Document) -> str:
    """Write how many threads did the learning and the turns for speed; empty where that is not known."""
    job, rules = document.get("job") or {}, document.get("protocol") or {}
    learning = job.get("threads") if rules.get("trials") != 0 else None
    speed = job.get("speed_threads") if rules.get("pairs") or learning is None else None
    if learning and speed and learning != speed:
        return f"learning with {_count(learning, 'thread')}, speed with {speed}"
    found = learning or speed
    return _count(found, "thread") if found else ""


def environment_line(document: Document) -> str:
    """Write the machine and the versions that it was made with."""
    where = document["environment"]
    parts = [
        where["device_name"],
        f"{where['cores']} cores",
        f"{where['memory_gib']:.3g} GiB",
        where["system"],
        *(f"{name} {version}" for name, version in where["versions"].items()),
    ]
    return ", ".join(parts)


def protocol_line(document: Document) -> str:
    """Write how the contestants were treated, so that it was fair; empty where nothing was tried or timed."""
    rules, parts = document["protocol"], []
    if rules["trials"] and document["suite"] != "memory":
        apart = f", a factor {rules['lr_factor']:.3g} apart" if rules["trials"] > 1 else ""
        rates = f"{_count(rules['trials'], 'learning rate')} each{apart}"
        centre = "" if rules["lr_centre"] is None else f", around {rules['lr_centre']:.3g} for the reference"
        law = f" (by {rules['lr_law']})" if rules["lr_law"] else ""
        parts.append(f"{rates}{centre}{law}")
        parts.append(f"{_count(rules['seeds'], 'seed')} at the best one")
    if rules["target_loss"] is not None and document["suite"] != "memory":
        parts.append(f"target: a held-out loss of {rules['target_loss']:.4g} ({rules['target_rule']})")
    if rules["pairs"]:
        parts.append(
            f"speed in {_count(rules['pairs'], 'interleaved pair')} of turns of {rules['turn_steps']} steps"
        )
    return "; ".join(parts)


def legend(document: Document) -> str:
    """Say what the numbers of the table are, those that are there."""
    rows, reference = document["contestants"], document["protocol"]["reference"]
    parts = []
    if document["suite"] != "memory" and any(one["loss"] for one in rows):
        parts.append("loss: held-out nats a token at the best learning rate, median of the seeds")
    if any(one["lr_at_edge"] for one in rows):
        parts.append("*: the best rate lies at the edge of the search, so a better one may lie beyond")
    if any(one["speed_ratio"] for one in rows):
        parts.append(f"speed over {reference}: the ratio within a pair of turns, median of the pairs")
    return "; ".join([*parts, "±: how far off the farthest value is"])


def absences(document: Document) -> Iterator[tuple[str, str]]:
    """Yield what is missing, failed, not complete or diverged, as pairs of a word and a sentence."""
    together: dict[tuple[str, str], list[str]] = {}
    for one in document["contestants"]:
        done = one["status"] == "done"
        why = one["why"] or ("" if done else "not all of its runs are done")
        if why:
            together.setdefault(("note" if done else one["status"], why), []).append(one["name"])
    for (status, why), named in together.items():
        yield status, f"{', '.join(named)}: {why}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _by_loss(one: Contestant) -> float:
    return median(one, "loss", math.inf)


def _by_memory(one: Contestant) -> float:
    return float(one["tensor_bytes"] or one["peak_bytes"] or math.inf)


def _by_speed(one: Contestant) -> float:
    return -median(one, "tokens_per_s", -math.inf)


def _name(one: Contestant) -> str:
    return str(one["name"]) if one["status"] == "done" else f"{one['name']} ({one['status']})"


def _loss(one: Contestant) -> str:
    return "diverged" if has_diverged(one) else _spread(one["loss"], 3)


def _rate(one: Contestant) -> str:
    return NONE if one.get("lr") is None else f"{one['lr']:.3g}{'*' * bool(one.get('lr_at_edge'))}"


def _tokens_to_target(one: Contestant) -> str:
    target = one.get("to_target")
    if target is None:
        return NONE
    some = 0 < target["reached"] < target["of"]
    share = f" {target['reached']}/{target['of']}" if some else ""
    tokens = "never" if target["tokens"] is None else format_count(target["tokens"]).replace(" ", "")
    return f"{tokens}{share}"


def _seconds_to_target(one: Contestant) -> str:
    target = one.get("to_target")
    if target is None:
        return NONE
    if target["seconds"] is None:  # as it is where no speed was measured too
        return "never" if target["tokens"] is None and one.get("tokens_per_s") else NONE
    return f"{target['seconds']:.3g}" if target["seconds"] < 600 else format_duration(target["seconds"])


def _bytes(field: str, unit: str) -> Callable[[Contestant], str]:
    def cell(one: Contestant) -> str:
        found = one.get(field)
        return NONE if found is None else amount(found, unit)

    return cell


def _error(one: Contestant) -> str:
    """Write how far the prediction lies from the process's peak."""
    error = prediction_error(one)
    return NONE if error is None else f"{error:+.1%}"


def prediction_error(one: Contestant) -> float | None:
    """Return how far the predicted peak lies from the measured one, as a share of that."""
    predicted, measured = one.get("predicted_bytes"), one.get("peak_bytes")
    return None if not predicted or not measured else (predicted - measured) / measured


def _speed(one: Contestant) -> str:
    found = median(one, "tokens_per_s", math.nan)
    return NONE if math.isnan(found) else f"{found:,.0f}" if found >= 100 else f"{found:.3g}"


def _ratio(one: Contestant) -> str:
    return _spread(one.get("speed_ratio"), 2)


def _spread(found: Mapping[str, Any] | None, digits: int) -> str:
    """Write the median and how far the farthest value is from it; a single value has no spread."""
    if found is None or found["median"] is None:
        return NONE
    middle = f"{found['median']:.{digits}f}"
    if len(found["all"]) < 2:
        return middle
    off = max(found["highest"] - found["median"], found["median"] - found["lowest"])
    return f"{middle} ±{off:.{digits}f}"


def byte_unit(counts: Iterable[float | None]) -> str:
    """Return the unit in which the largest of some amounts has at most three digits before the point."""
    largest = max((count or 0 for count in counts), default=0)
    return next((unit for power, unit in enumerate(UNITS) if largest < 1000 * 1024**power), UNITS[-1])


def in_unit(count: float, unit: str) -> float:
    """Return bytes in a unit."""
    return count / float(1024 ** UNITS.index(unit))


def amount(count: float, unit: str) -> str:
    """Write bytes in a unit, with three digits."""
    value = in_unit(count, unit)
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
