"""Fine-tune SmolLM2-135M on a real text, and hand the result to plain transformers.

    python benchmarks/finetune.py --model SmolLM2-135M-Instruct.Q4_1.gguf [--data TEXT]

`scrimp train` starts from the GGUF file's weights and trains a few steps, on Python's own language
reference where no text is given (172 thousand tokens of English). The training loss must fall,
and so must the held-out loss. Then a process without scrimp loads the saved folder with
`AutoModelForCausalLM.from_pretrained` and takes the loss on the rows that the run evaluated on; it must
be the same number. The weights of the GGUF file, loaded by transformers too, give the loss before.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import run, run_json, say, scrimp_command, start

TOLERANCE = 1e-5  # nats: the same fp32 products, summed in batches of another size
ENDS = 5  # steps at either end over which the training loss is averaged


def main() -> None:
    benchmark = start("finetune", __doc__, _options)
    options = benchmark.arguments
    with tempfile.TemporaryDirectory(prefix="scrimp-finetune-") as folder:
        work = Path(folder)
        out = work / "run"
        words = [*_recipe(options), "--cache", str(work / "cache"), "--out", str(out)]
        finished = json.loads(run(scrimp_command("train", *words, "--json")))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses = [row["loss"] for row in rows if row["kind"] == "train"]
        _side("rows", str(out), str(work / "cache"), str(work / "rows.npz"))
        before = _side("plain", str(options.model), str(work / "rows.npz"))["loss"]
        after = _side("plain", str(out / "model"), str(work / "rows.npz"))["loss"]
    results = {
        "recipe": finished["recipe"] | {"model.name": options.model.name, "data.path": options.data.name},
        "first_losses": losses[:ENDS],
        "last_losses": losses[-ENDS:],
        "mean_of_first": statistics.mean(losses[:ENDS]),
        "mean_of_last": statistics.mean(losses[-ENDS:]),
        "held_out_loss_before": before,
        "held_out_loss_after": finished["eval_loss"],
        "held_out_loss_after_in_transformers": after,
        "difference": abs(after - finished["eval_loss"]),
        "held_out_tokens": finished["eval_tokens"],
        "bits_per_byte": finished["bits_per_byte"],
        "peak_bytes": finished["peak_bytes"],
    }
    benchmark.expect(
        "training loss, last steps minus first", results["mean_of_last"] - results["mean_of_first"], below=0
    )
    benchmark.expect("held-out loss, after minus before", finished["eval_loss"] - before, below=0)
    benchmark.expect("held-out loss, scrimp against transformers", results["difference"], below=TOLERANCE)
    benchmark.write(results)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M: a GGUF file or a folder")
    parser.add_argument("--data", type=Path, default=_reference(), help="a text; default: Python's reference")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--threads", type=int, default=2)


def _reference() -> Path:
    """Return the text that Python's `help()` shows about the language: real, and the same everywhere."""
    return Path(pydoc_data.__path__[0]) / "topics.py"


def _recipe(options: argparse.Namespace) -> list[str]:
    named = {
        "model": options.model,
        "data": options.data,
        "steps": options.steps,
        "batch": options.batch,
        "seq": options.seq,
        "lr": options.lr,
        "threads": options.threads,
        "evaluation.every": options.steps,
        "evaluation.tokens": 4096,
        "checkpoint.every": options.steps,
    }
    return [word for name, value in named.items() for word in (f"--{name}", str(value))]


def _side(name: str, *words: str) -> dict[str, Any]:
    say({"rows": "reading the held-out rows", "plain": "evaluating in transformers"}[name])
    return run_json([sys.executable, __file__, f"_{name}", *words])


def write_rows(run: str, cache: str, path: str) -> dict[str, Any]:
    """Write the rows that a run evaluates on: inputs and labels, each (rows, seq)."""
    import numpy as np

    from scrimp import recipe_file
    from scrimp.build import inspect, prepare
    from scrimp.data import evaluation_batches

    recipe = recipe_file.read(Path(run) / "recipe.yaml").recipe
    prepared = prepare(inspect(recipe, cache=Path(cache)), lambda *_: None)
    assert recipe.seq is not None
    batches = evaluation_batches(
        prepared.corpus.held_out,
        seq=recipe.seq,
        micro_batch=1,
        pad_id=prepared.pad_id,
        max_tokens=recipe.evaluation.tokens,
    )
    pairs = [(batch.input_ids.numpy(), batch.labels.numpy()) for batch in batches]
    inputs, labels = (np.concatenate(column) for column in zip(*pairs, strict=True))
    np.savez(path, inputs=inputs, labels=labels)
    return {"rows": len(inputs)}


def plain_loss(model_path: str, rows_path: str) -> dict[str, Any]:
    """Take the loss on rows by transformers alone, in nats a token."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    path = Path(model_path)
    if path.suffix == ".gguf":
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.eval()
    rows = np.load(rows_path)
    inputs, labels = torch.from_numpy(rows["inputs"]), torch.from_numpy(rows["labels"])
    nats = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for row, label in zip(inputs.split(4), labels.split(4), strict=True):
            logits = model(input_ids=row).logits
            nats += F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="sum")
    return {"loss": (nats / (labels != -100).sum()).item()}


PROCESSES: dict[str, Callable[..., dict[str, Any]]] = {"_rows": write_rows, "_plain": plain_loss}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PROCESSES:
        print(json.dumps(PROCESSES[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
