"""The loss at the end of the forward pass: over materialised logits, or without them.

The loss is a *sum* over targets divided by a count the caller gives: the targets of the whole
optimizer step in training, 1 in evaluation. Micro-batches then add up exactly.

Without logits the decoder alone runs, and what the model does after it is ours to do: multiply by the
head, scale, cap. Families differ in that, and their configurations say it in words of their own
(`_Head.of`). Whether a model's is understood is tried, not assumed: `check_head`.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.activations.linear_cross_entropy import linear_cross_entropy
from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import IGNORED, Batch

REMEDY = "use --activations.loss logits"
# Names that configurations have for one thing: what logits are multiplied by, divided by, bounded by.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
BOUNDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIES_BY_ITS_DIVISOR = "hyperclovax"  # it took Granite's word for the inverse

TRIED_TOKENS = 8
TINY = 1e-6  # the logits of a head that starts at zero
TRIED_LOGIT = 30.0  # where the caps in use (15 to 50) bend visibly


def logits(model: nn.Module, autocast: torch.dtype | None) -> TokenLoss:
    """Build `activations.loss logits`: the head's output in full, as the model computes it."""
    return TokenLoss(model, autocast=autocast)


def chunked(model: nn.Module, autocast: torch.dtype | None) -> ChunkedTokenLoss:
    """Build `activations.loss chunked`: the same number without the logits.

    Raises:
        ScrimpError: The model's head is not a linear layer after a decoder.
    """
    return ChunkedTokenLoss(model, autocast=autocast)


class TokenLoss:
    """Cross-entropy of a causal language model on its next tokens.

    Args:
        model: A transformers causal language model (or its compiled form).
        autocast: The dtype that matrix products run in, or None for the model's own.
    """

    def __init__(self, model: nn.Module, *, autocast: torch.dtype | None = None) -> None:
        self.model = model
        self.autocast = autocast

    @property
    def runs(self) -> nn.Module:
        """What it runs, for the `logits` of its output."""
        return self.model

    def __call__(self, batch: Batch, *, divisor: float) -> Tensor:
        """Return the summed cross-entropy in nats over `divisor`, a scalar fp32 tensor.

        A mixture of experts that asks for its balancing loss (`output_router_logits`) gets it
        weighted by the micro-batch's share of the targets.
        """
        output = run(self.model, batch, self.autocast)
        length = batch.labels.shape[1]  # a trained prompt's vectors come before, and have no labels
        # No reference to the logits may outlive this call: they are the largest tensor of a step.
        loss = F.cross_entropy(
            output.logits[:, -length:].flatten(0, 1).float(),
            batch.labels.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        balance = getattr(output, "aux_loss", None)
        if balance is not None:
            loss = loss + _balancing_weight(self.model) * balance.to(loss.device) * batch.targets
        return loss / divisor


class ChunkedTokenLoss:
    """`TokenLoss` without the logits: exact in value and gradient, a chunk of targets at a time.

    Args:
        model: A transformers causal language model. Of a compiled one, the decoder is compiled by itself.
        autocast: The dtype that matrix products run in, or None for the model's own. The head's gradient
            is summed in the head's dtype.

    Raises:
        ScrimpError: The head is not a linear layer after a decoder, or the model balances its experts in
            a way of its own.
    """

    def __init__(self, model: nn.Module, *, autocast: torch.dtype | None = None) -> None:
        self.model = model
        self.autocast = autocast
        plain: Any = getattr(model, "_orig_mod", model)  # what `torch.compile` wraps
        self._head = _Head.of(plain)
        self._experts = _Experts.of(plain)
        decoder = self._head.decoder
        # The way a model was compiled (back end, mode) is known to what it was compiled with.
        self.runs: nn.Module = decoder if plain is model else cast("Any", model).dynamo_ctx(decoder)

    def __call__(self, batch: Batch, *, divisor: float) -> Tensor:
        """Return the summed cross-entropy in nats over `divisor`, a scalar fp32 tensor.

        A mixture's balancing loss is added as in `TokenLoss`.
        """
        output = run(self.runs, batch, self.autocast)
        head = self._head
        loss = linear_cross_entropy(
            output.last_hidden_state.flatten(0, 1).to(self.autocast or head.linear.weight.dtype),
            head.linear.weight,
            head.linear.bias,
            batch.labels.flatten(),
            divisor=divisor,
            scale=head.scale,
            softcap=head.softcap,
            targets=batch.targets,
        )
        if self._experts is not None and self._experts.are_balanced:
            balance = self._experts.balancing_loss(output.router_logits).to(loss.device)
            loss = loss + _balancing_weight(self.model) * balance * (batch.targets / divisor)
        return loss


def check_head(model: nn.Module) -> None:
    """Try whether `ChunkedTokenLoss` computes a model's logits as the model does.

    The head is tried on large inputs, since a cap could not be seen on a new model's small logits.

    Args:
        model: A transformers causal language model, on the device and in the dtype it runs in.

    Raises:
        ScrimpError: It does not.
    """
    head = _Head.of(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            understood = _agrees(model, head)
    finally:
        model.train(was_training)
    if not understood:
        raise ScrimpError(
            f"activations.loss chunked: model {type(model).__name__} computes its logits in a way of its "
            f"own; {REMEDY}"
        )


def _agrees(model: Any, head: _Head) -> bool:
    linear = head.linear
    tokens = torch.arange(TRIED_TOKENS, device=linear.weight.device)[None] % linear.out_features
    hidden = getattr(head.decoder(input_ids=tokens, use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != linear.in_features:
        return False
    hidden = hidden.to(linear.weight.dtype)
    largest = (head.scale * F.linear(hidden, linear.weight)).abs().amax()
    enlarge = TRIED_LOGIT / largest.clamp(min=TINY)
    with linear.register_forward_pre_hook(lambda _, inputs: (inputs[0] * enlarge,)):
        theirs = model(input_ids=tokens, use_cache=False).logits.float()
    ours = head.logits(hidden * enlarge)
    tolerance = 8 * torch.finfo(linear.weight.dtype).eps * TRIED_LOGIT
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0, atol=tolerance)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """What a model does after its decoder: softcap tanh(scale linear(h) / softcap)."""

    decoder: nn.Module
    linear: nn.Linear
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> _Head:
        """Read it from a model.

        Raises:
            ScrimpError: There is no linear layer after a decoder.
        """
        linear, name = model.get_output_embeddings(), type(model).__name__
        # A subclass may compute something else, or keep its weights in codes.
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
            raise ScrimpError(
                f"activations.loss chunked: the head of model {name} is {type(linear).__name__}, "
                f"not a linear layer; {REMEDY}"
            )
        # Llama 4's text model has another prefix than its decoder's name, and so calls itself its base.
        decoder = getattr(model, "model", None) if model.base_model is model else model.base_model
        if decoder is None:
            raise ScrimpError(f"activations.loss chunked: model {name} has no decoder of its own; {REMEDY}")
        config = model.config.get_text_config()

        def product(names: tuple[str, ...]) -> float:
            return math.prod(getattr(config, each, None) or 1.0 for each in names)

        inverse = product(DIVISORS)
        divides = config.model_type != MULTIPLIES_BY_ITS_DIVISOR
        return cls(
            decoder=decoder,
            linear=linear,
            scale=product(MULTIPLIERS) * (1 / inverse if divides else inverse),
            softcap=next((cap for each in BOUNDS if (cap := getattr(config, each, None))), None),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute (..., V) in fp32, as `linear_cross_entropy` does."""
        z = self.scale * self.linear(hidden).float()
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Experts:
    """How a mixture of experts computes the loss that balances them."""

    function: Callable[..., Tensor]
    config: Any
    experts: int
    chosen: int

    @classmethod
    def of(cls, model: Any) -> _Experts | None:
        """Read it from a model; None is one that balances nothing.

        Raises:
            ScrimpError: It asks to balance, in a way of its own.
        """
        function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        if function is None:
            return None
        config = model.config.get_text_config()
        experts, chosen = (
            getattr(model, name, None) or getattr(config, name, None)
            for name in ("num_experts", "num_experts_per_tok")
        )
        takes = [*inspect.signature(function).parameters][:3]
        if experts and chosen and takes == ["gate_logits", "num_experts", "top_k"]:
            return cls(function=function, config=config, experts=experts, chosen=chosen)
        if not getattr(config, "output_router_logits", False):
            return None
        raise ScrimpError(
            f"activations.loss chunked: model {type(model).__name__} balances its experts in a way of its "
            f"own; {REMEDY}"
        )

    @property
    def are_balanced(self) -> bool:
        return bool(getattr(self.config, "output_router_logits", False))

    def balancing_loss(self, router_logits: tuple[Tensor, ...]) -> Tensor:
        return self.function(router_logits, self.experts, self.chosen)


def run(model: Any, batch: Batch, autocast: torch.dtype | None) -> Any:
    """Return the output of a model, or of its decoder, for a micro-batch."""
    with torch.autocast(batch.input_ids.device.type, autocast, enabled=autocast is not None):
        if batch.position_ids is None:
            return model(input_ids=batch.input_ids, use_cache=False)
        return model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)


def _balancing_weight(model: Any) -> float:
    weight: float = model.config.get_text_config().router_aux_loss_coef
    return weight
