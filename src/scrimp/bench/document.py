"""A suite's document: all that was asked, found and reported, as plain data for JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scrimp.base import platform
from scrimp.base.units import format_bytes, parse_bytes
from scrimp.bench import peers
from scrimp.bench.bench import Bench
from scrimp.bench.entries import Entry, Run
from scrimp.bench.machine import BUSY_OTHERS_SHARE, environment
from scrimp.bench.protocol import LR_FACTOR, TARGET_ROOM, TARGET_RULE, at_edge, spread, to_target
from scrimp.reported import reported

SCHEMA = 1
HELD = ("state_bytes", "tensor_bytes", "predicted_bytes", "memory", "trained")


def document(bench: Bench) -> dict[str, Any]:
    """Return what a suite came to so far.

    Args:
        bench: The suite, finished or not.
    """
    ask = bench.ask
    disturbed = [entry for entry in bench.entries if entry.turns.get("others_share", 0.0) > BUSY_OTHERS_SHARE]
    packages = [entry.contestant.peer.package for entry in bench.entries if entry.contestant.peer]
    target = _target(bench.reference)
    return {
        "schema": SCHEMA,
        "kind": "suite",
        "suite": ask.suite.name,
        "title": ask.suite.title,
        "made": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "command": _shown(ask.command),
        "busy": bool(disturbed),
        "seconds": round(_spent(bench), 1),
        "notes": _notes(bench, disturbed),
        "environment": {
            **environment(packages, device=bench.job["device"]),
            "device_name": bench.job["device_name"],
        },
        "load": bench.load.end()[0],
        "job": _job(bench),
        "protocol": _protocol(bench, target),
        "contestants": [_row(entry, bench, target) for entry in bench.entries],
    }


def _spent(bench: Bench) -> float:
    """Return the seconds that the suite's runs and turns took, whenever that was."""
    turns = sum(entry.turns.get("seconds", 0.0) for entry in bench.entries)
    runs = [
        run.found["seconds"] for entry in bench.entries for run in [*entry.trials, *entry.more] if run.found
    ]
    return float(turns + sum(runs) / bench.pool.jobs)


def _shown(command: Sequence[str]) -> list[str]:
    """Return a command without the folders of this machine, for others to read."""
    return [Path(word).name if Path(word).is_absolute() else word for word in command]


def _target(reference: Entry) -> float | None:
    losses = spread([run.loss for run in reference.runs])
    return None if losses is None else float(f"{losses['median'] * TARGET_ROOM:.6g}")


def _job(bench: Bench) -> dict[str, Any]:
    recipe, ask = bench.job["recipe"], bench.ask
    found = [run.found for run in bench.reference.trials if run.found]
    steps = recipe["steps"] if ask.trials and ask.seconds is None else None
    on_cpu = bench.job["device"] == "cpu"
    threads = ask.recipe.get("threads")
    return {
        "model": _shown([recipe["model.name"].removesuffix("/model")])[0],
        "parameters": found[0]["parameters"] if found else None,
        "non_embedding": bench.job["non_embedding"],
        "init": recipe["model.init"],
        "data": ", ".join(_shown(bench.job["data"].split(", "))),
        "fingerprint": bench.job["fingerprint"],
        "tokens": None if steps is None else steps * recipe["batch"] * recipe["seq"],
        "steps": steps,
        "batch": recipe["batch"],
        "micro_batch": recipe["micro_batch"],
        "seq": recipe["seq"],
        "precision": recipe["precision"],
        "device": bench.job["device"],
        "threads": threads or (1 if on_cpu else None),
        "speed_threads": threads or (platform.usable_cores() if on_cpu else None),
        "schedule": recipe["schedule.name"],
        "evaluation_tokens": found[0]["evaluation_tokens"] if found else None,
    }


def _protocol(bench: Bench, target: float | None) -> dict[str, Any]:
    ask = bench.ask
    return {
        "trials": ask.trials,
        "lr_factor": round(LR_FACTOR, 4),
        "lr_centre": bench.centre or None,
        "lr_law": bench.law or None,
        "seeds": ask.runs_each,
        "reference": bench.reference.contestant.name,
        "target_loss": target,
        "target_rule": TARGET_RULE if target is not None else None,
        "pairs": ask.pairs,
        "turn_steps": bench.turn_steps if ask.pairs else None,
        "jobs": bench.pool.jobs,
        "seconds": ask.seconds,
    }


def _row(entry: Entry, bench: Bench, target: float | None) -> dict[str, Any]:
    contestant, best, runs = entry.contestant, entry.best, entry.runs
    # What a run held is known even of one that diverged.
    held: Mapping[str, Any] = next((run.found for run in [*runs, *entry.trials] if run.found), {})
    peaks = [run.found["peak_bytes"] for run in runs if run.found]
    peer = contestant.peer
    version = None if peer is None else peers.installed_version(peer)
    return {
        "name": contestant.name,
        "kind": contestant.kind,
        "title": contestant.title,
        "package": None if peer is None else " ".join(filter(None, [peer.package, version])),
        "settings": held.get("settings") or entry.turns.get("settings", {}),
        "status": _status(entry, bench),
        "why": entry.missing or entry.failed or _lost(entry),
        "steps": entry.steps or None,
        "lr": None if best is None else best.lr,
        "lr_at_edge": best is not None and at_edge(best, entry.trials),
        "trials": [{"lr": run.lr, "seed": run.seed, "loss": run.loss} for run in entry.trials],
        "loss": spread([run.loss for run in runs]),
        "bits_per_byte": spread([run.found.get("bits_per_byte") for run in runs]),
        "to_target": _to_target(entry, target),
        **{
            key: held.get(key)
            for key in ("state_bytes", "tensor_bytes", "predicted_bytes", "memory", "trained")
        },
        "peak_bytes": round(statistics.median(peaks)) if peaks else held.get("peak_bytes"),
        **_speed(entry),
        "curves": [_curve(run) for run in runs if run.found],
        "reported": [one.plain() for one in reported(contestant.paper)] if contestant.paper else [],
    }


def _curve(run: Run) -> dict[str, Any]:
    return {"seed": run.seed, "lr": run.lr, "loss": run.loss, **run.found["curve"]}


def _lost(entry: Entry) -> str:
    """Say what changes the meaning of a contestant's figures: runs that came to nothing, a broken budget."""
    if entry.trials and entry.best is None:
        return "diverged at every learning rate tried"
    budget = entry.contestant.recipe.get("memory")
    peak = max((run.found["peak_bytes"] for run in entry.runs if run.found), default=0)
    over = budget is not None and peak > parse_bytes(budget)
    lost = [run for run in entry.runs if run.loss is None]
    failed = next((run.why for run in [*entry.trials, *entry.more] if run.why), "")
    said = {
        f"{len(lost)} of {len(entry.runs)} seeds diverged": bool(lost),
        f"a run failed: {failed}": bool(failed),
        f"over its budget, with {format_bytes(peak)} of {budget}": over,
    }
    return "; ".join(sentence for sentence, holds in said.items() if holds)


def _status(entry: Entry, bench: Bench) -> str:
    if entry.missing:
        return "missing"
    if entry.failed:
        return "failed"
    searched = len(entry.trials) == bench.ask.trials
    learned = not bench.ask.trials or entry.best is None or len(entry.runs) == bench.ask.runs_each
    return "done" if searched and learned and (entry.turns or not bench.ask.pairs) else "partial"


def _to_target(entry: Entry, target: float | None) -> dict[str, Any] | None:
    curves = [run.found["curve"] for run in entry.runs if run.found]
    if target is None or not curves:
        return None
    found = to_target(curves, target)
    timed = found["tokens"] is not None and entry.turns
    return {**found, "seconds": round(found["tokens"] / entry.speed, 2) if timed else None}


def _speed(entry: Entry) -> dict[str, Any]:
    if not entry.turns:
        return {"tokens_per_s": None, "speed_ratio": None}
    mine, other = entry.turns["speeds"]["contestant"], entry.turns["speeds"]["reference"]
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
    if bench.ask.pairs and bench.turn_steps > 1:
        notes.append(
            "A turn is as long as a projecting method has from one refresh to the next, so that each turn "
            "holds one."
        )
    if bench.ask.pairs:
        notes.append(
            "The reference takes turns with a second process of itself: how far its ratio is from 1 is what "
            "the machine's noise is worth."
        )
    if bench.ask.pairs and bench.ask.trials:
        notes.append(
            "Seconds to the target are tokens to the target over the speed measured in turns, where a "
            "contestant runs with the job's threads and nothing beside it but the waiting reference."
        )
    if any(entry.contestant.peer and entry.contestant.peer.brings_loop for entry in bench.entries):
        notes.append("A peer that brings its own loop is measured from outside: its memory has no terms.")
    return notes
