"""Adapters of peft, as peft builds them: injected into the model, trained by our loop, saved in peft's form.

A method is a configuration (`lora`, `others`). What is done around it here:

- Nonsense is refused before peft sees it: targets that match nothing, a rank above the smaller side.
- Draws come from the recipe's seed.
- An initialisation that moves the base weight (PiSSA, OLoRA, CorDA) is saved as the plain LoRA
  [B, -B_0] [A; A_0] of twice the rank on the untouched base; what it moved lies in every checkpoint.
- Prompts and prefixes are no part of the model: they live in the wrapper, which then is what runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import Probe
from scrimp.tuning import adapter_files
from scrimp.tuning.deltas.delta import Factors
from scrimp.tuning.targets import Place, check_rank, check_writable, find_targets

ADAPTER = "default"
TASK = "CAUSAL_LM"
Configure = Callable[[nn.Module, list[str] | None], Any]


class Memory(Protocol):
    """What one of peft's methods remembers beside its parameters."""

    def tensors(self, wrapper: Any) -> dict[str, Tensor]:
        """Return the tensors by name, which a resumed run fills in place."""

    def state(self, wrapper: Any) -> dict[str, list[float]]:
        """Return the numbers."""

    def load_state(self, wrapper: Any, state: Mapping[str, Sequence[float]]) -> None:
        """Take what `state` returned."""


@dataclass(slots=True, kw_only=True)
class PeftTuning:
    """Trains an adapter of peft's.

    Attributes:
        name: What a recipe calls it.
        configure: Makes peft's configuration for a model and the names of its targets.
        seed: Of all draws.
        targets: Which linear layers; None leaves it to peft, or there are none.
        rank: What must not exceed a target's smaller side; None is nothing.
        is_mergeable: Whether the model's own weights can hold the change.
        needs_biases: Whether a model whose targets have no bias cannot hold the change.
        wraps: Whether peft's wrapper runs, and not the model.
        moves_base: Whether the initialisation moves the base weights.
        finish: Changes the injected layers, such as `dora.factor_norms`.
        begin: Initialises from data before step 0.
        before_update: Called with peft's model before every update, when the gradients are there.
        after_update: Called after every update, with the steps done.
        memory: What must be resumed besides.
    """

    name: str
    configure: Configure
    seed: int
    targets: tuple[str, ...] | None
    rank: int | None = None
    is_mergeable: bool = True
    needs_biases: bool = False
    wraps: bool = False
    moves_base: bool = False
    finish: Callable[[nn.Module], None] | None = None
    begin: Callable[[Any, Probe], None] | None = None
    before_update: Callable[[Any], None] | None = None
    after_update: Callable[[Any, int], None] | None = None
    memory: Memory | None = None
    _peft: Any = field(default=None, init=False, repr=False)
    _initial: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _hooked: Any = field(default=None, init=False, repr=False)
    _step: int = field(default=0, init=False, repr=False)

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Inject the adapter, once, and return what trains by name.

        Raises:
            ScrimpError: A target matches nothing, the rank does not fit, or peft refuses the model.
        """
        if self._peft is None:
            self._inject(model)
        return {name: p for name, p in self.wrap(model).named_parameters() if p.requires_grad}

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return what runs: the model, or peft's wrapper around it."""
        return cast("nn.Module", self._peft) if self.wraps else model

    def before_step(self, step: int, optimizer: torch.optim.Optimizer, probe: Probe | None = None) -> None:
        """Initialise from data before step 0, and follow the optimizer's updates from then on."""
        self._step = step
        if step == 0 and self.begin is not None and probe is not None:
            self.begin(self._peft, probe)
            self._keep_initial()
        if self._hooked is not optimizer:
            self._hooked = optimizer
            if self.before_update is not None:
                optimizer.register_step_pre_hook(lambda *_: self._call(self.before_update))
            if self.after_update is not None:
                optimizer.register_step_post_hook(lambda *_: self._call(self.after_update, self._step + 1))

    def state(self) -> dict[str, list[float]]:
        """Return what is no tensor and changes."""
        return {} if self.memory is None else self.memory.state(self._peft)

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take what `state` returned, after `select`."""
        if self.memory is not None:
            self.memory.load_state(self._peft, state)

    def stored(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what a checkpoint holds: the adapter's tensors, and what its initialisation moved."""
        running = self.wrap(model).state_dict()
        own = self._own_names(running)
        kept = {name: tensor for name, tensor in running.items() if name in own}
        if self.moves_base:
            kept |= {n: t for n, t in running.items() if n.endswith(".base_layer.weight")} | self._initial
        if self.memory is not None:
            kept |= self.memory.tensors(self._peft)
        return kept

    def save(self, model: nn.Module, folder: Path, base: str) -> None:
        """Write the adapter in peft's form, for the untouched base."""
        if self.moves_base:
            adapter_files.write_lora(folder, dict(self._moved_factors()), base=base)
            return
        self._peft.peft_config[ADAPTER].base_model_name_or_path = base
        with _quiet():
            # Whether embeddings changed would be asked of the hub.
            self._peft.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # a form to fill in

    def merge(self, model: nn.Module) -> None:
        """Turn the adapted layers back into plain ones that hold the change.

        Raises:
            ScrimpError: No plain weight can hold it.
        """
        if not self.is_mergeable:
            raise ScrimpError(
                f"tune {self.name} cannot be merged: no weight of the model can hold what it does"
            )
        with _quiet():
            self._peft.merge_and_unload()

    def _inject(self, model: nn.Module) -> None:
        from peft import get_peft_model

        model.requires_grad_(False)
        places = [] if self.targets is None else find_targets(model, self.targets, tune=self.name)
        if self.rank is not None and places:
            check_rank(places, self.rank, tune=self.name)
        if self.moves_base:
            check_writable(places, tune=self.name)
        if self.needs_biases:
            self.is_mergeable = all(place.module.bias is not None for place in places)
        config = self.configure(model, _shortest(model, places) if places else None)
        on_meta = next(model.parameters()).is_meta
        if on_meta and hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # shapes alone count: nothing is decomposed
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(self.seed)
            try:
                self._peft = get_peft_model(cast("Any", model), config, adapter_name=ADAPTER)
            except (ValueError, TypeError, KeyError) as error:
                raise ScrimpError(
                    f"tune {self.name}: peft refuses {type(model).__name__}: {error}"
                ) from error
        if self.finish is not None:
            self.finish(model)
        self._keep_initial()

    def _keep_initial(self) -> None:
        """Keep the factors that the base was moved by."""
        if self.moves_base:
            for name, layer in self._layers():
                for part in ("lora_A", "lora_B"):
                    weight = getattr(layer, part)[ADAPTER].weight.detach()
                    kept = self._initial.setdefault(f"initial.{name}.{part}", torch.empty_like(weight))
                    kept.copy_(weight)

    def _moved_factors(self) -> Iterator[tuple[str, Factors]]:
        for name, layer in self._layers():
            a, b = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
            a0, b0 = self._initial[f"initial.{name}.lora_A"], self._initial[f"initial.{name}.lora_B"]
            scale = layer.scaling[ADAPTER]
            yield name, Factors(torch.cat([a, a0]), scale * torch.cat([b, -b0], 1))

    def _layers(self) -> Iterator[tuple[str, Any]]:
        from peft.tuners.lora import LoraLayer

        for name, module in self._peft.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                yield name, module

    def _own_names(self, running: Mapping[str, Tensor]) -> set[str]:
        """Return the names of the tensors that are not the base model's."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        tree = self.wrap(self._peft.get_base_model())
        trained = {name for name, p in tree.named_parameters() if p.requires_grad}
        layers = [(n, m) for n, m in tree.named_modules() if isinstance(m, BaseTunerLayer)]
        for name, layer in layers:
            for part in (*layer.adapter_layer_names, *layer.other_param_names):
                trained |= {key for key in running if key.startswith(f"{name}.{part}")}
        return trained

    def _call(self, function: Callable[..., None] | None, *more: Any) -> None:
        assert function is not None
        function(self._peft, *more)


def _shortest(model: nn.Module, places: Sequence[Place]) -> list[str]:
    """Return the last words of the targets' paths where those name nothing else, or the paths."""
    kinds = sorted({place.kind for place in places})
    names = {place.name for place in places}
    ends = {name for name, module in model.named_modules() if name.rpartition(".")[2] in kinds}
    return kinds if ends == names else sorted(names)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what peft warns of away from the screen: it is handled here, or said in the documentation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_numbers(name: str, rank: int, alpha: float, dropout: float) -> None:
    """Refuse numbers that make no adapter.

    Raises:
        ScrimpError: One does.
    """
    if type(rank) is not int or rank < 1:
        raise ScrimpError(f"tune {name}: rank {rank!r} must be a whole number, 1 or more")
    if not alpha > 0:
        raise ScrimpError(
            f"tune {name}: alpha {alpha!r} must be above 0: the change is alpha / rank times B A"
        )
    if not 0 <= dropout < 1:
        raise ScrimpError(f"tune {name}: dropout {dropout!r} must be at least 0 and below 1")
