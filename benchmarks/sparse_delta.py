"""A sparse delta inside the weight against the scatter form: time and peak memory, forward and backward.

    python benchmarks/sparse_delta.py

A stack of linear layers with tanh between, fp32, of whose entries some train. Ours changes the weight for
the while of each product; peft's SHiRA makes the changed weight anew, which then waits for the backward
pass. Both train the same entries, in one process and in turn, and their gradients are compared. Memory is
the most bytes that torch's CPU allocator held above what was there before, by its own events.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import ratios, say, spread, start
from peft import ShiraConfig, get_peft_model
from torch import Tensor, nn

from scrimp.memory.allocator import peak_of
from scrimp.tuning.deltas.delta import AdaptedLinear
from scrimp.tuning.deltas.sparse import Sparse

# Layers, width, tokens, and r of the r (out + in) entries; with more tokens activations are most of the peak.
CASES = ((8, 512, 256, 4), (8, 512, 1024, 4), (4, 2048, 256, 10))
MEMORY = 0.6
SAME = 1e-4

Side = Callable[[], list[Tensor]]


def main() -> None:
    benchmark = start("sparse_delta", __doc__, _options)
    given = benchmark.arguments
    torch.set_num_threads(given.threads)
    found = [measure(*case, turns=given.turns) for case in CASES[: given.cases]]
    for case in found:
        say(f"{case['case']}: {case['seconds_over_scatter']['median']:.2f} of the scatter form's time")
    first = found[0]
    ratio = first["peak_bytes"]["ours"] / first["peak_bytes"]["scatter"]
    benchmark.expect(f"{first['case']}: peak, ours / scatter", ratio, below=MEMORY)
    benchmark.write({"settings": {"turns": given.turns, "threads": given.threads}, "cases": found})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--turns", type=int, default=11, help="timed turns of both sides")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first of them")


def measure(layers: int, width: int, tokens: int, rank: int, *, turns: int) -> dict[str, Any]:
    """Return both sides' seconds and peaks."""
    torch.manual_seed(0)
    theirs = get_peft_model(
        _stack(layers, width), ShiraConfig(r=rank, target_modules="all-linear", random_seed=0)
    )
    mine = _like(theirs, layers, width)
    x = torch.randn(tokens, width)
    sides = {"ours": _step(mine, x), "scatter": _step(theirs, x)}
    for ours, scatter in zip(*(side() for side in sides.values()), strict=True):
        assert (ours - scatter).abs().max() < SAME * scatter.abs().max(), "the gradients differ"
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(turns):
        for side in list(sides)[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            sides[side]()
            seconds[side].append(time.perf_counter() - began)
    return {
        "case": f"{layers} layers of {width} x {width}, {tokens} tokens, {2 * rank} entries a row",
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "seconds_over_scatter": ratios(seconds["ours"], seconds["scatter"]),
        "peak_bytes": {side: peak_of(run) for side, run in sides.items()},
    }


def _stack(layers: int, width: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*parts).requires_grad_(False)


def _like(theirs: Any, layers: int, width: int) -> nn.Sequential:
    """Return the same stack with the same entries as sparse deltas of ours."""
    stack = _stack(layers, width)
    for number in range(0, len(stack), 2):
        adapted = theirs.base_model.model[number]
        rows, columns = adapted.shira_indices["default"].long()
        stack[number].load_state_dict(adapted.base_layer.state_dict())
        stack[number] = AdaptedLinear(stack[number], Sparse((width, width), rows * width + columns))
    return stack


def _step(model: nn.Module, x: Tensor) -> Side:
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(model(x).square().mean(), trained))

    return step


if __name__ == "__main__":
    main()
