"""Megabytes of text tokenised per CPU second: `scrimp.data.prepare` against `datasets.map`.

    python benchmarks/tokenising.py --tokenizer SmolLM2-135M-Instruct.gguf --out tokenising.json

Both tokenise the same documents with the same tokenizer, each time in a fresh process, in pairs,
one after the other. The text is the standard library of this Python. CPU seconds are those of
the process and its children, from before the first document to after the last: for `prepare`
that includes finding, reading and hashing the files, the split and the writing; the other side
is given its documents in memory, since reading them is not what is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from scrimp.data import find_sources, load_tokenizer, prepare

SIDES = ("scrimp", "datasets")
KEY = "megabytes_per_cpu_second"


def main() -> None:
    """Run pairs and write what they gave, or (--side) measure one side in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="folder, tokenizer.json or GGUF file")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="threads of the tokenizer, for both sides")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.tokenizer)))
        return
    result = compare(options.tokenizer, options.pairs, options.threads)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", "utf-8")


def compare(tokenizer: str, pairs: int, threads: int) -> dict[str, object]:
    """Measure both sides in turn; which one goes first alternates."""
    # Both sides read this, and the same number of threads on each makes CPU seconds comparable.
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, __file__, "--tokenizer", tokenizer, "--side"]
    runs: list[dict[str, dict[str, float]]] = []
    for number in range(pairs):
        order = SIDES if number % 2 == 0 else SIDES[::-1]
        runs.append({})
        for side in order:
            done = subprocess.run([*command, side], env=environment, stdout=subprocess.PIPE, check=True)
            runs[-1][side] = {**json.loads(done.stdout.splitlines()[-1]), "load": os.getloadavg()[0]}
    speeds = {side: [run[side]["megabytes_per_cpu_second"] for run in runs] for side in SIDES}
    return {
        "what": "megabytes of text per CPU second, scrimp.data.prepare against datasets.map",
        "command": f"python benchmarks/tokenising.py --tokenizer {Path(tokenizer).name} --pairs {pairs} "
        f"--threads {threads}",
        "threads": threads,
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "datasets", "numpy")},
        "median": {side: statistics.median(speeds[side]) for side in SIDES},
        "ratio": statistics.median(run["scrimp"][KEY] / run["datasets"][KEY] for run in runs),
        "runs": runs,
    }


def measure(side: str, tokenizer_path: str) -> dict[str, float]:
    """Tokenise the default text once and return megabytes, CPU seconds, wall seconds and speed."""
    tokenizer = load_tokenizer(tokenizer_path)
    sources = find_sources()
    with tempfile.TemporaryDirectory() as folder:
        if side == "datasets":
            import datasets

            from scrimp.data.content import inspect
            from scrimp.data.documents import read_documents

            datasets.disable_progress_bars()
            content = inspect(sources, cache=Path(folder), progress=lambda message, done: None)
            texts = [document.content.decode() for document in read_documents(content.files, "text", "text")]
            rows = datasets.Dataset.from_dict({"text": texts})
            size = sum(len(text.encode()) for text in texts)
            cpu, wall = cpu_seconds(), time.perf_counter()
            rows.map(
                lambda batch: tokenizer(batch["text"]), batched=True, cache_file_name=f"{folder}/tokens.arrow"
            )
        else:
            cpu, wall = cpu_seconds(), time.perf_counter()
            corpus = prepare(find_sources(), tokenizer, cache=Path(folder))
            size = int(corpus.train.bytes.sum() + corpus.held_out.bytes.sum())
        spent, waited = cpu_seconds() - cpu, time.perf_counter() - wall
    megabytes = size / 1e6
    return {"megabytes": megabytes, "cpu_seconds": spent, "wall_seconds": waited, KEY: megabytes / spent}


def cpu_seconds() -> float:
    """Return the CPU seconds, user and system, of this process and its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
