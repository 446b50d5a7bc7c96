"""DePT: a short soft prompt, and a low-rank change of the embeddings at each position.

    [P; E + s A B]      P (l, d), A (L, r), B (r, d), s = alpha / sqrt(r)

P is the start of a longer prompt, and A B takes the place of its rest: the sequence grows by l only. Both act
on what the decoder is called with, and what it gives for P is dropped again, so that losses, logits and
generation know nothing of it. Generation with a cache holds P in the cache.

The paper trains P much faster than A and B, and an optimizer has one learning rate here: P is kept divided by
the rates' ratio. For rules that do not see the gradient's size (AdamW) that is the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.base.errors import ScrimpError
from scrimp.base.seeds import derive
from scrimp.tuning.deltas.parts import draw_subset, draw_uniform
from scrimp.tuning.modules.attached import (
    Arguments,
    AttachedTuning,
    Part,
    base_model_path,
    embedded,
    replace_first,
)
from scrimp.tuning.option_checks import check_positive


class DecomposedPrompt(Part):
    """[ratio prompt; E + scale A B] in place of E.

    Attributes:
        prompt: P / ratio, (l, d) float32.
        a: (L, r) float32.
        b: (r, d) float32.
    """

    def __init__(self, prompt: Tensor, a: Tensor, b: Tensor, *, scale: float, ratio: float) -> None:
        super().__init__()
        self.prompt, self.a, self.b = nn.Parameter(prompt), nn.Parameter(a), nn.Parameter(b)
        self.scale, self.ratio = scale, ratio

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Call the decoder with the prompt before changed embeddings.

        Raises:
            ScrimpError: The sequence is longer than A.
        """
        given, rest = embedded(module, args, kwargs)
        length, past = len(self.prompt), _cached(rest)
        start = past - length if past else 0
        if start + given.shape[1] > len(self.a):
            raise ScrimpError(
                f"tune dept: a sequence of {start + given.shape[1]} tokens is longer than length "
                f"{len(self.a)}, for which it was trained; shorten it, or train with a longer --seq"
            )
        positions = rest.get("position_ids")
        rows = self.a[start : start + given.shape[1]] if positions is None else self.a[positions]
        changed = given + (self.scale * rows @ self.b).to(given.dtype)
        before = self._prompt(given) if past == 0 else given[:, :0]
        return (), {
            **rest,
            "inputs_embeds": torch.cat([before, changed], dim=1),
            "attention_mask": _widened(rest.get("attention_mask"), length),
            "position_ids": _shifted(positions, length, before.shape[1]),
        }

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Drop what the decoder gives for the prompt."""
        held = _cached(kwargs)  # by now with this call's own
        is_first = held in (0, kwargs["inputs_embeds"].shape[1])
        return replace_first(output, lambda h: h[:, len(self.prompt) :]) if is_first else output

    def _prompt(self, given: Tensor) -> Tensor:
        return (self.ratio * self.prompt).to(given.dtype).expand(len(given), -1, -1)


def DePT(
    *,
    prompt: int = 40,
    rank: int = 45,
    alpha: float = 8.0,
    length: int = 256,
    ratio: float = 60.0,
    seed: int = 0,
) -> AttachedTuning:
    """DePT: a short soft prompt before, and a low-rank change at each position of the embeddings.

        [P; E + s A B],   s = alpha / sqrt(r)

    At first B is zero and P embeddings of tokens, drawn without repetition. With rank 0 it is prompt tuning.
    The released code takes inputs that are padded to exactly L; here shorter ones use A's first rows.

    Args:
        prompt: l, rows of P.
        rank: r; with 40 and 45 it has as many numbers as a prompt of 100 in the paper (width 768, L 256).
        alpha: s = alpha / sqrt(r).
        length: L, the longest sequence: T5's in the paper.
        ratio: P's learning rate over A's and B's, which is the recipe's: 0.3 over 0.005 in the paper.
        seed: Of A, and of the tokens that P begins with.

    Memory:
        16 (l d + r (L + d)) bytes (itself, gradient, AdamW's moments); activations as of l tokens more.

    Raises:
        ScrimpError: An option is out of its range.

    References:
        DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning, Shi and Lipani, ICLR 2024, arXiv
        2309.05173.
    """
    name = "dept"
    check_positive(name, {"prompt": prompt, "alpha": alpha, "length": length, "ratio": ratio})
    if rank < 0:
        raise ScrimpError(f"tune {name}: rank {rank} must not be negative; 0 is prompt tuning")

    def find(model: Any) -> dict[str, Part]:
        path = base_model_path(model, tune=name)
        embedding: Tensor = model.get_input_embeddings().weight
        vocabulary, width = embedding.shape
        if prompt > vocabulary:
            raise ScrimpError(f"tune {name}: prompt {prompt} is more than the {vocabulary} tokens there are")
        chosen = draw_subset(derive(seed, name, "tokens"), vocabulary, prompt).to(embedding.device)
        start = embedding.detach()[chosen].float() / ratio
        # torch's kaiming_uniform(a=sqrt(5)) of an (L, r) matrix.
        a = draw_uniform(derive(seed, name, "a"), (length, rank), bound=max(rank, 1) ** -0.5)
        scale = alpha / math.sqrt(max(rank, 1))
        return {path: DecomposedPrompt(start, a, torch.zeros(rank, width), scale=scale, ratio=ratio)}

    settings = {"prompt": prompt, "rank": rank, "alpha": alpha, "length": length, "ratio": ratio}
    return AttachedTuning(name=name, find=find, settings=settings)


def _cached(kwargs: dict[str, Any]) -> int:
    """Return how many tokens the cache of a call holds."""
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def _widened(mask: Any, length: int) -> Any:
    """Let every row see the prompt.

    Raises:
        ScrimpError: The mask is no plain one of tokens.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ScrimpError("tune dept: an attention mask must be (batch, seq) for a prompt to come before it")
    return torch.cat([mask.new_ones(len(mask), length), mask], dim=1)


def _shifted(positions: Tensor | None, length: int, new: int) -> Tensor | None:
    """Let positions (batch, seq) begin after the prompt, whose own come first where it is `new`."""
    if positions is None:
        return None
    first = torch.arange(new, device=positions.device).expand(len(positions), -1)
    return torch.cat([first, positions + length], dim=1)
