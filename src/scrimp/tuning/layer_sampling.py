"""Layer sampling: a few decoder layers train at a time, drawn anew every so many steps.

    interval = step // every        awake = `layers` of the decoder layers, drawn by (seed, interval, layer)

What lies outside the layers (embeddings, head, final norm) always trains. A layer that falls asleep gives
its gradients and its optimizer state back, and begins anew, bias correction included, when it wakes; one
that is drawn twice in a row just goes on. A step's draw does not depend on the one before, so a resumed run
draws what the other would have drawn, and only what was measured (`chances`) has to be saved.

Three named schedules differ in how likely each layer is:

    LISA     equally
    OwLore   by the share of outliers in it (the paper runs GaLore of rank 256 on what is awake)
    IST      by an importance that is learnt from losses; made for adapters

What the authors' code does otherwise:

- LISA's (LMFlow) never frees the state of what sleeps, so that memory grows until every layer has been
  drawn; the paper's figures come from intervals run as processes of their own, which freed everything.
- OwLore's keeps moments and projector of a layer that sleeps, and uses them when it wakes.
- IST's is as here, with its score's sign turned: there a high score is drawn rarely.
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
from scrimp.tuning.chances import Chances, Importance, OutlierRatio, Uniform, draw
from scrimp.tuning.layers import Layers, find_layers, wake


@dataclass(slots=True, kw_only=True)
class LayerSampling:
    """Wakes a few decoder layers at a time.

    Attributes:
        name: What a recipe calls it.
        layers: How many are awake; below 1 a share of all, rounded down, but one at the least.
        every: Steps between draws; the first is before step 0.
        seed: Of the draws.
        chances: How likely each layer is.
        asleep: What becomes of the optimizer state of a layer that falls asleep.

    Memory:
        Gradients and optimizer state of everything outside the layers and of `layers` layers.
    """

    name: str
    layers: float
    every: int
    seed: int
    chances: Chances
    asleep: Literal["drop", "keep"] = "drop"
    _found: Layers | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_period(self.name, self.every)
        if not (0 < self.layers < 1 or self.layers == int(self.layers) > 0):
            raise ScrimpError(
                f"tune {self.name}: layers {self.layers} must be a whole number above 0, or a share below 1"
            )

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return every parameter that will ever train, by name.

        Of a model with adapters, that is what they left unfrozen; of another one, all.

        Raises:
            ScrimpError: The model has no list of decoder layers, or fewer than are to be awake.
        """
        found = find_layers(model, tune=self.name)
        if self.layers > len(found.modules):
            raise ScrimpError(
                f"tune {self.name}: layers {self.layers:g} of a model that has {len(found.modules)}; "
                "ask for fewer, or use --tune full"
            )
        self._found = found
        return found.trainable

    def awake(self, step: int) -> tuple[int, ...]:
        """Return the decoder layers that train at 0-based `step`, by their numbers."""
        total = len(self._layers.modules)
        count = max(1, int(self.layers if self.layers >= 1 else self.layers * total))
        return draw(self.chances.weights(total), count, derive(self.seed, "layers", step // self.every))

    def before_step(self, step: int, optimizer: torch.optim.Optimizer, probe: Probe | None = None) -> None:
        """Wake what trains at 0-based `step`, and free what the rest held."""
        layers = self._layers
        self.chances.renew(layers, step, probe)
        awake = {*layers.embedding, *layers.head}
        awake.update(p for index in self.awake(step) for p in layers.decoder[index])
        wake(
            layers.trainable.values(), awake, optimizer, forget="asleep" if self.asleep == "drop" else "none"
        )

    def state(self) -> dict[str, list[float]]:
        """Return what was measured, for a checkpoint."""
        return self.chances.state()

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take what `state` returned."""
        self.chances.load_state(state)

    @property
    def _layers(self) -> Layers:
        assert self._found is not None, "select comes first"
        return self._found


def check_period(name: str, every: int) -> None:
    """Refuse a period that is no whole number of steps.

    Raises:
        ScrimpError: It is none.
    """
    if type(every) is not int or every < 1:
        raise ScrimpError(f"tune {name}: every {every!r} must be a whole number of steps, 1 or more")


def LISA(*, layers: int = 2, every: int = 20, seed: int = 0) -> LayerSampling:
    """Layerwise importance sampled AdamW: `layers` decoder layers, drawn evenly, and all outside them.

    References:
        LISA, Pan et al., NeurIPS 2024, arXiv 2403.17919.
    """
    return LayerSampling(name="lisa", layers=layers, every=every, seed=seed, chances=Uniform())


def OwLore(*, layers: int = 5, every: int = 50, threshold: float = 13.0, seed: int = 0) -> LayerSampling:
    """Outlier-weighed layerwise sampling: layers with many outliers are drawn more often.

    The ratios are measured before the first step, on the tokens of the probe; without one, by the weights
    alone. A model without a single outlier (a new one) is drawn from evenly.

    References:
        OwLore, Li et al., 2024, arXiv 2405.18380.
    """
    chances = OutlierRatio(threshold=threshold)
    return LayerSampling(name="owlore", layers=layers, every=every, seed=seed, chances=chances)


def IST(
    *,
    layers: float = 0.25,
    every: int = 1,
    update_every: int = 10,
    asleep: Literal["drop", "keep"] = "keep",
    seed: int = 0,
) -> LayerSampling:
    """Importance-aware sparse tuning: a quarter of the layers, the important ones more often.

    Layers are drawn at every step, so their state, which for adapters is small, is kept (as the authors do);
    with a larger `every`, `asleep="drop"` frees it. Gradients are freed in either case.

    Raises:
        ScrimpError: `update_every` is no multiple of `every`: the importances would change within a draw.

    References:
        Layer-wise Importance Matters (IST), Yao et al., Findings of EMNLP 2024, arXiv 2410.11772; constants
        are those of the authors' code (antgroup/importance-aware-sparse-tuning-IST-paper, ist.py).
    """
    check_period("ist", every)
    check_period("ist", update_every)
    if update_every % every:
        raise ScrimpError(f"tune ist: update_every {update_every} must be a multiple of every {every}")
    chances = Importance(every=update_every, seed=seed)
    return LayerSampling(name="ist", layers=layers, every=every, seed=seed, chances=chances, asleep=asleep)
