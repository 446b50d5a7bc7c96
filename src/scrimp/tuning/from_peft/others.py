"""The adapters of peft that are no LoRA, by name, each a configuration with defaults that are known to work.

Those of some rank take `rank`, `alpha`, `dropout` and `targets`, as LoRA does; prompts take their length in
tokens. What each gives up stands in the catalogue.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from scrimp.tuning.from_peft.tuning import TASK, PeftTuning, check_numbers
from scrimp.tuning.targets import ALL_LINEAR

Targets = tuple[str, ...]
EVERY: Targets = (ALL_LINEAR,)


def VeRA(*, rank: int = 256, dropout: float = 0.0, targets: Targets = EVERY, seed: int = 0) -> PeftTuning:
    """Random A and B that all layers share and nobody trains, between two trained vectors.

    References:
        VeRA, Kopiczko et al., ICLR 2024, arXiv 2310.11454.
    """
    check_numbers("vera", rank, 1, dropout)

    def configure(_model: nn.Module, names: list[str] | None) -> Any:
        from peft import VeraConfig

        return VeraConfig(
            r=rank,
            target_modules=names,
            vera_dropout=dropout,
            projection_prng_key=seed % 2**31,
            task_type=TASK,
        )

    return PeftTuning(name="vera", configure=configure, seed=seed, targets=targets, rank=None)


def RandLoRA(
    *, rank: int = 32, alpha: float = 640, dropout: float = 0.0, targets: Targets = EVERY, seed: int = 0
) -> PeftTuning:
    """A sum of random low-rank bases with trained diagonals: a change of full rank.

    References:
        RandLoRA, Albert et al., ICLR 2025, arXiv 2502.00987.
    """
    check_numbers("randlora", rank, alpha, dropout)

    def configure(_model: nn.Module, names: list[str] | None) -> Any:
        from peft import RandLoraConfig

        return RandLoraConfig(
            r=rank,
            randlora_alpha=cast("Any", alpha),  # annotated as a whole number
            randlora_dropout=dropout,
            target_modules=names,
            projection_prng_key=seed % 2**31,
            task_type=TASK,
        )

    return PeftTuning(name="randlora", configure=configure, seed=seed, targets=targets, rank=rank)


def MiSS(*, rank: int = 64, dropout: float = 0.0, targets: Targets = EVERY, seed: int = 0) -> PeftTuning:
    """One trained shard a matrix, repeated over the columns: x is summed before it is multiplied.

    References:
        MiSS, Kang and Yin, 2024, arXiv 2409.15371.
    """
    check_numbers("miss", rank, 1, dropout)

    def configure(_model: nn.Module, names: list[str] | None) -> Any:
        from peft import MissConfig

        return MissConfig(r=rank, miss_dropout=dropout, target_modules=names, task_type=TASK)

    return PeftTuning(name="miss", configure=configure, seed=seed, targets=targets, rank=rank)


def IA3(*, seed: int = 0) -> PeftTuning:
    """Trained factors of keys, values and the MLP's inner activations.

    References:
        (IA)^3, Liu et al., NeurIPS 2022, arXiv 2205.05638.
    """

    def configure(_model: nn.Module, _names: list[str] | None) -> Any:
        from peft import IA3Config

        return IA3Config(task_type=TASK)

    return PeftTuning(name="ia3", configure=configure, seed=seed, targets=None)


def LayerNormTuning(*, seed: int = 0) -> PeftTuning:
    """The norms' own parameters train.

    References:
        Tuning LayerNorm in Attention, Zhao et al., ICLR 2024, arXiv 2312.11420.
    """

    def configure(model: nn.Module, _names: list[str] | None) -> Any:
        from peft import LNTuningConfig

        norms = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if "Norm" in type(m).__name__})
        return LNTuningConfig(target_modules=norms, task_type=TASK)

    return PeftTuning(name="layernorm", configure=configure, seed=seed, targets=None)


def BiasTuning(*, targets: Targets = EVERY, seed: int = 0) -> PeftTuning:
    """A trained bias on every linear layer, also where the model has none.

    References:
        BitFit, Ben Zaken et al., ACL 2022, arXiv 2106.10199; peft's BEFT.
    """

    def configure(_model: nn.Module, names: list[str] | None) -> Any:
        from peft import BeftConfig

        return BeftConfig(target_modules=names, task_type=TASK)

    return PeftTuning(name="bias", configure=configure, seed=seed, targets=targets, needs_biases=True)


def PromptTuning(*, prompt: int = 20, seed: int = 0) -> PeftTuning:
    """Trained vectors before the text.

    References:
        Prompt tuning, Lester et al., EMNLP 2021, arXiv 2104.08691.
    """

    def configure(_model: nn.Module, _names: list[str] | None) -> Any:
        from peft import PromptTuningConfig

        return PromptTuningConfig(num_virtual_tokens=prompt, task_type=TASK)

    return PeftTuning(
        name="prompt", configure=configure, seed=seed, targets=None, is_mergeable=False, wraps=True
    )


def PrefixTuning(*, prompt: int = 20, seed: int = 0) -> PeftTuning:
    """Trained keys and values before the text, in every layer.

    References:
        Prefix-tuning, Li and Liang, ACL 2021, arXiv 2101.00190.
    """

    def configure(_model: nn.Module, _names: list[str] | None) -> Any:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(num_virtual_tokens=prompt, task_type=TASK)

    return PeftTuning(
        name="prefix", configure=configure, seed=seed, targets=None, is_mergeable=False, wraps=True
    )


def PTuning(*, prompt: int = 20, seed: int = 0) -> PeftTuning:
    """Vectors before the text, made by a small trained network.

    References:
        P-tuning, Liu et al., 2021, arXiv 2103.10385.
    """

    def configure(model: Any, _names: list[str] | None) -> Any:
        from peft import PromptEncoderConfig

        width = model.config.get_text_config().hidden_size
        return PromptEncoderConfig(num_virtual_tokens=prompt, encoder_hidden_size=width, task_type=TASK)

    return PeftTuning(
        name="p-tuning", configure=configure, seed=seed, targets=None, is_mergeable=False, wraps=True
    )


def LlamaAdapter(*, prompt: int = 10, seed: int = 0) -> PeftTuning:
    """Prompts within the attention of all but the first two layers, behind a gate that starts at zero.

    References:
        LLaMA-Adapter, Zhang et al., ICLR 2024, arXiv 2303.16199.
    """

    def configure(model: Any, _names: list[str] | None) -> Any:
        from peft import AdaptionPromptConfig

        depth = model.config.get_text_config().num_hidden_layers
        return AdaptionPromptConfig(adapter_len=prompt, adapter_layers=max(1, depth - 2), task_type=TASK)

    return PeftTuning(name="llama-adapter", configure=configure, seed=seed, targets=None, is_mergeable=False)
