"""Check what the built wheel left: a small installation, and a finished run that transformers loads.

Usage: check_wheel.py RUN, with the Python of the environment that the wheel was installed in.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

MOST_PACKAGES = 45
MOST_BITS_PER_BYTE = 3.0


def main(run: Path) -> int:
    """Print each figure beside its limit; return 1 if one is missed."""
    packages = {distribution.name for distribution in importlib.metadata.distributions()} - {"pip"}
    print(f"packages: {len(packages)} (at most {MOST_PACKAGES})")

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    bits = [record["bits_per_byte"] for record in records if record["kind"] == "eval"][-1]
    print(f"held-out bits per byte: {bits:.3f} (below {MOST_BITS_PER_BYTE})")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokens = AutoTokenizer.from_pretrained(run / "model")("def main(", return_tensors="pt")
    written = model.generate(**tokens, max_new_tokens=16, do_sample=False)
    size = f"{model.num_parameters():,} parameters"
    print(f"model: {type(model).__name__}, {size}, wrote {written.shape[1]} tokens")
    return 0 if len(packages) <= MOST_PACKAGES and bits < MOST_BITS_PER_BYTE else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
