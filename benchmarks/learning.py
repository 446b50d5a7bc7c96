"""How well every optimizer learns: all on one job, the best-known ones for longer and at more rates.

    python benchmarks/learning.py --out learning          all, about four hours on two cores
    python benchmarks/learning.py --only long             one part of it: every, rates or long

Each part is a suite of `scrimp bench optimizers` and becomes a section of docs/results.md:

    every     every method of the catalogue, 0.9 million tokens, three rates, three seeds at the best one
    rates     the six below with five rates: whether a search that was too narrow explains their order
    long      the six once, with 4 million tokens at the best rate of the part that ran last

Runs that lie in `--out` are not done again, so it can be stopped at any time; `long` comes last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _common import RESULTS, command_line, run, say, scrimp_command

from scrimp.base import files
from scrimp.bench.contestants import contestant
from scrimp.bench.protocol import to_target
from scrimp.bench.suites import SUITES
from scrimp.methods import METHODS, piece

SIX = ("adamw", "galore", "fira", "apollo", "apollo-mini", "frugal")
SHORT, LONG = 900_000, 4_000_000
TITLES = {
    "every": "Optimizers: every method, 0.9 million tokens",
    "rates": "Optimizers: six of them, five learning rates",
    "long": "Optimizers: six of them, 4 million tokens at the best rate",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("learning"), help="where the runs lie")
    parser.add_argument("--only", choices=tuple(TITLES), action="append", help="a part of it")
    parser.add_argument("--pairs", type=int, default=3, help="turns for the speed of `every`; 0 for none")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the documents go")
    given = parser.parse_args()
    parts: dict[str, Callable[[Path, int], dict[str, Any]]] = {"every": every, "rates": rates, "long": long}
    for name in given.only or parts:
        say(f"{name}: {TITLES[name]}")
        document = parts[name](given.out, given.pairs)
        document |= {"title": TITLES[name], "command": command_line()}
        files.write_json(given.results / f"bench-learning-{name}.json", document)


def every(out: Path, pairs: int) -> dict[str, Any]:
    """Return the suite's document on every method."""
    # An adapter over random weights would be no comparison.
    ours = (m.name for m in METHODS if not piece("tune", m.pieces.get("tune", "full")).freezes_base)
    names = list(dict.fromkeys([*SIX, *ours]))
    return _bench(out / "short", names, SHORT, "--pairs", str(pairs), "--threads", "1")


def rates(out: Path, _pairs: int) -> dict[str, Any]:
    """Return the document on the six with two more rates each."""
    return _bench(out / "short", SIX, SHORT, "--pairs", "0", "--threads", "1", "--trials", "5")


def long(out: Path, _pairs: int) -> dict[str, Any]:
    """Return one document on the six, each at its own best rate: several runs of the suite."""
    found = json.loads((out / "short" / "bench.json").read_text(encoding="utf-8"))
    best = {each["name"]: each["lr"] for each in found["contestants"]}

    def alone(name: str) -> dict[str, Any]:
        lr = best[name] / contestant(name, next(s for s in SUITES if s.name == "optimizers")).lr_ratio
        words = ("--pairs", "0", "--threads", "1", "--trials", "1", "--seeds", "1", "--lr", f"{lr:.6g}")
        return _bench(out / f"long-{name}", [name], LONG, *words)

    with ThreadPoolExecutor(2) as pool:  # each has one thread
        documents = list(pool.map(alone, SIX))
    merged = documents[0]  # AdamW's: its loss is the target of all
    merged["contestants"] = [each for document in documents for each in document["contestants"]]
    for each in merged["contestants"]:
        each["to_target"] |= to_target(each["curves"], merged["protocol"]["target_loss"])
    merged["seconds"] = sum(document["seconds"] for document in documents)
    merged["busy"] = any(document["busy"] for document in documents)
    return merged


def _bench(out: Path, names: Sequence[str], tokens: int, *words: str) -> dict[str, Any]:
    command = ("bench", "optimizers", "--methods", ",".join(names), "--tokens", str(tokens), "--json")
    try:
        return dict(json.loads(run(scrimp_command(*command, *words, "--out", out))))
    except subprocess.SubprocessError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
