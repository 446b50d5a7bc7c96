"""What other tools say about the same runs, beside the allocator's own events.

    pip install accelerate deepspeed        (DeepSpeed is left out where it is absent)
    python benchmarks/memory_peers.py

Cases, truth and our prediction are those of `memory_accuracy.py`: the tensors of two optimizer steps with
AdamW. The others are asked as their documentation says:

- `accelerate estimate-memory`: its function `estimate_training_usage`, for the bytes of the model; it knows
  no batch and no sequence.
- DeepSpeed: `estimate_zero2_model_states_mem_needs` for one GPU without offload; model states alone, by its
  own words.
- torch: `torch.distributed._tools.mem_tracker.MemTracker` around two steps on fake tensors, with the model
  made under the fake mode, and transformers' own loss and recomputation.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from _common import say, start
from memory_accuracy import Case, _measured, _percent, _predicted

CASES = (
    Case(family="llama", precision="fp32", width=256, layers=4, vocab=8192),
    Case(family="llama", precision="fp32", width=256, layers=4, vocab=8192, rows=1, seq=64),
    Case(family="llama", precision="fp32", width=256, layers=8, rows=4, seq=512, activations="recompute"),
    Case(family="llama", precision="bf16", width=256, layers=4, vocab=32_000, rows=4),
    Case(family="qwen2", precision="fp32", width=256, layers=4, vocab=32_000, rows=4),
    Case(family="gpt2", precision="fp32", width=256, layers=4, rows=2, seq=512),
    Case(family="gemma3", precision="bf16", width=256, layers=4, rows=2, seq=512),
    Case(family="qwen3-moe", precision="fp32", width=256, layers=4, rows=2),
)


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    benchmark = start("memory_peers", __doc__, _options)
    torch.set_num_threads(1)
    rows = [compare(case) for case in CASES]
    worst = {
        name: max(abs(row["error_percent"][name]) for row in rows if name in row["error_percent"])
        for name in rows[0]["error_percent"]
    }
    benchmark.expect("scrimp: worst error in %", worst["scrimp"], below=1)
    benchmark.write({"worst_error_percent": worst, "cases": rows})


def _options(_: argparse.ArgumentParser) -> None:
    pass


def compare(case: Case) -> dict[str, Any]:
    """Ask everybody about a case, and run it."""
    config = case.config()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.save_pretrained(folder)
        recipe = case.recipe(folder)
        said: dict[str, Any] = {"scrimp": _predicted(recipe, config, folder)[1]}
        measured = _measured(recipe, config, even=False)
    for peer, ask in (
        ("accelerate", accelerate),
        ("DeepSpeed", deepspeed),
        ("torch MemTracker", mem_tracker),
    ):
        try:
            answer = ask(case, config)
        except Exception as error:  # what a peer raises is its answer
            said[peer] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        else:
            if answer is not None:
                said[peer] = answer
    errors = {peer: _percent(answer, measured) for peer, answer in said.items() if isinstance(answer, int)}
    say(f"{case.family} {case.precision}: {measured / 1e6:.1f} MB; error in %: {errors}")
    return {"case": str(case), "measured_bytes": measured, "said": said, "error_percent": errors}


def parameters_of(config: Any) -> int:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def accelerate(case: Case, config: Any) -> int:
    from accelerate.commands.estimate import estimate_training_usage

    precision = "float32" if case.precision == "fp32" else "bfloat16"
    return int(max(estimate_training_usage(4 * parameters_of(config), precision).values()))


def deepspeed(case: Case, config: Any) -> int | None:
    try:
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
    except ImportError:
        return None
    _, gpu = estimate_zero2_model_states_mem_needs(parameters_of(config), 1, 1, cpu_offload=False)
    return int(gpu)


def mem_tracker(case: Case, config: Any) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    with FakeTensorMode():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        if case.activations == "recompute":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.zeros((case.rows, case.seq), dtype=torch.int64)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for step in range(2):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if step == 0:
                    tracker.reset_mod_stats()
    peak = tracker.get_tracker_snapshot("peak")
    return int(sum(terms["Total"] for terms in peak.values()))


if __name__ == "__main__":
    main()
