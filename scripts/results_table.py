"""Write the tables of the benchmarks page from `benchmarks/results/*.json`.

`python scripts/results_table.py` rewrites what stands in `docs/benchmarks.md` between `<!-- results -->` and
`<!-- end of results -->`; `tests/test_docs.py` fails while the page differs from the results. A benchmark
without a result says so. A result that was made on a busy machine is marked.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- results -->\n)(.*?)(<!-- end of results -->)", re.DOTALL)

Document = dict[str, Any]
Row = tuple[str, str, str, str]  # what, measured, promised, met

TITLES = {
    "default_run": "The default run",
    "loop": "The loop, against a bare PyTorch loop and transformers' Trainer",
    "openmp_wait": "How OpenMP's threads wait",
    "startup": "Starting up",
    "tokenising": "Tokenising, against datasets.map",
    "preparing_memory": "Memory while a corpus is prepared",
    "kills": "Kill and resume",
    "finetune": "Fine-tuning SmolLM2-135M",
    "memory_accuracy": "Predicted memory, against the allocator's events",
    "memory_resident": "Predicted memory, against the resident memory of whole runs",
    "memory_budgets": "Random budgets",
    "memory_peers": "Predicted memory, beside other tools",
    "plan_time": "How long a plan takes",
    "optimizer_step": "Optimizer steps, against the authors' packages",
    "optimizer_refresh": "Choosing a subspace anew, against an exact SVD",
    "optimizer_state": "Optimizer state of every method on the shapes of llama-7b",
    "seven_billion": "Seven billion parameters trained in nine gigabytes of main memory",
    "adapter_step": "Steps of LoRA and DoRA, against peft's",
    "sparse_delta": "A sparse change of the weights, against scattering it",
    "together": "Four adapters at once, against one after the other",
    "qlora": "A base in four bits",
    "paged_state": "Optimizer state off the device",
    "tuning_task": "Every way to fine-tune, on a task with a score",
}
MORE_OF_IT = {  # on another machine or by other options: shown where there is a result
    "together_nf4": "Four adapters at once, over a base in four bits",
    "gpu": "On a GPU",
}
LEAST_TOKENISING_RATIO = 1.3
MOST_PREPARING_MB = 400


def page(text: str, results: Path = RESULTS) -> str:
    """Return the page with its tables written anew."""
    shown = [*TITLES, *(name for name in MORE_OF_IT if (results / f"{name}.json").is_file())]
    sections = "\n\n".join(section(name, results / f"{name}.json") for name in shown)
    return PLACE.sub(lambda place: f"{place[1]}\n{sections}\n\n{place[3]}", text)


def section(name: str, path: Path) -> str:
    """Return one benchmark's heading, tables, and what it was measured on."""
    heading = f"## {(TITLES | MORE_OF_IT)[name]}\n"
    if not path.is_file():
        return f"{heading}\nNo result yet: `benchmarks/{name}.py` makes one."
    document = json.loads(path.read_text(encoding="utf-8"))
    rows = [_target(target) for target in document.get("targets", [])] + OTHER_ROWS.get(name, _none)(document)
    more = f"{MORE[name](document)}\n\n" if name in MORE else ""
    more += f"{document['note']}\n\n" if "note" in document else ""
    return f"{heading}\n{table(rows)}\n\n{more}{_measured_on(document)}"


def table(rows: list[Row]) -> str:
    """Return rows as a Markdown table."""
    lines = [("", "measured", "promised", "met"), ("---",) * 4, *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def number(value: float) -> str:
    """Write a number with four significant digits, whole ones in full."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def _target(target: Document) -> Row:
    promised = next(
        (
            f"{words} {number(target[key])}"
            for key, words in (("at_least", "at least"), ("below", "below"))
            if key in target
        ),
        "",
    )
    return target["what"], number(target["value"]), promised, "yes" if target["met"] else "**no**"


def _none(_: Document) -> list[Row]:
    return []


def _spread(found: Document) -> str:
    return f"{number(found['median'])} ({number(found['lowest'])} to {number(found['highest'])})"


def _loop(document: Document) -> list[Row]:
    return [
        (f"{case}: tokens/s, {side}", _spread(spread), "", "")
        for case, found in document["results"]["cases"].items()
        for side, spread in found["tokens_per_s"].items()
    ]


def _openmp_wait(document: Document) -> list[Row]:
    results = document["results"]
    return [
        (f"{place}: tokens/s, {wait} wait", _spread(spread), "", "")
        for place, by_wait in results["tokens_per_s"].items()
        for wait, spread in by_wait.items()
    ] + [
        (f"{place}: short / {wait}", _spread(spread), "", "")
        for place, by_wait in results["short_over"].items()
        for wait, spread in by_wait.items()
    ]


def _tokenising(document: Document) -> list[Row]:
    if document.get("targets"):
        return []
    speeds = [
        (f"MB per CPU second, {side}", number(speed), "", "") for side, speed in document["median"].items()
    ]
    ratio = document["ratio"]
    promised = f"at least {LEAST_TOKENISING_RATIO}"
    met = "yes" if ratio >= LEAST_TOKENISING_RATIO else "**no**"
    return [*speeds, ("scrimp / datasets.map", number(ratio), promised, met)]


def _preparing_memory(document: Document) -> list[Row]:
    if document.get("targets"):
        return []
    return [
        (
            f"{run['corpus_megabytes']:,} MB with the tokenizer {Path(run['tokenizer']).name}: MB above idle",
            number(run["above_idle_megabytes"]),
            f"at most {MOST_PREPARING_MB}",
            "yes" if run["above_idle_megabytes"] <= MOST_PREPARING_MB else "**no**",
        )
        for run in document["runs"]
    ]


def _kills(document: Document) -> list[Row]:
    if document.get("targets"):
        return []
    rows = []
    for place in dict.fromkeys(kill["place"] for kill in document["each"]):
        here = [kill["identical"] for kill in document["each"] if kill["place"] == place]
        met = "yes" if all(here) else "**no**"
        where = {"random": "at a random moment"}.get(place, place)
        rows.append((f"killed {where}, resumed, identical", f"{sum(here)} of {len(here)}", "all", met))
    return rows


def _memory_peers(document: Document) -> list[Row]:
    rows = []
    for row in document["results"]["cases"]:
        case = re.sub(r"Case\(|\)|'", "", row["case"])
        for peer, answer in row["said"].items():
            off = row["error_percent"].get(peer)
            said = f"{off:+.4g} %" if off is not None else f"fails: {answer}"
            rows.append((f"{peer}: {case}", said, "", ""))
    return rows


def _memory_resident(document: Document) -> list[Row]:
    results = document["results"]
    rows = [
        (
            f"`{run['run']}`: MB measured, MB predicted",
            f"{run['measured'] / 1e6:,.0f}, {run['predicted'] / 1e6:,.0f} ({run['error']:+.1%})",
            "",
            "",
        )
        for run in results["runs"]
    ]
    return rows + [
        (f"`{run['run']}` under a limit of {factor} x its prediction", run[f"at_{factor}"], "", "")
        for run in results["limits"]
        for factor in ("1.05", "0.9")
    ]


def _optimizer_step(document: Document) -> list[Row]:
    rows = []
    for case in document["results"]["cases"]:
        name = f"{case['method']}, {case['size']}"
        for side, seconds in case["seconds"].items():
            ratio = case["faster_than"].get(side, case["over_bound"])
            over = "ours is so many times as fast" if side != "ours" else "over the bound"
            told = f"{1000 * seconds['median']:,.0f} ms, {_spread(ratio)}"
            rows.append((f"{name}: {side}; {over}", told, "", ""))
    return rows + [
        (f"{method}: seconds of compilation, cold; cached", f"{number(cold)}; {number(cached)}", "", "")
        for method, found in document["results"]["compile"].items()
        for cold, cached in [(found["cold"]["seconds"], found["cached"]["seconds"])]
    ]


def _optimizer_refresh(document: Document) -> list[Row]:
    return [
        (
            f"{case['size']}, rank {case['rank']}, {case['spectrum']}: seconds, {side}",
            _spread(seconds),
            "",
            "",
        )
        for case in document["results"]["cases"]
        for side, seconds in case["whole_seconds"].items()
    ]


def _optimizer_state(document: Document) -> list[Row]:
    return [
        (
            f"{row['method']} ({row['settings']}): GB; of it inside the layers"
            + "".join(f"; paper: {said}" for said in row["reported"]),
            f"{row['bytes'] / 1e9:.3f}; {row['inner_bytes'] / 1e9:.3f}",
            "",
            "",
        )
        for row in document["results"]["rows"]
    ]


def _seven_billion(document: Document) -> list[Row]:
    found = document["results"]
    terms = [
        (f"predicted, GB: {term}", f"{size / 1e9:.3f}", "", "") for term, size in found["predicted"].items()
    ]
    return [
        *terms,
        (
            "loss of each step, on the same batch",
            ", ".join(f"{loss:.3f}" for loss in found["losses"]),
            "",
            "",
        ),
        ("seconds of each step", ", ".join(f"{second:.0f}" for second in found["seconds"]), "", ""),
    ]


def _adapter_step(document: Document) -> list[Row]:
    return [
        (f"{case}: ms a step, {side}; peak above the model, MB", told, "", "")
        for case, found in document["results"]["cases"].items()
        for side, seconds in found["seconds"].items()
        for told in [f"{1000 * seconds['median']:,.0f}; {found['peak_bytes'][side] / 1e6:,.0f}"]
    ]


def _sparse_delta(document: Document) -> list[Row]:
    rows = []
    for case in document["results"]["cases"]:
        ours, scatter = case["peak_bytes"]["ours"], case["peak_bytes"]["scatter"]
        time = _spread(case["seconds_over_scatter"])
        rows.append((f"{case['case']}: peak, ours / scatter; time", f"{ours / scatter:.2f}; {time}", "", ""))
    return rows


def _paged_state(document: Document) -> list[Row]:
    found = document["results"]
    rows: list[Row] = []
    for name, peak in found["peak_bytes"].items():
        predicted, seconds = found["predicted_bytes"][name], found["seconds"][name]["median"]
        value = f"{peak / 1e9:.2f} GB; {predicted / 1e9:.2f} GB; {seconds:.2f} s"
        rows.append((f"{found['model']}, `{name}`: peak; predicted; a step", value, "", ""))
    return [*rows, ("paged-state over device, time", number(found["time"]["median"]), "", "")]


def _qlora(document: Document) -> list[Row]:
    sides = {name: side for name, side in document["results"].items() if isinstance(side, dict)}
    return [
        (f"{name}: held-out loss; MB of the base", f"{side['loss']:.4f}; {side['bytes'] / 1e6:.1f}", "", "")
        for name, side in sides.items()
    ]


def _together(document: Document) -> list[Row]:
    return [
        (f"{case} tokens a batch: times four runs, {side}", _spread(times), "", "")
        for case, found in document["results"]["cases"].items()
        for side, times in found["times"].items()
    ]


def _tuning_task(document: Document) -> str:
    """Return the task in a sentence, the picture, and a table of all sides by their score."""
    results = document["results"]
    task = results["task"]
    sentence = (
        f"{task['questions']} questions, which of {len(task['keywords'])} keywords comes next in a piece of "
        f"source (chance: {task['chance']:.0%}), after {results['tokens']:,} tokens in sequences of "
        f"{results['seq']}. `cut` is the first 8 layers of SmolLM2-135M, healed by a short run on other "
        "source; `whole` is all 30, at the rates found for the cut one. A learning rate with a star lies at "
        "the edge of its search."
    )
    picture = "![Score, peak memory and tokens/s of every method](assets/tuning-task.svg)"
    heads = ("method", "model", "right", "loss", "trained", "tokens/s", "peak, MB", "learning rate")
    ranked = sorted(results["rows"], key=lambda row: (row["model"], -(row["score"] or 0)))
    lines = [heads, ("---", "---", *("---:",) * 6), *map(_side_cells, ranked)]
    return f"{sentence}\n\n{picture}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _side_cells(row: Document) -> tuple[str, ...]:
    tried = [trial["lr"] for trial in row["trials"] or []]
    edge = "*" if tried and row["lr"] in (min(tried), max(tried)) else ""
    speed = row["tokens_per_s"]
    return (
        row["name"],
        row["model"],
        f"{row['score']:.1%}" if row["score"] is not None else row["why"] or "",
        f"{row['loss']:.3f}" if row["loss"] is not None else "",
        f"{row['trained']:,}" if row["trained"] else "",
        number(speed["median"]) + ("?" if row["busy"] else "") if speed else "",
        f"{row['peak_bytes'] / 1e6:,.0f}" if row["peak_bytes"] else "",
        f"{row['lr']:g}{edge}" if row["lr"] else "",
    )


MORE: dict[str, Callable[[Document], str]] = {"tuning_task": _tuning_task}
OTHER_ROWS: dict[str, Callable[[Document], list[Row]]] = {
    "loop": _loop,
    "openmp_wait": _openmp_wait,
    "tokenising": _tokenising,
    "preparing_memory": _preparing_memory,
    "kills": _kills,
    "memory_peers": _memory_peers,
    "memory_resident": _memory_resident,
    "optimizer_step": _optimizer_step,
    "optimizer_refresh": _optimizer_refresh,
    "optimizer_state": _optimizer_state,
    "seven_billion": _seven_billion,
    "adapter_step": _adapter_step,
    "sparse_delta": _sparse_delta,
    "qlora": _qlora,
    "paged_state": _paged_state,
    "together": _together,
    "together_nf4": _together,
}


def _measured_on(document: Document) -> str:
    """Say on what, with which versions and by which command a result was made."""
    around = document.get("environment") or {
        **document.get("machine", {}),
        "versions": document.get("versions", {}),
    }
    words = [str(around[key]) for key in ("device_name", "cpu", "platform", "system") if key in around]
    words = list(dict.fromkeys(words))  # on a CPU the device is the processor
    words += [f"{around['cores']} cores"] if "cores" in around else []
    versions = {"python": around["python"]} if "python" in around else {}
    words += [f"{name} {version}" for name, version in (versions | around.get("versions", {})).items()]
    parts = [", ".join(words) + "."]
    if command := document.get("command"):
        parts.append(f"Command: `{command if isinstance(command, str) else shlex.join(command)}`.")
    if document.get("busy"):
        parts.append("**The machine was busy: timings are not to be trusted.**")
    return " ".join(parts)


def main() -> None:
    """Rewrite the page."""
    old = PAGE.read_text(encoding="utf-8")
    new = page(old)
    if new != old:
        PAGE.write_text(new, encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
