"""`scrimp train --tune` from chats to an adapter, which peft reads; what is refused before training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

Cli = Callable[..., Any]


@pytest.fixture(scope="session")
def base(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model with weights and a chat template."""
    folder = tmp_path_factory.mktemp("models") / "base"
    shutil.copytree(tiny_chat, folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_chat)).save_pretrained(folder)
    return folder


@pytest.fixture
def job(base: Path, here: Path, cache: Path) -> tuple[str, ...]:
    """Return the options of a run of three steps on a few conversations."""
    rows = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n + 1}."}]
        for n in range(60)
    ]
    (here / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    options = f"--model {base} --data chat.jsonl --cache {cache} --data.held-out 0.2 --data.packing padded"
    options += " --steps 3 --batch 2 --micro-batch 2 --seq 64 --lr 0.01 --tune.rank 2"
    return tuple(options.split())


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(40)[None]).logits
    return found


def test_a_chat_file_becomes_an_adapter_that_peft_reads_and_merge_folds_in(
    cli: Cli, job: tuple[str, ...], base: Path, here: Path
) -> None:
    outcome = cli("train", *job, "--tune", "lora", "--out", "run", "--json")
    assert outcome.code == 0, outcome.err
    assert not (here / "run" / "model").exists()
    adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), here / "run" / "adapter")
    assert not torch.allclose(_logits(adapted), _logits(LlamaForCausalLM.from_pretrained(base)), atol=1e-4)
    assert cli("merge", "run", "--out", "merged").code == 0
    merged = AutoModelForCausalLM.from_pretrained(here / "merged")
    torch.testing.assert_close(_logits(merged), _logits(adapted), rtol=1e-4, atol=1e-5)
    by = ("--data", "chat.jsonl", "--seq", "64", "--json")
    before, after = (cli("eval", name, *by).document["eval_loss"] for name in ("run/adapter", "merged"))
    assert before == pytest.approx(after, rel=1e-5)


def test_an_adapter_can_be_trained_over_another_one(
    cli: Cli, job: tuple[str, ...], here: Path, base: Path
) -> None:
    assert cli("train", *job, "--tune", "lora", "--out", "first").code == 0
    again = ("--model", "first", *job[2:])
    outcome = cli("train", *again, "--tune", "ia3", "--merge", "--out", "second")
    assert outcome.code == 2 and "rank" in outcome.err  # IA3 has none
    outcome = cli("train", *again[:-2], "--tune", "ia3", "--merge", "--out", "second")
    assert outcome.code == 0, outcome.err
    assert (here / "second" / "adapter").is_dir() and (here / "second" / "model").is_dir()


def test_a_prompt_is_trained_before_the_text_and_runs_with_its_base(
    cli: Cli, job: tuple[str, ...], here: Path, base: Path
) -> None:
    outcome = cli("train", *job[:-2], "--tune", "prompt", "--out", "run")
    assert outcome.code == 0, outcome.err
    assert "generate run --chat --prompt" in outcome.err
    plan = json.loads((here / "run" / "memory.json").read_text("utf-8"))["predicted"]
    assert plan["basis"] == "traced"
    hidden = LlamaConfig.from_pretrained(base).hidden_size
    assert plan["moments"][-1]["terms"]["optimizer state"] == 2 * 4 * 20 * hidden  # of twenty vectors
    assert cli("eval", "run/adapter", "--data", "chat.jsonl", "--seq", "64").code == 0
    outcome = cli("train", "--model", "run", *job[2:], "--tune", "lora", "--out", "over")
    assert outcome.code == 2 and "train over its base" in outcome.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--tune lora --tune.rank 40", "rank 40 does not fit"),
        ("--tune lora --tune.targets attn", "there are: "),
        ("--tune prompt --merge", "cannot be merged"),
        ("--tune full --merge", "trains the model itself"),
        ("--tune full --weights nf4", "never train"),
        ("--tune lora --model.init scratch", "starts from random weights"),
        ("--tune lora-plus --optimizer.fused-backward --clip 0", "leave --optimizer.fused-backward out"),
        ("--tune sft --optimizer.fused-backward --clip 0", "leave --optimizer.fused-backward out"),
    ],
)
def test_what_could_not_be_done_afterwards_is_refused_before(
    cli: Cli, job: tuple[str, ...], here: Path, options: str, said: str
) -> None:
    outcome = cli("train", *job[:-2], *options.split(), "--out", "run")
    assert outcome.code == 2 and said in outcome.err
    assert not (here / "run" / "adapter").exists()


def test_a_base_that_has_changed_is_refused(cli: Cli, job: tuple[str, ...], base: Path, here: Path) -> None:
    shutil.copytree(base, here / "mine")
    assert cli("train", "--model", "mine", *job[2:], "--tune", "lora", "--out", "run").code == 0
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(base)).save_pretrained(here / "mine")
    outcome = cli("merge", "run", "--out", "merged")
    assert outcome.code == 2 and "its weights have changed" in outcome.err
