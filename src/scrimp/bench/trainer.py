"""transformers' Trainer on a job of ours: its loop, its optimizer, its data loader, our rows and schedule.

It sees the same rows in the same order, the same initial weights, learning rates, weight decay and clipping,
and is set up as a user would set it up who wants nothing saved, logged or reported. Labels come shifted, so
that all `seq` inputs of a row have a target, as on our side; the loss is the model's own, over logits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from scrimp.build import Job
from scrimp.data.loader import MicroBatch
from scrimp.schedules import learning_rate


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The rows of all steps, one after the other."""

    def __init__(self, job: Job) -> None:
        recipe = job.recipe
        assert recipe.batch is not None and recipe.micro_batch is not None and recipe.steps is not None
        self._loader = job.loader
        self._batch, self._micro_batch, self._steps = recipe.batch, recipe.micro_batch, recipe.steps
        self._step, self._micro_batches = -1, list[MicroBatch]()

    def __len__(self) -> int:
        return self._steps * self._batch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, place = divmod(index, self._batch)
        if step != self._step:  # the sampler goes through them in order
            self._step, self._micro_batches = step, self._loader.step(step)
        micro, row = divmod(place, self._micro_batch)
        taken = self._micro_batches[micro]
        labels = taken.labels[row]
        found = {"input_ids": taken.input_ids[row], "labels": labels, "shift_labels": labels}
        if taken.position_ids is not None:
            found["position_ids"] = taken.position_ids[row]
        return found


class _OurTrainer(Trainer):
    """Trainer with our schedule, which lets its optimizer and its losses be seen."""

    def __init__(self, job: Job, **options: Any) -> None:
        super().__init__(job.model, **options)
        self._job = job
        self.losses: list[Tensor] = []

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self._job.optimizer = super().create_optimizer(model)
        return self._job.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        recipe = self._job.recipe
        peak = recipe.optimizer.lr
        assert isinstance(peak, float)

        def factor(step: int) -> float:
            # After the last step it asks for the rate of one more.
            return learning_rate(recipe, min(step, num_training_steps - 1)) / peak

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self._job.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss)
        return loss


class _Told(TrainerCallback):
    """Tells of each step, and has the model evaluated when the recipe says so."""

    def __init__(
        self, job: Job, *, after_step: Callable[[int, float], None], evaluate: Callable[[], None]
    ) -> None:
        self._recipe = job.recipe
        self._after_step, self._evaluate = after_step, evaluate
        self.trainer: _OurTrainer | None = None

    def _step_ended(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Sum the losses of the step's micro-batches, each over the targets of the whole step."""
        assert self.trainer is not None
        losses, self.trainer.losses = self.trainer.losses, []
        step = int(state.global_step)
        self._after_step(step, float(torch.stack(losses).sum()))
        every = self._recipe.evaluation.every
        if step == self._recipe.steps or (every is not None and step % every == 0):
            self._evaluate()

    on_step_end = _step_ended  # transformers gives it more by name than anybody wants


def run_trainer(job: Job, *, after_step: Callable[[int, float], None], evaluate: Callable[[], None]) -> None:
    """Train a job's model with transformers' Trainer, for all steps of its recipe.

    `job.optimizer` is Trainer's from the first step on. When `after_step` is called, its groups hold the rate
    of the step to come.

    Args:
        job: Built from a resolved recipe, untrained.
        after_step: Called after every step with its number, from 1, and its loss in nats a target.
        evaluate: Called at the recipe's evaluations, after `after_step`.
    """
    told = _Told(job, after_step=after_step, evaluate=evaluate)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _OurTrainer(job, args=_arguments(job, folder), train_dataset=_Rows(job), callbacks=[told])
        told.trainer = trainer
        trainer.remove_callback(PrinterCallback)  # standard output belongs to the bench
        trainer.train()


def _arguments(job: Job, folder: str) -> TrainingArguments:
    recipe, optimizer = job.recipe, job.recipe.optimizer
    assert recipe.batch is not None and recipe.micro_batch is not None and recipe.steps is not None
    assert isinstance(optimizer.lr, float) and optimizer.betas is not None
    assert optimizer.eps is not None and optimizer.weight_decay is not None
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.batch // recipe.micro_batch,
        train_sampling_strategy="sequential",
        optim="adamw_torch_fused",
        learning_rate=optimizer.lr,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=recipe.clip,
        bf16=recipe.precision == "bf16-mixed",
        torch_compile=bool(recipe.compile),
        seed=recipe.seed,
        use_cpu=job.device.type == "cpu",
        dataloader_pin_memory=job.device.type != "cpu",
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    # With several GPUs it would split each micro-batch among them, and take as many more rows.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
