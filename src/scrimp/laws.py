"""A first guess at learning rate and batch, from laws that others fitted to thousands of runs.

    Step Law    lr = 1.79 N^-0.713 D^0.307            batch = 0.58 D^0.571 tokens
    Power       lr(n) = min(cap, beta a n^b)

N counts *non-embedding* parameters (`scrimp.models.non_embedding`): with all of them a small model would get
a rate that is a third too low. D is all tokens of the run, n those processed so far, beta the batch in
sequences. Rates are AdamW's peak; Power's a and b were fitted with muP, which a plain model has not.

Step Law's numbers are the paper's, so that anyone can check them by hand; the unrounded means of its authors'
repository give 2 % more. Neither comes out of their released runs again: the law is good to within a factor
of two, and says nothing about other optimizers or about fine-tuning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scrimp.base.units import format_count

SOURCE = "Step Law, arXiv 2503.04715"
PARAMETERS = (6e7, 1e9)  # of the models that the law was fitted to
TOKENS = (2e9, 1e11)  # that they were trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """What a law says.

    Attributes:
        value: The learning rate, or the tokens of a batch.
        inside: Whether the law was fitted to models and runs of this size.
        source: Who fitted it.
        text: What it was asked and how far to trust it, in a phrase without the value.
    """

    value: float
    inside: bool
    source: str
    text: str


def steplaw_lr(parameters: int, tokens: int) -> Guess:
    """Return Step Law's peak learning rate of AdamW for training from random weights.

    Args:
        parameters: Of the model, without its embeddings.
        tokens: Of the whole run.

    Raises:
        ValueError: One of them is not positive.
    """
    _check(parameters=parameters, tokens=tokens)
    asked = f"{format_count(parameters)} non-embedding parameters and {format_count(tokens)} tokens"
    inside = _within(parameters, PARAMETERS) and _within(tokens, TOKENS)
    fitted = f"{_range(PARAMETERS)} parameters and {_range(TOKENS)} tokens"
    return Guess(
        value=1.79 * parameters**-0.713 * tokens**0.307,
        inside=inside,
        source=SOURCE,
        text=_text(asked, fitted, inside=inside),
    )


def steplaw_batch(tokens: int) -> Guess:
    """Return Step Law's batch in tokens; it does not depend on the model.

    Args:
        tokens: Of the whole run.

    Raises:
        ValueError: They are not positive.
    """
    _check(tokens=tokens)
    inside = _within(tokens, TOKENS)
    return Guess(
        value=0.58 * tokens**0.571,
        inside=inside,
        source=SOURCE,
        text=_text(f"{format_count(tokens)} tokens", f"{_range(TOKENS)} tokens", inside=inside),
    )


def power_lr(tokens_seen: int, batch: int, *, cap: float, amplitude: float, exponent: float) -> float:
    """Return the Power scheduler's learning rate (arXiv 2408.13359).

    Args:
        tokens_seen: Processed so far.
        batch: Sequences an optimizer step.
        cap: The largest rate.
        amplitude: The rate a sequence of the batch after one token; 4 in the paper, with muP.
        exponent: How it falls with the tokens; -0.51 in the paper.
    """
    if tokens_seen == 0:  # where the power has a pole, and the cap holds
        return cap
    return min(cap, batch * amplitude * math.pow(tokens_seen, exponent))


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if count <= 0:
            raise ValueError(f"{name} must be positive for a power of them to be a rate, got {count}")


def _within(count: int, limits: tuple[float, float]) -> bool:
    return limits[0] <= count <= limits[1]


def _range(limits: tuple[float, float]) -> str:
    return f"{format_count(limits[0])} to {format_count(limits[1])}"


def _text(asked: str, fitted: str, *, inside: bool) -> str:
    here = "as here" if inside else "and here an extrapolation"
    return f"{SOURCE}, for {asked}; right to within about 2x where it was fitted, {fitted}, {here}"
