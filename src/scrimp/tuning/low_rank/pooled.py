"""Low-rank adapters whose factors are shared: MoS, S2-LoRA and Block-LoRA. All are saved as plain LoRAs.

m, n: a layer's outputs and inputs; L: layers of a kind or shape. Bytes count an fp32 parameter with its
gradient and AdamW's two moments as 16.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import Probe
from scrimp.base.seeds import derive
from scrimp.tuning.deltas.delta import Delta
from scrimp.tuning.deltas.parts import CPU, draw_normal, draw_subset, draw_uniform
from scrimp.tuning.deltas.pooled import FactorPair, Sharded, ShardPool, Tied, Tiled
from scrimp.tuning.deltas.tuning import DeltaTuning
from scrimp.tuning.option_checks import check_counts
from scrimp.tuning.targets import ALL_LINEAR, Place, check_rank

_STD = 0.02  # S2-LoRA's, as AdaLoRA's


def MoS(
    *,
    rank: int = 8,
    equivalent_rank: int = 2,
    private_rank: int = 1,
    shards: int = 4,
    alpha: float = 16.0,
    targets: tuple[str, ...] = (ALL_LINEAR,),
    seed: int = 0,
) -> DeltaTuning:
    """Return a mixture of shards: each layer assembles A and B from pools that the layers of a kind share.

    Per kind of layer (`q_proj`, `up_proj`, ...) the pools hold e L l shards of n / l and of m / l numbers. A
    layer takes (r - p) l of the public ones, drawn once, apart for A and for B, and p l of its own.

    Memory: 16 e L (m + n) bytes a kind, a LoRA of rank e; the assembled r (m + n) 4 a layer in the forward
    pass, and a gradient of the size of the pool for a moment in the backward pass.

    The released code leaves r, p, e and l to scripts without recommending values: the defaults but for alpha
    are ours. Its dropout (0.1) is not here. A layer draws (r - p) l of (e - p) L l public shards, so a model
    of few layers needs a lower r or a higher e: with the defaults at least 7 layers.

    Args:
        rank: r, of each layer.
        equivalent_rank: e, the budget.
        private_rank: p, the ranks' worth of shards that a layer has to itself.
        shards: l, shards a vector; must divide both sides of every target.
        alpha: The scale is alpha / r.
        targets: Which layers.
        seed: Of the initial shards and of what each layer draws.

    Raises:
        ScrimpError: The numbers do not fit each other, or a target.

    References:
        MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards, Wang et al.,
        ICLR 2025, arXiv 2410.00938.
    """
    check_counts("mos", {"rank": rank, "equivalent_rank": equivalent_rank, "shards": shards})
    p, e = private_rank, equivalent_rank
    if not 0 <= p <= min(rank, e):
        raise ScrimpError(
            f"tune mos: private_rank {p} must be from 0 to the smaller of rank ({rank}) and "
            f"equivalent_rank ({e})"
        )
    if rank < e or (p == e and rank != e):
        raise ScrimpError(
            f"tune mos: rank {rank} must be equivalent_rank ({e}) or more, and equal to it where "
            "private_rank takes all of it"
        )

    def make(places: Sequence[Place]) -> list[Delta]:
        check_rank(places, rank, tune="mos")
        made: dict[int, Delta] = {}
        for kind, members in _groups(places, by_kind=True).items():
            made |= _shard(members, derive(seed, "mos", *map(str, kind)), rank, e, p, shards, alpha / rank)
        return [made[place.number] for place in places]

    settings = {"rank": rank, "equivalent_rank": e, "private_rank": p, "shards": shards, "alpha": alpha}
    return DeltaTuning(name="mos", make=make, targets=targets, settings=settings)


def _shard(
    members: list[Place], seed: int, rank: int, e: int, p: int, shards: int, scale: float
) -> dict[int, Delta]:
    kind, (out_features, in_features) = members[0].kind, members[0].module.weight.shape
    if in_features % shards or out_features % shards:
        raise ScrimpError(
            f"tune mos: shards {shards} does not divide both sides of {kind} ({out_features} x {in_features})"
        )
    public, wanted, own = (e - p) * len(members) * shards, (rank - p) * shards, p * shards
    if wanted > public:
        raise ScrimpError(
            f"tune mos: a layer of {kind} draws {wanted} shards of {public} public ones: lower rank, or "
            "raise equivalent_rank"
        )
    shape = (e * len(members) * shards, in_features // shards)
    bound = 1 / math.sqrt(in_features)  # kaiming_uniform(a=sqrt(5)) of the whole vector's width
    pool = ShardPool(
        draw_uniform(derive(seed, "pool"), shape, bound=bound), out_features=out_features, shards=shards
    )

    def rows(number: int, factor: str) -> Tensor:
        drawn = draw_subset(derive(seed, number, factor), public, wanted)
        private = torch.arange(public + number * own, public + (number + 1) * own, device=CPU)
        return torch.cat([drawn, private]).int()

    return {
        place.number: Sharded(pool, rows(number, "a"), rows(number, "b"), rank=rank, scale=scale)
        for number, place in enumerate(members)
    }


def S2Lora(
    *,
    rank: int = 32,
    alpha: float = 32.0,
    penalty: float = 1e-3,
    threshold: float = 1e-3,
    targets: tuple[str, ...] = (ALL_LINEAR,),
    seed: int = 0,
) -> DeltaTuning:
    """Return sparsely shared LoRA: layers of a shape share A and B, each has its own rank coefficients.

        change = (alpha / r) B diag(e) A        loss + penalty * sum |e|;  |e| <= threshold counts as zero

    Memory: 16 (r (m + n) + r L) bytes a shape. It starts at no change (e = 0), A and B ~ N(0, 0.02).

    Unverified: the paper's abstract says that the factors are shared and the coefficients are constrained
    to be sparse. How (the penalty, the threshold), the initialisation and the defaults are ours.

    Args:
        rank: r.
        alpha: The scale is alpha / r.
        penalty: Weight of the coefficients' L1 norm, over all layers, in the loss.
        threshold: Below it a coefficient counts as zero, in training and in what is saved.
        targets: Which layers.
        seed: Of the initial factors.

    Raises:
        ScrimpError: A number is out of its range, or the rank does not fit a target.

    References:
        Sparsely Shared LoRA on Whisper for Child Speech Recognition, Liu, Qin, Peng and Lee, ICASSP 2024,
        arXiv 2309.11756.
    """
    check_counts("s2-lora", {"rank": rank})
    if penalty < 0 or threshold < 0:
        raise ScrimpError(
            f"tune s2-lora: penalty ({penalty}) and threshold ({threshold}) must not be negative"
        )

    def make(places: Sequence[Place]) -> list[Delta]:
        check_rank(places, rank, tune="s2-lora")
        made: dict[int, Delta] = {}
        for shape, members in _groups(places, by_kind=False).items():
            (out_features, in_features), own = (
                members[0].module.weight.shape,
                derive(seed, "s2-lora", str(shape)),
            )
            a = draw_normal(derive(own, "a"), (rank, in_features), std=_STD)
            pair = FactorPair(a, draw_normal(derive(own, "b"), (out_features, rank), std=_STD))
            for place in members:
                made[place.number] = Tied(pair, scale=alpha / rank, threshold=threshold)
        return [made[place.number] for place in places]

    settings = {"rank": rank, "alpha": alpha, "penalty": penalty, "threshold": threshold}
    events = (Lasso(penalty=penalty),)
    return DeltaTuning(name="s2-lora", make=make, targets=targets, events=events, settings=settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lasso:
    """Adds penalty * sum |e| of all `Tied` deltas to the loss: to its gradient.

    Attributes:
        penalty: Its weight.
    """

    penalty: float

    @torch.no_grad()
    def before_step(
        self,
        step: int,
        deltas: Mapping[str, Delta],
        optimizer: torch.optim.Optimizer,
        probe: Probe | None,
    ) -> None:
        """Leave the gradients for the backward pass to add to; a second call leaves the same."""
        for delta in deltas.values():
            if isinstance(delta, Tied):
                delta.coefficients.grad = self.penalty * delta.coefficients.sign()


def BlockLora(
    *,
    rank: int = 8,
    blocks: int = 4,
    alpha: float = 16.0,
    targets: tuple[str, ...] = (ALL_LINEAR,),
    seed: int = 0,
) -> DeltaTuning:
    """Return Block-LoRA: blocks of the input share a down-projection, so that they are added first.

        change = (alpha / r) B [A', ..., A']        A': (r, n / blocks)

    Memory: 16 r (m + n / blocks) bytes a layer, and of the input only the sum of its blocks is kept.

    Unverified: the paper's abstract says that the factors are cut into blocks, that all down-projections
    are one, and that this turns multiplications into additions; it does not say how B is cut. Cut by its
    rows it is the whole B, as here. The defaults are ours.

    Args:
        rank: r.
        blocks: How many; must divide the inputs of every target.
        alpha: The scale is alpha / r.
        targets: Which layers.
        seed: Of the initial A'.

    Raises:
        ScrimpError: A number does not fit a target.

    References:
        One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning, Zhou et
        al., arXiv 2501.16720.
    """
    check_counts("block-lora", {"rank": rank, "blocks": blocks})

    def make(places: Sequence[Place]) -> list[Delta]:
        check_rank(places, rank, tune="block-lora")
        return [_tile(place, derive(seed, "block-lora", place.number)) for place in places]

    def _tile(place: Place, own: int) -> Tiled:
        out_features, in_features = place.module.weight.shape
        if in_features % blocks or rank > in_features // blocks:
            raise ScrimpError(
                f"tune block-lora: {place.name} has {in_features} inputs, which {blocks} blocks must divide "
                f"into at least {rank} (the rank) each"
            )
        tile = draw_uniform(own, (rank, in_features // blocks), bound=1 / math.sqrt(in_features))
        return Tiled(tile, out_features=out_features, pieces=blocks, scale=alpha / rank)

    settings = {"rank": rank, "blocks": blocks, "alpha": alpha}
    return DeltaTuning(name="block-lora", make=make, targets=targets, settings=settings)


def _groups(places: Sequence[Place], *, by_kind: bool) -> dict[tuple[Hashable, ...], list[Place]]:
    found: dict[tuple[Hashable, ...], list[Place]] = defaultdict(list)
    for place in places:
        found[place.kind if by_kind else "", *place.module.weight.shape].append(place)
    return dict(found)
