"""One full-parameter training step of the llama-7b shape in nine gigabytes of main memory, without a GPU.

    python benchmarks/seven_billion.py

Batch 1, 256 tokens, three steps on the same batch. Every matrix of the decoder is held in int8 codes, drawn
block by block and never held in another precision; embedding, head and norms are bf16 with 8-bit Adam; the
optimizer is APOLLO-Mini, inside the backward pass; decoder layers run again in the backward pass. A process
of its own does it, and the kernel's high-water mark (VmHWM) counts all of it: Python, torch and transformers
too.

Predicted are the bytes of each term, by formula: the program (as measured when all is imported), weights,
optimizer state, one input of each layer, the head's gradient, and what the loss holds beside it.

`--layers` makes a model of fewer layers, to try it in seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from _common import say, start

from scrimp.base import platform
from scrimp.bench.machine import clean_env

if TYPE_CHECKING:
    from torch import Tensor, nn

SHAPE = "llama-7b"
SEQ = 256
BOUND = 9.0  # GB of 1e9 bytes
MMAP_THRESHOLD = 64 * 2**10  # freed blocks go back to the system, as in a run of `scrimp train`


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        layers, steps, group, seed, compiles = (int(word) for word in sys.argv[3:])
        found = train(layers, steps, lr=float(sys.argv[2]), group=group, seed=seed, compiles=bool(compiles))
        print(json.dumps(found))
        return
    benchmark = start("seven_billion", __doc__, _options)
    given = benchmark.arguments
    words = [given.lr, given.layers, given.steps, given.group, given.seed, int(given.compile)]
    command = [sys.executable, __file__, "--worker", *map(str, words)]
    done = subprocess.run(command, env=clean_env(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the training process ended with {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    benchmark.expect("peak of resident memory (VmHWM), GB", found["peak_bytes"] / 1e9, below=BOUND)
    losses = found["losses"]
    falls = [before - after for before, after in itertools.pairwise(losses)]
    benchmark.expect("the smallest fall of the loss from step to step", min(falls), at_least=1e-3)
    excess = found["peak_bytes"] / sum(found["predicted"].values()) - 1
    benchmark.expect("excess of the peak over the prediction", excess, below=0.05)
    benchmark.write(found)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=32, help="decoder layers")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--group", type=int, default=256, help="weights that share a scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence, a micro-batch of the losses."""

    input_ids: Tensor
    labels: Tensor
    targets: int
    position_ids: None = None


def train(layers: int, steps: int, *, lr: float, group: int, seed: int, compiles: bool) -> dict[str, Any]:
    """Train, and return what it took.

    Args:
        layers: Decoder layers.
        steps: Optimizer steps.
        lr: Learning rate.
        group: Weights that share a scale.
        seed: Of the weights, the batch and the optimizer's draws.
        compiles: Run the optimizer's arithmetic as compiled functions.
    """
    platform.set_mmap_threshold(MMAP_THRESHOLD)
    with platform.passive_openmp():
        import torch

    from scrimp.activations.loss import chunked
    from scrimp.optim import ApolloMini
    from scrimp.weights.int8_weight import Int8Weight

    began = time.perf_counter()
    model = make_model(layers, group=group, seed=seed)
    program = platform.resident_bytes() - weight_bytes(model)
    say(f"{parameter_count(model) / 1e9:.2f} B parameters drawn, {_memory()}, {_since(began)}")
    coded = [each for each in model.named_parameters() if isinstance(each[1], Int8Weight)]
    others = [each for each in model.named_parameters() if not isinstance(each[1], Int8Weight)]
    groups = [{"params": coded, "rank": 1}, {"params": others, "store": "8bit"}]
    optimizer = ApolloMini(groups, lr=lr, seed=seed, compile=compiles)
    optimizer.fuse_backward()
    ids = torch.randint(32_000, (1, SEQ + 1), generator=torch.Generator().manual_seed(seed))
    batch = Sequence(ids[:, :-1], ids[:, 1:], SEQ)
    loss_of = chunked(model, None)
    losses, seconds = [], []
    for step in range(steps):
        began = time.perf_counter()
        loss = loss_of(batch, divisor=float(SEQ))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(round(time.perf_counter() - began, 1))
        say(f"step {step + 1}: loss {losses[-1]:.4f}, {_memory()}, {seconds[-1]:.0f} s")
    predicted = predict(model, optimizer, program)
    return {
        "parameters": parameter_count(model),
        "losses": losses,
        "seconds": seconds,
        "peak_bytes": platform.peak_resident_bytes(),
        "predicted": predicted,
    }


def make_model(layers: int, *, group: int, seed: int) -> Any:
    """Make the model in int8 codes, drawn from `seed` by transformers' own rule, block by block."""
    import torch

    from scrimp import models
    from scrimp.activations.recompute import recompute
    from scrimp.weights.int8 import int8

    config = models.load_config(models.locate(SHAPE), vocab=0)
    config.num_hidden_layers = layers
    with torch.device("meta"):
        model: Any = models.create_empty(config, dtype=torch.bfloat16)
    int8(group).apply(model)
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    with torch.no_grad():
        model.initialize_weights()
    recompute().apply(model)
    return model.train()


def predict(model: Any, optimizer: Any, program: int) -> dict[str, int]:
    """Return the bytes of every term at the peak, which is the end of the forward pass.

    Args:
        model: The model.
        optimizer: Its optimizer, after a step.
        program: What the process holds before any tensor.
    """
    from scrimp.activations.linear_cross_entropy import scratch_bytes

    config = model.config
    hidden, vocab = config.hidden_size, config.vocab_size
    state = [value for entries in optimizer.state.values() for value in entries.values()]
    return {
        "program": program,
        "weights": weight_bytes(model),
        "state": sum(getattr(value, "nbytes", 0) for value in state),
        "activations": 2 * SEQ * hidden * (config.num_hidden_layers + 3),
        "gradients": 2 * hidden * vocab,
        "temporaries": scratch_bytes(SEQ, hidden, vocab, 2),
    }


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights, as they are held."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def parameter_count(model: nn.Module) -> int:
    """Count the parameters."""
    return sum(p.numel() for p in model.parameters())


def _memory() -> str:
    now, peak = platform.resident_bytes(), platform.peak_resident_bytes()
    return f"resident {now / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB"


def _since(began: float) -> str:
    return f"{time.perf_counter() - began:.0f} s"


if __name__ == "__main__":
    main()
