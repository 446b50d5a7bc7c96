"""How long a plan takes, cold and warm, and what it holds.

    python benchmarks/plan_time.py

Whole processes, each in turn: CPU seconds (of all threads, and of children) and the highest resident memory.
Cold: an empty cache, so that the machine is looked at and the model is traced. Warm: the same plan again, and
another budget; neither may import torch, which shows in its seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import clean_env, say, scrimp_command, start

LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


def main() -> None:
    benchmark = start("plan_time", __doc__, _options)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        big = Path(folder, "llama-70b")
        big.mkdir()
        (big / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
        for number in range(benchmark.arguments.runs):
            cache = Path(folder, f"cache-{number}")
            rows.append(
                {
                    "7B, cold": plan(cache, "llama-7b", "24GiB"),
                    "7B, warm": plan(cache, "llama-7b", "24GiB"),
                    "7B, warm, another budget": plan(cache, "llama-7b", "20GiB"),
                    "70B, cold": plan(cache, str(big), "80GiB", "--device", "cuda"),
                    "70B, warm": plan(cache, str(big), "80GiB", "--device", "cuda"),
                }
            )
    best = {name: min((row[name] for row in rows), key=lambda found: found["cpu_s"]) for name in rows[0]}
    benchmark.expect("7B, cold: CPU seconds", best["7B, cold"]["cpu_s"], below=20)
    benchmark.expect("7B, warm: seconds", best["7B, warm"]["wall_s"], below=3)
    benchmark.expect("7B, warm, another budget: seconds", best["7B, warm, another budget"]["wall_s"], below=3)
    benchmark.expect("70B, cold: CPU seconds", best["70B, cold"]["cpu_s"], below=60)
    benchmark.expect(
        "resident memory of a plan: GB, highest", max(found["peak_gb"] for found in best.values()), below=2
    )
    benchmark.write({"best": best, "all": rows})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=2)


def plan(cache: Path, model: str, memory: str, *words: str) -> dict[str, Any]:
    """Run a plan in a cache of its own, and return what it took."""
    env = clean_env({"XDG_CACHE_HOME": str(cache)})
    began = time.perf_counter()
    process = subprocess.Popen(
        scrimp_command("plan", model, "--memory", memory, *words),
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"scrimp plan {model} ended with {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    row = {
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "wall_s": round(time.perf_counter() - began, 2),
        "peak_gb": round(usage.ru_maxrss * unit / 1e9, 3),
    }
    say(f"{Path(model).name} {memory}: {row}")
    return row


if __name__ == "__main__":
    main()
