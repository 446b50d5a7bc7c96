"""The factors of LoRA in pairs, and what happens to them around an optimizer's step.

    y = x W^T + s x A^T B^T          A: (..., r, in)   B: (..., out, r)   s: the layer's scale

Methods that look at both factors at once are a `PairTransform`, called by hooks right before and after
`optimizer.step()`: before it the gradients are whole and clipped (the norm that a run reports is the raw
gradients'), after it both factors are new. Nothing of a transform lives between steps but in the model's
buffers and the optimizer's state, so that a resumed run computes the same bits.

Oddities. Pairs are found by structure: any module with `lora_A` and `lora_B`, peft's (one of each for every
adapter) and our own. Updates inside the backward pass never have both gradients: `needs_step` says so, and
factors with hooks for them are refused before the first step. A simulation of the memory sees every factor
awake that ever is, since an alternating method needs the most memory in a step that is not the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import Adapter, Probe

Awake = Literal["a", "b", "both"]


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of one layer.

    Attributes:
        name: The layer's path in the model.
        module: What holds them.
        adapter: Which of peft's adapters; empty in a layer of our own.
    """

    name: str
    module: Any
    adapter: str

    @property
    def a(self) -> nn.Parameter:
        """(..., r, in)."""
        return _factor(self.module.lora_A, self.adapter)

    @property
    def b(self) -> nn.Parameter:
        """(..., out, r)."""
        return _factor(self.module.lora_B, self.adapter)

    @property
    def scale(self) -> float:
        """What B A is multiplied by, as the layer has it now."""
        return float(self.module.scaling[self.adapter] if self.adapter else self.module.scale)


def _factor(held: Any, adapter: str) -> nn.Parameter:
    factor: nn.Parameter = held[adapter].weight if adapter else held
    return factor


def find_pairs(model: nn.Module, *, tune: str) -> list[Pair]:
    """Return the pairs of a model in which a factor trains, in its order.

    Args:
        model: The model, its adapters in place.
        tune: Who asks, for the message.

    Raises:
        ScrimpError: There is none, or one is more than a product of two factors.
    """
    pairs = [pair for name, module in model.named_modules() for pair in _pairs_of(name, module)]
    pairs = [pair for pair in pairs if pair.a.requires_grad or pair.b.requires_grad]
    if not pairs:
        raise ScrimpError(f"tune {tune}: {type(model).__name__} has no LoRA pairs that train")
    for pair in pairs:
        _check(pair, tune)
    return pairs


def _pairs_of(name: str, module: nn.Module) -> Iterator[Pair]:
    held = getattr(module, "lora_A", None)
    if isinstance(held, nn.ModuleDict):
        yield from (Pair(name, module, adapter) for adapter in held)
    elif isinstance(held, nn.Parameter):
        yield Pair(name, module, "")


def _check(pair: Pair, tune: str) -> None:
    """Refuse a layer whose change is not s B A, or whose Gram matrices can never be inverted."""
    other = _other_change(pair)
    if other:
        raise ScrimpError(
            f"tune {tune}: the change of {pair.name} ({other}) is no product of two factors: use plain LoRA"
        )
    rank, largest = pair.a.shape[-2], min(pair.a.shape[-1], pair.b.shape[-2])
    if rank > largest:
        raise ScrimpError(
            f"tune {tune}: rank {rank} does not fit {pair.name}: the largest allowed is {largest}; "
            "lower --tune.rank or leave the layer out of --tune.targets"
        )


def _other_change(pair: Pair) -> str:
    """Return what a layer does that is not s B A; empty where it is just that."""
    module: Any = pair.module
    if not pair.adapter:
        own = {name for name, _ in module.named_parameters(recurse=False)}
        return "" if own == {"lora_A", "lora_B"} else type(module).__name__
    if pair.adapter in module.lora_variant:
        return type(module.lora_variant[pair.adapter]).__name__
    if getattr(module, "num_experts", 1) > 1:
        return "experts in one matrix"
    return "" if pair.a.ndim == 2 else type(module).__name__  # a convolution's


class PairTransform:
    """What a method does with pairs; each part does nothing unless a method says otherwise.

    Attributes:
        trained: The factors that ever train.
        buffers: The names of the buffers that it keeps in the layers.
    """

    trained: Awake = "both"
    buffers: tuple[str, ...] = ()

    def awake(self, step: int) -> Awake:
        """Return the factors that train at 0-based `step`."""
        return self.trained

    def begin(self, pairs: Sequence[Pair]) -> None:
        """Make the buffers, on the layers' devices."""

    def before_update(self, pairs: Sequence[Pair], optimizer: torch.optim.Optimizer) -> None:
        """Replace the gradients; called without autograd."""

    def after_update(self, pairs: Sequence[Pair], optimizer: torch.optim.Optimizer) -> None:
        """Follow what the step has changed; called without autograd."""


class Paired:
    """An adapter that trains through a transform of its pairs.

    Args:
        inner: Injects the pairs, and saves and merges them.
        transform: What happens around each step.
        name: What a recipe calls the whole.
    """

    needs_step = True  # updates inside the backward pass see one gradient at a time

    def __init__(self, inner: Adapter, transform: PairTransform, *, name: str) -> None:
        self.inner, self.transform, self.name = inner, transform, name
        self._pairs: list[Pair] = []
        self._hooked: torch.optim.Optimizer | None = None

    @property
    def is_mergeable(self) -> bool:
        """Whether the inner adapter is."""
        return self.inner.is_mergeable

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model as the inner adapter wraps it."""
        return self.inner.wrap(model)

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """Write the inner adapter."""
        self.inner.save(model, folder, base)

    def merge(self, model: nn.Module) -> None:
        """Fold the inner adapter into the model's own weights."""
        self.inner.merge(model)

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Inject the pairs, and return what ever trains by name.

        Raises:
            ScrimpError: There are no pairs, or the transform does not fit them.
        """
        trained = self.inner.select(model)
        if not self._pairs:
            self._pairs = find_pairs(model, tune=self.name)
            self.transform.begin(self._pairs)
        self._wake(self.transform.trained)
        return {name: p for name, p in trained.items() if p.requires_grad}

    def before_step(self, step: int, optimizer: torch.optim.Optimizer, probe: Probe | None = None) -> None:
        """Wake the factors of a step, and follow the optimizer's updates from then on.

        Raises:
            ScrimpError: Updates run inside the backward pass.
        """
        if any(p._post_accumulate_grad_hooks for pair in self._pairs for p in (pair.a, pair.b)):
            raise ScrimpError(
                f"tune {self.name}: it needs both gradients of a pair at once, and updates inside the "
                "backward pass see one at a time: leave --optimizer.fused-backward out"
            )
        self.inner.before_step(step, optimizer, probe)
        simulated = detect_fake_mode() is not None
        self._wake(self.transform.trained if simulated else self.transform.awake(step))
        if self._hooked is not optimizer:
            self._hooked = optimizer
            optimizer.register_step_pre_hook(self._before_update)
            optimizer.register_step_post_hook(self._after_update)

    def state(self) -> dict[str, list[float]]:
        """Return the inner adapter's."""
        return self.inner.state()

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take the inner adapter's."""
        self.inner.load_state(state)

    def stored(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what a checkpoint holds: the inner adapter's tensors and the transform's."""
        own = {
            f"{pair.name}.{buffer}": pair.module.get_buffer(buffer)
            for pair in self._pairs
            for buffer in self.transform.buffers
        }
        return {**self.inner.stored(model), **own}

    def _wake(self, awake: Awake) -> None:
        for pair in self._pairs:
            for factor, letter in ((pair.a, "a"), (pair.b, "b")):
                factor.requires_grad_(awake in (letter, "both"))
                if not factor.requires_grad:
                    factor.grad = None

    @torch.no_grad()
    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        ready = [pair for pair in self._pairs if pair.a.grad is not None or pair.b.grad is not None]
        self.transform.before_update(ready, optimizer)

    @torch.no_grad()
    def _after_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.transform.after_update(self._pairs, optimizer)
