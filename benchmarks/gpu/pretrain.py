"""llama-60m from random weights, for the same number of tokens with every method: `scrimp bench pretrain`.

How many tokens and how many learning rates follows from the time there is: the default run is timed first
(once to fill the caches, once for the time), and the fullest protocol is taken whose runs are still of a
useful length. The text is the default one, Python's standard library, as bytes: of the shape's 32,000 tokens
only 259 occur, so that losses compare with each other and with no paper.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from _tasks import Expect, Part, Row, Setting, Task, answer, bench, own

from scrimp.bench.contestants import contestants
from scrimp.bench.suites import REFERENCE, suite

SUITE = "pretrain"
JOB = {"model.name": "llama-60m", "precision": "bf16-mixed", "batch": 64, "seq": 256}
TINY_S = 10.0
TINY_JOB = {"model.name": "llama-1m", "precision": "fp32", "batch": 2, "seq": 32}
PROTOCOLS = ((3, 3), (3, 1), (1, 1))  # learning rates, and seeds at the best one
LEAST_TOKENS = 2 * 10**6  # a run with fewer shows little; the last protocol takes what there is
STEPS_TO_TIME, STEPS_BEFORE = 40, 10
USABLE = 0.6  # of the time: evaluations, methods slower than AdamW
JOBS = 4  # learning runs side by side: losses are compared here, and the speed elsewhere


def tasks(setting: Setting, rows: Mapping[str, Row], left: Callable[[], float]) -> Iterator[Task]:
    job = TINY_JOB if setting.tiny else JOB
    methods = [REFERENCE, f"{REFERENCE}+chunked"] if setting.tiny else ["all"]
    competing = sum(not one.why_missing(setting.device) for one in contestants(methods, suite(SUITE)))
    jobs = 1 if setting.tiny else JOBS
    spec = {"job": {**job, "device": setting.device}, "contestants": competing, "jobs": jobs}
    for name in ("fill the caches", "time a run"):
        yield own("pretrain", name, {**spec, "seconds": min(left(), TINY_S) if setting.tiny else left()})
    chosen = rows["time a run"]
    if chosen["status"] != "done":
        return
    fields = {f"--{name.replace('_', '-')}": value for name, value in job.items()}
    options = {
        **fields,
        "--tokens": chosen["tokens"],
        "--trials": chosen["trials"],
        "--seeds": chosen["seeds"],
        "--pairs": 0,
        "--jobs": jobs,
        "--methods": ",".join(methods),
    }
    words = [word for name, value in options.items() for word in (name, str(value))]
    yield bench(setting, SUITE, [SUITE, *words])


def choose(
    seconds: float, *, contestants: int, jobs: int, tokens_per_s: float, start_s: float, step: int
) -> dict[str, int]:
    """Return the fullest protocol that fits, and its number of tokens.

    Args:
        seconds: For all runs.
        contestants: How many compete.
        jobs: Runs side by side, which share the device.
        tokens_per_s: Of one run alone.
        start_s: What a run takes before its first step.
        step: Tokens of an optimizer step, of which the answer is a multiple.
    """
    tokens = 0
    for trials, seeds in PROTOCOLS:
        rounds = math.ceil(contestants * (trials + seeds - 1) / jobs)
        training = USABLE * seconds / rounds - start_s
        tokens = max(1, int(training * tokens_per_s / jobs / step)) * step
        if tokens >= LEAST_TOKENS:
            break
    return {"trials": trials, "seeds": seeds, "tokens": tokens}


def summary(rows: list[Row], expect: Expect) -> dict[str, Any]:
    document = next((row["document"] for row in rows if row.get("document")), None)
    if document is None:
        return {}
    by_status: dict[str, list[str]] = {}
    for row in document["contestants"]:
        by_status.setdefault(row["status"], []).append(row["name"])
    expect("pretrain: contestants that failed", len(by_status.get("failed", [])), below=1)
    losses = {row["name"]: row["loss"] for row in document["contestants"] if row["loss"] is not None}
    return {
        "tokens": document["job"]["tokens"],
        "trials": document["protocol"]["trials"],
        "seeds": document["protocol"]["seeds"],
        "data": "Python's standard library as bytes (259 of 32,000 tokens occur)",
        "held_out_loss": dict(sorted(losses.items(), key=lambda item: item[1]["median"])),
        "contestants": by_status,
    }


PART = Part(name="pretrain", minutes=8, tasks=tasks, summary=summary)


def work(spec: dict[str, Any]) -> Row:
    """Time the reference's steps, and choose."""
    began = time.perf_counter()
    from _held import USUAL, running

    from scrimp.recipe import Recipe, replace

    job = spec["job"]
    total = STEPS_BEFORE + STEPS_TO_TIME
    values = {**USUAL, **job, "micro_batch": job["batch"], "steps": total + 1}
    recipe = replace(Recipe(), values)
    with running(recipe) as (loop, _):
        loop.run(STEPS_BEFORE)  # its last step is read from the device, which waits for it
        middle = time.perf_counter()
        loop.run(total)
        end = time.perf_counter()
    step = job["batch"] * job["seq"]
    measured = {
        "tokens_per_s": round(STEPS_TO_TIME * step / (end - middle), 1),
        "start_s": round(middle - began, 2),
    }
    chosen = choose(
        spec["seconds"], contestants=spec["contestants"], jobs=spec["jobs"], step=step, **measured
    )
    return {**measured, **chosen, "contestants": spec["contestants"], "jobs": spec["jobs"]}


if __name__ == "__main__":
    answer(work)
