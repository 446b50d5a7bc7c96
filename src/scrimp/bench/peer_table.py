"""The table of peers: other people's packages as contestants, with their sources' settings.

`lr_ratio` is where the search for a learning rate begins, as a multiple of AdamW's: what the method's
source says, or the rates that its scripts use beside those of their AdamW baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Suite = Literal["optimizers", "pretrain", "finetune", "memory", "speed"]

SCRATCH: tuple[Suite, ...] = ("optimizers", "pretrain", "memory", "speed")
EVERYWHERE: tuple[Suite, ...] = (*SCRATCH, "finetune")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One method of one package.

    Attributes:
        name: `PACKAGE`, or `PACKAGE:CLASS`.
        title: The class.
        adapt: What puts it to work, as `module:function`: `adapt(job, settings)` changes the job in place
            and returns the settings as used; with `brings_loop` it is `scrimp.bench.trainer.run_trainer`.
        lr_ratio: The centre of the search for its learning rate, over AdamW's.
        settings: Its source's; what depends on the model is a function of it, which `adapt` resolves.
        suites: Where it can stand.
        paper: The method whose reported figures stand beside it; None where there are none.
        summary: One line for people.
        needs: `cuda` where it works on nothing else.
        brings_loop: Whether it brings a training loop instead of an optimizer.
    """

    name: str
    title: str
    adapt: str
    lr_ratio: float
    summary: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    suites: tuple[Suite, ...] = SCRATCH
    paper: str | None = None
    needs: Literal["", "cuda"] = ""
    brings_loop: bool = False

    @property
    def package(self) -> str:
        """The distribution, as pip names it."""
        return self.name.partition(":")[0]


def _adapter(function: str) -> str:
    return f"scrimp.bench.adapters:{function}"


def _projection(function: str) -> str:
    return f"scrimp.bench.projections:{function}"


# The 60M scripts of all three papers: a rank of a quarter of the width, and 200 steps between refreshes. A
# run of some hundred steps would never leave its first subspace, that of noise, so it has ten refreshes.
_GAP = "min(200, steps/10)"
_GALORE = {"rank": "width/4", "update_proj_gap": _GAP, "scale": 0.25, "proj_type": "std"}
_APOLLO = {
    "rank": "width/4",
    "update_proj_gap": _GAP,
    "scale": 1.0,
    "proj": "random",
    "scale_type": "channel",
    "proj_type": "std",
}
_Q_GALORE = {
    **_GALORE,
    "quant": True,
    "quant_n_bit": 4,
    "quant_group_size": 256,
    "cos_threshold": 0.4,
    "gamma_proj": 2,
    "queue_size": 5,
}
# Lion, section 5: 3 to 10 times smaller than AdamW's. The weight decay grows by as much.
LION_LR = 1 / 5
# Scripts of GaLore, Fira and APOLLO: 0.01; the best rate of AdamW in APOLLO's long-context run: 0.005.
PROJECTED_LR = 2.0
_LION = {"betas": (0.9, 0.99), "weight_decay_factor": 5.0}
# torch's defaults: 0.01 for Adafactor, whose steps scale with the weights' RMS, 0.001 for AdamW.
_RMS_SCALED_LR = 10.0

PEERS: tuple[Peer, ...] = (
    Peer(
        name="torch:AdamW",
        title="AdamW",
        adapt=_adapter("torch_adamw"),
        lr_ratio=1.0,
        suites=EVERYWHERE,
        paper="adamw",
        summary="torch's AdamW with its own choice of kernel (ours asks for the fused one)",
    ),
    Peer(
        name="torch:SGD",
        title="SGD",
        adapt=_adapter("torch_sgd"),
        lr_ratio=10.0,  # no second moment to divide by; the textbook's 0.01 beside AdamW's 0.001
        settings={"momentum": 0.9},
        summary="stochastic gradient descent with momentum",
    ),
    Peer(
        name="torch:Adafactor",
        title="Adafactor",
        adapt=_adapter("torch_adafactor"),
        lr_ratio=_RMS_SCALED_LR,
        paper="adafactor",
        summary="second moments as a row and a column; steps scaled by the weights' RMS",
    ),
    Peer(
        name="torch:Muon",
        title="Muon",
        adapt=_adapter("torch_muon"),
        lr_ratio=1.0,  # "match_rms_adamw" is there to take AdamW's rate and decay over (arXiv 2502.16982)
        settings={"adjust_lr_fn": "match_rms_adamw", "momentum": 0.95},
        paper="muon",
        summary="orthogonalised momentum for the inner matrices, AdamW for the rest",
    ),
    Peer(
        name="transformers",
        title="Trainer",
        adapt="scrimp.bench.trainer:run_trainer",
        lr_ratio=1.0,
        settings={"optim": "adamw_torch_fused"},
        suites=EVERYWHERE,
        paper="adamw",
        summary="transformers' Trainer with its default AdamW",
        brings_loop=True,
    ),
    Peer(
        name="transformers:Adafactor",
        title="Adafactor",
        adapt=_adapter("transformers_adafactor"),
        lr_ratio=1.0,  # with both switches off its steps have AdamW's size
        settings={"relative_step": False, "scale_parameter": False},
        paper="adafactor",
        summary="second moments as a row and a column; a given learning rate, as T5's guide has it",
    ),
    Peer(
        name="lion-pytorch",
        title="Lion",
        adapt=_adapter("lion"),
        lr_ratio=LION_LR,
        settings=_LION,
        suites=EVERYWHERE,
        paper="lion",
        summary="the sign of a blend of momentum and gradient; one moment",
    ),
    Peer(
        name="adam-mini",
        title="Adam_mini",
        adapt=_adapter("adam_mini"),
        lr_ratio=1.0,  # "the same hyperparameters as AdamW"
        paper="adam-mini",
        summary="one second moment for a head or a row",
    ),
    Peer(
        name="came-pytorch",
        title="CAME",
        adapt=_adapter("came"),
        lr_ratio=0.5,  # its README: 1 to 3 times smaller than AdamW's
        settings={"betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16)},
        paper="came",
        summary="Adafactor with a confidence on its momentum",
    ),
    Peer(
        name="galore-torch",
        title="GaLoreAdamW",
        adapt=_projection("galore"),
        lr_ratio=PROJECTED_LR,
        settings=_GALORE,
        suites=EVERYWHERE,
        paper="galore",
        summary="AdamW in the gradient's leading singular subspace",
    ),
    Peer(
        name="galore-torch:GaLoreAdamW8bit",
        title="GaLoreAdamW8bit",
        adapt=_projection("galore_8bit"),
        lr_ratio=PROJECTED_LR,
        settings=_GALORE,
        suites=EVERYWHERE,
        paper="galore-8bit",
        summary="GaLore over bitsandbytes' 8-bit AdamW",
        needs="cuda",
    ),
    Peer(
        name="galore-torch:GaLoreAdafactor",
        title="GaLoreAdafactor",
        adapt=_projection("galore_adafactor"),
        lr_ratio=PROJECTED_LR,
        settings={**_GALORE, "relative_step": False, "scale_parameter": False, "beta1": 0.9},
        paper="galore",
        summary="Adafactor with momentum in the gradient's leading singular subspace",
    ),
    Peer(
        name="apollo-torch",
        title="APOLLOAdamW",
        adapt=_projection("apollo"),
        lr_ratio=PROJECTED_LR,
        settings=_APOLLO,
        suites=EVERYWHERE,
        paper="apollo",
        summary="the raw gradient, scaled for each channel by what Adam does to a random sketch of it",
    ),
    Peer(
        name="apollo-torch:mini",
        title="APOLLOAdamW",
        adapt=_projection("apollo"),
        lr_ratio=PROJECTED_LR,
        settings={**_APOLLO, "rank": 1, "scale": 128.0, "scale_type": "tensor"},
        suites=EVERYWHERE,
        paper="apollo-mini",
        summary="APOLLO with a sketch of rank 1 and one scale for a matrix",
    ),
    Peer(
        name="fira",
        title="FiraAdamW",
        adapt=_projection("fira"),
        lr_ratio=PROJECTED_LR,
        settings={"rank": "width/4", "update_proj_gap": _GAP, "alpha": 0.25, "proj_type": "std"},
        suites=EVERYWHERE,
        paper="fira",
        summary="GaLore plus the residual outside the subspace, scaled and limited",
    ),
    Peer(
        name="q-galore-torch",
        title="QGaLoreAdamW8bit_simulate",
        adapt=_projection("q_galore"),
        lr_ratio=3.0,  # 0.015 where GaLore has 0.01
        settings=_Q_GALORE,
        paper="q-galore",
        summary="8-bit GaLore with a 4-bit projector that is renewed lazily; weights stay as they are",
        needs="cuda",
    ),
    Peer(
        name="bitsandbytes",
        title="AdamW8bit",
        adapt=_adapter("bitsandbytes_adamw"),
        lr_ratio=1.0,
        suites=EVERYWHERE,
        paper="adamw-8bit",
        summary="AdamW with both moments in blocks of 8 bits",
    ),
    Peer(
        name="bitsandbytes:Lion8bit",
        title="Lion8bit",
        adapt=_adapter("bitsandbytes_lion"),
        lr_ratio=LION_LR,
        settings=_LION,
        suites=EVERYWHERE,
        paper="lion",
        summary="Lion with its moment in blocks of 8 bits",
    ),
    Peer(
        name="torchao",
        title="AdamW8bit",
        adapt=_adapter("torchao_adamw"),
        lr_ratio=1.0,
        settings={"bits": 8},
        suites=EVERYWHERE,
        paper="adamw-8bit",
        summary="AdamW with both moments in blocks of 8 bits, as a compiled kernel",
    ),
    Peer(
        name="torchao:AdamW4bit",
        title="AdamW4bit",
        adapt=_adapter("torchao_adamw"),
        lr_ratio=1.0,
        settings={"bits": 4},
        suites=EVERYWHERE,
        paper="adamw-4bit",
        summary="AdamW with both moments in blocks of 4 bits, as a compiled kernel",
    ),
    Peer(
        name="badam",
        title="BlockOptimizer",
        adapt=_projection("badam"),
        lr_ratio=1.0,
        # The class's own 50 steps, but no longer than lets every block have a turn.
        settings={"switch_block_every": "min(50, steps/blocks)", "switch_mode": "descending"},
        suites=EVERYWHERE,
        paper="badam",
        summary="AdamW on one layer at a time",
    ),
    Peer(
        name="lomo-optim",
        title="AdaLomo",
        adapt=_projection("adalomo"),
        lr_ratio=_RMS_SCALED_LR,
        suites=EVERYWHERE,
        paper="adalomo",
        summary="Adafactor inside the backward pass, so that no more than two gradients live at once",
        needs="cuda",
    ),
    Peer(
        name="peft",
        title="LoRA",
        adapt=_projection("peft_lora"),
        lr_ratio=10.0,  # "LoRA Without Regret" (Schulman, 2025): ten times that of full fine-tuning
        settings={"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        suites=("finetune", "memory", "speed"),
        paper="lora",
        summary="frozen weights plus trained factors of low rank",
    ),
)
