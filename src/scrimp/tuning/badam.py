"""BAdam: block coordinate descent, one decoder layer at a time, with Adam begun anew for each.

    block of step s = order[((s + o) // every) mod D]      D blocks; o = 0, or 1 as released

At each switch the optimizer's whole state is dropped: the new block starts without moments. Nothing but the
block holds gradients or state, and the backward pass ends at it, so it costs the less the higher the block.

What trains with half-precision weights is, in the paper, an fp32 copy of the block: 16 bytes an element
(copy, gradient, two moments), whose last bits are lost at a switch. An optimizer that keeps such copies in
its state gets just that, since the state is dropped here; one that rounds stochastically needs no copy.

Oddities of the released package (badam 1.4), which `variant="released"` shares where marked:

- (shared) The first block is awake for `every` - 1 steps: the switch looks at the count of steps one late.
- Asked for the head and not the embedding, it trains the embedding in the head's block.
- Weight decay applies to everything: the group meant for biases gets the optimizer's own decay again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import Probe
from scrimp.base.seeds import derive
from scrimp.tuning.layer_sampling import check_period
from scrimp.tuning.layers import Layers, Parameters, find_layers, wake

Order = Literal["random", "ascending", "descending", "fixed"]


@dataclass(slots=True, kw_only=True)
class BAdam:
    """Wakes one block at a time: each decoder layer, and the embeddings and the head if asked for.

    Attributes:
        every: Steps between switches.
        order: Of the blocks: a new permutation each time round, up, down, or one block for good.
        include_embedding: Whether the embeddings are a block, the first.
        include_head: Whether the head with the final norm is a block, the last. A tied head trains with
            whichever of both comes first.
        start: The first block's number; None is 0, or the last one where the order descends.
        variant: "paper", or "released" with a first block that is one step short.
        seed: Of the permutations.

    Memory:
        Gradients and optimizer state of one block.

    References:
        BAdam, Luo et al., NeurIPS 2024, arXiv 2404.02827.
    """

    every: int = 100
    order: Order = "random"
    include_embedding: bool = False
    include_head: bool = False
    start: int | None = None
    variant: Literal["paper", "released"] = "paper"
    seed: int = 0
    _blocks: tuple[Parameters, ...] = field(default=(), init=False, repr=False)
    _trained: dict[str, nn.Parameter] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_period("badam", self.every)
        if self.order == "random" and self.start is not None:
            raise ScrimpError(
                "tune badam: a random order has no start; leave start out, or choose another order"
            )

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Freeze what is in no block, and return the rest by name.

        Raises:
            ScrimpError: The model has no list of decoder layers, or no block of the number `start`.
        """
        found = find_layers(model, tune="badam")
        blocks = self._divide(found)
        if self.start is not None and not 0 <= self.start < len(blocks):
            raise ScrimpError(f"tune badam: start {self.start} of {len(blocks)} blocks; they count from 0")
        self._blocks = blocks
        chosen = {p for block in blocks for p in block}
        for parameter in found.trainable.values():
            parameter.requires_grad_(parameter in chosen)
        self._trained = {name: p for name, p in found.trainable.items() if p in chosen}
        return self._trained

    def _divide(self, found: Layers) -> tuple[Parameters, ...]:
        embedding = found.embedding if self.include_embedding else ()
        head = found.head if self.include_head else ()
        last = tuple(p for p in head if p not in set(embedding))
        # Adapters may leave whole layers without anything that trains.
        return tuple(block for block in (embedding, *found.decoder, last) if block)

    def block(self, step: int) -> int:
        """Return the number of the block that trains at 0-based `step`."""
        count = len(self._blocks)
        interval = (step + self._early) // self.every
        if self.order == "random":
            round_, place = divmod(interval, count)
            return sorted(range(count), key=lambda index: derive(self.seed, "blocks", round_, index))[place]
        move = {"ascending": 1, "descending": -1, "fixed": 0}[self.order]
        first = self.start if self.start is not None else (count - 1 if self.order == "descending" else 0)
        return (first + move * interval) % count

    @property
    def _early(self) -> int:
        # A first block of no step at all is skipped by the package's switch at construction.
        return 1 if self.variant == "released" and self.every > 1 else 0

    def before_step(self, step: int, optimizer: torch.optim.Optimizer, probe: Probe | None = None) -> None:
        """Wake the block of 0-based `step`; at a switch, drop the optimizer's state."""
        switches = step == 0 or (step + self._early) % self.every == 0
        wake(
            self._trained.values(),
            set(self._blocks[self.block(step)]),
            optimizer,
            forget="all" if switches else "asleep",
        )

    def state(self) -> dict[str, list[float]]:
        """Return nothing: seed and step say it all."""
        return {}

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Do nothing."""
