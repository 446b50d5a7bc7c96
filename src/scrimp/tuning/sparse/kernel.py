"""SNELL: a sparse change of full rank from small factors through a distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

from scrimp.base.errors import ScrimpError
from scrimp.base.seeds import derive
from scrimp.tuning.deltas.delta import Delta
from scrimp.tuning.deltas.kernel import Kernelised, Variant
from scrimp.tuning.deltas.parts import draw_uniform
from scrimp.tuning.deltas.tuning import DeltaTuning
from scrimp.tuning.option_checks import check_choice
from scrimp.tuning.targets import ALL_LINEAR, Place, check_rank


def Snell(
    *,
    rank: int = 32,
    sparsity: float = 0.3,
    variant: Variant = "released",
    targets: tuple[str, ...] = (ALL_LINEAR,),
    seed: int = 0,
) -> DeltaTuning:
    """Return SNELL: a difference of two distance kernels, sparse, and computed again where it is needed.

        D^T = 0.1 (K_0 - K_1),  K_h[j, i] = |P_h[j] - Q_h[i]|_2;   change = D |D| where |D| > quantile

    Memory: 16 r (m + n) bytes a layer, r = 2 q, as a LoRA of rank r; kept for the backward pass is x alone,
    and for a moment a few fp32 matrices m x n exist (5 in the backward pass). It is merged as a dense
    change.

    The paper masks the entries; the released code, whose figures are the reported ones, multiplies them by
    their own magnitude, of which no gradient is taken. Both start with a change that is not zero (of about
    1e-5 and 1e-3 an entry at 500 x 500). The extension SNELLA, which learns each matrix's sparsity, is not
    here.

    Args:
        rank: Numbers per row and column, in two kernels; even. The authors use 8, 16 and 32.
        sparsity: The share of entries that is zero, below 1.
        variant: "released" or "paper", as above.
        targets: Which layers.
        seed: Of the initial factors.

    Raises:
        ScrimpError: A number or the variant is not allowed, or the rank does not fit a target.

    References:
        Expanding Sparse Tuning for Low Memory Usage, Shen et al., NeurIPS 2024, arXiv 2411.01800.
    """
    if rank < 2 or rank % 2:
        raise ScrimpError(f"tune snell: rank {rank} must be even and at least 2: it is shared by two kernels")
    if not 0 <= sparsity < 1:
        raise ScrimpError(f"tune snell: sparsity {sparsity} must be from 0 to below 1")
    check_choice("snell", "variant", variant, get_args(Variant))

    def make(places: Sequence[Place]) -> list[Delta]:
        check_rank(places, rank, tune="snell")
        return [_delta(place, derive(seed, "snell", place.number)) for place in places]

    def _delta(place: Place, own: int) -> Kernelised:
        m, n = place.module.weight.shape
        half = rank // 2
        # kaiming_uniform(a=sqrt(5)) of the stacked factors, as released: the fan-in is side times half.
        p = draw_uniform(derive(own, "p"), (2, n, half), bound=1 / math.sqrt(n * half))
        q = draw_uniform(derive(own, "q"), (2, m, half), bound=1 / math.sqrt(m * half))
        return Kernelised(p, q, sparsity=sparsity, variant=variant)

    settings = {"rank": rank, "sparsity": sparsity, "variant": variant}
    return DeltaTuning(name="snell", make=make, targets=targets, saves="own", settings=settings)
