"""Adapters after which the model is quantised: PEQA and L4Q.

method   the base while it trains     what trains                     afterwards
peqa     codes and scales             the scales                      the same codes, other scales
l4q      as it was                    LoRA's factors and the grids    codes and scales
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from scrimp.base.errors import ScrimpError
from scrimp.base.seeds import derive
from scrimp.tuning.deltas.low_rank import lora_start
from scrimp.tuning.deltas.quant_aware import QuantAware
from scrimp.tuning.deltas.quantised import TrainedScales
from scrimp.tuning.deltas.tuning import DeltaTuning
from scrimp.tuning.option_checks import check_positive
from scrimp.tuning.targets import Place, check_rank, check_writable


def PEQA(
    *, bits: int = 4, group: int | None = None, targets: tuple[str, ...] = ("all-linear",)
) -> DeltaTuning:
    """PEQA: the base in a few bits, of which the scales train.

    W' = (s + ds) (Q - z): Q and z are rounded to nearest at the start and stay.

    Args:
        bits: Of a code, 2 to 8: 4 and 3 in the paper.
        group: Elements of a row that share a scale; None takes whole rows, as the paper does first (it also
            tries groups of 256 to 64).
        targets: Which layers.

    Memory:
        in out / 2 bytes of codes (in out beyond four bits), and 21 bytes a scale (itself, its zero point, its
        change, gradient, AdamW's moments). Activations: out a token for whole rows, in a token for groups.

    References:
        Memory-Efficient Fine-Tuning of Compressed LLMs via sub-4-bit Integer Quantization, Kim et al.,
        NeurIPS 2023, arXiv 2305.14152.

    Raises:
        ScrimpError: An option is out of its range.
    """
    name = "peqa"
    _check_bits(name, bits)
    if group is not None:
        _check_group(name, group)

    def make(places: Sequence[Place]) -> list[TrainedScales]:
        check_writable(places, tune=name)
        return [_take_over(place.module, bits, group) for place in places]

    settings = {"bits": bits, "group": group}
    return DeltaTuning(name=name, make=make, targets=targets, saves="own", settings=settings)


def L4Q(
    *,
    rank: int = 4,
    alpha: float = 8.0,
    bits: int = 4,
    group: int = 128,
    targets: tuple[str, ...] = ("all-linear",),
    seed: int = 0,
) -> DeltaTuning:
    """L4Q: a LoRA trained through the rounding of base and LoRA together, and the grid with it.

    W' = q clamp(round((W + s B A - o) / q)) + o with s = alpha / r.

    Args:
        rank: r.
        alpha: s = alpha / r.
        bits: Of a code, 2 to 8.
        group: Elements of a row that share q and o.
        targets: Which layers.
        seed: Of A.

    Memory:
        The base as it is; 16 r (in + out) + 32 out in / group bytes that train (themselves, gradient, AdamW's
        moments) a matrix; activations in a token.

    References:
        L4Q: Parameter Efficient Quantization-Aware Fine-Tuning on Large Language Models, Jeon et al., ACL
        2025, arXiv 2402.04902. Rank and alpha are ours.

    Raises:
        ScrimpError: An option is out of its range, or the rank above a layer's smaller side.
    """
    name = "l4q"
    check_positive(name, {"rank": rank, "alpha": alpha})
    _check_bits(name, bits)
    _check_group(name, group)

    def make(places: Sequence[Place]) -> list[QuantAware]:
        check_rank(places, rank, tune=name)
        return [
            QuantAware(
                place.module.weight,
                lora_start(place.module, rank, seed=derive(seed, name, place.number)),
                scale=alpha / rank,
                bits=bits,
                group=group,
            )
            for place in places
        ]

    settings = {"rank": rank, "alpha": alpha, "bits": bits, "group": group}
    return DeltaTuning(name=name, make=make, targets=targets, saves="own", settings=settings)


def _take_over(layer: nn.Linear, bits: int, group: int | None) -> TrainedScales:
    """Make the codes of a layer's weight, and let go of the weight."""
    delta = TrainedScales(layer.weight, bits=bits, group=group)
    layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
    return delta


def _check_bits(name: str, bits: int) -> None:
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ScrimpError(
            f"tune {name}: bits must be a whole number from 2 to 8, not {bits!r}; usual are 4 and 3"
        )


def _check_group(name: str, group: int) -> None:
    if type(group) is not int or group < 2:
        raise ScrimpError(
            f"tune {name}: group must be a whole number from 2, not {group!r}; usual are 64 and 128"
        )
