"""Low-rank adapters whose ranks grow where it pays: IncreLoRA and TriAdaptLoRA, saved as plain LoRAs.

m, n: a layer's outputs and inputs; R: the largest rank that a layer may reach, for which there is room from
the start. Bytes count an fp32 parameter with its gradient and AdamW's two moments as 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from scrimp.base.errors import ScrimpError
from scrimp.base.seeds import derive
from scrimp.tuning.deltas.delta import Delta
from scrimp.tuning.deltas.growing import RankOnes, Triangular
from scrimp.tuning.deltas.tuning import DeltaTuning
from scrimp.tuning.low_rank.rank_growth import Orthogonality, ScoredGrowth, ThresholdGrowth
from scrimp.tuning.option_checks import check_counts
from scrimp.tuning.targets import ALL_LINEAR, Place, check_rank


def IncreLora(
    *,
    rank: int = 2,
    first_rank: int = 1,
    largest: int | None = None,
    increase: int | None = None,
    top: int | None = None,
    warmup: int | None = None,
    interval: int | None = None,
    measure_every: int | None = None,
    alpha: float = 16.0,
    penalty: float = 0.1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    steps: int | None = None,
    targets: tuple[str, ...] = (ALL_LINEAR,),
    seed: int = 0,
) -> DeltaTuning:
    """Return IncreLoRA: ranks grow by and by in the layers to whose change the loss is most sensitive.

        change = B diag(e) A alpha / (rho + 1e-5)       rho: the layer's rank so far

    After `warmup`, every `interval` steps, the `top` highest layers grow by `increase`, until the mean rank
    is `rank`. The vectors that come next learn ahead, with the coefficient 1e-5.

    Memory: 16 R (m + n + 1) bytes a layer: that of a LoRA of rank R = `largest`, not of `rank` (the authors
    add parameters as they grow). A measurement is one more pass over some of a step's tokens.

    The released code measures at every step with m x n matrices, lets ties grow too, penalises each grown
    block by itself, and gives new vectors a fresh optimizer state. Its dropout (0.2) is not here. Its scripts
    fit warmup, interval and top to the task (1000, 1000 and 2 for MNLI's 110,000 steps, 100, 100 and 5 for
    RTE's 3,900), and so do the defaults.

    Args:
        rank: The mean rank at the end.
        first_rank: Of every layer at first.
        largest: What a layer may grow to; None is four times `rank`, or the layer's smaller side.
        increase: By how much a layer grows at a time, and how many vectors learn ahead; None is half of
            `rank`, as the authors have it for 2, 4, 6 and 8.
        top: How many layers grow at a time; None is 2, or so many that 15 times suffice.
        warmup: The step after which they do; None is `interval`.
        interval: Steps between; a multiple of `measure_every`. None is a fortieth of the run, at most 1000.
        measure_every: Steps between measurements; None is about a tenth of `interval`.
        alpha: The scale times the rank.
        penalty: Weight of the orthogonality of A and B in the loss.
        beta1: Smooths the measured sensitivity.
        beta2: Smooths its deviation.
        steps: The run's; None is a long one.
        targets: Which layers.
        seed: Of all vectors.

    Raises:
        ScrimpError: The numbers do not fit each other, or a target.

    References:
        IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning, Zhang et al.,
        arXiv 2308.12043.
    """
    _check_ranks("increlora", first=first_rank, rank=rank, largest=largest)
    increase = max(1, rank // 2) if increase is None else increase
    interval = _share_of(steps, 40, most=1000) if interval is None else interval
    given = {"increase": increase, "interval": interval} | ({} if top is None else {"top": top})
    check_counts("increlora", given)
    measure_every = _tenth(interval) if measure_every is None else measure_every
    check_counts("increlora", {"measure_every": measure_every})
    if interval % measure_every:
        raise ScrimpError(
            f"tune increlora: interval {interval} must be a multiple of measure_every ({measure_every})"
        )
    if not (0 < beta1 < 1 and 0 < beta2 < 1):
        raise ScrimpError(f"tune increlora: beta1 ({beta1}) and beta2 ({beta2}) must be between 0 and 1")

    def make(places: Sequence[Place]) -> list[Delta]:
        check_rank(places, largest or rank, tune="increlora")
        return [_delta(place) for place in places]

    def _delta(place: Place) -> RankOnes:
        m, n = place.module.weight.shape
        own = derive(seed, "increlora", place.number)
        room = largest or min(4 * rank, m, n)
        return RankOnes(n, m, rank=first_rank, ahead=increase, largest=room, alpha=alpha, seed=own)

    growth = ScoredGrowth(
        rank=first_rank,
        target=rank,
        warmup=interval if warmup is None else warmup,
        interval=interval,
        every=measure_every,
        top=top,
        increase=increase,
        beta1=beta1,
        beta2=beta2,
    )
    return DeltaTuning(
        name="increlora",
        make=make,
        targets=targets,
        events=(growth, Orthogonality(weight=penalty)),
        settings={"rank": rank, "first_rank": first_rank, "alpha": alpha},
    )


def TriAdaptLora(
    *,
    rank: int = 8,
    largest: int | None = None,
    first: int | None = None,
    last: int | None = None,
    every: int | None = None,
    growth: Literal["linear", "exponential"] = "linear",
    mu: float = 0.5,
    alpha: float = 16.0,
    penalty: float = 0.5,
    steps: int | None = None,
    targets: tuple[str, ...] = (ALL_LINEAR,),
    seed: int = 0,
) -> DeltaTuning:
    """Return TriAdaptLoRA: a core of two triangles, whose rank grows where the core changes most.

        change = B (C_lower + C_upper) A alpha / (rho + 1e-5)       rho: the layer's rank so far

    Layers start with half of `rank`, and grow by as much. From step `first` to `last` a threshold says how
    many do; those where |C|_F over the number of blocks changed most since the last time.

    Memory: 16 (R (m + n) + 2 R^2) bytes a layer: that of a LoRA of rank R = `largest`, not of `rank`.

    The fork of peft that was read starts B and all of C at zero, and new blocks in all factors, and so
    cannot learn: here vectors are random and C is zero. Unverified: when thresholds are applied, their
    exponent mu, and the defaults but for the penalty are ours.

    Args:
        rank: The mean rank at the end; even.
        largest: What a layer may grow to; None is twice `rank`, or the layer's smaller side.
        first: The first step at which ranks may grow; None is a twentieth of the run, at most 100.
        last: The last one; None is ten times `first`.
        every: Steps between; None is `first`.
        growth: The threshold, linear in time or exponential.
        mu: The exponent of the latter.
        alpha: The scale times the rank.
        penalty: Weight of the orthogonality of A and B in the loss.
        steps: The run's; None is a long one.
        targets: Which layers.
        seed: Of all vectors.

    Raises:
        ScrimpError: The numbers do not fit each other, or a target.

    References:
        TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient
        Fine-Tuning, Liang, Wang and Zeng, arXiv 2501.08008.
    """
    first = _share_of(steps, 20, most=100) if first is None else first
    last = 10 * first if last is None else last
    every = max(1, first) if every is None else every
    check_counts("triadapt-lora", {"every": every})
    half = rank // 2
    if rank < 2 or rank % 2:
        raise ScrimpError(
            f"tune triadapt-lora: rank {rank} must be even and at least 2: layers grow by its half"
        )
    _check_ranks("triadapt-lora", first=half, rank=rank, largest=largest)
    if not 0 <= first < last:
        raise ScrimpError(f"tune triadapt-lora: first ({first}) must be a step before last ({last})")
    if growth not in ("linear", "exponential"):
        raise ScrimpError(f"tune triadapt-lora: growth {growth!r} must be linear or exponential")

    def make(places: Sequence[Place]) -> list[Delta]:
        check_rank(places, largest or rank, tune="triadapt-lora")
        return [_delta(place) for place in places]

    def _delta(place: Place) -> Triangular:
        m, n = place.module.weight.shape
        own = derive(seed, "triadapt-lora", place.number)
        room = largest or min(2 * rank, m, n)
        return Triangular(n, m, rank=half, largest=room, alpha=alpha, seed=own)

    schedule = ThresholdGrowth(
        target=rank, first=first, last=last, every=every, growth=growth, mu=mu, increase=half
    )
    return DeltaTuning(
        name="triadapt-lora",
        make=make,
        targets=targets,
        events=(schedule, Orthogonality(weight=penalty)),
        settings={"rank": rank, "alpha": alpha, "growth": growth},
    )


def _check_ranks(tune: str, *, first: int, rank: int, largest: int | None) -> None:
    if not 1 <= first <= rank <= (largest or rank):
        raise ScrimpError(
            f"tune {tune}: the first rank ({first}), the mean rank at the end ({rank}) and the largest "
            f"({largest or 'any'}) must not fall"
        )


def _share_of(steps: int | None, parts: int, *, most: int) -> int:
    """Return a part of a run in steps, from 1 to `most`, which it is where the run's length is unknown."""
    return most if steps is None else min(most, max(1, steps // parts))


def _tenth(interval: int) -> int:
    """Return the largest divisor that is no more than a tenth, or 1."""
    return next((part for part in range(interval // 10, 0, -1) if interval % part == 0), 1)
