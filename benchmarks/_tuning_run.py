"""A process of `tuning_task.py`: one run, alone, so that its memory is its own.

    python _tuning_run.py FOLDER        reads task.json, writes result.json

A task either makes the models and the questions, or trains one of the models and asks it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _keyword_task import QUESTIONS, TRAIN, VALIDATION, ask, write_task

from scrimp.base import files
from scrimp.base.errors import ScrimpError
from scrimp.base.platform import passive_openmp
from scrimp.report.lines import LineReporter

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel

    from scrimp.bench.bout import Bout
    from scrimp.training.reporter import Tick

TRACKED_STEPS = 2  # slower than the others, since their tensors are counted
CUT, WHOLE, BROKEN = "cut", "whole", "broken"  # models: first layers, healed; all layers; first layers


def main(folder: Path) -> None:
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    with passive_openmp():
        import torch  # noqa: F401
    began = time.monotonic()
    try:
        found = prepare(task) if task["kind"] == "prepare" else train(task)
    except ScrimpError as error:
        found = {"status": "failed", "why": str(error)}
    files.write_json(folder / "result.json", {**found, "seconds": round(time.monotonic() - began, 1)})


def prepare(task: dict[str, Any]) -> dict[str, Any]:
    """Write both models as folders, and the questions."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    path, folder = Path(task["model"]), Path(task["folder"])
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    dense: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)} if gguf else {}
    source = path.parent if gguf else path
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **gguf, **dense)
    tokenizer = AutoTokenizer.from_pretrained(source, **gguf)
    counts = {part: task[part] for part in (TRAIN, VALIDATION, QUESTIONS)}
    found = write_task(folder, tokenizer, seq=task["seq"], counts=counts)
    _save(model, tokenizer, folder / WHOLE)
    model.model.layers = model.model.layers[: task["layers"]]
    model.config.num_hidden_layers = task["layers"]
    _save(model, tokenizer, folder / BROKEN)
    with _bout({**task["heal"], "model.name": str(folder / BROKEN)}, task) as healed:
        healed.run(None, LineReporter())
        _save(healed.job.model, tokenizer, folder / CUT)
        last = healed.progress.last
    return {"status": "done", **found, "healed_to": last and last.loss}


def _save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _bout(recipe: dict[str, Any], task: dict[str, Any]) -> AbstractContextManager[Bout]:
    from scrimp.bench.bout import bout
    from scrimp.build import inspect
    from scrimp.recipe import nest, parse

    return bout(
        inspect(parse(nest(recipe), where=task["name"]), cache=Path(task["cache"])), None, LineReporter()
    )


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Train a model as `scrimp train` does, and ask it what the task says."""
    timer = _Timer()
    with _bout(task["recipe"], task) as made:
        found: dict[str, Any] = {"status": "done"}
        try:
            if task["trains"]:
                made.run(None, timer)
        except ScrimpError as error:
            if made.is_finite:
                raise
            return {"status": "diverged", "why": str(error)}
        seen = made.found()
        kept = (
            "parameters",
            "trained",
            "state_bytes",
            "peak_bytes",
            "predicted_bytes",
            "tensor_bytes",
            "memory",
        )
        found |= {name: seen[name] for name in kept}
        found |= _speed(made, timer) if task["trains"] else {}
        for part in task["asks"]:
            found[part] = ask(
                made.job.model, made.job.prepared.tokenizer, Path(task["folder"]) / f"{part}.jsonl"
            )
    return found


class _Timer(LineReporter):
    """Notes when each step was done."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def tick(self, tick: Tick) -> None:
        """Note a step."""
        self.ends.append(time.perf_counter())
        super().tick(tick)


def _speed(made: Bout, timer: _Timer) -> dict[str, Any]:
    recipe, last = made.job.recipe, made.progress.last
    assert recipe.batch is not None and recipe.seq is not None and last is not None
    steps = [b - a for a, b in zip(timer.ends[TRACKED_STEPS - 1 :], timer.ends[TRACKED_STEPS:], strict=False)]
    speed = recipe.batch * recipe.seq / statistics.median(steps) if steps else None
    return {"tokens_per_s": speed, "train_loss": last.loss, "steps": recipe.steps}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
