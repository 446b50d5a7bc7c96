"""Peers: the names, and every installed package on a real job in the real loop."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scrimp.base.errors import ScrimpError
from scrimp.bench.peers import PEERS, install_line, installed_version, peer
from scrimp.bench.trainer import run_trainer
from scrimp.build import Job, build, inspect
from scrimp.memory.observer import PeakMeter
from scrimp.memory.state_bytes import state_bytes
from scrimp.recipe import Recipe, nest, parse, replace
from scrimp.report.lines import LineReporter
from scrimp.training.loop import Loop
from scrimp.training.progress import Progress
from scrimp.training.run import plan
from scrimp.training.stopping import Stopper
from scrimp.training.watch import Watch

STEPS = 3


class Recorder(LineReporter):
    """Keeps the losses."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def tick(self, tick: Any) -> None:
        self.losses.append(tick.loss)

    def phase(self, message: str, done: float | None) -> None:
        pass


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe of three steps on a Llama of two narrow layers, in two micro-batches a step."""
    from transformers import LlamaConfig

    from scrimp.data import byte_tokenizer

    folder = tmp_path_factory.mktemp("peers")
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    text = folder / "text"
    text.mkdir()
    for number in range(1, 31):
        sentence = "the cat sat on a mat and saw many red birds fly. "
        (text / f"{number}.txt").write_text(sentence * (number % 3) + sentence[:number], encoding="utf-8")
    return parse(
        nest(
            {
                "model": str(folder / "tiny"),
                "data.path": [str(text)],
                "optimizer.lr": 1e-2,
                "optimizer.weight_decay": 0.1,
                "steps": STEPS,
                "batch": 4,
                "micro_batch": 2,
                "seq": 16,
                "threads": 1,
                "device": "cpu",
                "memory": "8GiB",
                "activations.name": "everything",
                "activations.loss": "logits",
                "precision": "fp32",
            }
        )
    )


def maker(recipe: Recipe, cache: Path) -> Callable[[], Job]:
    """Read a recipe's inputs once, and build jobs alike to the bit and not trained yet."""
    prepared, _, resolved = plan(inspect(recipe, cache=cache), Recorder())
    return lambda: build(prepared, resolved.recipe, resolved.ledger, empty=False, say=lambda *_: None)


@pytest.fixture(scope="module")
def make_job(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Job]:
    return maker(recipe, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def job(make_job: Callable[[], Job]) -> Job:
    return make_job()


def adapt(name: str, job: Job) -> dict[str, Any]:
    """Put a peer to work on a job; skip the test where its package is missing or needs another device."""
    found = peer(name)
    if installed_version(found) is None:
        pytest.skip(f"{found.package} is not installed: {install_line(found)}")
    if found.needs == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{name} needs a CUDA device, and there is none")
    module, _, function = found.adapt.partition(":")
    return getattr(importlib.import_module(module), function)(job, found.settings)


def run(job: Job) -> list[float]:
    """Take the recipe's steps in our own loop, and return the losses."""
    reporter = Recorder()
    assert job.recipe.steps is not None
    Loop(
        job=job,
        progress=Progress(),
        watch=Watch(job, PeakMeter(job.device)),
        reporter=reporter,
        stopper=Stopper(),
    ).run(job.recipe.steps)
    return reporter.losses


def moved(before: dict[str, torch.Tensor], job: Job) -> int:
    return sum(not torch.equal(before[name], p) for name, p in job.trained.items())


def snapshot(job: Job) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in job.trained.items()}


def eager_for(name: str) -> Any:
    """torchao compiles its step, which takes ten seconds; the same step runs as plain operations."""
    return torch.compiler.set_stance("force_eager") if name.startswith("torchao") else nullcontext()


OPTIMIZERS = [p.name for p in PEERS if not p.brings_loop and p.name != "badam"]
OPEN = ["torch:NAdam", "pytorch-optimizer:Fira", "pytorch-optimizer:Muon", "pytorch-optimizer:Adan"]


@pytest.mark.parametrize("name", [*OPTIMIZERS, *OPEN])
def test_a_peer_trains_every_parameter_of_a_real_job(
    name: str, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt(name, job)
    before = snapshot(job)
    with eager_for(name):
        losses = run(job)
    assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert moved(before, job) == len(before) > 0
    assert capsys.readouterr().out == ""  # standard output belongs to the bench


def test_badam_trains_one_block_after_the_other(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps a block: the first has one, as in the package, so three steps see two blocks of four."""
    used = adapt("badam", job)
    before = snapshot(job)
    losses = run(job)
    assert used["blocks"] == 4 and used["switch_block_every"] == 2
    assert capsys.readouterr().out == ""
    changed = {name for name, p in job.trained.items() if not torch.equal(before[name], p)}
    assert changed == {n for n in before if n.startswith(("lm_head", "model.norm", "model.layers.1."))}
    assert losses[-1] < losses[0]


def test_torchs_adamw_is_our_adamw(make_job: Callable[[], Job]) -> None:
    """The peer differs in its kernel alone, so an adapter that loses decay, betas or groups is seen."""
    ours, theirs = make_job(), make_job()
    adapt("torch:AdamW", theirs)
    assert run(ours) == pytest.approx(run(theirs), rel=1e-6)
    for name, p in ours.trained.items():
        torch.testing.assert_close(theirs.trained[name], p, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["torchao", "torch:Muon", "badam"])
def test_the_rate_that_the_loop_writes_is_the_rate_of_the_step(name: str, job: Job) -> None:
    """torchao holds its rate as a tensor; others share their groups with optimizers of their own."""
    adapt(name, job)
    before = snapshot(job)
    for rate in (0.0, 0.1):
        for group in job.optimizer.param_groups:
            group["lr"] = rate
        for p in job.trained.values():
            p.grad = torch.ones_like(p)
        with eager_for(name):
            job.optimizer.step()
        assert bool(moved(before, job)) == bool(rate)


def test_the_authors_groups(job: Job) -> None:
    """Rank for attention and MLP; embedding, head and norms with plain AdamW; no decay on vectors."""
    used = adapt("galore-torch", job)
    assert used["rank"] == 4
    names = {id(p): name for name, p in job.trained.items()}
    groups = job.optimizer.param_groups
    projected = {names[id(p)] for group in groups if "rank" in group for p in group["params"]}
    assert projected == {n for n in job.trained if ".self_attn." in n or ".mlp." in n}
    plain = {
        n: g["weight_decay"] for g in groups if "rank" not in g for n in (names[id(p)] for p in g["params"])
    }
    assert {n for n, decay in plain.items() if decay} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert projected | set(plain) == set(job.trained)


def test_lora_leaves_the_base_alone(job: Job) -> None:
    base = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    used = adapt("peft", job)
    run(job)
    now = {name.replace(".base_layer", ""): p for name, p in job.model.named_parameters()}
    assert all(torch.equal(now[name], p) for name, p in base.items())
    # Seven matrices a layer; every factor pair has rank * (rows + columns) elements.
    matrices = [p for name, p in base.items() if ".self_attn." in name or ".mlp." in name]
    assert used["trained"] == sum(16 * sum(p.shape) for p in matrices)


# Bytes by hand.


def test_state_bytes_of_adamw(job: Job) -> None:
    adapt("torch:AdamW", job)
    assert state_bytes(job.optimizer) == 0
    run(job)
    assert state_bytes(job.optimizer) == sum(8 * p.numel() + 4 for p in job.trained.values())


def test_state_bytes_of_galore_counts_the_whole_matrix_behind_its_projector(job: Job) -> None:
    """In fp32 the projector is a view: of r rows of Vh or r columns of U, squares of the smaller side."""
    adapt("galore-torch", job)
    run(job)
    rank, expected = 4, 0
    for name, p in job.trained.items():
        if ".self_attn." in name or ".mlp." in name:
            expected += 4 * (min(p.shape) ** 2 + 2 * max(p.shape) * rank)
        else:
            expected += 8 * p.numel()
    assert state_bytes(job.optimizer) == expected


@pytest.mark.parametrize(("bits", "block", "codes"), [(8, 256, 256), (4, 128, 16)])
def test_state_bytes_of_torchao(bits: int, block: int, codes: int) -> None:
    """Codes, a scale for each block, and a code book for each moment; one step count."""
    optim = pytest.importorskip("torchao.optim")
    matrix = nn.Parameter(torch.ones(64, 64))
    optimizer = getattr(optim, f"AdamW{bits}bit")([matrix], lr=1e-3)
    matrix.grad = torch.ones_like(matrix)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    moment = 4096 * bits // 8 + 4 * (4096 // block) + 4 * codes
    assert state_bytes(optimizer) == 2 * moment + 4


def test_state_bytes_of_bitsandbytes() -> None:
    """Codes and a scale for each block of 256; the two code books are shared by all matrices."""
    module = pytest.importorskip("bitsandbytes")
    matrices = [nn.Parameter(torch.ones(64, 64)) for _ in range(3)]
    small = nn.Parameter(torch.ones(64))
    optimizer = module.optim.AdamW8bit([*matrices, small], lr=1e-3)
    for p in (*matrices, small):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert state_bytes(optimizer) == 3 * 2 * (4096 + 4 * 16) + 2 * 4 * 256 + 8 * 64


def test_state_bytes_counts_a_storage_once_and_no_parameter() -> None:
    weight = nn.Parameter(torch.ones(8))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    whole = torch.zeros(10)
    optimizer.state[weight] = {"a": whole[:3], "b": [whole[3:], {"c": weight.detach()}], "d": weight}
    assert state_bytes(optimizer) == 40


# transformers' Trainer


@pytest.mark.parametrize(
    "rows",
    [{}, {"data.packing": "padded"}, {"data.boundaries": "isolate"}],
    ids=["joined", "padded", "isolated"],
)
def test_trainer_takes_the_same_steps_as_our_loop(
    rows: dict[str, Any], recipe: Recipe, tmp_path: Path
) -> None:
    """In two micro-batches, which padding leaves with different numbers of targets."""
    make = maker(replace(recipe, rows), tmp_path)
    ours, theirs = make(), make()
    told: list[tuple[int, float]] = []
    evaluated: list[int] = []
    run_trainer(
        theirs,
        after_step=lambda step, loss: told.append((step, loss)),
        evaluate=lambda: evaluated.append(len(told)),
    )
    losses = run(ours)
    assert [step for step, _ in told] == [1, 2, 3]
    # Its loss is a sum over one count of targets, ours of losses over it: the order of the additions differs.
    assert [loss for _, loss in told] == pytest.approx(losses, rel=1e-6)
    for name, p in ours.trained.items():
        torch.testing.assert_close(theirs.trained[name], p, rtol=1e-5, atol=1e-7)
    every = ours.recipe.evaluation.every
    assert every is not None and evaluated == [s for s in (1, 2, 3) if s % every == 0 or s == 3]
    counts = 4 * len(theirs.trained)  # torch counts steps in a tensor for each parameter
    assert state_bytes(theirs.optimizer) == state_bytes(ours.optimizer) + counts


def test_trainer_says_nothing_on_standard_output(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    run_trainer(job, after_step=lambda step, loss: None, evaluate=lambda: None)
    assert capsys.readouterr().out == ""


# Names


def test_names_are_checked_without_torch() -> None:
    """In a fresh interpreter, since this one has loaded everything."""
    script = (
        "import sys; from scrimp.bench.peers import PEERS, installed_version, peer; "
        "peer('torch:NAdam'), [installed_version(p) for p in PEERS]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("name", "near"),
    [("galore", "galore-torch"), ("apollo-torch:min", "apollo-torch:mini"), ("torch:NAdma", "NAdam")],
)
def test_an_unknown_peer_is_met_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ScrimpError, match=f"did you mean '{near}'"):
        peer(name)


def test_an_unknown_class_of_pytorch_optimizer_is_met_with_the_nearest() -> None:
    pytest.importorskip("pytorch_optimizer")
    assert peer("pytorch-optimizer:SPAM").title == "SPAM"
    with pytest.raises(ScrimpError, match="did you mean 'Fira'"):
        peer("pytorch-optimizer:Firra")


def test_a_class_that_needs_more_than_gradients_says_so(job: Job) -> None:
    with pytest.raises(ScrimpError, match="torch:LBFGS needs a closure"):
        adapt("torch:LBFGS", job)


def test_a_missing_package_has_an_install_line() -> None:
    missing = with_changes(peer("lion-pytorch"), name="no-such-package")
    assert installed_version(missing) is None
    assert install_line(missing) == "pip install 'scrimp[oracles]'"


def test_names_and_adapters_of_the_table() -> None:
    assert len({p.name for p in PEERS}) == len(PEERS)
    for found in PEERS:
        module, _, function = found.adapt.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert found.lr_ratio > 0 and found.suites and not found.summary.endswith(".")
