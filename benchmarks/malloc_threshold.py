"""What malloc keeps beyond the tensors: resident peak against the allocator's events, by malloc's settings.

    python benchmarks/malloc_threshold.py

Every run is a process of its own: a tiny warm-up step, then the model, optimizer steps and an evaluation.
`slack` is what its resident peak (the kernel's high-water mark) grew by since the warm-up, over the peak of
the tensors that torch's CPU allocator handed out in an equal run under the profiler. Settings, in turn:

    as it is   glibc's own rule, under which the threshold rises to 32 MiB
    trim       the heap's holes are given back just before the loss
    return     blocks of 64 KiB or more come from the kernel and go back when they are freed
    1 MiB      the same for 1 MiB

`chosen` is what scrimp takes for the run (`scrimp.memory.heap`). Of the steps the shortest counts, by the
process's own CPU seconds: on a busy machine its wall clock measures the neighbours.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _common import run_json, say, spread, start

MIB = 2**20
SETTINGS: dict[str, Any] = {"as it is": "leave", "trim": "trim", "return": "return", "1 MiB": MIB}
GPT2 = {
    "model_type": "gpt2", "n_embd": 384, "n_layer": 6, "n_head": 6, "vocab_size": 32000,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
CHUNKED = {"activations.loss": "chunked"}
# Model, rows, tokens, precision, threads, steps, other fields of the recipe.
RUNS: dict[str, tuple[str, int, int, str, int, int, dict[str, Any]]] = {
    "llama-1m 8x128": ("llama-1m", 8, 128, "fp32", 1, 20, {}),
    "llama-1m 64x128": ("llama-1m", 64, 128, "fp32", 1, 6, {}),
    "llama-20m 8x256": ("llama-20m", 8, 256, "fp32", 1, 4, {}),
    "llama-35m 8x256": ("llama-35m", 8, 256, "fp32", 1, 4, {}),
    "llama-35m 8x256, 2 threads": ("llama-35m", 8, 256, "fp32", 2, 4, {}),
    "llama-35m 8x256 bf16": ("llama-35m", 8, 256, "bf16", 1, 4, {}),
    "GPT-2 8x256": ("gpt2", 8, 256, "fp32", 1, 4, {}),
    "llama-60m 1x64": ("llama-60m", 1, 64, "fp32", 1, 5, {}),
    "llama-35m 8x256 chunked": ("llama-35m", 8, 256, "fp32", 1, 4, CHUNKED),
    "llama-35m 8x512 chunked, recompute": (
        "llama-35m", 8, 512, "fp32", 1, 3, {**CHUNKED, "activations.name": "recompute"},
    ),
}  # fmt: skip
LIMIT = 0.04  # of the whole process, where the tensors take 300 MB or more
LIMITED_FROM = 300 * 10**6


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "--side":
        print(json.dumps(_side(json.loads(sys.argv[2]))))
        return
    benchmark = start("malloc_threshold", __doc__, _options)
    results, options = {}, benchmark.arguments
    with tempfile.TemporaryDirectory(prefix="scrimp-malloc-") as work:
        (Path(work) / "config.json").write_text(json.dumps(GPT2), encoding="utf-8")
        for name in options.only or RUNS:
            results[name] = _compare(name, work, options.turns)
    for name, found in results.items():
        if found["tensors_mb"] * 1e6 >= LIMITED_FROM:
            over = found["settings"][found["chosen"]]["over_whole"]
            benchmark.expect(f"{name}: resident over predicted ({found['chosen']})", over, below=LIMIT)
    benchmark.write({"settings": {"turns": options.turns}, "runs": results})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--turns", type=int, default=2, help="turns through the settings of a run")
    parser.add_argument("--only", nargs="*", choices=list(RUNS), help="some of the runs")


def _compare(name: str, work: str, turns: int) -> dict[str, Any]:
    """Do one run in every setting."""

    def side(setting: Any) -> dict[str, Any]:
        spec = {"run": name, "work": work, "setting": setting}
        return run_json([sys.executable, __file__, "--side", json.dumps(spec)])

    tensors, policy, settings = side("events")["peak"], side("policy")["policy"], {}
    found: dict[str, list[dict[str, Any]]] = {setting: [] for setting in SETTINGS}
    for _ in range(turns):
        for setting, value in SETTINGS.items():
            found[setting].append(side(value))
    for setting, sides in found.items():
        worst = max(sides, key=lambda one: one["grown"])
        settings[setting] = {
            "slack_mb": round((worst["grown"] - tensors) / 1e6, 1),
            "slack": round(worst["grown"] / tensors - 1, 4),
            "over_whole": round((worst["grown"] - tensors) / (worst["base"] + tensors), 4),
            "step_cpu_s": spread([one["cpu"] for one in sides]),
            "page_faults_a_step": min(one["faults"] for one in sides),
        }
        say(f"{name}, {setting}: {settings[setting]}")
    chosen = next(setting for setting, value in SETTINGS.items() if value == policy)
    as_it_is = min(one["cpu"] for one in found["as it is"])
    for setting, sides in found.items():
        settings[setting]["step_over_as_it_is"] = round(min(one["cpu"] for one in sides) / as_it_is, 3)
    return {"tensors_mb": round(tensors / 1e6, 1), "chosen": chosen, "settings": settings}


def _side(spec: dict[str, Any]) -> dict[str, Any]:
    """Do one run in this process, and return what it held."""
    from scrimp.base import platform

    with platform.passive_openmp():
        import torch

    from scrimp.memory import predict
    from scrimp.memory.allocator import allocator_events
    from scrimp.memory.heap import choose_policy, returning, trimming
    from scrimp.memory.warmup import settle_resident, warm_up

    _, _, _, precision, threads, steps, _ = RUNS[spec["run"]]
    torch.set_num_threads(threads)
    recipe, config = _recipe(spec)
    if spec["setting"] == "policy":
        return {"policy": choose_policy(predict(recipe), recipe)}
    if spec["setting"] == "events":
        with allocator_events() as events:
            for step in _steps(recipe, config, 2, lambda _: ExitStack()):
                step()
        return {"peak": events.peak}
    policy = spec["setting"] if isinstance(spec["setting"], str) else "leave"
    if isinstance(spec["setting"], int):
        platform.set_mmap_threshold(spec["setting"])
    warm_up(precision)
    base, cpu, faults = settle_resident(), [], []
    platform.reset_peak_resident()
    with returning(policy):
        for step in _steps(recipe, config, steps, lambda model: trimming(model, policy)):
            before, fault = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            step()
            cpu.append(time.process_time() - before)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - fault)
    grown = platform.peak_resident_bytes() - base
    # The evaluation at the end is no step.
    return {"base": base, "grown": grown, "cpu": min(cpu[1:-1]), "faults": faults[-2]}


def _recipe(spec: dict[str, Any]) -> tuple[Any, Any]:
    """Return the run's recipe, resolved but for its data, and the model's configuration."""
    from scrimp import models
    from scrimp.defaults import settle
    from scrimp.recipe import Recipe, replace
    from scrimp.shapes import Dimensions

    model, rows, seq, precision, threads, _, more = RUNS[spec["run"]]
    source = models.locate(spec["work"] if model == "gpt2" else model)
    fields = {
        "model.name": source.name, "batch": rows, "micro_batch": rows, "seq": seq, "precision": precision,
        "device": "cpu", "threads": threads, **more,
    }  # fmt: skip
    model = Dimensions(context=None, width=64)
    recipe = settle(replace(Recipe(), fields), source, device="cpu", has_bf16=False, model=model)
    return recipe, models.load_config(source, vocab=259)


def _steps(recipe: Any, config: Any, steps: int, around: Callable[[Any], Any]) -> Any:
    """Yield a model's optimizer steps, and its evaluation."""
    import torch

    from scrimp import models
    from scrimp.assembly import assemble, make_optimizer
    from scrimp.data.loader import MicroBatch
    from scrimp.optim.clipping import clip_gradients

    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    made = assemble(models.create(config, seed=0, dtype=dtype), recipe)
    optimizer = make_optimizer(recipe, made.model)
    ids = torch.randint(0, 259, (recipe.micro_batch, recipe.seq), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(ids, ids, None, ids.numel())

    def step() -> None:
        with made.activations.context():
            made.estimator.step(functools.partial(made.loss, divisor=ids.numel()), [batch])
        clip_gradients(made.trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def evaluate() -> None:
        made.model.eval()
        with torch.no_grad():
            made.loss(batch, divisor=1.0)

    made.model.train()
    with around(made.model):
        for _ in range(steps):
            yield step
        yield evaluate


if __name__ == "__main__":
    main()
