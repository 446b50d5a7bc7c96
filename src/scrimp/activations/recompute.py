"""Recomputation: keep a region's input, and run the region again when the backward pass needs its inside.

Also called activation (or gradient) checkpointing. Four choices, each with the bytes that a decoder
layer of a Llama keeps a token in bf16, and what of it runs twice (d: hidden size, d_q and d_kv: width
of all query and of all key heads, f: MLP size, h: heads):

    everything                16d + 4d_q + 4d_kv + 8f + 4h + 8   nothing
    recompute                 2d                                 the layer
    recompute-keep-attention  2d + 2d_q + 4h                     the layer without the attention kernel
    recompute-keep-matmuls    6d + 4d_q + 4d_kv + 4f + 4h        what is element by element
    recompute-mlp             8d + 4d_q + 4d_kv + 4h             the MLP and the norms

Oddities:

- A region is run by an attribute `forward` of its module, which hides the class's. No parameter, name
  or configuration changes, the module's hooks run once, and evaluation runs plainly. transformers' own
  switch knows whole layers only, makes the embedding's output require a gradient (frozen layers below
  the first trained one would then be kept, too), and warns under one of its two names.
- The second run ends with the last tensor that is needed: a dense layer's last product is not repeated
  (experts' are, since the gradient of the routing weights reads them).
- A kept operation keeps its whole output: `recompute-keep-matmuls` holds the down projection's, which
  nothing reads.
- Policies that keep operations see each one in Python, about 2 ms a layer and step. Against everything,
  a step of 512 tokens took 1.27, 1.26, 1.09 and 1.13 times as long (Llama, 8 layers of d = 512, fp32,
  one CPU thread); with 32 tokens 1.11, 1.26, 1.10 and 1.05 times.
- Where a model draws random numbers (dropout), each region stores the generator's state and restores it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from scrimp.base.decoder_layers import all_layers
from scrimp.base.errors import ScrimpError

MLP_NAMES = frozenset({"mlp", "mlp_block", "shared_mlp", "feed_forward", "ffn", "block_sparse_moe"})
MATMULS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_mm", "_scaled_grouped_mm"})


@dataclass(frozen=True, slots=True)
class Recompute:
    """Recomputation of regions of a model.

    Attributes:
        name: What a recipe calls it.
        regions: Find the modules to run again.
        keep: Tell by its name (`aten::mm`) whether an operation's output is kept; None keeps none.
    """

    name: str
    regions: Callable[[nn.Module], Sequence[nn.Module]]
    keep: Callable[[str], bool] | None = None

    def apply(self, model: nn.Module) -> None:
        """Make the regions of `model` run again in the backward pass, while they are in training mode.

        Raises:
            ScrimpError: The model has no such regions.
        """
        regions = self.regions(model)
        if not regions:
            use = "recompute or everything" if all_layers(model) else "everything"
            raise ScrimpError(
                f"activations.name {self.name}: it finds nothing to recompute in model "
                f"{type(model).__name__}; use {use}"
            )
        options: dict[str, Any] = {"preserve_rng_state": is_random(model)}
        if self.keep is not None:
            policy = partial(_policy, self.keep)
            options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
        for region in regions:
            # A partial and no closure: in a deep copy of the model it holds the copy's region.
            region.forward = partial(_run, region, region.forward, options)

    @contextmanager
    def context(self) -> Iterator[None]:
        """Explain torch's refusal of a model that changes in place what has to be kept.

        Raises:
            ScrimpError: It does. transformers adds the biases of grouped experts in place (gpt-oss).
        """
        try:
            yield
        except RuntimeError as error:
            if "has been mutated" not in str(error) and "inplace operation" not in str(error):
                raise
            use = "everything" if self.name == "recompute" else "recompute or everything"
            raise ScrimpError(
                f"activations.name {self.name}: this model changes in place what has to be kept; use {use}"
            ) from error


def recompute() -> Recompute:
    """Run whole decoder layers again: the least memory, for nearly a third more work.

    Keeps 2d bytes a token and layer (bf16). Extra FLOPs a token and layer: 4d·d_q + 4d·d_kv + 4d·f, the
    products but the down projection's, and attention's 4T·d_q over T tokens (half of it if causal).
    """
    return Recompute("recompute", all_layers)


def recompute_keep_attention() -> Recompute:
    """Run whole decoder layers again but for the attention kernel, whose output is kept.

    For long sequences: no work that grows with T is repeated. Keeps 2d + 2d_q + 4h bytes a token and
    layer (bf16). Extra FLOPs a token and layer: 4d·d_q + 4d·d_kv + 4d·f. Eager attention is no kernel,
    and a kernel that drops at random must run again: with either this is `recompute`.
    """
    return Recompute("recompute-keep-attention", all_layers, _is_attention)


def recompute_keep_matmuls() -> Recompute:
    """Keep matrix products and attention, and run the rest of each decoder layer again.

    Keeps 6d + 4d_q + 4d_kv + 4f + 4h bytes a token and layer (bf16). Extra FLOPs: none in products; the
    norms, the rotary embedding and the activation function move their bytes again.
    """
    return Recompute("recompute-keep-matmuls", all_layers, _is_product)


def recompute_mlp() -> Recompute:
    """Run MLPs (dense or of experts) and norms again, attention and its projections once.

    Keeps 8d + 4d_q + 4d_kv + 4h bytes a token and layer (bf16). Extra FLOPs a token and layer: 4d·f, the
    gate's and the up projection's.
    """
    return Recompute("recompute-mlp", _mlps_and_norms)


def is_random(model: nn.Module) -> bool:
    """Tell whether a model may draw random numbers in training, which a second run must draw again.

    Judged by its dropout modules and by the names in its configuration. A rate of something unused is
    a false alarm that costs microseconds; a miss would make wrong gradients.
    """
    config: Any = getattr(model, "config", None)
    dropouts = (m for m in model.modules() if "Dropout" in type(m).__name__)
    return any(getattr(m, "p", 0) for m in dropouts) or any(_rates(config.to_dict() if config else {}))


def _rates(values: dict[str, Any]) -> Iterator[float]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _rates(value)
        elif isinstance(value, int | float) and ("drop" in name or "jitter" in name):
            yield value


def _mlps_and_norms(model: nn.Module) -> list[nn.Module]:
    found = [pair for layer in all_layers(model) for pair in _outermost(layer, _is_mlp_or_norm)]
    return [module for _, module in found] if any(name in MLP_NAMES for name, _ in found) else []


def _is_mlp_or_norm(name: str, module: nn.Module) -> bool:
    return name in MLP_NAMES or "norm" in type(module).__name__.lower()


def _outermost(root: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the wanted modules below `root` with their own names, and none that is within another."""
    for name, child in root.named_children():
        if wanted(name, child):
            yield name, child
        else:
            yield from _outermost(child, wanted)


def _run(
    region: nn.Module, forward: Callable[..., Any], options: dict[str, Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Stand in for the forward of a region."""
    if not (region.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, **options)


def _policy(keep: Callable[[str], bool], _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = keep(op.name()) and not _drops(op, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _drops(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether an attention kernel drops at random, so that it has to run again.

    Were it left out of the second run, the next dropout would draw the numbers that were the kernel's.
    """
    schema = getattr(op, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    if "dropout_p" not in names:
        return False
    given = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get("dropout_p", 0.0) > 0)


def _is_attention(op: str) -> bool:
    """Tell a fused attention kernel: each backend's has a name of its own, and so has flash-attn's."""
    return "attention" in op or "flash_attn" in op


def _is_product(op: str) -> bool:
    return op.rpartition("::")[2] in MATMULS or "grouped_mm" in op or _is_attention(op)
