"""A whole training step with an adapter: ours against the library it is compared with.

    python benchmarks/adapter_step.py                 all, about 3 minutes on two cores
    python benchmarks/adapter_step.py --quick         two layers, three turns

The model has SmolLM2-135M's widths (576, 1536, 9 heads over 3) with random weights, fp32, four of its 30
layers and an eighth of its vocabulary: the head then has about the share of a step that it has in the whole
model. Rank 16 on every linear layer, 4 x 128 tokens.

All sides of a case stand in one process, over the same weights and tokens, and step in turn; a ratio is taken
within a turn. Our side is the step of `scrimp train`: the assembled recipe's forward and backward pass,
clipping, AdamW. The other is a bare loop over what the library makes: the model's own loss, `backward`,
`clip_grad_norm_`, torch's fused AdamW, `zero_grad`. All must begin with the same loss.

Memory is the most bytes that torch's CPU allocator held during a later step above what was there before it,
by its own events. DoRA's extra is that of each side above the LoRA of the same side.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import ratios, run_json, say, spread, start

RANK, ALPHA = 16, 32
ROWS, SEQ = 4, 128
LAYERS, QUICK_LAYERS = 4, 2
SMOL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 6144,
    "tie_word_embeddings": True,
    "use_cache": False,
}
SAME_LOSS = 1e-4

Step = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Two sides, and what is promised of the first.

    Attributes:
        ours: Its name among `SIDES`.
        other: The other's.
        times: How many times as fast ours must be at least.
        over: The sides whose peaks are taken off, ours and the other's; None compares peaks as they are.
        memory: What ours may need of the other's bytes at most; None promises nothing.
    """

    ours: str
    other: str
    times: float
    over: tuple[str, str] | None = None
    memory: float | None = None


CASES = {
    "lora": Case(ours="scrimp lora", other="peft lora", times=1.0),
    "dora": Case(
        ours="scrimp dora", other="peft dora", times=1.2, over=("scrimp lora", "peft lora"), memory=0.5
    ),
}


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return
    benchmark = start("adapter_step", __doc__, _options)
    given = benchmark.arguments
    settings = {
        "layers": QUICK_LAYERS if given.quick else LAYERS,
        "turns": 3 if given.quick else given.turns,
        "threads": given.threads or os.cpu_count(),
    }
    cases = {}
    for name in given.cases:
        case = CASES[name]
        sides = list(dict.fromkeys((case.ours, case.other, *(case.over or ()))))
        found = run_json([sys.executable, __file__, "--worker", json.dumps({**settings, "sides": sides})])
        cases[name] = compare(case, found)
        _hold(benchmark, name, case, cases[name])
    benchmark.write({"settings": {**settings, "rows": ROWS, "seq": SEQ, "rank": RANK}, "cases": cases})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--turns", type=int, default=11, help="timed steps of every side")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 takes all")
    parser.add_argument("--quick", action="store_true", help="two layers and three turns")


def compare(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """Return what a worker found, with our times as fast and our share of the memory."""
    seconds, peaks = found.pop("seconds"), found["peak_bytes"]
    ours, other = peaks[case.ours], peaks[case.other]
    if case.over is not None:
        ours, other = ours - peaks[case.over[0]], other - peaks[case.over[1]]
    return found | {
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "times_as_fast": ratios(seconds[case.other], seconds[case.ours]),
        "memory": {"ours": ours, "other": other, "ratio": round(ours / other, 4)},
    }


def _hold(benchmark: Any, name: str, case: Case, found: dict[str, Any]) -> None:
    for side, values in found["seconds"].items():
        peak = found["peak_bytes"][side] / 2**20
        say(f"{name}: {side}: {1000 * values['median']:.1f} ms, peak {peak:.1f} MiB")
    what = f"{name}: {case.ours}, times as fast as {case.other}"
    benchmark.expect(what, found["times_as_fast"]["median"], at_least=case.times)
    if case.memory is not None:
        kind = "peak" if case.over is None else f"peak above {case.over[0].split()[-1]}"
        ratio = found["memory"]["ratio"]
        benchmark.expect(f"{name}: {kind}, to that of {case.other}", ratio, below=case.memory)


# ---- in a process of its own -------------------------------------------------------------------------


def measure(*, sides: list[str], layers: int, turns: int, threads: int) -> dict[str, Any]:
    """Return the seconds of steps of all sides in turn, and the peak of a later step of each."""
    import torch

    from scrimp.memory.allocator import peak_of

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        steps = {side: SIDES[side](Path(name), layers) for side in sides}
        losses = {side: [step() for _ in range(3)] for side, step in steps.items()}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(turns):
            for side in sides[:: 1 if turn % 2 else -1]:
                began = time.perf_counter()
                steps[side]()
                seconds[side].append(time.perf_counter() - began)
        peaks = {side: peak_of(step) for side, step in steps.items()}
    first = [found[0] for found in losses.values()]
    assert max(first) - min(first) < SAME_LOSS, f"the sides do not start from the same function: {losses}"
    return {"losses": losses, "seconds": seconds, "peak_bytes": peaks}


def model_of(layers: int) -> Any:
    """Return the model, the same at every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMOL, num_hidden_layers=layers, max_position_embeddings=SEQ))


def tokens() -> Any:
    """Return the token numbers of every step, (rows, seq)."""
    import torch

    drawn = torch.Generator().manual_seed(1)
    return torch.randint(0, SMOL["vocab_size"], (ROWS, SEQ), generator=drawn)


def ours(folder: Path, layers: int, *, tune: str) -> Step:
    """Return the step that `scrimp train` takes with an adapter of the catalogue."""
    import torch

    from scrimp.assembly import assemble, make_optimizer
    from scrimp.base.protocols import IGNORED
    from scrimp.data.loader import MicroBatch
    from scrimp.optim.clipping import clip_gradients
    from scrimp.recipe import Recipe, replace

    model = model_of(layers)
    model.config.save_pretrained(folder)
    values = {"model.name": str(folder), "model.init": "scratch", "precision": "fp32", "device": "cpu"}
    values |= {"seq": SEQ, "batch": ROWS, "micro_batch": ROWS, "steps": 100, "optimizer.lr": 1e-4}
    values |= {"tune.name": tune, "tune.rank": RANK, "tune.alpha": ALPHA, "activations.loss": "logits"}
    recipe = replace(Recipe(), values)
    made = assemble(model, recipe)
    made.model.train()
    optimizer, trained = make_optimizer(recipe, made.model), list(made.trained.values())
    ids = tokens()
    following = torch.cat([ids[:, 1:], torch.full((ROWS, 1), IGNORED)], 1)
    targets = ROWS * (SEQ - 1)
    batch = [MicroBatch(ids, following, None, targets)]
    loss = functools.partial(made.loss, divisor=float(targets))

    def step() -> float:
        found = made.estimator.step(loss, batch)
        clip_gradients(trained, recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(found)

    return step


def peft(folder: Path, layers: int, **settings: Any) -> Step:
    """Return a step of a bare loop over peft's model."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", **settings
    )
    model: Any = get_peft_model(model_of(layers), config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    ids = tokens()

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


SIDES: dict[str, Callable[[Path, int], Step]] = {
    "scrimp lora": functools.partial(ours, tune="lora"),
    "scrimp dora": functools.partial(ours, tune="dora"),
    "peft lora": peft,
    "peft dora": functools.partial(peft, use_dora=True),
}


if __name__ == "__main__":
    main()
