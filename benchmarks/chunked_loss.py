"""The loss without logits: time and peak memory against full logits and torch's own operator.

    python benchmarks/chunked_loss.py

Forward and backward pass of a linear head and its cross-entropy, in one process, the sides in turn. What
each holds at its peak is read from the allocator's events, above its inputs: logits and what is made of
them, and the gradients of head and hidden states, which every side has to make. torch's operator is shown
under each of its accumulation policies. Losses and gradients are held against fp64.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _common import ratios, say, spread, start
from torch import Tensor, nn

from scrimp.activations.linear_cross_entropy import chunk_tokens, linear_cross_entropy
from scrimp.memory.allocator import peak_of

Inputs = tuple[Tensor, Tensor, Tensor]
Side = Callable[[Tensor, Tensor, Tensor], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
POLICIES = ("auto", "accurate", "balanced", "compact")
# Tokens, width, vocabulary; and the policies of torch's operator, which takes minutes a pass of the last.
SIZES = {(2048, 512, 32_000): POLICIES, (512, 576, 49_152): POLICIES, (1024, 2048, 128_256): ("auto",)}


def main() -> None:
    benchmark = start("chunked_loss", __doc__, _options)
    options = benchmark.arguments
    torch.set_num_threads(options.threads)
    found = [
        _measure(size, dtype, turns=options.turns, policies=policies)
        for size, policies in [*SIZES.items()][: options.sizes]
        for dtype in DTYPES
    ]
    for case in found:
        if case["dtype"] == "fp32":
            ratio = case["sides"]["ours"]["seconds_over_logits"]["median"]
            benchmark.expect(f"{case['case']}: seconds, ours / full logits", ratio, below=1.0)
    benchmark.write({"settings": {"turns": options.turns, "threads": options.threads}, "cases": found})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--turns", type=int, default=3, help="timed turns of every side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="only the first of the sizes")


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, None, labels, divisor=len(labels))


def torchs(policy: str) -> Side:
    options = nn.LinearCrossEntropyOptions(acc_policy=policy)

    def side(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, labels, options=options)

    return side


def _measure(
    size: tuple[int, int, int], dtype: str, *, turns: int, policies: tuple[str, ...]
) -> dict[str, Any]:
    """Compare the sides on one size."""
    tokens, width, vocab = size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(DTYPES[dtype])
    # Logits of standard deviation 2, as those of a trained model.
    weight = (2 * width**-0.5 * torch.randn(vocab, width, generator=generator)).to(DTYPES[dtype])
    inputs = (hidden, weight, torch.randint(0, vocab, (tokens,), generator=generator))
    sides: dict[str, Side] = {"logits": full_logits, "ours": ours}
    sides |= {f"torch {policy}": torchs(policy) for policy in policies}

    # The untimed pass is each side's first: it pays for new pages.
    truth = _in_fp64(inputs)
    profiles = {name: _profile(side, inputs, truth) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, side in sides.items():
            seconds[name].append(_seconds(side, inputs))
    case = f"{tokens} x {width} x {vocab} {dtype}"
    results = {}
    for name, timed in seconds.items():
        over = ratios(timed, seconds["logits"])
        results[name] = {"seconds": spread(timed), "seconds_over_logits": over, **profiles[name]}
        say(
            f"{case} {name}: {statistics.median(timed):.3f} s, {over['median']:.2f} of full logits, "
            f"{profiles[name]['peak_bytes'] / 2**20:.0f} MiB, errors {profiles[name]['errors']}"
        )
    for result in results.values():
        result["peak_over_logits"] = round(result["peak_bytes"] / results["logits"]["peak_bytes"], 4)
    head = {"tokens": tokens, "hidden": width, "vocab": vocab, "chunk": chunk_tokens(width)}
    return {"case": case, "dtype": dtype, **head, "head_bytes": weight.nbytes, "sides": results}


def _leaves(inputs: Inputs) -> Inputs:
    """Return the same tensors, with gradients to come."""
    hidden, weight, labels = inputs
    return hidden.detach().requires_grad_(), weight.detach().requires_grad_(), labels


def _seconds(side: Side, inputs: Inputs) -> float:
    given = _leaves(inputs)
    gc.collect()
    began = time.perf_counter()
    side(*given).backward()
    return time.perf_counter() - began


def _profile(side: Side, inputs: Inputs, truth: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return the peak of a pass above its inputs, and the relative errors of what it found, by norm."""
    hidden, weight, labels = _leaves(inputs)
    losses = []

    def run() -> None:
        loss = side(hidden, weight, labels)
        loss.backward()
        losses.append(loss.detach())

    peak = peak_of(run)
    assert hidden.grad is not None and weight.grad is not None
    found = dict(zip(("loss", "hidden", "weight"), (losses[0], hidden.grad, weight.grad), strict=True))
    errors = {
        name: float(f"{float((value - t).norm() / t.norm()):.2g}")
        for (name, value), t in zip(found.items(), truth, strict=True)
    }
    return {"peak_bytes": peak, "errors": errors}


def _in_fp64(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return loss and gradients in fp64, a piece at a time: full logits might not fit."""
    hidden, weight, labels = inputs[0].double(), inputs[1].double().requires_grad_(), inputs[2]
    total, gradients = torch.zeros((), dtype=torch.float64), []
    for h, t in zip(hidden.split(128), labels.split(128), strict=True):
        piece = h.clone().requires_grad_()
        loss = F.cross_entropy(piece @ weight.t(), t, reduction="sum") / len(labels)
        loss.backward()
        total += loss.detach()
        assert piece.grad is not None
        gradients.append(piece.grad)
    assert weight.grad is not None
    return total, torch.cat(gradients), weight.grad


if __name__ == "__main__":
    main()
