"""A whole optimizer step between refreshes: ours, compiled, against each author's package and the bound.

    python benchmarks/optimizer_step.py                all, about 15 minutes on two cores
    python benchmarks/optimizer_step.py --quick        llama-20m, a few turns

Over the real parameters of a shape, fp32, with random gradients. All sides of a method stand in one process,
over the same weights and gradients, and step in turn; a ratio is taken within a turn. The first step, which
compiles and chooses subspaces, is outside the clock.

The bound of a turn is measured within it, between three more of our steps. Both are the best of three: the
machine that this runs on is shared, and one step against a rate's best would count others' work as ours.

    FLOPs of the step's products / FLOP/s of a product of 2048 x 2048      2 k d r a product
    + bytes of the step / bytes/s of the triad a += s b over 256 MiB        (or c = a + s b, if faster)

with the bytes of W read and written, of G read as often as the method must, of the state read and written,
and of the basis read:

    GaLore                                    one read of G (R = G B), two products
    Fira, APOLLO                              two reads: the limiter's norm of G comes before its use
    Adam-mini                                 two reads: the blocks' means come before the step
    Adafactor                                 three: row and column means, RMS of the update, the update
    Adam, Lion, SGD, whatever the store       one

What a compilation takes is measured on one decoder layer with embedding and head, which has all kinds of
matrices: in a process with empty caches, and in a second one that finds the first one's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from _common import ratios, run_json, say, spread, start

if TYPE_CHECKING:
    from torch import nn

    from scrimp.optim import Optimizer

METHODS = ("adamw", "lion", "adafactor", "adam-mini", "adamw-8bit", "galore", "fira", "apollo", "apollo-mini")
MORE = ("sgd-m", "lion-8bit", "adamw-4bit", "adamw-fp8")
SIZES = ("llama-60m", "llama-130m")
AT_LEAST = {  # times as fast as the package, on the whole step
    ("galore", "galore-torch"): 1.9,
    ("fira", "fira"): 2.5,
    ("apollo", "apollo-torch"): 2.5,
    ("apollo-mini", "apollo-torch"): 3.5,
    ("adamw-8bit", "bitsandbytes"): 4.0,
}
OVER_BOUND = {"galore": 1.3, "fira": 1.3, "apollo": 1.3, "apollo-mini": 1.3}
OVER_BOUND |= {"adamw": 1.2, "lion": 1.2, "sgd-m": 1.2}
OVER_FUSED = {"adamw-8bit": 2.0}
READS = {"AdamMini": 2, "Adafactor": 3}  # of G by whole rules, by class
TRIAD = 1 << 26  # elements: an array of 256 MiB is beyond most caches
SIDE = 2048
TRIES = 3  # of our step and of the machine's rates, in each turn


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        work = {"compile": compile_seconds, "steps": step_seconds}[sys.argv[2]]
        print(json.dumps(work(**json.loads(sys.argv[3]))))
        return
    benchmark = start("optimizer_step", __doc__, _options)
    given = benchmark.arguments
    sizes = ["llama-20m"] if given.quick else given.sizes
    turns = 3 if given.quick else given.turns
    with tempfile.TemporaryDirectory() as folder:
        cases, compiled = [], {}
        for method in given.methods:
            env = {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCH_EXTENSIONS_DIR": folder}
            words = {"size": sizes[0], "method": method, "threads": given.threads}
            both = [_worker("compile", words, env) for _ in range(2)]
            compiled[method] = dict(zip(("cold", "cached"), both, strict=True))
            say(f"{method}: compilation {both[0]['seconds']:.1f} s, cached {both[1]['seconds']:.1f} s")
            for size in sizes:
                case = _worker("steps", {**words, "size": size, "turns": turns}, env)
                cases.append(_compared(case))
    for case in cases:
        _hold(benchmark, case)
    settings = {"threads": given.threads or os.cpu_count(), "turns": turns, "rank": 128, "dtype": "float32"}
    benchmark.write({"settings": settings, "cases": cases, "compile": compiled})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=(*METHODS, *MORE))
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="named shapes")
    parser.add_argument("--turns", type=int, default=7, help="timed steps of every side")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 takes all")
    parser.add_argument("--quick", action="store_true", help="llama-20m and three turns")


def _worker(kind: str, given: dict[str, Any], env: dict[str, str]) -> dict[str, Any]:
    return run_json([sys.executable, __file__, "--worker", kind, json.dumps(given)], env=env)


def _compared(case: dict[str, Any]) -> dict[str, Any]:
    """Return a case with its seconds as spreads, and what they are to ours and to the bound."""
    seconds, beside, bounds = case.pop("seconds"), case.pop("beside"), case.pop("bounds")
    found = case | {
        "seconds": {side: spread(values, 5) for side, values in seconds.items()},
        "seconds_beside_bound": spread(beside, 5),
        "bound_seconds": spread(bounds, 5),
        "over_bound": ratios(beside, bounds),
        "faster_than": {
            side: ratios(values, seconds["ours"]) for side, values in seconds.items() if side != "ours"
        },
    }
    middle = found["seconds"]["ours"]["median"]
    others = ", ".join(f"{ratio['median']:.2f} x {side}" for side, ratio in found["faster_than"].items())
    over = found["over_bound"]["median"]
    say(f"{case['method']} {case['size']}: {1000 * middle:.0f} ms, {over:.2f} of the bound; {others}")
    return found


def _hold(benchmark: Any, case: dict[str, Any]) -> None:
    """Hold a case against what is promised of its method."""
    method, name = case["method"], f"{case['method']}, {case['size']}"
    for side, ratio in case["faster_than"].items():
        if (method, side) in AT_LEAST:
            least = AT_LEAST[method, side]
            benchmark.expect(f"{name}: times as fast as {side}", ratio["median"], at_least=least)
    if method in OVER_BOUND:
        over = case["over_bound"]["median"]
        benchmark.expect(f"{name}: step over its bound", over, below=OVER_BOUND[method])
    if method in OVER_FUSED:
        over = 1 / case["faster_than"]["torch fused AdamW"]["median"]
        benchmark.expect(f"{name}: step over torch's fused AdamW's", over, below=OVER_FUSED[method])


# ---- in a process of its own -------------------------------------------------------------------------


def model_of(size: str, layers: int | None = None) -> nn.Module:
    """Return a model of a named shape with random gradients, fp32."""
    import torch

    from scrimp import models

    config = models.load_config(models.locate(size), vocab=32_000)
    if layers is not None:
        config.num_hidden_layers = layers
    model: nn.Module = models.create(config, seed=0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn(p.shape, generator=generator)
    return model


def compile_seconds(*, size: str, method: str, threads: int) -> dict[str, float]:
    """Return how much longer a compiled optimizer's first step takes than a later one.

    It goes on from an eager first step, which chooses the subspaces.
    """
    import _rivals
    import torch

    set_threads(threads)
    model = model_of(size, layers=1)
    eager = _rivals.ours(method, model, compiles=False)
    eager.step()
    optimizer = _rivals.ours(method, model, compiles=True)
    optimizer.load_state_dict(eager.state_dict())
    first, *later = (_seconds(optimizer.step) for _ in range(4))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"seconds": round(first - min(later), 3), "graphs": graphs}


def step_seconds(*, size: str, method: str, threads: int, turns: int) -> dict[str, Any]:
    """Return the seconds of steps of all sides in turn, and the bound of each turn."""
    import _rivals
    import torch

    set_threads(threads)
    model = model_of(size)
    mine = _rivals.ours(method, model, compiles=True)
    makers = _rivals.RIVALS[method]
    sides = {"ours": mine.step} | {name: make(model).step for name, make in makers.items()}
    first = {name: round(_seconds(step), 3) for name, step in sides.items()}
    for step in sides.values():
        step()  # the first one allocated
    work, rates = work_of(mine), Rates()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    beside, measured = [], []
    for turn in range(turns):
        order = list(sides.items())[:: 1 if turn % 2 else -1]
        for name, step in order:
            seconds[name].append(_seconds(step))
        tries = [(_seconds(mine.step), rates.flops(), rates.bandwidth()) for _ in range(TRIES)]
        best, *rate = zip(*tries, strict=True)
        beside.append(min(best))
        measured.append(tuple(max(each) for each in rate))
    again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    assert not again, f"{again} graphs were compiled within the clock"
    return {
        "size": size,
        "method": method,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": sum(mine.plan_of(p).state_bytes() for p in model.parameters()),
        "graphs": graphs,
        "first_step_seconds": first,
        "work": work,
        "gflops": spread([flops / 1e9 for flops, _ in measured], 1),
        "gigabytes_per_s": spread([rate / 1e9 for _, rate in measured], 2),
        "seconds": seconds,
        "beside": beside,
        "bounds": [work["flops"] / flops + work["bytes"] / rate for flops, rate in measured],
    }


def set_threads(threads: int) -> None:
    """Use so many threads of the CPU; 0 leaves torch's choice."""
    import torch

    if threads:
        torch.set_num_threads(threads)


def _seconds(step: Callable[[], Any]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def work_of(optimizer: Optimizer) -> dict[str, int]:
    """Return the FLOPs and the bytes that a step between refreshes cannot do without."""
    from scrimp.optim.lifts.scaling import ScaleGradient

    flops = moved = 0
    for p in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
        plan = optimizer.plan_of(p)
        projector, lift = plan.composition.projector, plan.composition.lift
        kept = plan.state_bytes()
        reads = READS.get(type(plan.composition.rule).__name__, 1)
        basis = 0
        if projector is not None and lift is not None:
            products = 1 if isinstance(lift, ScaleGradient) else 2
            flops += 2 * p.numel() * plan.shape(0)[-1] * products
            reads = 2 if lift.needs_gradient else 1
            basis = sum(_bytes(plan, slot) for slot in projector.slots(plan.target))
        moved += (2 + reads) * p.numel() * p.itemsize + 2 * (kept - basis) + basis
    return {"flops": flops, "bytes": moved}


def _bytes(plan: Any, slot: Any) -> int:
    """Return the bytes of what a projector keeps, which a step between refreshes only reads."""
    entries = plan.composition.basis_store.layout(slot).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in entries)


class Rates:
    """What the machine can do at the moment."""

    def __init__(self) -> None:
        import torch

        self._arrays = [torch.ones(TRIAD) for _ in range(3)]
        self._squares = [torch.randn(SIDE, SIDE) for _ in range(3)]
        self._torch = torch

    def flops(self) -> float:
        """Return FLOP/s of a product of two square matrices, fp32."""
        a, b, out = self._squares
        return 2 * SIDE**3 / _seconds(lambda: self._torch.mm(a, b, out=out))

    def bandwidth(self) -> float:
        """Return bytes/s of the faster triad; each is counted as two arrays read and one written."""
        a, b, out = self._arrays
        triads = (lambda: out.add_(b, alpha=1e-9), lambda: self._torch.add(a, b, alpha=2.0, out=out))
        return 12 * TRIAD / min(_seconds(triad) for triad in triads)


if __name__ == "__main__":
    main()
