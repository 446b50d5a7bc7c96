"""What a recipe will need, before anything is allocated.

The tensors that stay are counted, what is alive in between comes from a traced step (`profiling`), and
`account` puts the moments together. A model that cannot be traced is answered by the closed formula
(`formula`), with the larger error stated. With the traces in the cache, no torch is needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path
from typing import TYPE_CHECKING

from scrimp import models
from scrimp.base.ledger import Ledger
from scrimp.defaults import settle
from scrimp.memory.account import Parts, ledger
from scrimp.memory.heap import slack_bytes
from scrimp.memory.machine import Machine
from scrimp.memory.profiles import Profiles, Say
from scrimp.memory.untraceable import Untraceable
from scrimp.recipe import Recipe, replace

if TYPE_CHECKING:
    from scrimp.memory.profile import ModelSize

GGUF_COPIES = 2  # of a parameter while it is decoded: 1.7 were seen
DTYPES = {"fp32": "F32", "bf16-mixed": "F32", "bf16": "BF16"}  # of the weights, as safetensors writes them


@dataclass(slots=True, kw_only=True)
class Predictor:
    """Predicts recipes of one model.

    Attributes:
        profiles: The model's traces.
        fixed: Bytes held before the model exists.
    """

    profiles: Profiles
    fixed: int

    def ledger(self, recipe: Recipe) -> Ledger:
        """Return the ledger of a settled recipe whose micro-batch is given.

        Raises:
            ScrimpError: Not even the model's configuration can be used.
        """
        assert recipe.micro_batch is not None
        try:
            size = self.profiles.size(recipe)
            parts = Parts(
                size=size,
                step=self.profiles.step(recipe, recipe.micro_batch),
                evaluation=self.profiles.evaluation(recipe, recipe.micro_batch),
                optimizer=self.profiles.optimizer(recipe),
                fixed=self.fixed,
                file_bytes=_file_bytes(self.profiles.source, recipe, size.largest),
            )
        except Untraceable as error:
            from scrimp.memory.formula import estimate

            return estimate(self.profiles.read_config(), recipe, fixed=self.fixed, reason=str(error))
        found = ledger(parts, recipe)
        if recipe.device != "cpu":
            return found
        return ledger(
            replaced(parts, slack=slack_bytes(found, recipe)), recipe
        )  # it follows from the tensors

    def size(self, recipe: Recipe) -> ModelSize:
        """Return the size of a recipe's model."""
        return self.profiles.size(recipe)

    def fit(self, recipe: Recipe, sizes: Sequence[int], budget: int) -> tuple[Recipe, Ledger]:
        """Return a recipe with the largest of some micro-batches that fits, or else the smallest.

        Args:
            recipe: The settled recipe.
            sizes: From the largest to the smallest.
            budget: Bytes on the device.
        """
        *larger, smallest = sizes
        least = self._sized(recipe, smallest)
        if needed(least[1], recipe) <= budget:
            for size in larger:
                sized, found = self._sized(recipe, size)
                if needed(found, recipe) <= budget:
                    return sized, found
        return least

    def _sized(self, recipe: Recipe, micro_batch: int) -> tuple[Recipe, Ledger]:
        sized = replace(recipe, {"micro_batch": micro_batch})
        return sized, self.ledger(sized)


CUDA_FRAGMENTATION = 0.06  # of the peak


def needed(found: Ledger, recipe: Recipe) -> int:
    """Return the budget that a ledger asks for: its peak and the stated error.

    On CUDA the caching allocator's blocks are cut up: 6 % of the peak is what that costs.
    """
    error = max(found.error, CUDA_FRAGMENTATION if recipe.device == "cuda" else 0.0)
    return round(found.peak.total * (1 + error))


def divisors(batch: int) -> list[int]:
    """Return the micro-batches that divide a batch, the largest first."""
    return [size for size in range(batch, 0, -1) if batch % size == 0]


def prepare(
    recipe: Recipe,
    machine: Machine,
    *,
    trust_remote_code: bool = False,
    folder: Path | None = None,
    say: Say = lambda *_: None,
) -> tuple[Predictor, Recipe]:
    """Find a recipe's model, and settle what neither data nor memory decide.

    Args:
        recipe: What the user asked for.
        machine: What it is to run on.
        trust_remote_code: Let the model's own Python code run.
        folder: Where traces are kept; None is the cache.
        say: Told what is going on.
    """
    source = models.locate(recipe.model.name, trust_remote_code=trust_remote_code)
    profiles = Profiles(source, trust_remote_code=trust_remote_code, say=say)
    if folder is not None:
        profiles = Profiles(source, trust_remote_code=trust_remote_code, say=say, folder=folder)
    device = machine.device if recipe.device == "auto" else recipe.device
    # Of a device that is not here, the best is assumed: any GPU of the last years multiplies in bf16.
    has_bf16 = machine.has_bf16 if device == machine.device else device == "cuda"
    settled = settle(recipe, source, device=device, has_bf16=has_bf16, model=profiles.dimensions())
    return Predictor(profiles=profiles, fixed=machine.fixed_bytes(settled)), settled


def _file_bytes(source: models.Source, recipe: Recipe, largest: int) -> int:
    """Return the bytes of weight files that must be read beside the model, since their dtype is another.

    Args:
        source: Where the weights come from.
        recipe: What is to run.
        largest: Bytes of the largest parameter, of which decoding a GGUF file holds copies.
    """
    if recipe.model.init != "weights" or source.path is None:
        return 0
    if source.kind == "gguf":
        return source.path.stat().st_size + GGUF_COPIES * largest
    wanted, size = DTYPES[recipe.precision], 0
    for path in source.path.glob("*.safetensors"):
        header = {}
        with (
            suppress(OSError, ValueError),
            path.open("rb") as file,
        ):  # a damaged file is refused when it is loaded
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        if any(entry.get("dtype") != wanted for name, entry in header.items() if name != "__metadata__"):
            size += path.stat().st_size
    return size
