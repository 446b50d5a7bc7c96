"""The loss at the end of the forward pass, over materialised logits.

The loss is a *sum* over targets divided by a count the caller gives: the targets of the whole
optimizer step in training, 1 in evaluation. Micro-batches then add up exactly.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.base.protocols import IGNORED, Batch


class TokenLoss:
    """Cross-entropy of a causal language model on its next tokens.

    Args:
        model: A transformers causal language model (or its compiled form).
        autocast: The dtype that matrix products run in, or None for the model's own.
    """

    def __init__(self, model: nn.Module, *, autocast: torch.dtype | None = None) -> None:
        self.model = model
        self.autocast = autocast

    def __call__(self, batch: Batch, *, divisor: float) -> Tensor:
        """Return the summed cross-entropy in nats over `divisor`, a scalar fp32 tensor.

        A mixture of experts that asks for its balancing loss (`output_router_logits`) gets it
        weighted by the micro-batch's share of the targets.
        """
        with torch.autocast(batch.input_ids.device.type, self.autocast, enabled=self.autocast is not None):
            output = self._forward(batch)
        # No reference to the logits may outlive this call: they are the largest tensor of a step.
        balance = getattr(output, "aux_loss", None)
        loss = F.cross_entropy(
            output.logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        if balance is not None:
            weight: Any = self.model.config
            loss = loss + weight.router_aux_loss_coef * balance.to(loss.device) * batch.targets
        return loss / divisor

    def _forward(self, batch: Batch) -> Any:
        if batch.position_ids is None:
            return self.model(input_ids=batch.input_ids, use_cache=False)
        return self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
