"""Several LoRA adapters of one base made into one, as an adapter or as changes of the base's weights.

    linear      A = [A_1; A_2; ...],  B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]     exact; ranks add up
    any other   B A = the nearest matrix of a stated rank to the merged dW    the error is reported

What `ties`, `dare`, `magnitude` and `pcb` leave of dW has full rank: as an adapter they lose much, and
merging into the base's weights (`merged_changes`) loses nothing.

A change is W's where W is a linear layer's, (out, in); GPT-2's layers hold W transposed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scrimp.base.adapter_names import BASE
from scrimp.base.errors import ScrimpError
from scrimp.tuning.adapter_files import write_lora
from scrimp.tuning.deltas.delta import Factors
from scrimp.tuning.merging.reading import Adapter, factors_of, new_folder, read_adapter
from scrimp.tuning.merging.task_vectors import How, Operation, merge_each, shapes_of


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge came to.

    Attributes:
        ranks: By the path of the layer.
        errors: By the path of the layer, |dW - B A| / |dW| in Frobenius norm; 0 for an exact merge.
    """

    ranks: dict[str, int]
    errors: dict[str, float]


def merge_adapters(
    folders: Sequence[Path],
    out: Path,
    *,
    how: How = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> Merged:
    """Write one LoRA adapter made of several.

    Args:
        folders: Plain LoRA adapters in peft's form, of one base. Ranks and targets may differ.
        out: Where. It must not exist, or be empty.
        how: See `scrimp.tuning.merging.task_vectors`.
        weights: As in `Operation`.
        density: As in `Operation`.
        rank: Of the result; None is the sum of the adapters' ranks at a layer, at most its smaller side.
        seed: As in `Operation`.

    Raises:
        ScrimpError: Adapters of different bases or no plain LoRA, a rank below 1 or above a layer's smaller
            side, `out` in use, or what `Operation` raises.

    Memory:
        The adapters, and a few weights at a time; an SVD of each weight unless `how` is linear.
    """
    adapters, operation = _read_all(folders), _operation(how, weights, density, seed)
    sources = [factors_of(adapter) for adapter in adapters]
    ranks = _ranks(sources, rank)
    if operation.how == "linear":
        found = _merged_factors(sources, ranks, operation)
    else:
        changes = _changes(sources, operation)
        found = ((name, *_nearest(change, ranks[name])) for name, change in changes)
    factors, errors = {}, {}
    for name, pair, error in found:
        factors[name], errors[name] = pair, error
    with new_folder(out) as new:
        write_lora(new, factors, base=adapters[0].base)
        known = next((each.folder for each in adapters if each.identity is not None), None)
        if known is not None:
            shutil.copyfile(known / BASE, new / BASE)
    return Merged({name: len(pair.a) for name, pair in factors.items()}, errors)


def merged_changes(
    folders: Sequence[Path],
    *,
    how: How = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Return what several adapters together add to their base, one weight at a time.

    The arguments and errors are those of `merge_adapters`; errors come before the first change.

    Returns:
        The path of each layer and its change, (out, in) float32.
    """
    sources = [factors_of(adapter) for adapter in _read_all(folders)]
    operation = _operation(how, weights, density, seed)
    operation.weights_of(len(sources))
    _ranks(sources, None)
    return _changes(sources, operation)


def _read_all(folders: Sequence[Path]) -> list[Adapter]:
    if not folders:
        raise ScrimpError("there is nothing to merge; give at least one adapter's folder")
    adapters = [read_adapter(folder) for folder in folders]
    first = adapters[0]
    for other in adapters[1:]:
        # Hashes tell more than names: one base may lie in two folders.
        if None in (first.identity, other.identity):
            same = first.base == other.base
        else:
            same = first.identity == other.identity
        if not same:
            raise ScrimpError(
                f"{first.folder} belongs to the base {first.base or '(unnamed)'} and {other.folder} to "
                f"{other.base or '(unnamed)'}, whose names or hashes differ; merge only adapters of one base"
            )
    return adapters


def _operation(how: How, weights: Sequence[float] | None, density: float | None, seed: int) -> Operation:
    return Operation(how=how, weights=None if weights is None else tuple(weights), density=density, seed=seed)


def _ranks(sources: Sequence[Mapping[str, Factors]], rank: int | None) -> dict[str, int]:
    """Return the result's rank at each layer, checked; also checks that shapes agree."""
    shapes = shapes_of([{name: _meta(pair) for name, pair in source.items()} for source in sources])
    if not shapes:
        raise ScrimpError("there is nothing to merge: the adapters hold no factors")
    for name, shape in shapes.items():
        if rank is not None and not 1 <= rank <= min(shape):
            raise ScrimpError(f"rank {rank} does not fit {name} of {tuple(shape)}; choose 1 to {min(shape)}")
    added = {name: sum(len(source[name].a) for source in sources if name in source) for name in shapes}
    return {name: min(rank or added[name], *shape) for name, shape in shapes.items()}


def _meta(pair: Factors) -> Tensor:
    return torch.empty(len(pair.b), pair.a.shape[1], device="meta")


def _changes(sources: Sequence[Mapping[str, Factors]], operation: Operation) -> Iterator[tuple[str, Tensor]]:
    names = list(dict.fromkeys(name for source in sources for name in source))

    def tasks(name: str) -> Tensor:
        pairs = [source.get(name) for source in sources]
        known = next(pair for pair in pairs if pair is not None)
        zero = torch.zeros(len(known.b), known.a.shape[1])
        return torch.stack([zero if pair is None else pair.b @ pair.a for pair in pairs])

    return merge_each(names, tasks, operation)


def _merged_factors(
    sources: Sequence[Mapping[str, Factors]], ranks: Mapping[str, int], operation: Operation
) -> Iterator[tuple[str, Factors, float]]:
    weights = operation.weights_of(len(sources)).tolist()
    for name, rank in ranks.items():
        mine = [
            (weight, source[name]) for weight, source in zip(weights, sources, strict=True) if name in source
        ]
        a = torch.cat([pair.a for _, pair in mine])
        b = torch.cat([weight * pair.b for weight, pair in mine], 1)
        if len(a) <= rank:
            yield name, Factors(a, b), 0.0
            continue
        # The SVD of B A through that of its small core: B = Q R and A^T = P S give Q (R S^T) P^T.
        (q, r), (p, s) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
        core, error = _nearest(r @ s.mT, rank)
        yield name, Factors(core.a @ p.mT, q @ core.b), error


def _nearest(change: Tensor, rank: int) -> tuple[Factors, float]:
    """Return the nearest product of a rank and its relative error."""
    u, sizes, v = torch.linalg.svd(change, full_matrices=False)
    root = sizes[:rank].sqrt()
    whole = float(sizes.norm())
    error = float(sizes[rank:].norm()) / whole if whole else 0.0
    return Factors(root.unsqueeze(1) * v[:rank], u[:, :rank] * root), error
