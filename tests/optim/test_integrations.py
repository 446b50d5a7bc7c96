"""Inside other people's loops: transformers' Trainer, Lightning, Accelerate, DistributedDataParallel.

Each trains a small Llama with accumulation and clipping, stops half-way, and resumes in a fresh model: the
weights are those of the run that was not interrupted, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import scrimp.optim
from scrimp.optim import Optimizer
from scrimp.optim.compat.galore_torch import GaLoreAdamW

STEPS, HALF, ACCUMULATED, CLIP = 8, 4, 2, 0.5
OPTIONS = {"lr": 1e-2, "rank": 4, "refresh_every": 3}  # a resumed run is in the middle of a subspace's life


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def sequences() -> list[dict[str, Tensor]]:
    tokens = torch.randint(64, (2 * STEPS * ACCUMULATED, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def batches() -> torch.utils.data.DataLoader[dict[str, Tensor]]:
    return torch.utils.data.DataLoader(sequences(), batch_size=2)  # type: ignore[arg-type]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


# ---- transformers' Trainer -------------------------------------------------------------------------------


def galore_of_the_model(model: nn.Module) -> dict[str, Any]:
    return {"optimizers": (scrimp.optim.GaLore(model, **OPTIONS), None)}


def galore_made_by_the_trainer(model: nn.Module) -> dict[str, Any]:
    # What is no class is a factory to the Trainer: called without arguments first, then with the model.
    return {"optimizer_cls_and_kwargs": (lambda: scrimp.optim.GaLore, OPTIONS)}


def a_class_and_groups(model: nn.Module) -> dict[str, Any]:
    group = {"rank": 4, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    chosen = [p for name, p in model.named_parameters() if "mlp" in name]
    others = [p for name, p in model.named_parameters() if "mlp" not in name]
    groups = [{"params": others}, {"params": chosen, **group}]
    return {"optimizer_cls_and_kwargs": (GaLoreAdamW, {"params": groups, "lr": 1e-2})}


def fira(model: nn.Module) -> dict[str, Any]:
    return {"optimizers": (scrimp.optim.Fira(model, **OPTIONS), None)}


def apollo(model: nn.Module) -> dict[str, Any]:
    return {"optimizers": (scrimp.optim.Apollo(model, **OPTIONS), None)}


def trainer(model: nn.Module, out: Path, given: dict[str, Any]) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=STEPS,
        save_steps=HALF,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATED,
        max_grad_norm=CLIP,
        learning_rate=OPTIONS["lr"],
        warmup_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model=model, args=arguments, train_dataset=sequences(), **given)


@pytest.mark.parametrize(
    "given", [galore_of_the_model, galore_made_by_the_trainer, a_class_and_groups, fira, apollo]
)
def test_transformers_trainer_resumes_bit_for_bit(given: Any, tmp_path: Path) -> None:
    start, whole, resumed = llama(), llama(), llama()
    trainer(whole, tmp_path, given(whole)).train()
    again = trainer(resumed, tmp_path, given(resumed))
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))
    assert isinstance(again.optimizer.optimizer, Optimizer)
    assert same(whole, resumed) and not same(whole, start)


def test_updates_inside_the_backward_pass_are_the_trainers_steps(tmp_path: Path) -> None:
    weights = []
    for fuses in (False, True):
        optimizer = scrimp.optim.GaLore(model := llama(), **OPTIONS)
        loop = trainer(model, tmp_path, {"optimizers": (optimizer, None)})
        loop.args.max_grad_norm = 0.0
        if fuses:
            optimizer.fuse_backward(micro_batches=ACCUMULATED)
        loop.train()
        weights.append([p.detach() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # micro-batches add up in the subspace


# ---- Lightning -------------------------------------------------------------------------------------------


# Lightning warns of its own use of torch, and of the second run's folder.
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            optimizer = scrimp.optim.GaLore(self.model, **OPTIONS)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def fit(module: Module, out: Path, **options: Any) -> None:
        saving = lightning.pytorch.callbacks.ModelCheckpoint(
            out, "{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
        )
        lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=2,
            limit_train_batches=HALF * ACCUMULATED,
            accumulate_grad_batches=ACCUMULATED,
            gradient_clip_val=CLIP,
            callbacks=[saving],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, batches(), **options)

    whole, resumed = Module(), Module()
    fit(whole, tmp_path / "whole")
    fit(resumed, tmp_path / "resumed", ckpt_path=tmp_path / "whole" / f"step={HALF}.ckpt", weights_only=True)
    assert same(whole, resumed) and not same(whole, Module())


# ---- Accelerate ------------------------------------------------------------------------------------------


def test_accelerate_resumes_bit_for_bit(tmp_path: Path) -> None:
    from accelerate import Accelerator

    def run(first: int, last: int) -> LlamaForCausalLM:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
        optimizer = scrimp.optim.Fira(given := llama(), **OPTIONS)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        model, optimizer, loader, schedule = accelerator.prepare(given, optimizer, batches(), schedule)
        if first:
            accelerator.load_state(str(tmp_path))
            loader = accelerator.skip_first_batches(loader, first * ACCUMULATED)
        for number, batch in enumerate(loader, first * ACCUMULATED):
            if number == last * ACCUMULATED:
                break
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if last < STEPS:
            accelerator.save_state(str(tmp_path))
        return given

    whole, half, resumed = run(0, STEPS), run(0, HALF), run(HALF, STEPS)
    assert same(whole, resumed) and not same(whole, half)


# ---- DistributedDataParallel -----------------------------------------------------------------------------


def test_ddp_of_one_process_changes_nothing() -> None:
    def run(model: nn.Module) -> None:
        optimizer = scrimp.optim.GaLore(model, **OPTIONS)
        for batch in batches():
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    alone, wrapped = llama(), llama()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        run(nn.parallel.DistributedDataParallel(wrapped))
    finally:
        torch.distributed.destroy_process_group()
    run(alone)
    assert same(alone, wrapped) and not same(alone, llama())
