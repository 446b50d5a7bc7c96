"""Bytes of optimizer state of every method on the shapes of llama-7b, beside what the papers say.

    python benchmarks/optimizer_state.py               all methods, half a minute, no weight allocated
    python benchmarks/optimizer_state.py --markdown    and the table, ready to be pasted

The model lies on torch's `meta` device; the bytes are those of the tensors that the optimizer will hold
for it, by their formula (`Optimizer.plan_of(p).state_bytes()`; that real state has exactly these bytes is a
test). Ranks are those of the papers at 7B: 1024, APOLLO 256, its Mini form 1.

`bytes` is what each method keeps by default (fp32, or its quantised store), `inner_bytes` the part of it that
belongs to the matrices inside the layers, which is what some papers count. Papers hold weights and moments
in bf16, so that theirs is half of our fp32.

A schedule of layers holds the state of what is awake (IST's that of all: it draws anew at every step, and
keeps what sleeps). FRUGAL's state moves from matrices to matrices; shown is the largest over its turns.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from _common import say, start
from torch import nn

from scrimp import models
from scrimp.assembly import assemble, make_optimizer
from scrimp.defaults import with_options
from scrimp.methods import METHODS, Method, piece
from scrimp.optim import Optimizer
from scrimp.optim.roles import roles
from scrimp.recipe import Recipe, replace
from scrimp.reported import MEMORY, PEAK, reported
from scrimp.shapes import SHAPES

RANK, APOLLO_RANK = 1024, 256
OF_MEMORY = (MEMORY, PEAK)


def main() -> None:
    benchmark = start("optimizer_state", __doc__, _options)
    shape = benchmark.arguments.shape
    config = models.load_config(models.locate(shape), vocab=32_000)
    rows = []
    for method in METHODS:
        with torch.device("meta"):
            model = models.create_empty(config, dtype=torch.float32)
        rows.append(_row(method, shape, model))
        say(f"{method.name}: {rows[-1]['bytes'] / 1e9:.3f} GB")
    parameters = SHAPES[shape].parameters(32_000)
    if shape == "llama-7b":
        by_name = {row["method"]: row for row in rows}
        apollo = by_name["apollo"]["inner_bytes"] / 2 / 1.6e9
        benchmark.expect("APOLLO, in bf16: off from the paper's 1.6 GB, share", abs(apollo - 1), below=0.05)
        adam = (by_name["adamw-8bit"]["bytes"] + 2 * parameters) / (26 * 2**30)
        what = "8-bit AdamW with bf16 weights: off from GaLore's 26 GiB, share"
        benchmark.expect(what, abs(adam - 1), below=0.05)
    benchmark.write({"shape": shape, "parameters": parameters, "rows": rows})
    if benchmark.arguments.markdown:
        print(table(rows))


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="llama-7b", help="a named shape")
    parser.add_argument("--markdown", action="store_true", help="print the table")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, gigabytes of 10^9."""
    lines = ["| method | keeps | state, GB | of it inside the layers | the papers |", "|---" * 5 + "|"]
    for row in rows:
        state, inner = row["bytes"] / 1e9, row["inner_bytes"] / 1e9
        said = "; ".join(row["reported"]) or "-"
        lines.append(f"| {row['method']} | {row['settings']} | {state:.3f} | {inner:.3f} | {said} |")
    return "\n".join(lines)


def _row(method: Method, shape: str, model: Any) -> dict[str, Any]:
    """Return what a method holds for a model on the meta device."""
    recipe = _recipe(method, shape)
    made = assemble(model, recipe)
    optimizer = make_optimizer(recipe, model)
    awake = _awake(recipe, made, optimizer)
    inner = {name for name, role in roles(model).items() if role in ("linear", "experts")}
    named = {id(p): name for name, p in model.named_parameters()}
    every = getattr(recipe.optimizer, "refresh_every", None) or 1
    by_turn = [{id(p): optimizer.plan_of(p).state_bytes(turn * every) for p in awake} for turn in range(4)]
    held = max(by_turn, key=lambda turn: sum(turn.values()))
    settings = [f"rank {recipe.optimizer.rank}"] if recipe.optimizer.rank else []
    return {
        "method": method.name,
        "settings": ", ".join([*settings, f"store {recipe.optimizer.store}"]),
        "bytes": sum(held.values()),
        "inner_bytes": sum(size for key, size in held.items() if named[key] in inner),
        "reported": [
            f"{entry.memory} ({entry.setup}; {entry.source})"
            if entry.memory
            else f"{entry.value:g} GB {entry.metric} ({entry.setup}; {entry.source})"
            for entry in reported(method.name)
            if entry.model == "7B" and (entry.memory or entry.metric in OF_MEMORY)
        ],
    }


def _recipe(method: Method, shape: str) -> Recipe:
    """Return a recipe of a method with the papers' rank at 7B, where it leaves the rank open."""
    pieces = {f"{choice}.name": name for choice, name in method.pieces.items()}
    options = {"model.name": shape, "precision": "fp32", "optimizer.lr": 1e-3, **pieces, **method.settings}
    name = method.pieces.get("optimizer", "adamw")
    if "rank" in piece("optimizer", name).options:
        options.setdefault("optimizer.rank", APOLLO_RANK if name == "apollo" else RANK)
    return with_options(replace(Recipe(), options), SHAPES[shape].hidden)


def _awake(recipe: Recipe, made: Any, optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters that hold state at once."""
    trained: dict[str, nn.Parameter] = made.trained
    if recipe.tune.name in ("full", "ist"):
        return list(trained.values())
    # OwLore would count outliers, of which weights without values have none; the layers are all alike.
    made.tune.load_state({"ratios": [1.0] * SHAPES[recipe.model.name].layers})
    made.tune.before_step(0, optimizer)
    return [p for p in trained.values() if p.requires_grad]


if __name__ == "__main__":
    main()
