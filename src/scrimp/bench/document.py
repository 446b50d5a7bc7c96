"""A suite's document: all that was asked, found and reported, as plain data for JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scrimp.bench import peers
from scrimp.bench.bench import Bench, Entry
from scrimp.bench.machine import BUSY_OTHERS_SHARE, environment
from scrimp.bench.protocol import LR_FACTOR, TARGET_ROOM, TARGET_RULE, at_edge, best, spread, to_target
from scrimp.reported import reported

SCHEMA = 1


def document(bench: Bench) -> dict[str, Any]:
    """Return what a suite came to so far.

    Args:
        bench: The suite, finished or not.
    """
    ask = bench.ask
    disturbed = [entry for entry in bench.entries if entry.others_share > BUSY_OTHERS_SHARE]
    reference = bench.reference
    target = _target(reference)
    packages = [entry.contestant.peer.package for entry in bench.entries if entry.contestant.peer]
    return {
        "schema": SCHEMA,
        "kind": "suite",
        "suite": ask.suite.name,
        "title": ask.suite.title,
        "made": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "command": [Path(word).name if Path(word).is_absolute() else word for word in ask.command],
        "busy": bool(disturbed),
        "seconds": round(bench.earlier + bench.load.seconds, 1),
        "notes": _notes(bench, disturbed),
        "environment": environment(packages, device=bench.job["device"]),
        "load": bench.load.end()[0],
        "job": _job(bench),
        "protocol": {
            "trials": ask.trials,
            "lr_factor": round(LR_FACTOR, 4),
            "lr_centre": bench.centre,
            "lr_law": bench.law,
            "seeds": ask.seeds,
            "reference": reference.contestant.name,
            "target_loss": target,
            "target_rule": TARGET_RULE if target is not None else None,
            "pairs": ask.pairs,
            "turn_steps": ask.suite.turn_steps if ask.pairs else None,
            "jobs": ask.jobs,
            "seconds": ask.seconds,
        },
        "contestants": [_row(entry, bench, target) for entry in bench.entries],
    }


def _runs(entry: Entry) -> list[dict[str, Any]]:
    """Return the runs at the best rate, the search's own first."""
    trial = best(entry.trials)
    return [] if trial is None else [dict(trial), *(run for run in entry.runs if run["lr"] == trial["lr"])]


def _target(reference: Entry) -> float | None:
    losses = spread([run["loss"] for run in _runs(reference)])
    return None if losses is None else float(f"{losses['median'] * TARGET_ROOM:.6g}")


def _job(bench: Bench) -> dict[str, Any]:
    recipe, ask = bench.job["recipe"], bench.ask
    found = [run["found"] for entry in bench.entries for run in entry.trials]
    steps = recipe["steps"]
    return {
        "model": recipe["model.name"],
        "parameters": max((run["parameters"] for run in found), default=None),
        "non_embedding": bench.job["non_embedding"],
        "init": recipe["model.init"],
        "data": bench.job["data"],
        "fingerprint": bench.job["fingerprint"],
        "tokens": steps * recipe["batch"] * recipe["seq"] if ask.trials else None,
        "steps": steps if ask.trials else None,
        "batch": recipe["batch"],
        "seq": recipe["seq"],
        "precision": recipe["precision"],
        "device": bench.job["device"],
        "threads": ask.recipe.get("threads") or 1,
        "speed_threads": recipe["threads"],
        "schedule": recipe["schedule.name"],
        "evaluation_tokens": max((run["evaluation_tokens"] or 0 for run in found), default=None),
        "evaluation_every": max(1, steps // max(1, ask.suite.evaluations)),
    }


def _row(entry: Entry, bench: Bench, target: float | None) -> dict[str, Any]:
    contestant, runs = entry.contestant, _runs(entry)
    first: Mapping[str, Any] = runs[0]["found"] if runs else {}
    tried = [trial["lr"] for trial in entry.trials]
    peer = contestant.peer
    version = None if peer is None else peers.installed_version(peer)
    return {
        "name": contestant.name,
        "kind": contestant.kind,
        "title": contestant.title,
        "package": None if peer is None else " ".join(filter(None, [peer.package, version])),
        "settings": first.get("settings", {}),
        "status": _status(entry, bench),
        "why": entry.missing or entry.failed or _diverged(entry, runs),
        "lr": runs[0]["lr"] if runs else None,
        "lr_at_edge": bool(runs) and bench.ask.trials > 1 and at_edge(runs[0]["lr"], tried),
        "trials": [{key: trial[key] for key in ("lr", "seed", "loss")} for trial in entry.trials],
        "loss": spread([run["found"]["loss"] for run in runs]),
        "bits_per_byte": spread([run["found"]["bits_per_byte"] for run in runs]),
        "to_target": _to_target(entry, runs, target),
        **{key: first.get(key) for key in ("state_bytes", "tensor_bytes", "predicted_bytes", "memory")},
        "trained": first.get("trained"),
        "peak_bytes": round(statistics.median(run["found"]["peak_bytes"] for run in runs)) if runs else None,
        **_speed(entry, bench.entries),
        "curves": [
            {"seed": run["seed"], "lr": run["lr"], "loss": run["loss"], **run["found"]["curve"]}
            for run in runs
        ],
        "reported": [one.plain() for one in reported(contestant.paper)] if contestant.paper else [],
    }


def _diverged(entry: Entry, runs: Sequence[Mapping[str, Any]]) -> str:
    """Say which of a contestant's runs diverged, where that changes what its figures mean."""
    if entry.trials and not runs:
        return "diverged at every learning rate tried"
    lost = sum(run["loss"] is None for run in runs)
    return f"{lost} of {len(runs)} seeds diverged" if lost else ""


def _status(entry: Entry, bench: Bench) -> str:
    if entry.missing:
        return "missing"
    if entry.failed:
        return "failed"
    expected = bench.ask.seeds if bench.ask.trials else 0
    searched = len(entry.trials) == bench.ask.trials
    diverged = searched and best(entry.trials) is None
    whole = searched and (diverged or len(_runs(entry)) == expected)
    return "done" if whole and (entry.speeds or not bench.ask.pairs) else "partial"


def _to_target(
    entry: Entry, runs: Sequence[Mapping[str, Any]], target: float | None
) -> dict[str, Any] | None:
    if target is None or not runs:
        return None
    found = to_target([run["found"]["curve"] for run in runs], target)
    speeds = entry.speeds.get("contestant")
    seconds = None
    if found["tokens"] is not None and speeds:
        seconds = round(found["tokens"] / statistics.median(speeds), 2)
    return {"tokens": found["tokens"], "seconds": seconds, "reached": found["reached"], "of": found["of"]}


def _speed(entry: Entry, entries: Sequence[Entry]) -> dict[str, Any]:
    if not entry.speeds:
        return {"tokens_per_s": None, "speed_ratio": None}
    mine, other = entry.speeds["contestant"], entry.speeds["reference"]
    return {
        "tokens_per_s": spread(mine, digits=5),
        "speed_ratio": spread([a / b for a, b in zip(mine, other, strict=True)], digits=4),
    }


def _notes(bench: Bench, disturbed: Sequence[Entry]) -> list[str]:
    notes = []
    if disturbed:
        names = ", ".join(entry.contestant.name for entry in disturbed)
        notes.append(
            f"Other programs took over {BUSY_OTHERS_SHARE:.0%} of the cores while these took turns: {names}."
        )
    if bench.ask.pairs and bench.ask.trials:
        notes.append(
            "Seconds to the target are tokens to the target over the speed measured in turns, where a "
            "contestant runs with the job's threads and nothing beside it but the waiting reference."
        )
    if bench.ask.pairs:
        notes.append(
            "The reference takes turns with a second process of itself: how far its ratio is from 1 is what "
            "the machine's noise is worth."
        )
    if any(entry.contestant.peer and entry.contestant.peer.brings_loop for entry in bench.entries):
        notes.append("A peer that brings its own loop is measured from outside: its memory has no terms.")
    return notes
