"""scrimp's loop against a bare PyTorch loop and against transformers' Trainer.

    python benchmarks/loop.py                             about 11 minutes
    python benchmarks/loop.py --pairs 1 --steps 5         does it run?

Tokens per second, over all steps but the first ones, of the sides in `_sides.py`; they train the same
model on the same rows, and their losses must agree. Then the seconds from the start of a process to
the end of its first step: the whole `scrimp train` command against a short script around Trainer,
neither of which tokenises. Sides run in turn, and ratios are taken within a turn.

All sides get the same threads and, unless `--openmp` says otherwise, the same short OpenMP wait that
scrimp asks for: a spinning wait makes a loop look five times slower as soon as anything else runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import (
    Benchmark,
    Watched,
    ratios,
    run_json,
    say,
    scrimp_command,
    spread,
    start,
)
from _sides import LOG_EVERY, Spec

from scrimp.base.platform import SHORT_WAIT

SIDES = Path(__file__).with_name("_sides.py")
LOSS_TOLERANCE = 1e-3  # the sides compute the same sums, in another order at most
SPINNING = {"GOMP_SPINCOUNT": "300000"}  # what GNU's OpenMP does where nothing is set
OPENMP: dict[str, dict[str, dict[str, str]]] = {
    "short": {"ours": SHORT_WAIT, "others": SHORT_WAIT},  # what scrimp asks for
    "spinning": {"ours": SPINNING, "others": SPINNING},
    "shipped": {"ours": {}, "others": {}},  # ours asks for the short wait, torch for none
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and batch to compare on, with the least ratio that is promised against each side."""

    model: str
    batch: int
    seq: int
    steps: int
    skip: int
    targets: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.model} {self.batch}x{self.seq}"


CASES = (
    Case(model="llama-1m", batch=8, seq=128, steps=100, skip=10, targets={"bare": 0.97, "trainer": 1.05}),
    Case(model="llama-60m", batch=1, seq=512, steps=12, skip=2, targets={"trainer": 0.98}),
)


def main() -> None:
    benchmark = start("loop", __doc__, _options)
    options = benchmark.arguments
    cases = {}
    with tempfile.TemporaryDirectory(prefix="scrimp-loop-") as work:
        for case in CASES:
            if options.model in (None, case.model):
                spec = _spec(case, options, work)
                run_json([sys.executable, SIDES, "prepare", spec.write(Path(work) / "spec.json")])
                cases[case.name] = {
                    **_speed(benchmark, case, spec),
                    "first_step": _first_step(benchmark, case, spec),
                }
    benchmark.write({"settings": _settings(options), "cases": cases})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of each run; default: enough for each model")
    parser.add_argument("--model", choices=[case.model for case in CASES], help="default: each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--openmp", choices=OPENMP, default="short", help="how OpenMP's threads wait")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "pairs": options.pairs,
        "threads": options.threads,
        "openmp": options.openmp,
        "precision": "fp32",
        "optimizer": f"torch's fused AdamW, constant learning rate {options.lr:g}, clipped at 1",
        "ours": "memory read and metrics written at every step, plain lines every ten seconds",
        "bare": "forward, backward, clip, step, schedule, zero_grad; no loss read, nothing written",
        "trainer": f"no evaluation, saving, reports; logging_steps {LOG_EVERY} (its default is 500), bar on",
    }


def _spec(case: Case, options: argparse.Namespace, work: str) -> Spec:
    return Spec(
        model=case.model,
        batch=case.batch,
        seq=case.seq,
        steps=options.steps or case.steps,
        lr=options.lr,
        threads=options.threads,
        work=work,
    )


def _env(options: argparse.Namespace, side: str) -> dict[str, str]:
    return OPENMP[options.openmp]["ours" if side == "ours" else "others"]


def _speed(benchmark: Benchmark, case: Case, spec: Spec) -> dict[str, Any]:
    """Compare tokens a second."""
    sides = ["ours", *case.targets]
    skip = min(case.skip, spec.steps // 2)
    counted = spec.steps - skip
    tokens_per_s: dict[str, list[float]] = {side: [] for side in sides}
    cpu_ms: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {}
    loss_gap = dict.fromkeys(case.targets, 0.0)
    path = spec.write(Path(spec.work) / "spec.json")
    for pair in range(benchmark.arguments.pairs):
        for side in sides:
            found = run_json([sys.executable, SIDES, side, path], env=_env(benchmark.arguments, side))
            wall, cpu = (found[clock][-1] - found[clock][skip - 1] for clock in ("ends", "cpu"))
            tokens_per_s[side].append(spec.batch * spec.seq * counted / wall)
            cpu_ms[side].append(1000 * cpu / counted)
            losses[side] = [found["losses"][0], found["losses"][-1]]
        for side in case.targets:
            gaps = (abs(theirs - ours) for theirs, ours in zip(losses[side], losses["ours"], strict=True))
            loss_gap[side] = max(loss_gap[side], *gaps)
        speeds = ", ".join(f"{side} {tokens_per_s[side][-1]:,.0f}" for side in sides)
        say(f"{case.name} turn {pair + 1}: tokens/s {speeds}")
    result: dict[str, Any] = {
        "steps": spec.steps,
        "skipped_steps": skip,
        "first_and_last_loss": losses["ours"],
        "tokens_per_s": {side: spread(values, 1) for side, values in tokens_per_s.items()},
        "cpu_ms_per_step": {side: spread(values, 2) for side, values in cpu_ms.items()},
    }
    for side, least in case.targets.items():
        over = ratios(tokens_per_s["ours"], tokens_per_s[side])
        result[f"ours_over_{side}"] = over
        result[f"cpu_of_{side}_over_ours"] = ratios(cpu_ms[side], cpu_ms["ours"])
        result[f"loss_gap_to_{side}"] = loss_gap[side]
        benchmark.expect(f"{case.name}: tokens/s, ours / {side}", over["median"], at_least=least)
        what = f"{case.name}: first and last loss, gap to {side}"
        benchmark.expect(what, loss_gap[side], below=LOSS_TOLERANCE)
    return result


def _first_step(benchmark: Benchmark, case: Case, spec: Spec) -> dict[str, Any]:
    """Compare the seconds from the start of a process to the end of its first step."""
    seconds: dict[str, list[float]] = {"ours": [], "trainer": []}
    with tempfile.TemporaryDirectory(dir=spec.work) as folder:
        for pair in range(benchmark.arguments.pairs):
            out, announce = Path(folder) / f"run-{pair}", Path(folder) / f"trainer-{pair}"
            told = dataclasses.replace(spec, announce=str(announce)).write(Path(folder) / "spec.json")
            ours = scrimp_command("train", *spec.words(), "--cache", spec.cache, "--out", out)
            theirs = [sys.executable, str(SIDES), "trainer", str(told)]
            seconds["ours"].append(
                _until_first_step(ours, out / "metrics.jsonl", benchmark.arguments, "ours")
            )
            seconds["trainer"].append(_until_first_step(theirs, announce, benchmark.arguments, "trainer"))
            say(
                f"{case.name} first step: ours {seconds['ours'][-1]:.2f} s, "
                f"trainer {seconds['trainer'][-1]:.2f} s"
            )
    over = ratios(seconds["ours"], seconds["trainer"])
    benchmark.expect(f"{case.name}: seconds to the first step, ours / trainer", over["median"], below=1.0)
    return {
        "seconds": {side: spread(values, 3) for side, values in seconds.items()},
        "ours_over_trainer": over,
    }


def _until_first_step(command: list[str], path: Path, options: argparse.Namespace, side: str) -> float:
    with Watched(command, env=_env(options, side)) as process:
        return process.first_line(path)


if __name__ == "__main__":
    main()
