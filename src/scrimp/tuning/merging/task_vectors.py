"""Arithmetic on task vectors: several changes of one base made into one.

    tau_i = theta_i - theta_0                 the task vector of model i, by name of parameter
    linear     sum_i w_i tau_i
    magnitude  sum_i w_i top(tau_i)           top keeps the share `density` of largest magnitude
    dare       sum_i w_i drop(tau_i)          drop keeps an entry with probability `density` and divides by it
    ties       mean of w_i top(tau_i) over those of the elected sign, the sign of sum_i top(tau_i)
    dare-ties  the same with drop in place of top
    pcb        see `scrimp.tuning.merging.pcb`

Task vectors are changes dW of whole weights, never LoRA's factors: A and B are defined up to an invertible
R (BR, R^-1 A), so entries of two adapters' factors do not correspond, and (B_1 + B_2)(A_1 + A_2) holds cross
terms that nobody trained. peft's `linear`, `ties`, `dare_linear`, ... work on factors all the same; ours are
its `svd`, `ties_svd`, `dare_linear_svd`, ... before the SVD, and call its functions.

The share that `ties` and `magnitude` keep is of each weight, as in peft; TIES as published takes it of the
whole vector. `pcb` takes it of the whole vector, as its authors do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.base.seeds import derive
from scrimp.tuning.merging import pcb

How = Literal["linear", "magnitude", "dare", "ties", "dare-ties", "pcb"]
DENSITY: dict[str, float] = {"magnitude": 0.2, "dare": 0.2, "ties": 0.2, "dare-ties": 0.2, "pcb": 0.1}
_SUMS = ("linear", "magnitude", "dare")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A way to make several task vectors into one.

    Attributes:
        how: Its name.
        weights: One per task vector. None is 1 / N each where the operation sums, 1 each where it averages by
            itself (`ties`, `dare-ties`, `pcb`).
        density: The share of entries kept, above 0 and at most 1; None is `DENSITY`'s. `linear` has none.
        seed: Of what `dare` drops.

    Raises:
        ScrimpError: An unknown name, a weight that is not finite, a density outside (0, 1], or one for
            `linear`.

    References:
        Task arithmetic, Ilharco et al., ICLR 2023, arXiv 2212.04089. TIES, Yadav et al., NeurIPS 2023,
        arXiv 2306.01708. DARE, Yu et al., ICML 2024, arXiv 2311.03099. PCB: see `scrimp.tuning.merging.pcb`.
    """

    how: How = "linear"
    weights: tuple[float, ...] | None = None
    density: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise ScrimpError(f"no merge is called {self.how!r}; choose one of {', '.join(get_args(How))}")
        if not all(math.isfinite(weight) for weight in self.weights or ()):
            raise ScrimpError(f"weights {self.weights} are not all numbers; give a finite one for each")
        if self.density is None:
            return
        if self.how == "linear":
            raise ScrimpError("a linear merge keeps every entry; leave density out, or choose another merge")
        if not 0 < self.density <= 1:
            raise ScrimpError(
                f"density {self.density} keeps no share of a task vector; choose above 0, up to 1"
            )

    def weights_of(self, count: int) -> Tensor:
        """Return the weights of `count` task vectors, (count,) float32.

        Raises:
            ScrimpError: There are more or fewer weights than task vectors.
        """
        if self.weights is None:
            return torch.full((count,), 1 / count if self.how in _SUMS else 1.0)
        if len(self.weights) != count:
            raise ScrimpError(f"{len(self.weights)} weights for {count} task vectors; give one for each")
        return torch.tensor(self.weights, dtype=torch.float32)


def merge(vectors: Sequence[Mapping[str, Tensor]], operation: Operation) -> dict[str, Tensor]:
    """Return one task vector made of several.

    Args:
        vectors: By name of parameter, any shape, equal for one name. What a vector lacks is zero there.
        operation: How.

    Returns:
        By name, in the first appearance's order, float32.

    Raises:
        ScrimpError: One name has several shapes, or what `Operation` and `pcb` raise.
    """
    shapes = shapes_of(vectors)

    def tasks(name: str) -> Tensor:
        zero = torch.zeros(shapes[name])
        return torch.stack([vector.get(name, zero).float() for vector in vectors])

    return dict(merge_each(list(shapes), tasks, operation))


def shapes_of(vectors: Sequence[Mapping[str, Tensor]]) -> dict[str, torch.Size]:
    """Return the shape of every name of any vector.

    Raises:
        ScrimpError: One name has several shapes.
    """
    shapes: dict[str, torch.Size] = {}
    for number, vector in enumerate(vectors, 1):
        for name, tensor in vector.items():
            if shapes.setdefault(name, tensor.shape) != tensor.shape:
                raise ScrimpError(
                    f"{name} is {tuple(tensor.shape)} in task vector {number} and {tuple(shapes[name])} "
                    "before: they belong to different models; merge only changes of one base"
                )
    return shapes


def merge_each(
    names: Sequence[str], tasks: Callable[[str], Tensor], operation: Operation
) -> Iterator[tuple[str, Tensor]]:
    """Merge parameter by parameter; only one is in memory at a time.

    Args:
        names: Of the parameters.
        tasks: Returns the task vectors of a name, (N, *shape) float32. `pcb` asks five times for each name,
            the others once.
        operation: How.

    Yields:
        A name and its merged change, (*shape) float32.
    """
    limits: pcb.Limits | None = None
    if operation.how == "pcb":
        limits = pcb.limits(lambda: map(tasks, names), _density(operation))
    for name in names:
        stack = tasks(name)
        weights = operation.weights_of(len(stack)).to(stack.device)
        if limits is not None:
            yield name, pcb.merge(stack, limits, weights)
        else:
            yield name, _by_peft(stack, weights, operation, name)


def _density(operation: Operation) -> float:
    return DENSITY[operation.how] if operation.density is None else operation.density


def _by_peft(stack: Tensor, weights: Tensor, operation: Operation, name: str) -> Tensor:
    from peft.utils import merge_utils

    tasks = list(stack)
    if operation.how == "linear":
        return merge_utils.task_arithmetic(tasks, weights)
    function = {
        "magnitude": merge_utils.magnitude_prune,
        "dare": merge_utils.dare_linear,
        "ties": merge_utils.ties,
        "dare-ties": merge_utils.dare_ties,
    }[operation.how]
    # peft draws from the global generator; what it draws here depends on the seed and the name alone.
    with torch.random.fork_rng([stack.device] if stack.is_cuda else []), warnings.catch_warnings():
        torch.manual_seed(derive(operation.seed, "dare", name))
        warnings.filterwarnings("ignore", "The density .* no pruning")  # density 1 is asked for
        return function(tasks, weights, _density(operation))
