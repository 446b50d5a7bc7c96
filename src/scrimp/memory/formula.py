"""What a run will need, by a closed formula: for a model whose step cannot be traced.

    weights          4P          (2P in pure bf16)
    gradients        as weights
    optimizer state  2 moments in the weights' dtype
    activations      N tokens of L (24d + 8d_q + 8d_kv + 16f + 4h + 8) bytes in fp32,
                                 L (16d + 4d_q + 4d_kv +  8f + 4h + 8) in bf16, and 12V in the loss

P parameters, N = micro-batch x sequence, d hidden, d_q and d_kv widths of queries and of keys, f the
SwiGLU's width, h heads, L layers, V vocabulary. The layer's count is exact for a Llama of
transformers 5 with SDPA; for other families it is an estimate. On a CPU the fixed part (interpreter
and libraries) counts too, since there the budget is the resident memory of the whole process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scrimp.base.ledger import Ledger, Moment, Term
from scrimp.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """The widths of a decoder that its memory depends on (names as in the module's formula)."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    query: int
    key_value: int
    vocab: int

    @classmethod
    def of(cls, config: Any) -> Widths:
        """Read them from a transformers configuration, with the usual defaults for older families."""
        text = config.get_text_config()
        hidden = text.hidden_size
        heads = getattr(text, "num_attention_heads", None) or 1  # a state-space model has none
        head = getattr(text, "head_dim", None) or hidden // heads
        ffn = next(
            (
                width
                for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
                if isinstance(width := getattr(text, name, None), int)
            ),
            4 * hidden,
        )
        experts = getattr(text, "num_experts_per_tok", None) or 1
        return cls(
            layers=text.num_hidden_layers,
            hidden=hidden,
            ffn=ffn * experts,
            heads=heads,
            query=head * heads,
            key_value=head * (getattr(text, "num_key_value_heads", None) or heads),
            vocab=text.vocab_size,
        )

    def layer_bytes(self, precision: str) -> int:
        """Bytes that one token of one layer leaves for the backward pass."""
        shared = 4 * self.heads + 8
        if precision == "fp32":
            return 24 * self.hidden + 8 * self.query + 8 * self.key_value + 16 * self.ffn + shared
        return 16 * self.hidden + 4 * self.query + 4 * self.key_value + 8 * self.ffn + shared


FORMULA_ERROR = 0.3  # of the peak: what it was off by where a trace knew better, and some more


def estimate(config: Any, recipe: Recipe, *, fixed: int, reason: str) -> Ledger:
    """Estimate the bytes held at each moment of an optimizer step.

    Args:
        config: The model's configuration.
        recipe: The settled recipe, with its micro-batch.
        fixed: Bytes held before the model exists.
        reason: Why the step was not traced.

    Returns:
        The moments loss, backward and optimizer step.
    """
    assert recipe.micro_batch is not None and recipe.seq is not None and recipe.batch is not None
    widths, precision = Widths.of(config), recipe.precision
    tokens = recipe.micro_batch * recipe.seq
    several = recipe.batch > recipe.micro_batch
    width = 2 if precision == "bf16" else 4
    parameters = count_parameters(config)
    gradients = width * parameters
    copies = 2 * parameters if precision == "bf16-mixed" else 0  # autocast keeps bf16 copies of the matrices
    layers = tokens * widths.layers * widths.layer_bytes(precision)
    head = tokens * (12 * widths.hidden + 4 * widths.vocab)
    always: dict[Term, int] = {
        "fixed": fixed,
        "weights": width * parameters,
        "optimizer state": 8 * parameters,
    }
    # With several micro-batches the gradients of the ones before are alive during the next loss.
    loss: dict[Term, int] = {
        "gradients": gradients if several else 0,
        "activations": layers + head,
        "temporaries": 8 * tokens * widths.vocab + copies,
    }
    backward: dict[Term, int] = {
        "gradients": gradients,
        "activations": layers if several else layers // widths.layers,
        "temporaries": tokens * (4 * widths.ffn + 20 * widths.hidden) + copies,
    }
    step: dict[Term, int] = {"gradients": gradients}
    moments = (("loss", loss), ("backward", backward), ("optimizer step", step))
    return Ledger(
        tuple(Moment(name, {**always, **terms}) for name, terms in moments),
        basis="formula",
        error=FORMULA_ERROR,
        notes=(f"the step could not be traced ({reason}), so this is the closed formula of a dense decoder",),
    )


def count_parameters(config: Any) -> int:
    """Count a model's parameters without allocating them; tied ones count once."""
    import torch

    from scrimp import models

    with torch.device("meta"):
        model = models.create_empty(config, dtype=torch.float32)
    return sum(parameter.numel() for parameter in model.parameters())
