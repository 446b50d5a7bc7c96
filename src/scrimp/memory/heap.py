"""Keep malloc's slack out of a run's resident peak, on a CPU with glibc.

Torch asks for blocks aligned to 64 bytes, and glibc (2.36, where it was tried) never gives the room of a
freed one to the next request of the same size, as it would an unaligned one. So the heap fragments, and its
holes stay resident: half of the bytes that come and go in a step, 12 to 62 % above the tensors of whole runs
(`benchmarks/malloc_threshold.py`). Two things help, at different prices:

    trim       give the holes back to the system just before the loss: 0 to 6 % of a step
    return     take blocks of 64 KiB or more straight from the system and give them back when they are freed;
               each page of each of them is then zeroed anew: 14 to 31 % of a step, 65 % at a width of 128

Logits of more than 32 MiB come straight from the system in any case. So where the peak lies in the loss, the
holes before it are what matters, and `trim` is as exact as `return` and far cheaper. Where it lies in the
layers, or in a loss by chunks, holes open between one operation and the next, and only `return` closes them.
Small runs are left alone: their slack is small beside the program itself, and their steps would suffer most.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from scrimp.base import platform
from scrimp.base.ledger import Ledger, Moment
from scrimp.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

HeapPolicy = Literal["leave", "trim", "return"]

SMALL = 256 * 2**20  # bytes of tensors at the peak; below, nothing is done
HOLES = 0.65  # of the bytes that come and go: the most that was seen
HARMLESS = 0.02  # of the whole peak
BUFFERS = 18 * 2**20  # of the math libraries for each thread, once they have seen a large vocabulary
THRESHOLD = 64 * 2**10
LARGEST_THRESHOLD = 32 * 2**20  # where glibc's own rule ends, once it has seen a large block freed


def choose_policy(ledger: Ledger, recipe: Recipe) -> HeapPolicy:
    """Choose what keeps a run on a CPU within its prediction at the least cost.

    Args:
        ledger: The predicted memory of the run.
        recipe: The resolved recipe.
    """
    if platform.has_data_limit():
        return "return"  # holes that went back to the system still count there
    peak = ledger.peak
    others = [moment for moment in ledger.moments if not moment.name.startswith(("loss", "load"))]
    holes = max((HOLES * _passing(moment) for moment in others), default=0.0)
    if _tensors(peak) < SMALL or holes <= HARMLESS * peak.total:
        return "leave"
    reach = max(_tensors(moment) + HOLES * _passing(moment) for moment in others)
    # A loss by chunks leaves holes of its own, and a compiled model calls no hooks of ours.
    can_trim = recipe.activations.loss == "logits" and not recipe.compile
    return "trim" if can_trim and reach <= _tensors(peak) else "return"


def slack_bytes(ledger: Ledger, recipe: Recipe) -> int:
    """Return what the heap's holes and the libraries' buffers add to a run's tensors.

    Args:
        ledger: The predicted memory of the run.
        recipe: The resolved recipe.
    """
    if choose_policy(ledger, recipe) != "leave":
        return BUFFERS * (recipe.threads or 1)
    return round(HOLES * max(_passing(moment) for moment in ledger.moments if moment.name != "load"))


@contextmanager
def returning(policy: HeapPolicy) -> Iterator[None]:
    """Let freed blocks go back to the system at once, where that is the policy; begin before the model."""
    if policy == "return":
        platform.set_mmap_threshold(THRESHOLD)
    try:
        yield
    finally:
        if policy == "return":
            platform.set_mmap_threshold(LARGEST_THRESHOLD)


@contextmanager
def trimming(model: nn.Module, policy: HeapPolicy) -> Iterator[None]:
    """Give the heap's holes back whenever the decoder is done and the loss is next, where that is the policy.

    Args:
        model: A transformers causal language model.
        policy: As from `choose_policy`.
    """
    if policy != "trim":
        yield
        return

    def trim(*_: object) -> None:
        platform.trim_heap()

    handle = getattr(model, "base_model", model).register_forward_hook(trim)
    try:
        yield
    finally:
        handle.remove()


def _tensors(moment: Moment) -> int:
    return moment.total - moment.terms.get("fixed", 0)


def _passing(moment: Moment) -> int:
    """Return the bytes that come and go in a step."""
    return sum(moment.terms.get(term, 0) for term in ("gradients", "activations", "temporaries"))
