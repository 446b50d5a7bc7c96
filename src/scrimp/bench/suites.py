"""The suites: what is compared on which job, where nothing else is said. Plain data, free of torch.

A suite learns (tuning trials, then more seeds), takes turns for speed, or both. Its job is a recipe that any
option of `scrimp train` changes. Whatever the planner would choose is stated here, so that contestants differ
by what their name says and by nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scrimp.base.errors import ScrimpError
from scrimp.base.suggest import did_you_mean

REFERENCE = "adamw"
NO_LIMIT = "1024TiB"  # of memory: a recipe that states it is fitted to nothing
STATED: Mapping[str, Any] = {
    "weights.name": "dense",
    "tune.name": "full",
    "gradient.name": "backprop",
    "optimizer.name": "adamw",
    "activations.name": "everything",
    "activations.loss": "logits",
    "placement.name": "device",
    "precision": "fp32",
    "clip": 1.0,
    "nonfinite": "stop",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One suite.

    Attributes:
        name: On the command line.
        title: In the report.
        contestants: Who competes where nobody is named, the reference first; at most twelve.
        recipe: The job, by dotted fields of a recipe.
        trials: Learning rates that each contestant may try; 0 learns nothing.
        seeds: Runs at the best rate, the trial's own among them.
        evaluations: Held-out losses along a run.
        pairs: Turns against the reference; 0 measures no speed.
        tunes: Whether it starts from a trained model, which is made first where none is named.
    """

    name: str
    title: str
    contestants: tuple[str, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 3
    seeds: int = 3
    evaluations: int = 20
    pairs: int = 5
    tunes: bool = False


SUITES: tuple[Suite, ...] = (
    Suite(
        name="optimizers",
        title="Optimizers: one model, one text, an equal search for each",
        contestants=(
            REFERENCE,
            "torch:SGD",
            "torch:Muon",
            "torch:Adafactor",
            "lion-pytorch",
            "adam-mini",
            "galore-torch",
            "fira",
            "apollo-torch",
            "bitsandbytes",
            "torchao",
            "transformers",
        ),
        recipe={"model.name": "llama-1m", "steps": 300},
    ),
    Suite(
        name="pretrain",
        title="Pre-training from random weights: whole recipes",
        contestants=(
            REFERENCE,
            "adamw+bf16-mixed",
            "adamw+bf16",
            "adamw+recompute+chunked",
            "transformers",
            "galore-torch",
            "apollo-torch",
            "bitsandbytes",
        ),
        recipe={"model.name": "llama-1m", "model.init": "scratch", "steps": 600},
    ),
    Suite(
        name="finetune",
        title="Fine-tuning a trained model on another text",
        contestants=(
            REFERENCE,
            "adamw+recompute+chunked",
            "transformers",
            "peft",
            "galore-torch",
            "lion-pytorch",
        ),
        recipe={"steps": 100, "seq": 128, "batch": 8},
        tunes=True,
    ),
    Suite(
        name="memory",
        title="Memory: what a step holds, by term",
        contestants=(
            REFERENCE,
            "adamw+recompute",
            "adamw+recompute-keep-attention",
            "adamw+recompute-mlp",
            "adamw+chunked",
            "adamw+recompute+chunked",
            "adamw+bf16+recompute+chunked",
            "torch:AdamW",
            "galore-torch",
            "bitsandbytes",
            "torchao",
            "transformers",
        ),
        recipe={"model.name": "llama-20m", "steps": 3, "batch": 4, "seq": 256},
        trials=1,
        seeds=1,
        evaluations=1,
        pairs=0,
    ),
    Suite(
        name="speed",
        title="Speed: steps in turns with the reference",
        contestants=(
            REFERENCE,
            "adamw+bf16-mixed",
            "adamw+recompute",
            "adamw+chunked",
            "torch:AdamW",
            "lion-pytorch",
            "galore-torch",
            "fira",
            "apollo-torch",
            "bitsandbytes",
            "torchao",
            "transformers",
        ),
        recipe={"model.name": "llama-9m", "batch": 4, "seq": 128, "steps": 100},
        trials=0,
        seeds=0,
        evaluations=0,
    ),
)


def suite(name: str) -> Suite:
    """Look a suite up.

    Raises:
        ScrimpError: There is none of that name.
    """
    found = {entry.name: entry for entry in SUITES}
    if name not in found:
        raise ScrimpError(f"there is no suite {name!r}{did_you_mean(name, found)}; known: {', '.join(found)}")
    return found[name]
