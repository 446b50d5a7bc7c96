"""peft's LoRA and its kin by name, each a configuration with defaults that are known to work.

All take `rank`, `alpha` (the scale is alpha / rank), `dropout` and `targets`. What each gives up stands in
the catalogue; the other adapters of peft's are in `others`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from scrimp.base.protocols import Probe
from scrimp.tuning.from_peft.tuning import ADAPTER, TASK, PeftTuning, check_numbers
from scrimp.tuning.targets import ALL_LINEAR

Targets = tuple[str, ...]
EVERY: Targets = (ALL_LINEAR,)


def _lora(
    name: str,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Targets,
    seed: int,
    *,
    init: Any = True,
    moves_base: bool = False,
    finish: Callable[[nn.Module], None] | None = None,
    **settings: Any,
) -> PeftTuning:
    check_numbers(name, rank, alpha, dropout)

    def configure(_model: nn.Module, names: list[str] | None) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=rank,
            lora_alpha=cast("Any", alpha),  # annotated as a whole number
            lora_dropout=dropout,
            target_modules=names,
            init_lora_weights=init,
            task_type=TASK,
            **settings,
        )

    return PeftTuning(
        name=name,
        configure=configure,
        seed=seed,
        targets=targets,
        rank=rank,
        moves_base=moves_base,
        finish=finish or _fuse,
    )


def _fuse(model: nn.Module) -> None:
    from scrimp.tuning.from_peft.fused_lora import fuse

    fuse(model)


def LoRA(
    *, rank: int = 16, alpha: float = 32, dropout: float = 0.0, targets: Targets = EVERY, seed: int = 0
) -> PeftTuning:
    """W + (alpha / r) B A, A drawn as Kaiming does, B zero.

    References:
        LoRA, Hu et al., ICLR 2022, arXiv 2106.09685.
    """
    return _lora("lora", rank, alpha, dropout, targets, seed)


def RsLoRA(
    *, rank: int = 16, alpha: float = 32, dropout: float = 0.0, targets: Targets = EVERY, seed: int = 0
) -> PeftTuning:
    """LoRA with the scale alpha / sqrt(r), which keeps large ranks learning.

    References:
        rsLoRA, Kalajdzievski, 2023, arXiv 2312.03732.
    """
    return _lora("rslora", rank, alpha, dropout, targets, seed, use_rslora=True)


def PiSSA(
    *, rank: int = 16, alpha: float = 16, dropout: float = 0.0, targets: Targets = EVERY, seed: int = 0
) -> PeftTuning:
    """LoRA that begins with the principal singular directions of W, which W gives up.

    The decomposition is randomised, with sixteen iterations, as its authors advise for large matrices.

    References:
        PiSSA, Meng et al., NeurIPS 2024, arXiv 2404.02948.
    """
    return _lora("pissa", rank, alpha, dropout, targets, seed, init="pissa_niter_16", moves_base=True)


def OLoRA(
    *, rank: int = 16, alpha: float = 16, dropout: float = 0.0, targets: Targets = EVERY, seed: int = 0
) -> PeftTuning:
    """LoRA that begins with the first columns and rows of W's QR decomposition, which W gives up.

    References:
        OLoRA, Buyukakyuz, 2024, arXiv 2406.01775.
    """
    return _lora("olora", rank, alpha, dropout, targets, seed, init="olora", moves_base=True)


def DoRA(
    *, rank: int = 16, alpha: float = 32, dropout: float = 0.0, targets: Targets = EVERY, seed: int = 0
) -> PeftTuning:
    """Magnitude and direction apart: the rows of W + s B A at a trained length.

    peft's layers with the norm in factors, so that B A is never formed.

    References:
        DoRA, Liu et al., ICML 2024, arXiv 2402.09353. Factored norms: arXiv 2603.22276.
    """
    from scrimp.tuning.from_peft.dora import factor_norms

    return _lora("dora", rank, alpha, dropout, targets, seed, finish=factor_norms, use_dora=True)


def EVA(
    *,
    rank: int = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Targets = EVERY,
    passes: int = 4,
    seed: int = 0,
) -> PeftTuning:
    """LoRA whose A begins with the principal directions of the layer's inputs, on training text.

    Every layer keeps its rank (rho 1): ranks that move between layers would change what the plan counted.

    References:
        EVA, Paischer et al., 2024, arXiv 2410.07170.
    """
    from peft import EvaConfig

    made = _lora("eva", rank, alpha, dropout, targets, seed, init="eva", eva_config=EvaConfig(rho=1.0))

    def begin(wrapper: Any, probe: Probe) -> None:
        from peft.tuners.lora.eva import get_eva_state_dict

        found = get_eva_state_dict(
            wrapper,
            dataloader=[{}] * passes,
            forward_fn=lambda _model, _inputs: probe(),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda inputs, _model_input, _name: inputs[0].flatten(0, -2).float(),
            show_progress_bar=False,
        )
        layers = dict(wrapper.named_modules())
        with torch.no_grad():
            for name, directions in found.items():
                weight = layers[name].lora_A[ADAPTER].weight
                weight[: len(directions)].copy_(directions)

    made.begin = begin
    return made


def CorDA(
    *,
    rank: int = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: Targets = EVERY,
    passes: int = 4,
    seed: int = 0,
) -> PeftTuning:
    """LoRA that begins with the directions of W which training text uses most, and W gives up.

    References:
        CorDA, Yang et al., NeurIPS 2024, arXiv 2406.05223 (its instruction-previewed mode).
    """
    made = _lora("corda", rank, alpha, dropout, targets, seed, moves_base=True)

    def begin(wrapper: Any, probe: Probe) -> None:
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        inner = wrapper.get_base_model()
        layers = {n: m for n, m in inner.named_modules() if isinstance(m, LoraLayer)}
        config = LoraConfig(
            r=rank,
            target_modules=[f"{name}.base_layer" for name in layers],
            init_lora_weights="corda",
            corda_config=CordaConfig(corda_method="ipm"),
        )

        def look() -> None:
            with torch.no_grad(), _flat_inputs(layer.get_base_layer() for layer in layers.values()):
                for _ in range(passes):
                    probe()

        was_training = inner.training
        preprocess_corda(inner, config, run_model=look)
        inner.train(was_training)
        with torch.no_grad():
            for layer in layers.values():
                layer.corda_init(ADAPTER, "corda")

    made.begin = begin
    return made


@contextmanager
def _flat_inputs(linears: Iterable[nn.Module]) -> Iterator[None]:
    """Give layers their inputs as (tokens, in): peft's CorDA takes one sequence at a time, or this."""
    shapes: dict[nn.Module, torch.Size] = {}

    def flatten(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes[module] = inputs[0].shape
        return (inputs[0].flatten(0, -2), *inputs[1:])

    def restore(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        whole: Tensor = output.unflatten(0, shapes[module][:-1])
        return whole

    handles: list[Any] = []
    for linear in linears:
        handles += [linear.register_forward_pre_hook(flatten), linear.register_forward_hook(restore)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
