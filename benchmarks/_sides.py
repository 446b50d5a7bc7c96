"""The sides that the benchmarks of the loop compare: one training run, three ways, each in a process.

    ours      scrimp.training.run.execute, metrics and memory measured, told in plain lines
    bare      what a user writes by hand: forward, backward, clip, step, schedule, zero_grad
    trainer   transformers' Trainer, set up as a user would

All see the same rows of the same memory-mapped tokens in the same order, the same initial weights and
the same constant learning rate, fp32, torch's fused AdamW and clipping at 1. No side predicts the token
that begins a document. Nobody evaluates or saves: our run is stopped by its reporter after the last
step that counts. The losses come back too, and must agree.

    python benchmarks/_sides.py SIDE SPEC.json       prints {"ends": …, "cpu": …, "losses": …}

`ends` are the moments at which each step was over, `cpu` the CPU seconds of the process by then.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CLIP = 1.0
IGNORED = -100
LOG_EVERY = 10  # Trainer's own default is 500; a user who watches a run of 150 steps sets less


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A training run that every side can do.

    Attributes:
        model: A named shape.
        batch: Sequences a step, in one micro-batch.
        seq: Tokens a sequence.
        steps: Optimizer steps.
        lr: Constant learning rate.
        threads: Of the CPU.
        work: Folder of what `prepare` writes, and of the runs.
        seconds: Stop after so many seconds of steps, if that is sooner; only our side does.
        announce: File into which the trainer writes a line after its first step.
    """

    model: str
    batch: int
    seq: int
    steps: int
    lr: float
    threads: int
    work: str
    seconds: float | None = None
    announce: str | None = None

    @property
    def cache(self) -> Path:
        return Path(self.work) / "cache"

    @property
    def config(self) -> Path:
        return Path(self.work) / self.model

    @property
    def starts(self) -> Path:
        """Where each row begins in the tokens: int64, (steps, batch)."""
        return self.config / f"starts-{self.batch}x{self.seq}.npy"

    def options(self) -> dict[str, Any]:
        """Return the recipe's fields by dotted name."""
        return {
            "model.name": self.model,
            "batch": self.batch,
            "micro_batch": self.batch,
            "seq": self.seq,
            "steps": self.steps,
            "optimizer.lr": self.lr,
            "schedule.name": "constant",
            "schedule.warmup": 0,
            "clip": CLIP,
            "precision": "fp32",
            "device": "cpu",
            "threads": self.threads,
            "memory": "8GiB",
            "evaluation.every": self.steps,
            "checkpoint.every": self.steps,
        }

    def words(self) -> list[str]:
        """Return the recipe's fields as options of the command line."""
        return [
            w for name, value in self.options().items() for w in (f"--{name.replace('_', '-')}", str(value))
        ]

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path


@dataclass(slots=True)
class Clock:
    """Notes when each step was over, and its loss."""

    ends: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[Any] = field(default_factory=list)

    def step(self) -> None:
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def result(self) -> dict[str, Any]:
        return {"ends": self.ends, "cpu": self.cpu, "losses": [float(loss) for loss in self.losses]}


def prepare(spec: Spec) -> dict[str, Any]:
    """Tokenise the default text, and write down the model's configuration and the order of the rows."""
    import numpy as np

    from scrimp.base.seeds import derive
    from scrimp.build import inspect
    from scrimp.build import prepare as read
    from scrimp.data import separator
    from scrimp.data.loader import Loader
    from scrimp.recipe import Recipe, replace

    prepared = read(inspect(replace(Recipe(), spec.options()), cache=spec.cache), lambda *_: None)
    loader = Loader(
        prepared.corpus.train,
        seq=spec.seq,
        batch=spec.batch,
        micro_batch=spec.batch,
        pad_id=prepared.pad_id,
    )
    prepared.config.save_pretrained(spec.config)
    np.save(spec.starts, np.stack([loader.order(step) * spec.seq for step in range(spec.steps)]))
    (tokens,) = spec.cache.rglob("train.tokens")
    between = separator(prepared.tokenizer)
    found = {
        "tokens": str(tokens),
        "dtype": prepared.corpus.train.tokens.dtype.name,
        "never_predicted": None if between.shared else between.start,
        "init_seed": derive(0, "init"),
    }
    (spec.config / "data.json").write_text(json.dumps(found), encoding="utf-8")
    return found


def ours(spec: Spec) -> dict[str, Any]:
    """Run scrimp's own loop."""
    from scrimp.base.platform import passive_openmp

    with passive_openmp():
        import torch  # noqa: F401

    import tempfile

    from scrimp.build import inspect
    from scrimp.recipe import Recipe, replace
    from scrimp.report.lines import LineReporter
    from scrimp.training.reporter import Tick
    from scrimp.training.run import execute
    from scrimp.training.start import choose_start

    class EnoughError(Exception):
        """The last step that counts was done."""

    clock = Clock()

    class Watch(LineReporter):
        def tick(self, tick: Tick) -> None:
            super().tick(tick)
            clock.losses.append(tick.loss)
            clock.step()
            late = spec.seconds is not None and clock.ends[-1] - clock.ends[0] > spec.seconds
            if late or tick.step == spec.steps:
                raise EnoughError

    with tempfile.TemporaryDirectory(dir=spec.work) as folder:
        start = choose_start(replace(Recipe(), spec.options()), out=Path(folder) / "run", resume=False)
        try:
            execute(start, inspect(start.recipe, cache=spec.cache), Watch())
        except EnoughError:
            return clock.result()
    raise AssertionError("the run ended by itself")


@dataclass(frozen=True, slots=True)
class Text:
    """The tokens as a script by hand would read them.

    Attributes:
        tokens: The mapped stream.
        starts: Where each row begins, (steps, batch).
        never_predicted: The token that begins a document.
    """

    tokens: Any
    starts: Any
    never_predicted: int | None

    def row(self, start: int, length: int) -> tuple[Any, Any]:
        """Return inputs and labels, each (length,)."""
        import torch

        row = torch.from_numpy(self.tokens[start : start + length + 1].astype("int64"))
        labels = row[1:].clone()
        if self.never_predicted is not None:
            labels[labels == self.never_predicted] = IGNORED
        return row[:-1], labels


def _model_and_text(spec: Spec) -> tuple[Any, Text]:
    """Return the model with our run's initial weights, and the text."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(spec.threads)
    data = json.loads((spec.config / "data.json").read_text(encoding="utf-8"))
    torch.manual_seed(data["init_seed"])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec.config), dtype=torch.float32)
    tokens = np.memmap(data["tokens"], dtype=data["dtype"], mode="r")
    return model, Text(tokens, np.load(spec.starts), data["never_predicted"])


def bare(spec: Spec) -> dict[str, Any]:
    """Run a loop written by hand; it reads no loss during the run and measures nothing."""
    import torch
    import torch.nn.functional as F

    model, text = _model_and_text(spec)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=spec.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    model.train()
    clock = Clock()
    for step in range(spec.steps):
        rows = [text.row(start, spec.seq) for start in text.starts[step]]
        inputs, labels = (torch.stack(column) for column in zip(*rows, strict=True))
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        clock.losses.append(loss.detach())
        clock.step()
    return clock.result()


def trainer(spec: Spec) -> dict[str, Any]:
    """Run transformers' Trainer without evaluation, saving or reports."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, text = _model_and_text(spec)
    order = text.starts.flatten()

    class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return len(order)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            inputs, labels = text.row(order[index], spec.seq)
            # Shifted already, so that all `seq` inputs have a target, as on the other sides.
            return {"input_ids": inputs, "labels": labels, "shift_labels": labels}

    clock = Clock()

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()
            if spec.announce is not None and len(clock.ends) == 1:
                Path(spec.announce).write_text("first step\n", encoding="utf-8")

    class Keeping(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            clock.losses.append(loss)
            return loss

    arguments = TrainingArguments(
        output_dir=str(Path(spec.work) / "trainer"),
        per_device_train_batch_size=spec.batch,
        max_steps=spec.steps,
        learning_rate=spec.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.01,
        max_grad_norm=CLIP,
        logging_steps=LOG_EVERY,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        use_cpu=True,
    )
    Keeping(model=model, args=arguments, train_dataset=Rows(), callbacks=[Watch()]).train()
    return clock.result()


SIDES = {"prepare": prepare, "ours": ours, "bare": bare, "trainer": trainer}


if __name__ == "__main__":
    spec = Spec(**json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    print(json.dumps(SIDES[sys.argv[1]](spec)))
