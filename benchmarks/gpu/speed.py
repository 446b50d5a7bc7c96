"""Tokens a second on llama-350m and llama-1b: every method of the catalogue, and transformers' Trainer.

`scrimp bench speed` on each model and precision: contestant and reference (AdamW in scrimp's loop) are alive
at once and take turns, and ratios are taken within a pair of turns. Beside the methods stand the two recipes
that give time for memory, and the Trainer on the same rows and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

from _tasks import Expect, Part, Row, Setting, Task, bench

from scrimp.bench.protocol import spread
from scrimp.bench.suites import REFERENCE
from scrimp.methods import METHODS

TRAINER = "transformers"
LEAST_OVER_TRAINER = 0.98
MODELS = ("llama-350m", "llama-1b")
PRECISIONS = ("bf16-mixed", "bf16")
BATCH, SEQ = 8, 512  # two of llama-1b in fp32 fit beside each other in 80 GB
PAIRS = 3
STEPS = 50  # of the run that the turns are cut from: a turn is a tenth of it


def tasks(setting: Setting, _: Mapping[str, Row], __: Callable[[], float]) -> Iterator[Task]:
    models, precisions = (("llama-1m",), ("fp32",)) if setting.tiny else (MODELS, PRECISIONS)
    batch, seq, pairs, steps = (2, 32, 1, 10) if setting.tiny else (BATCH, SEQ, PAIRS, STEPS)
    for precision, model in product(precisions, models):
        fields = {"model": model, "precision": precision, "batch": batch, "seq": seq, "steps": steps}
        options = {**fields, "pairs": pairs, "methods": ",".join(contestants(tiny=setting.tiny))}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        yield bench(setting, f"{model} {precision}", ["speed", *words])


def contestants(*, tiny: bool) -> list[str]:
    """Return who takes turns, the reference first."""
    others = [method.name for method in METHODS if method.name != REFERENCE]
    with_less_memory = [f"{REFERENCE}+chunked", f"{REFERENCE}+recompute+chunked"]
    return [REFERENCE, TRAINER] if tiny else [REFERENCE, TRAINER, *with_less_memory, *others]


def summary(rows: list[Row], expect: Expect) -> dict[str, Any]:
    found = {row["name"]: _table(row["document"]) for row in rows if row.get("document")}
    for name, table in found.items():
        over = table.get(TRAINER, {}).get("reference_over_it")
        if over is not None:
            what = f"speed: {name}: tokens/s, ours / Trainer"
            expect(what, over["median"], at_least=LEAST_OVER_TRAINER)
    return found


def _table(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return each contestant's speed, and the reference's over it within a pair of turns."""
    tokens = document["job"]["batch"] * document["job"]["seq"]
    return {
        row["name"]: {
            "tokens_per_s": row["tokens_per_s"],
            "ms_per_step": spread([1000 * tokens / speed for speed in row["tokens_per_s"]["all"]]),
            "reference_over_it": spread([1 / ratio for ratio in row["speed_ratio"]["all"]]),
        }
        for row in document["contestants"]
        if row["tokens_per_s"] is not None
    }


PART = Part(name="speed", minutes=5, tasks=tasks, summary=summary)
