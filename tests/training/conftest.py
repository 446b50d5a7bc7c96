"""A small run: a few kilobytes of seeded text, tiny models, and a reporter that remembers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from scrimp.build import Job, build, inspect
from scrimp.recipe import Recipe, nest, parse
from scrimp.training.metrics import read_metrics
from scrimp.training.run import Run, execute, plan
from scrimp.training.start import choose_start

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "many", "red", "birds", "fly", "over", "hills"]
MEASURED = ("tokens_per_s", "peak_bytes", "predicted_bytes")  # times, and memory of this very process


@dataclass
class Recorder:
    """A reporter that remembers what it was told, and does something after a given step."""

    after: dict[int, Callable[[], object]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    ticks: list[Any] = field(default_factory=list)
    job: Any = None

    def phase(self, message: str, done: float | None) -> None:
        self.phases.append(message)

    def plan(self, job: Any) -> None:
        self.job = job
        self.after.get(0, int)()

    def tick(self, tick: Any) -> None:
        self.ticks.append(tick)
        self.after.get(tick.step, int)()

    def note(self, message: str) -> None:
        self.notes.append(message)

    def done(self, job: Any, run: Run) -> None:
        self.phases.append("done")


@dataclass(frozen=True)
class Lab:
    """Starts small runs below one folder."""

    path: Path
    text: Path
    model: Path

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    def reporter(self, after: dict[int, Callable[[], object]] | None = None) -> Recorder:
        """Return a reporter that calls `after[step]` when a step is done; 0 is before the first."""
        return Recorder(after or {})

    def job(self, recipe: Recipe) -> Job:
        """Build what the loop would run, without running it."""
        prepared, _, resolved = plan(inspect(recipe, cache=self.cache), Recorder())
        return build(prepared, resolved.recipe, resolved.ledger, empty=False, say=Recorder().phase)

    def recipe(self, **changes: Any) -> Recipe:
        """Return a recipe of 6 steps on the tiny Llama; `__` in a name stands for a dot."""
        base = {
            "model": str(self.model),
            "data.path": [str(self.text)],
            "optimizer.lr": 1e-2,
            "steps": 6,
            "batch": 4,
            "micro_batch": 2,
            "seq": 16,
            "threads": 1,
            "memory": "8GiB",
            # With all choices made there is nothing to plan.
            "weights.name": "dense",
            "tune.name": "full",
            "gradient.name": "backprop",
            "optimizer.name": "adamw",
            "activations.name": "everything",
            "activations.loss": "logits",
            "placement.name": "device",
            "precision": "fp32",
        }
        return parse(nest({**base, **{name.replace("__", "."): value for name, value in changes.items()}}))

    def train(
        self,
        recipe: Recipe,
        out: str = "run",
        *,
        resume: bool = False,
        overwrite: bool = False,
        reporter: Recorder | None = None,
    ) -> Run:
        start = choose_start(recipe, out=self.path / out, resume=resume, overwrite=overwrite)
        inputs = inspect(start.recipe, cache=self.cache)
        return execute(start, inputs, reporter or Recorder())

    def rows(self, out: str = "run", *, kind: str | None = None) -> list[dict[str, Any]]:
        """Return the metrics of a run without what is measured."""
        rows = read_metrics(self.path / out / "metrics.jsonl")
        return [
            {name: value for name, value in row.items() if name not in MEASURED}
            for row in rows
            if kind in (None, row["kind"])
        ]

    def weights(self, out: str = "run") -> bytes:
        return (self.path / out / "model" / "model.safetensors").read_bytes()

    def checkpoints(self, out: str = "run") -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in (self.path / out / "checkpoints").iterdir())


def write_text(folder: Path, *, documents: int = 24, seed: int = 0) -> Path:
    """Write documents of very different lengths."""
    rng = random.Random(seed)
    folder.mkdir(exist_ok=True)
    for number in range(documents):
        words = rng.choices(WORDS, k=rng.choice([3, 20, 60]))
        (folder / f"{number:03}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def write_model(folder: Path, **changes: Any) -> Path:
    """Write the configuration of a tiny Llama over bytes: a model without weights."""
    from transformers import LlamaConfig

    from scrimp.data import byte_tokenizer

    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **{**sizes, **changes},
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_gpt2(folder: Path, *, dropout: float) -> Path:
    """Write the configuration of a tiny GPT-2 whose three dropouts have one rate."""
    from transformers import GPT2Config

    from scrimp.data import byte_tokenizer

    tokenizer = byte_tokenizer()
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2Config(vocab_size=len(tokenizer), **sizes, **rates, **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path, write_text(tmp_path / "text"), write_model(tmp_path / "tiny"))
