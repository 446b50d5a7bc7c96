"""Methods that train some entries of the weights themselves: NeuroAda, SHiRA and scalable sparse fine-tuning.

They differ in which entries train (`masks`), and whether that changes (`selection`); what
computes with them is one delta (`deltas.sparse`). All are saved as peft's Supertuning.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from scrimp.base.errors import ScrimpError
from scrimp.tuning.deltas.sparse import Sparse
from scrimp.tuning.deltas.tuning import DeltaTuning, Event
from scrimp.tuning.option_checks import check_choice
from scrimp.tuning.sparse.masks import (
    Choose,
    FromGradient,
    Scores,
    choose,
    largest,
    largest_of_rows,
    magnitudes,
    random_scores,
)
from scrimp.tuning.sparse.selection import Reselected, Reselection
from scrimp.tuning.targets import ALL_LINEAR, Place

Count = Callable[[tuple[int, int]], int]
Pick = Literal["largest", "smallest", "random", "gradient"]
Mask = Literal["random", "magnitude", "gradient", "snip"]


def NeuroAda(
    *, per_row: int = 20, pick: Pick = "largest", targets: tuple[str, ...] = (ALL_LINEAR,), seed: int = 0
) -> DeltaTuning:
    """Train the k largest entries of every row of every target: each output neuron gets some.

        W_ij + v_ij   for the k columns j with the largest |W_ij| of row i; v = 0 at first

    The released code makes W + v anew out of place, so that a copy of every weight waits for the backward
    pass, keeps indices in int64, trains v in bf16, and takes k > in for k = in.

    Args:
        per_row: k.
        pick: By |W|, largest or smallest, at random, or by the largest gradient of a probe before step 0.
        targets: Which layers.
        seed: Of random entries.

    Memory:
        8 bytes an entry (value and index), 4 for its gradient, 8 for AdamW: 20 out k a matrix.

    References:
        NeuroAda: Activating Each Neuron's Potential for Parameter-Efficient Fine-Tuning, EMNLP 2025,
        arXiv 2510.18940.
    """
    _check_whole("neuroada", "per_row", per_row)
    check_choice("neuroada", "pick", pick, ("largest", "smallest", "random", "gradient"))

    def scores(place: Place) -> Scores:
        if pick in ("largest", "smallest"):
            return magnitudes(place, tune="neuroada", sign=1 if pick == "largest" else -1)
        return random_scores(place, seed=seed)

    return DeltaTuning(
        name="neuroada",
        make=_maker("neuroada", "per_row", lambda shape: per_row, largest_of_rows, scores),
        targets=targets,
        events=_from_gradient(pick, lambda shape: per_row, largest_of_rows),
        saves="shira",
        settings={"per_row": per_row, "pick": pick},
    )


def Shira(
    *, rank: int = 32, mask: Mask = "random", targets: tuple[str, ...] = (ALL_LINEAR,), seed: int = 0
) -> DeltaTuning:
    """Train r (out + in) entries of every target, as many as a LoRA of rank r has: a change of high rank.

    peft's has random masks only (others are the user's to write), keeps a copy of every weight for the
    backward pass, and a checkpoint of it is what this saves.

    Args:
        rank: r.
        mask: At random; by |W| ("magnitude", the paper's WM); by |dW| ("gradient") or |W dW| ("snip") of a
            probe before step 0.
        targets: Which layers.
        seed: Of a random mask.

    Memory:
        20 r (out + in) bytes a matrix: value, index, gradient and AdamW.

    References:
        Sparse High Rank Adapters, Bhardwaj et al., NeurIPS 2024, arXiv 2406.13175.
    """
    _check_whole("shira", "rank", rank)
    check_choice("shira", "mask", mask, ("random", "magnitude", "gradient", "snip"))

    def count(shape: tuple[int, int]) -> int:
        return rank * sum(shape)

    def scores(place: Place) -> Scores:
        if mask == "magnitude":
            return magnitudes(place, tune="shira")
        return random_scores(place, seed=seed)

    return DeltaTuning(
        name="shira",
        make=_maker("shira", "rank", count, largest, scores),
        targets=targets,
        events=_from_gradient(mask, count, largest),
        saves="shira",
        settings={"rank": rank, "mask": mask},
    )


def SFT(
    *,
    density: float = 0.01,
    select: Literal["rigl", "sm3"] = "rigl",
    every: int = 20,
    accumulate: int = 5,
    share: float = 0.2,
    decay: Literal["linear", "cosine"] = "linear",
    steps: int | None = None,
    targets: tuple[str, ...] = (ALL_LINEAR,),
    seed: int = 0,
) -> DeltaTuning:
    """Train a changing sparse set of entries: see `selection` for the rules.

    The released code takes `density` of the whole model's parameters, embeddings included, and copies each
    weight in the forward and again in the backward pass. The paper decays the values (that is, towards the
    pre-trained weights) with 1 to 30, and takes Adam's eps as 1e-6.

    Args:
        density: Share of each target's entries that train.
        select: SFT-AG ("rigl", with AdamW), or SFT-MA ("sm3", with plain SGD).
        every: Steps between replacements; 0 replaces none.
        accumulate: Steps whose gradients score (rigl).
        share: Of the entries, how many are replaced at first.
        decay: How that falls over the run.
        steps: The run's; None keeps the share.
        targets: Which layers.
        seed: Of the first entries.

    Memory:
        rigl: 20 bytes an entry as with any sparse delta under AdamW, and 20 for ages and candidates.
        sm3: 12 bytes an entry, and 4 (out + in).

    References:
        Scaling Sparse Fine-Tuning to Large Language Models, Ansell et al., 2024, arXiv 2401.16405.
    """
    check_choice("sft", "select", select, ("rigl", "sm3"))
    check_choice("sft", "decay", decay, ("linear", "cosine"))
    for name, value in (("density", density), ("share", share)):
        if not 0 < value <= 1:
            raise ScrimpError(f"tune sft: {name} {value} is no share: take more than 0, and 1 at most")
    if every != 0:
        _check_whole("sft", "every", every)
        _check_whole("sft", "accumulate", accumulate)
        if accumulate > every:
            raise ScrimpError(
                f"tune sft: accumulate {accumulate} is more than every {every}: gradients score between two "
                "replacements"
            )
    rule = Reselection(
        select=select,
        every=every or sys.maxsize,
        accumulate=accumulate,
        share=share,
        decay=decay,
        steps=steps,
    )
    make = _maker(
        "sft",
        "density",
        lambda shape: max(1, int(density * shape[0] * shape[1])),
        largest,
        lambda place: random_scores(place, seed=seed),
    )
    return DeltaTuning(
        name="sft" if select == "rigl" else "sft-ma",
        make=lambda places: [Reselected(delta, select) for delta in make(places)],
        targets=targets,
        events=(rule,) if every or select == "sm3" else (),  # sm3 is a preconditioner, too
        saves="shira",
        settings={"density": density, "select": select},
    )


def SftMa(
    *,
    density: float = 0.01,
    steps: int | None = None,
    targets: tuple[str, ...] = (ALL_LINEAR,),
    seed: int = 0,
) -> DeltaTuning:
    """Train a changing sparse set of entries by SM3: `SFT` with select "sm3", under SGD without momentum.

    Args:
        density: Share of each target's entries that train.
        steps: The run's; None keeps the share that is replaced.
        targets: Which layers.
        seed: Of the first entries.

    Memory:
        12 bytes an entry, and 4 (out + in).

    References:
        As `SFT`.
    """
    return SFT(density=density, select="sm3", steps=steps, targets=targets, seed=seed)


def _maker(
    tune: str, option: str, count: Count, chooser: Choose, scores: Callable[[Place], Scores]
) -> Callable[[Sequence[Place]], Sequence[Sparse]]:
    """Return what makes the deltas of all targets, once it knows that every one has as many entries."""

    def make(places: Sequence[Place]) -> list[Sparse]:
        for place in places:
            room = place.module.in_features * (1 if chooser is largest_of_rows else place.module.out_features)
            _check_fits(tune, option, place, count(_shape(place)), room)
        return [choose(place, count(_shape(place)), scores(place), chooser) for place in places]

    return make


def _check_fits(tune: str, option: str, place: Place, count: int, room: int) -> None:
    if count > room:
        sides = " x ".join(map(str, _shape(place)))
        raise ScrimpError(
            f"tune {tune}: {count} entries do not fit {place.name} ({sides}), which has {room}; lower "
            f"--tune.{option} or leave the layer out of --tune.targets"
        )


def _shape(place: Place) -> tuple[int, int]:
    return place.module.out_features, place.module.in_features


def _from_gradient(score: Any, count: Count, chooser: Choose) -> tuple[Event, ...]:
    return (FromGradient(count=count, chooser=chooser, score=score),) if score in ("gradient", "snip") else ()


def _check_whole(tune: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ScrimpError(f"tune {tune}: {name} {value!r} is no whole number from 1 on")
