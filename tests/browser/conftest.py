"""A Chromium, and two documents as large and as awkward as real ones: a suite of twelve, and two runs.

Without the Python package playwright or a Chromium the tests are skipped, with the reason; with
`SCRIMP_BROWSER=required`, as in CI, they fail instead.
"""

from __future__ import annotations

import copy
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scrimp.report.page import write_page
from scrimp.report.run_document import averaged

NAMES = ("chromium", "chromium-browser", "google-chrome")
TOKENS = 307_200
POINTS = 300
MIB = 2**20
# A no-break space, joined emoji, a line break, a byte that is no UTF-8, quotes, and what ends a script.
AWKWARD = ("\xa0x", "\U0001f468\u200d\U0001f52c", "\nline", "\udcff", "\"]'\\", "</script><b>&amp;")
# Name, package, held-out loss at the end, optimizer state a parameter, tokens/s.
METHODS = (
    ("adamw", None, 1.912, 8.0, 5400),
    ("adam-mini", None, 1.921, 4.1, 5250),
    ("adafactor", None, 1.958, 4.05, 4800),
    ("sgd", None, 2.671, 0.0, 5900),
    ("lora", None, 2.113, 0.9, 5600),
    ("bf16", None, 1.934, 4.0, 4100),
    ("galore-torch", "galore-torch 1.0", 1.997, 3.2, 4300),
    ("apollo-torch", "apollo-torch 1.0.3", 1.951, 2.4, 4700),
    ("came-pytorch", "came-pytorch 0.1.3", 1.944, 4.2, 4200),
    ("lion-pytorch", "lion-pytorch 0.2.5", 1.931, 4.0, 5650),
    ("pytorch-optimizer:Fira", "pytorch-optimizer 4.1", 1.926, 3.3, 3900),
    ("bitsandbytes:AdamW8bit", "bitsandbytes 0.50", 1.915, 2.1, 5000),
)
NOT_DONE = (
    ("q-galore-torch", "missing", "pip install 'scrimp[oracles]'"),
    ("fira", "failed", "the process ended with signal 9"),
)


def _spread(rng: random.Random, centre: float, share: float, count: int) -> dict[str, Any]:
    values = sorted(centre * (1 + rng.uniform(-share, share)) for _ in range(count))
    return {"median": values[len(values) // 2], "lowest": values[0], "highest": values[-1], "all": values}


def _falling(rng: random.Random, end: float, points: int, noise: float) -> list[float]:
    """Return losses that fall from that of bytes at random to `end`."""
    return [
        end + (5.55 - end) * math.exp(-7 * i / points) + rng.gauss(0, noise) for i in range(1, points + 1)
    ]


def _curve(rng: random.Random, end: float, seed: int, points: int) -> dict[str, Any]:
    evaluations = max(1, points // 15)
    return {
        "seed": seed,
        "lr": 0.0075,
        "loss": end,
        "tokens": [TOKENS * (i + 1) // points for i in range(points)],
        "train": _falling(rng, end - 0.03, points, 0.05),
        "eval_tokens": [TOKENS * (i + 1) // evaluations for i in range(evaluations)],
        "eval": _falling(rng, end, evaluations, 0.004),
    }


def _contestant(rng: random.Random, index: int, seeds: int) -> dict[str, Any]:
    name, package, end, state, rate = METHODS[index]
    parameters = 843_264
    terms = {
        "fixed": 391 * MIB,
        "weights": parameters * 4,
        "gradients": parameters * 4,
        "optimizer state": round(parameters * state),
        "activations": 21 * MIB + index * MIB // 3,
        "temporaries": 3 * MIB,
    }
    total = sum(terms.values())
    reached = 3 if end < 1.95 else 2 if end < 1.96 else 0
    reported = {
        "model": "60M",
        "metric": "C4 perplexity",
        "value": 34.06,
        "memory": "0.36G",
        "tokens": "1.3B",
        "device": "8 A100",
        "setup": "Llama 60M, C4, rank 128",
        "source": "GaLore, arXiv 2403.03507, table 2",
    }
    return {
        "name": name,
        "kind": "peer" if package else "ours",
        "title": name.split(":")[-1].title(),
        "package": package,
        "settings": {"rank": 32, "refresh_every": 200} if "galore" in name else {},
        "status": "partial" if name == "lora" else "done",
        "why": "one seed of three diverged" if name == "lora" else "",
        "lr": 0.0075 * 3.1623 ** (index % 3 - 1),
        "lr_at_edge": index % 3 == 2,
        "trials": [
            {
                "lr": 0.0075 * 3.1623**k,
                "seed": 0,
                "loss": None if k == 1 and index == 3 else end + 0.08 * (k - index % 3 + 1) ** 2,
            }
            for k in (-1, 0, 1)
        ],
        "loss": _spread(rng, end, 0.003, seeds),
        "bits_per_byte": _spread(rng, end / math.log(2), 0.003, seeds),
        "to_target": {
            "tokens": round(TOKENS * end / 2.1) if reached else None,
            "seconds": 60 * end / 2.1 if reached else None,
            "reached": reached,
            "of": 3,
        },
        "state_bytes": round(parameters * state),
        "peak_bytes": total + (4 + index % 4) * MIB,
        "tensor_bytes": total - terms["fixed"],
        "predicted_bytes": total + (index % 5) * MIB,
        "memory": {"moment": "backward", "terms": terms},
        "tokens_per_s": _spread(rng, rate, 0.03, 5),
        "speed_ratio": _spread(rng, rate / 5400, 0.01 if index else 0, 5),
        "curves": [_curve(rng, end * (1 + 0.002 * seed), seed, POINTS) for seed in range(seeds)],
        "reported": [reported] if package and "torch" in package else [],
    }


@pytest.fixture(scope="session")
def suite() -> dict[str, Any]:
    """Return a suite of twelve contestants with three seeds each, one that is missing and one that failed."""
    rng = random.Random(0)
    absent = [
        {
            "name": name,
            "kind": "peer",
            "title": "",
            "package": None,
            "settings": {},
            "status": status,
            "why": why,
            "lr": None,
            "lr_at_edge": False,
            "trials": [],
            "loss": None,
            "to_target": None,
            "memory": None,
            "curves": [],
            "reported": [],
        }
        for name, status, why in NOT_DONE
    ]
    return {
        "schema": 1,
        "kind": "suite",
        "suite": "optimizers",
        "title": "Optimizers: loss, memory and speed on one job",
        "made": "2026-11-22T09:00:00Z",
        "busy": True,
        "seconds": 2713.4,
        "command": [
            "scrimp",
            "bench",
            "optimizers",
            "--methods",
            ",".join(name for name, *_ in METHODS),
            "--out",
            "bench/optimizers",
        ],
        "notes": ["SGD was not tuned over momentum.", "One trial of sgd diverged."],
        "environment": {
            "device": "cpu",
            "device_name": "Intel(R) Xeon(R) Platinum 8481C",
            "cores": 2,
            "memory_gib": 23.5,
            "system": "Linux 6.1",
            "versions": {"python": "3.11.7", "scrimp": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        },
        "load": {"before": [0.1, 0.2, 0.3], "after": [1.4, 1.1, 0.9], "others_share_of_cpu": 0.124},
        "job": {
            "model": "llama-1m",
            "parameters": 843_264,
            "init": "scratch",
            "data": "Python's standard library",
            "tokens": TOKENS,
            "steps": 300,
            "batch": 8,
            "seq": 128,
            "precision": "fp32",
            "device": "cpu",
            "threads": 1,
            "speed_threads": 2,
            "evaluation_tokens": 15_286,
            "evaluation_every": 15,
        },
        "protocol": {
            "trials": 3,
            "lr_factor": 3.1623,
            "lr_centre": 0.0075,
            "lr_law": "StepLaw",
            "seeds": 3,
            "reference": "adamw",
            "target_loss": 1.95,
            "target_rule": "what the reference reaches after nine tenths of the tokens",
            "pairs": 5,
            "turn_steps": 10,
            "seconds": None,
        },
        "contestants": [_contestant(rng, index, 3) for index in range(len(METHODS))] + absent,
    }


def _run(rng: random.Random, name: str, lr: float, end: float) -> dict[str, Any]:
    steps, tokens = 1100, 1024
    xs = list(range(1, steps + 1))
    evals = xs[54::55]
    held = _falling(rng, end, len(evals), 0.003)
    names = ("load", "forward", "loss, micro-batch 1", "backward, micro-batch 1", "optimizer step", "save")
    base = {"fixed": 391 * MIB, "weights": 4 * MIB, "optimizer state": 7 * MIB}
    losses = _falling(rng, end - 0.02, steps, 0.06)
    norms = [0.5 + 3 * math.exp(-x / 80) + abs(rng.gauss(0, 0.1)) + (9 if x == 612 else 0) for x in xs]

    def moment(index: int, off: float) -> dict[str, Any]:
        more = {
            "gradients": 4 * MIB * (index > 2),
            "activations": round(off * MIB * (0, 20, 31, 24, 0, 0)[index]),
            "temporaries": round(off * 2 * MIB),
        }
        return {"name": names[index], "terms": {**base, **more}}

    return {
        "name": name,
        "finished": lr > 0.003,
        "steps": steps,
        "parameters": 843_264,
        "recorded": {"python": "3.11.7", "torch": "2.13.0", "device": "cpu", "cpu kernels": "AVX512"},
        "recipe": {
            "model.name": "llama-1m",
            "optimizer.name": "adamw",
            "optimizer.lr": lr,
            "optimizer.betas": [0.9, 0.95],
            "batch": 8,
            "seq": 128,
            "precision": "fp32",
            "clip_norm": 1.0,
            "schedule.name": "wsd",
            "seed": 0,
            "device": "cpu",
            "activations.name": "none",
            "evaluation.every": 55,
            "memory": None,
            "data": "auto",
        },
        "train": {
            "step": xs,
            "tokens": [x * tokens for x in xs],
            "loss": losses,
            "loss_average": averaged(xs, losses),
            "lr": [lr * min(1, x / 50) * (1 if x < 900 else (1100 - x) / 200) for x in xs],
            "grad_norm": norms,
            "grad_norm_average": averaged(xs, norms),
            "tokens_per_s": [None if x == 1 else 21_500 + rng.gauss(0, 600) for x in xs],
            "peak_bytes": [round((420 + 18 * (x > 1) + 2 * (x > 54) + 3 * (x > 700)) * MIB) for x in xs],
        },
        "eval": {
            "step": evals,
            "tokens": [x * tokens for x in evals],
            "eval_loss": held,
            "perplexity": [math.exp(x) for x in held],
            "bits_per_byte": [x / math.log(2) for x in held],
        },
        "tokens_per_s": 21_500.0,
        "peak_bytes": 443 * MIB,
        "peak_of": "process",
        "predicted_bytes": 440 * MIB,
        "budget_bytes": 512 * MIB,
        "memory": {
            "predicted": [moment(i, 1.0) for i in range(6)],
            "measured": [moment(i, 0.93 + 0.02 * i) for i in range(6)],
        },
        "sample": 'def main(argv=None):\n    """Run <the> program."""\n    self.assertEqual(result, None)\n',
        "notes": ["the log was thinned to 2,000 points"] if lr < 0.003 else [],
    }


@pytest.fixture(scope="session")
def runs() -> dict[str, Any]:
    """Return two runs that differ in their learning rate."""
    rng = random.Random(1)
    return {
        "schema": 1,
        "kind": "runs",
        "title": "llama-1m-1 and llama-1m-2",
        "made": "2026-11-22T09:00:00Z",
        "runs": [_run(rng, "llama-1m-1", 0.004, 1.71), _run(rng, "llama-1m-2", 0.002, 1.79)],
        "changes": [{"field": "optimizer.lr", "values": [0.004, 0.002]}],
    }


def _unavailable(reason: str) -> None:
    if os.environ.get("SCRIMP_BROWSER") == "required":
        pytest.fail(f"SCRIMP_BROWSER=required, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Return a Chromium without a window."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _unavailable("playwright is not installed: pip install 'scrimp[browser]'")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        _unavailable(f"there is no Chromium (none of {', '.join(NAMES)}): apt-get install chromium")
    with sync_playwright() as playwright:
        # Chromium has no sandbox for root.
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        found = playwright.chromium.launch(executable_path=path, args=root)
        yield found
        found.close()


@pytest.fixture(scope="session")
def poor(suite: dict[str, Any]) -> dict[str, Any]:
    """Return a suite of which little came: two did not run, one left only its state and a broken curve."""
    bare = dict.fromkeys(suite["contestants"][0])
    curve = {
        "seed": 0,
        "lr": 0.1,
        "loss": 2.0,
        "tokens": [1, 2],
        "train": [None, 2.0],
        "eval_tokens": [],
        "eval": [],
    }
    some = {"name": "lora", "status": "partial", "why": "killed", "state_bytes": 0, "curves": [curve]}
    return {**suite, "protocol": {}, "load": {}, "contestants": [bare | some, *suite["contestants"][-2:]]}


@pytest.fixture(scope="session")
def diverged(suite: dict[str, Any]) -> dict[str, Any]:
    """Return a suite in which nobody has a loss: one never learnt, another lost two seeds of three."""
    never, twice = (copy.deepcopy(row) for row in suite["contestants"][:2])
    gone = {"loss": None, "bits_per_byte": None, "to_target": None, "status": "done"}
    never |= {**gone, "lr": None, "curves": [], "why": "diverged at every learning rate tried"}
    twice |= {**gone, "why": "2 of 3 seeds diverged"}
    for trial in never["trials"]:
        trial["loss"] = None
    for curve in twice["curves"][1:]:
        curve |= {"loss": None, "eval": [*curve["eval"][:5], *[None] * (len(curve["eval"]) - 5)]}
    return {**suite, "contestants": [never, twice], "protocol": {**suite["protocol"], "target_loss": None}}


@pytest.fixture(scope="session")
def hostile(suite: dict[str, Any], runs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a suite and runs whose names hold what pages and selectors change."""
    rows = [
        {**row, "name": f"{row['name']}{text}"}
        for row, text in zip(suite["contestants"], AWKWARD, strict=False)
    ]
    named = [{**runs["runs"][n % 2], "name": f"run{text}"} for n, text in enumerate(AWKWARD)]
    protocol = {**suite["protocol"], "reference": rows[0]["name"]}
    return {
        "hostile suite": {**suite, "contestants": rows, "protocol": protocol},
        "hostile runs": {**runs, "runs": named, "changes": []},
    }


@pytest.fixture(scope="session")
def speed(suite: dict[str, Any]) -> dict[str, Any]:
    """Return a suite of speed alone: nothing learns."""
    nothing = {"lr": None, "trials": [], "curves": [], "lr_at_edge": False}
    nothing |= dict.fromkeys(("loss", "bits_per_byte", "to_target", "memory"))
    rules = {"trials": 0, "seeds": 0, "lr_centre": None, "lr_law": None}
    rules |= {"target_loss": None, "target_rule": None}
    return {
        **suite,
        "suite": "speed",
        "job": {**suite["job"], "tokens": None, "steps": None},
        "protocol": {**suite["protocol"], **rules},
        "contestants": [{**row, **nothing} for row in suite["contestants"][:4]],
    }


@pytest.fixture(scope="session")
def files(
    suite: dict[str, Any],
    runs: dict[str, Any],
    poor: dict[str, Any],
    diverged: dict[str, Any],
    hostile: dict[str, dict[str, Any]],
    speed: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Return the reports as files."""
    folder = tmp_path_factory.mktemp("reports")
    more = [{**row, "name": f"{row['name']}-{n}"} for n in (2, 3) for row in suite["contestants"][:12]]
    first = suite["contestants"][0]
    documents = {
        "suite": suite,
        "runs": runs,
        "poor": poor,
        "diverged": diverged,
        "alone": {**suite, "contestants": suite["contestants"][:1]},
        "pair": {**suite, "contestants": [{**first, "curves": first["curves"][:2]}]},
        "memory": {**suite, "suite": "memory"},
        "speed": speed,
        "crowd": {**suite, "contestants": [*more, *suite["contestants"]]},
        **hostile,
    }
    for name, document in documents.items():
        write_page(document, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in documents}


@pytest.fixture
def visit(browser: Any, files: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a report; a request for anything else, or a word in the console, fails."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def request_made(url: str, own: str) -> None:
        if url.partition("#")[0] != own and not url.startswith(("data:", "blob:")):
            complaints.append(f"request: {url}")

    def watch(page: Any, own: str) -> None:
        page.on("console", lambda message: complaints.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: request_made(request.url, own))

    def visit(kind: str, width: int = 1440, *, theme: str = "light", **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, **options)
        contexts.append(context)
        page = context.new_page()
        own = files[kind].as_uri()
        watch(page, own)
        page.goto(own)
        if options.get("java_script_enabled", True):
            page.wait_for_selector(".box > *")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []
