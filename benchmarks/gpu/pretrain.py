"""llama-60m from random weights, 2,097,152 tokens with every method: `scrimp bench pretrain`.

The tokens are fixed, so that two results compare. How many learning rates and seeds follows from the time:
the default run is timed first (once to fill the caches, once for the time), and the fullest protocol that
fits is taken. A method whose runs are not done when the time is over is a row marked late. The text is the
default one, Python's standard library, as bytes: of the shape's 32,000 tokens only 259 occur, so that losses
compare with each other and with no paper.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from _tasks import Expect, Part, Row, Setting, Task, answer, bench, own

from scrimp.bench.contestants import contestants
from scrimp.bench.suites import REFERENCE, suite

SUITE = "pretrain"
JOB = {"model.name": "llama-60m", "precision": "bf16-mixed", "batch": 64, "seq": 256}
TOKENS = 2**21  # 128 steps
TINY_JOB = {"model.name": "llama-1m", "precision": "fp32", "batch": 2, "seq": 32}
TINY_TOKENS = 2**9
TINY_S = 10.0
PROTOCOLS = ((3, 3), (3, 1), (1, 1))  # learning rates, and seeds at the best one
STEPS_BEFORE, SAMPLES, STEPS_A_SAMPLE = 10, 5, 8
USABLE = 0.6  # of the time: evaluations, methods slower than AdamW
JOBS = 4  # learning runs side by side, 11 GiB each: losses and memory are compared here, speed elsewhere
WHY_LATE = "the time was over before all its runs were done; the same command goes on with them"


def tasks(setting: Setting, rows: Mapping[str, Row], left: Callable[[], float]) -> Iterator[Task]:
    job, tokens = (TINY_JOB, TINY_TOKENS) if setting.tiny else (JOB, TOKENS)
    methods = [REFERENCE, f"{REFERENCE}+chunked"] if setting.tiny else ["all"]
    competing = sum(not one.why_missing(setting.device) for one in contestants(methods, suite(SUITE)))
    jobs = 1 if setting.tiny else JOBS
    spec = {
        "job": {**job, "device": setting.device},
        "tokens": tokens,
        "contestants": competing,
        "jobs": jobs,
    }
    for name in ("fill the caches", "time a run"):
        yield own("pretrain", name, {**spec, "seconds": min(left(), TINY_S) if setting.tiny else left()})
    chosen = rows["time a run"]
    if chosen["status"] != "done":
        return
    fields = {f"--{name.replace('_', '-')}": value for name, value in job.items()}
    options = {
        **fields,
        "--tokens": tokens,
        "--trials": chosen["trials"],
        "--seeds": chosen["seeds"],
        "--pairs": 0,
        "--jobs": jobs,
        "--methods": ",".join(methods),
    }
    words = [word for name, value in options.items() for word in (name, str(value))]
    yield bench(setting, f"{job['model.name']} {tokens} tokens", [SUITE, *words])


def choose(
    seconds: float, *, tokens: int, contestants: int, jobs: int, tokens_per_s: float, start_s: float
) -> dict[str, int]:
    """Return the fullest protocol that fits, or the shortest one: its learning rates and seeds.

    Args:
        seconds: For all runs.
        tokens: Of each run.
        contestants: How many compete.
        jobs: Runs side by side, which share the device.
        tokens_per_s: Of one run alone.
        start_s: What a run takes before its first step.
    """
    of_a_round = start_s + tokens * jobs / tokens_per_s
    for trials, seeds in PROTOCOLS:
        rounds = math.ceil(contestants * (trials + seeds - 1) / jobs)
        if rounds * of_a_round <= USABLE * seconds:
            break
    return {"trials": trials, "seeds": seeds}


def summary(rows: list[Row], expect: Expect) -> dict[str, Any]:
    document = next((row["document"] for row in rows if row.get("document")), None)
    if document is None:
        return {}
    job, protocol = document["job"], document["protocol"]
    methods = [_method(row) for row in document["contestants"]]
    for status in ("failed", "late"):
        found = sum(method["status"] == status for method in methods)
        expect(f"pretrain: contestants that are {status}", found, below=1)
    return {
        "title": f"{job['model']} from random weights, {job['tokens']:,} tokens with every method",
        "tokens": job["tokens"],
        "trials": protocol["trials"],
        "seeds": protocol["seeds"],
        "data": "Python's standard library as bytes (259 of 32,000 tokens occur)",
        "methods": sorted(methods, key=lambda one: one["loss"]["median"] if one["loss"] else math.inf),
    }


def _method(row: Mapping[str, Any]) -> Row:
    """Return a contestant's row: what it reached, where all its runs were done, or why not."""
    late = row["status"] == "partial"
    return {
        "name": row["name"],
        "status": "late" if late else row["status"],
        "why": WHY_LATE if late else row["why"],
        "loss": row["loss"] if row["status"] == "done" else None,
        "lr": row["lr"] if row["status"] == "done" else None,
    }


PART = Part(name="pretrain", minutes=8, tasks=tasks, summary=summary)


def work(spec: dict[str, Any]) -> Row:
    """Time the reference's steps, and choose the protocol for the time that is left then."""
    began = time.perf_counter()
    from _held import USUAL, running, timed

    from scrimp.recipe import Recipe, replace

    job = spec["job"]
    steps = STEPS_BEFORE + SAMPLES * STEPS_A_SAMPLE
    values = {**USUAL, **job, "micro_batch": job["batch"], "steps": steps}
    with running(replace(Recipe(), values)) as (loop, _):
        timed(loop, STEPS_BEFORE)
        start_s = time.perf_counter() - began
        samples = [timed(loop, STEPS_A_SAMPLE) for _ in range(SAMPLES)]
    a_sample = STEPS_A_SAMPLE * job["batch"] * job["seq"]
    speeds = [round(a_sample / seconds, 1) for seconds in samples]
    asked = {name: spec[name] for name in ("tokens", "contestants", "jobs")}
    left = spec["seconds"] - (time.perf_counter() - began)
    chosen = choose(left, tokens_per_s=statistics.median(speeds), start_s=start_s, **asked)
    return {"tokens_per_s": speeds, "start_s": round(start_s, 2), **asked, **chosen}


if __name__ == "__main__":
    answer(work)
