"""Model shapes with a name: Llamas that are made from scratch, free of torch.

`llama-9m` to `llama-7b` are those of the GaLore line of papers (ReLoRA, GaLore, Fira, APOLLO,
Q-GaLore, FRUGAL): RMSNorm eps 1e-6, SwiGLU, rotary positions, no biases, untied head, multi-head
attention, 32,000 tokens. The papers' code passes `pad_token_id=-1`, which freezes the embedding row
of the last token at zero; that quirk is left out. Table 5 of the GaLore paper prints 24 heads and 32
layers for 1B; its configuration file, which alone gives 1.3 B parameters, has 32 heads and 24 layers.

`llama-1m` is ours: for bytes, and for a laptop. Its random weights are wider than the papers' 0.02, which
suits widths of thousands: at a width of 128 that leaves attention flat for the first thousand steps (held-out
loss after 300 steps 2.5 nats a byte instead of 1.7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

CONTEXT = 2048  # the papers' JSON leaves LlamaConfig's own default in force


class Dimensions(NamedTuple):
    """What defaults depend on of a model.

    Attributes:
        context: The longest sequence it has positions for; None is no limit.
        width: Of its residual stream.
        depth: Its decoder layers; 1 where its configuration does not say.
    """

    context: int | None
    width: int
    depth: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One Llama shape and the training settings that suit it.

    Attributes:
        hidden: Width of the residual stream.
        ffn: Width of the SwiGLU.
        heads: Attention heads (as many for keys and values).
        layers: Decoder layers.
        vocab: Tokens; None takes the size of the tokenizer.
        tied: Whether the output head shares the embedding.
        init_std: Standard deviation of the random weights.
        lr: Peak learning rate for AdamW.
        seq: Tokens a sequence.
        batch: Sequences an optimizer step.
        steps: Optimizer steps where neither steps nor tokens are given; None is one pass over the data.
        memory: Memory budget where none is given; None is what the machine has free.
    """

    hidden: int
    ffn: int
    heads: int
    layers: int
    vocab: int | None = 32_000
    tied: bool = False
    init_std: float = 0.02
    lr: float = 1e-3
    seq: int = 256
    batch: int = 8
    steps: int | None = None
    memory: str | None = None

    def parameters(self, vocab: int) -> int:
        """Count the parameters for a vocabulary of `vocab` tokens."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + self.hidden + (1 if self.tied else 2) * vocab * self.hidden


SHAPES: dict[str, Shape] = {
    "llama-1m": Shape(
        hidden=128, ffn=352, heads=4, layers=4, vocab=None, tied=True, init_std=0.08,
        lr=4e-3, seq=128, batch=8, steps=1100, memory="1GiB",
    ),
    "llama-9m": Shape(hidden=128, ffn=352, heads=4, layers=4),
    "llama-20m": Shape(hidden=256, ffn=688, heads=4, layers=4),
    "llama-35m": Shape(hidden=384, ffn=1024, heads=8, layers=6),
    "llama-60m": Shape(hidden=512, ffn=1376, heads=8, layers=8),
    "llama-130m": Shape(hidden=768, ffn=2048, heads=12, layers=12),
    "llama-350m": Shape(hidden=1024, ffn=2736, heads=16, layers=24, lr=5e-4),
    "llama-1b": Shape(hidden=2048, ffn=5461, heads=32, layers=24, lr=5e-4),
    "llama-7b": Shape(hidden=4096, ffn=11008, heads=32, layers=32, lr=3e-4),
}  # fmt: skip
