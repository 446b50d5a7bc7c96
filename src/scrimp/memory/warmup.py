"""What a training process holds before its model exists.

The first step of a process loads modules and kernels, starts threads and fills the scratch buffers of the
math libraries, and none of that is freed. So the resident memory before a model is read after one tiny step
(`warm_up`, `settle_resident`); a planner, which has no such process, starts one:

    python -m scrimp.memory.warmup MODULE ...      prints bytes by precision as JSON

(Products with the head of a large vocabulary fill more of those buffers: 15 MB a thread at 32,000 tokens.)
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
from collections.abc import Callable, Sequence

from scrimp.base import platform
from scrimp.base.platform import passive_openmp
from scrimp.recipe import Recipe, replace

ROWS, LENGTH = 2, 16  # of the tiny micro-batch
ADAPTED = "lora"  # the adapter that is tried for what all of them load
ADAPTER = "adapter"  # what an adapter makes resident besides, among the bytes by precision


def warm_up(precision: str, tune: str = "full") -> None:
    """Do one tiny optimizer step and an evaluation on the CPU, and leave nothing of them behind.

    Args:
        precision: Of a recipe: other kernels are loaded for other dtypes.
        tune: What trains: adapters load peft, and what peft finds installed.
    """
    tiny_step(precision, "cpu", tune)()


def tiny_step(precision: str, device: str, tune: str = "full") -> Callable[[], None]:
    """Return a training step of a Llama of two layers and width 64, made of the pieces that runs are made of.

    It draws nothing from torch's random state.
    """
    import torch
    from transformers import LlamaConfig

    from scrimp import models
    from scrimp.assembly import assemble, make_optimizer
    from scrimp.data.loader import MicroBatch
    from scrimp.defaults import with_options
    from scrimp.optim.clipping import clip_gradients

    config = LlamaConfig(
        hidden_size=64, intermediate_size=176, num_attention_heads=4, num_hidden_layers=2, vocab_size=256
    )
    settings = {"precision": precision, "device": device, "optimizer.lr": 1e-3, "tune.name": tune}
    recipe = replace(Recipe(), settings)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = models.create(config, seed=0, dtype=dtype)
    recipe = with_options(recipe, models.dimensions(config))
    made = assemble(model, recipe, place=lambda model, device: model.to(device))
    optimizer = make_optimizer(recipe, made.model)
    ids = torch.zeros((ROWS, LENGTH), dtype=torch.int64, device=device)
    batch = MicroBatch(ids, ids, None, ids.numel())

    def step() -> None:
        made.model.train()
        with made.activations.context():
            made.estimator.step(lambda micro: made.loss(micro, divisor=1.0), [batch])
        clip_gradients(made.trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        made.model.eval()
        with torch.no_grad():
            made.loss(batch, divisor=1.0)

    return step


def settle_resident() -> int:
    """Free what is unreachable, give free pages back to the system, and return the bytes still resident."""
    gc.collect()
    platform.trim_heap()
    return platform.resident_bytes()


def resident_by_precision(modules: Sequence[str]) -> dict[str, int]:
    """Import what training imports, and return the bytes that a step of each precision makes resident.

    Args:
        modules: Their names.
    """
    with passive_openmp():
        for name in modules:
            importlib.import_module(name)
    found = {}
    # One after the other in one process: what they share is most of it, and fp32 comes first.
    for precision in ("fp32", "bf16-mixed", "bf16"):
        warm_up(precision)
        found[precision] = settle_resident()
    warm_up("fp32", ADAPTED)
    found[ADAPTER] = settle_resident() - max(found.values())
    return found


def main() -> None:
    """Print what each precision makes resident, with the modules of the command line imported."""
    print(json.dumps(resident_by_precision(sys.argv[1:])))


if __name__ == "__main__":
    main()
