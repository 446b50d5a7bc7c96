"""The prediction against what CUDA's allocator handed out, and the verdict against a capped allocator.

Families, sequence lengths, precisions, recomputation and losses, then the papers' shapes up to 7B, then every
other method of the catalogue on one of them. For each: the predicted peak of tensors against
`max_memory_allocated`, and two verdicts, tried with `set_per_process_memory_fraction`: in the budget that the
prediction asks for the steps must end well, and in nine tenths of the predicted peak they must not.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from _tasks import Expect, Part, Row, Setting, Task, answer, own

from scrimp.memory.planner import FIELDS
from scrimp.methods import METHODS

MOST_ERROR_PERCENT = 3.0
LEAST_CASES = 20
TOO_LITTLE = 0.9  # of the predicted peak: a budget that it says does not do

# A family of `memory_accuracy.py`, with what differs from `WIDE`.
WIDE = {"width": 1024, "layers": 8, "vocab": 32_000, "rows": 4, "seq": 512, "precision": "bf16-mixed"}
FAMILIES: tuple[dict[str, Any], ...] = (
    {"family": "llama"},
    {"family": "llama", "precision": "fp32"},
    {"family": "llama", "precision": "bf16"},
    {"family": "llama", "activations": "recompute"},
    {"family": "llama", "activations": "recompute-keep-attention", "seq": 1024},
    {"family": "llama", "activations": "recompute-keep-matmuls"},
    {"family": "llama", "activations": "recompute-mlp"},
    {"family": "llama", "loss": "chunked"},
    {"family": "llama", "precision": "bf16", "activations": "recompute", "loss": "chunked", "seq": 4096},
    {"family": "llama", "precision": "fp32", "seq": 2048, "rows": 2},
    {"family": "llama", "seq": 4096, "rows": 1},
    {"family": "llama", "seq": 64, "rows": 8},
    {"family": "llama", "micro_batches": 3},
    {"family": "qwen2"},
    {"family": "qwen2", "precision": "fp32", "loss": "chunked"},
    {"family": "qwen3", "precision": "bf16"},
    {"family": "gemma3", "seq": 1024},
    {"family": "gpt2", "precision": "fp32"},
    {"family": "gpt2", "activations": "recompute"},
    {"family": "mistral", "seq": 2048, "rows": 1},
    {"family": "neox", "loss": "chunked"},
    {"family": "qwen3-moe", "precision": "bf16", "width": 512},
)
LEAST_MEMORY = {"activations.name": "recompute", "activations.loss": "chunked"}
SHAPES: tuple[dict[str, Any], ...] = (
    {"model.name": "llama-350m", "precision": "bf16-mixed", "batch": 8, "seq": 512},
    {"model.name": "llama-1b", "precision": "bf16", "batch": 4, "seq": 512},
    {"model.name": "llama-1b", "precision": "bf16-mixed", "batch": 4, "seq": 1024, **LEAST_MEMORY},
    {"model.name": "llama-7b", "precision": "bf16", "batch": 1, "seq": 256, **LEAST_MEMORY},
)
METHODS_ON = {"model.name": "llama-130m", "precision": "bf16-mixed", "batch": 8, "seq": 256}
TINY: tuple[dict[str, Any], ...] = (
    {"family": "llama", "precision": "fp32", "width": 64, "layers": 2, "vocab": 512, "rows": 2, "seq": 64},
    {"model.name": "llama-1m", "precision": "bf16-mixed", "batch": 2, "seq": 64, **LEAST_MEMORY},
)


def tasks(setting: Setting, _: Mapping[str, Row], __: Callable[[], float]) -> Iterator[Task]:
    for case in TINY if setting.tiny else cases():
        yield own("planner", title(case), {"case": case, "device": setting.device})


def cases() -> list[dict[str, Any]]:
    """Return all cases: fields of `memory_accuracy.Case`, or fields of a recipe by dotted name."""
    families = [{**WIDE, **family} for family in FAMILIES]
    usual = {"optimizer": "adamw"}
    others = [method for method in METHODS if method.pieces != usual]
    return [
        *families,
        *SHAPES,
        *({**METHODS_ON, **{FIELDS[c]: name for c, name in m.pieces.items()}} for m in others),
    ]


def title(case: Mapping[str, Any]) -> str:
    """Return a case in a line: what differs from the usual one."""
    family = case.get("family", case.get("model.name"))
    others = {k: v for k, v in case.items() if k not in ("family", "model.name") and WIDE.get(k) != v}
    return " ".join(
        [str(family), *(f"{name.removesuffix('.name')}={value}" for name, value in others.items())]
    )


def summary(rows: list[Row], expect: Expect) -> dict[str, Any]:
    held = [row for row in rows if "error_percent" in row]
    errors = [abs(row["error_percent"]) for row in held]
    right = sum(row["verdicts_right"] for row in held)
    expect("planner: configurations", len(held), at_least=LEAST_CASES)
    if held:
        expect("planner: worst error in %", max(errors), below=MOST_ERROR_PERCENT)
        expect("planner: share of the verdicts that are right", right / (2 * len(held)), at_least=1)
    return {
        "configurations": len(held),
        "median_error_percent": statistics.median(errors) if held else None,
        "worst_error_percent": max(errors) if held else None,
        "verdicts": 2 * len(held),
        "verdicts_right": right,
    }


PART = Part(name="planner", minutes=6, tasks=tasks, summary=summary)


def work(spec: dict[str, Any]) -> Row:
    from _held import USUAL, fits_in, hold

    from scrimp.recipe import Recipe, replace

    case, device = spec["case"], {"device": spec["device"], **USUAL}
    with tempfile.TemporaryDirectory() as folder:
        if "family" in case:
            recipe = replace(_family(case, Path(folder)), device)
        else:
            recipe = replace(Recipe(), {"micro_batch": case["batch"], **case, **device})
        row = hold(recipe)
        # What is not the allocator's counts against a budget too, and is not his to refuse.
        budgets = {
            "in what it asks for": row["needed_bytes"],
            "in too little": round(TOO_LITTLE * (row["predicted_bytes"] + row["fixed_bytes"])),
        }
        fits = {
            name: fits_in(recipe, budget - row["fixed_bytes"], measured=row["measured_bytes"])
            for name, budget in budgets.items()
        }
    row["recipe"]["model"]["name"] = case.get("family", case.get("model.name"))  # of a family it was a folder
    ended = {name: "finished" if did else "out of memory" for name, did in fits.items()}
    right = int(fits["in what it asks for"]) + int(not fits["in too little"])
    return {**row, "budgets": budgets, "ended": ended, "verdicts_right": right}


def _family(case: dict[str, Any], folder: Path) -> Any:
    """Write the configuration of a family with a byte tokenizer, and return the recipe that trains it."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from memory_accuracy import Case

    from scrimp.data import byte_tokenizer

    wanted = Case(**case)
    wanted.config().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return wanted.recipe(folder)


if __name__ == "__main__":
    answer(work)
