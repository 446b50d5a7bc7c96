"""Choosing a subspace anew: our default against galore-torch's exact SVD, in time and in quality.

    python benchmarks/optimizer_refresh.py             llama-60m and llama-130m, rank 128 and 256
    python benchmarks/optimizer_refresh.py --quick     llama-20m, rank 64

One matrix of each shape of a middle layer; a whole refresh is the sum over all matrices of the model, each
at the price of its shape. Quality is the share of the gradient's energy that a basis B captures,

    ||G B||_F^2 / ||G||_F^2       never more than the exact SVD's,

on gradients of real text (one backward pass over Python's standard library as bytes, of a model with random
weights) and on the flat spectrum of a Gaussian matrix, where the leading subspace is hardest to find. Where
a spectrum is steep, energy says little of the weaker directions: beside it stands the share of the weaker
half of the SVD's that our subspace holds. The sides run in turn, each on the gradient as autograd left it.

Odd gradients show that time is bounded and a basis always one: all zero, of rank one, with singular values
that fall over 30 decades, and with an infinity.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import ratios, say, spread, start
from galore_torch.galore_projector import GaLoreProjector
from optimizer_step import model_of, set_threads
from torch import Tensor, nn

from scrimp.optim.pieces import Target
from scrimp.optim.projectors.svd import SingularVectors

SIZES = ("llama-60m", "llama-130m")
RANKS = (128, 256)
MATRICES = ("q_proj", "up_proj", "down_proj")  # each shape once: square, tall, wide
FASTER, EQUAL, SLOWEST = 3.0, 0.995, 2.0


def main() -> None:
    benchmark = start("optimizer_refresh", __doc__, _options)
    given = benchmark.arguments
    set_threads(given.threads)
    sizes, ranks = (("llama-20m",), (64,)) if given.quick else (given.sizes, given.ranks)
    cases = []
    for size in sizes:
        model = model_of(size)
        gradients = {"text": _of_text(model, rows=given.rows), "flat": _flat(model)}
        for rank in ranks:
            for spectrum, matrices in gradients.items():
                cases.append(_measure(size, rank, spectrum, matrices, _counts(model), given.turns))
    odd = _odd_gradients(cases, turns=given.turns)
    for case in cases:
        name = f"{case['size']}, rank {case['rank']}, {case['spectrum']}"
        least = case["faster"]["lowest"] if given.turns > 2 else case["faster"]["median"]
        benchmark.expect(f"{name}: refresh, times as fast as galore-torch's", least, at_least=FASTER)
        energy = min(row["energy_over_svd"] for row in case["matrices"].values())
        benchmark.expect(f"{name}: energy captured over the SVD's, least", energy, at_least=EQUAL)
    slowest = max(row["seconds_over_flat"] for row in odd.values())
    benchmark.expect("odd gradients: seconds over a flat spectrum's, most", slowest, below=SLOWEST)
    error = max(row["orthonormality_error"] for row in odd.values())
    benchmark.expect("odd gradients: ||B'B - I||, largest element", error, below=1e-4)
    settings = {"threads": torch.get_num_threads(), "turns": given.turns, "rows": given.rows}
    benchmark.write({"settings": settings, "cases": cases, "odd": odd})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="named shapes")
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--turns", type=int, default=5, help="timed turns of both sides")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 takes all")
    parser.add_argument("--rows", type=int, default=4, help="rows of 256 tokens of the backward pass")
    parser.add_argument("--quick", action="store_true", help="llama-20m at rank 64")


def ours(g: Tensor, rank: int) -> Tensor:
    """Return the basis, (d, r), of the side that is shortened."""
    projector = SingularVectors(rank=rank, method="power")
    oriented = g.mT if projector.transposes(tuple(g.shape)) else g
    target = Target(name="w", shape=tuple(oriented.shape))
    slots, _ = projector.refresh(oriented, None, {}, target, 0)
    return slots["basis"]


def theirs(g: Tensor, rank: int) -> Tensor:
    """Return galore-torch's projector, laid out as ours."""
    side = "right" if g.shape[0] >= g.shape[1] else "left"
    found: Tensor = GaLoreProjector(rank).get_orthogonal_matrix(g, rank, type=side)
    return found.mT if side == "right" else found


def captured(g: Tensor, basis: Tensor) -> float:
    """Return the share of the energy of `g` that lies in the subspace."""
    side = g if g.shape[0] >= g.shape[1] else g.mT
    return float(((side.double() @ basis.double()).norm() / g.double().norm()) ** 2)


def _measure(
    size: str, rank: int, spectrum: str, matrices: dict[str, Tensor], counts: dict[str, int], turns: int
) -> dict[str, Any]:
    """Time both sides on one matrix of each shape, and compare what they capture."""
    sides = {"ours": ours, "galore-torch": theirs}
    seconds: dict[str, dict[str, list[float]]] = {side: {name: [] for name in matrices} for side in sides}
    rows = {}
    for name, g in matrices.items():
        bases = {side: find(g, rank) for side, find in sides.items()}  # and a first, cold run
        energy = {side: captured(g, basis) for side, basis in bases.items()}
        weaker = bases["galore-torch"][:, rank // 2 :].mT @ bases["ours"]
        rows[name] = {
            "shape": list(g.shape),
            "energy": {side: round(value, 6) for side, value in energy.items()},
            "energy_over_svd": round(energy["ours"] / energy["galore-torch"], 6),
            "weaker_half_held": round(float(weaker.square().sum() / weaker.shape[0]), 4),
        }
        for turn in range(turns):
            for side, find in list(sides.items())[:: 1 if turn % 2 else -1]:
                seconds[side][name].append(_seconds(find, g, rank))
    whole = {
        side: [sum(counts[name] * by_name[name][turn] for name in matrices) for turn in range(turns)]
        for side, by_name in seconds.items()
    }
    for name, row in rows.items():
        row["seconds"] = {side: spread(by_name[name], 5) for side, by_name in seconds.items()}
        row["faster"] = ratios(seconds["galore-torch"][name], seconds["ours"][name])
    faster = ratios(whole["galore-torch"], whole["ours"])
    least = min(row["energy_over_svd"] for row in rows.values())
    times = f"{faster['median']:.2f} x galore-torch"
    say(f"{size} rank {rank} {spectrum}: {times}, energy {least:.4f} of the SVD's")
    return {
        "size": size,
        "rank": rank,
        "spectrum": spectrum,
        "whole_seconds": {side: spread(values) for side, values in whole.items()},
        "faster": faster,
        "matrices": rows,
    }


def _seconds(find: Callable[[Tensor, int], Tensor], g: Tensor, rank: int) -> float:
    began = time.perf_counter()
    find(g, rank)
    return time.perf_counter() - began


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a matrix of each shape, of the layer in the middle."""
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    named = dict(layers[len(layers) // 2].named_parameters())
    return {
        short: next(p for name, p in named.items() if name.endswith(f"{short}.weight")) for short in MATRICES
    }


def _counts(model: nn.Module) -> dict[str, int]:
    """Return how many matrices of the model have the shape of each one measured."""
    inner = [p.shape for name, p in model.named_parameters() if "_proj." in name]
    return {short: inner.count(p.shape) for short, p in _named(model).items()}


def _flat(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(p.shape, generator=generator) for name, p in _named(model).items()}


def _of_text(model: Any, *, rows: int, length: int = 256) -> dict[str, Tensor]:
    """Return the gradients of one backward pass over text that every Python has."""
    text = b"".join(_sources())[: rows * length]
    ids = torch.tensor(list(text)).view(rows, length)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad.clone() for name, p in _named(model).items() if p.grad is not None}
    model.zero_grad()
    return found


def _sources() -> list[bytes]:
    import argparse
    import inspect
    import textwrap

    return [inspect.getsource(module).encode() for module in (argparse, textwrap, statistics)]


def _odd_gradients(cases: list[dict[str, Any]], *, turns: int) -> dict[str, Any]:
    """Time our refresh on gradients that break decompositions, at the first case's shape and rank."""
    case = cases[0]
    k, d = sorted(case["matrices"]["up_proj"]["shape"], reverse=True)
    flat = torch.randn(k, d, generator=torch.Generator().manual_seed(2))
    left, right = torch.linalg.qr(flat)[0], torch.linalg.qr(flat[:d])[0]
    falling = torch.logspace(0, -30, d)
    given = {
        "zero": torch.zeros(k, d),
        "rank one": torch.outer(flat[:, 0], flat[0]),
        "30 decades": (left * falling) @ right,
        "an infinity": flat.clone().index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.inf)),
    }
    usual = statistics.median(_seconds(ours, flat, case["rank"]) for _ in range(turns))
    found = {}
    for name, g in given.items():
        basis = ours(g, case["rank"])
        error = (basis.mT @ basis - torch.eye(case["rank"])).abs().max()
        over = statistics.median(_seconds(ours, g, case["rank"]) for _ in range(turns)) / usual
        found[name] = {"seconds_over_flat": round(over, 3), "orthonormality_error": float(f"{error:.2g}")}
        say(f"{name}: {over:.2f} of the time on a flat spectrum, orthonormal to {error:.1e}")
    return found


if __name__ == "__main__":
    main()
