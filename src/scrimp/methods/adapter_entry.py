"""How the catalogue states an adapter.

`terms` are bytes: of a matrix of m rows and n columns (out and in), r the rank. A number of the adapter takes
4, and 12 more for its gradient and AdamW's moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

LOW_RANK = "a change of low rank in place of any (its paper finds full tuning's scores)"
FEW = "all but a few numbers stay as they are"
FACTORS = "16 r (m + n) a matrix: factors, gradients and moments"


class Entry(NamedTuple):
    """An adapter.

    Attributes:
        name: What a recipe calls it.
        builder: The builder's path.
        summary: What trains, in one line.
        gives_up: What it costs.
        options: The fields of a recipe's `tune` that it takes, with its defaults.
        terms: Bytes of what trains.
        source: Paper, or package.
        lr_ratio: Its learning rate over full tuning's. Ten is LoRA's ("LoRA Without Regret", Schulman, 2025);
            what trains vectors alone has larger ones in its sources.
        settings: What else its source's recipe says, by dotted field.
        wraps: Whether it runs around the model.
    """

    name: str
    builder: str
    summary: str
    gives_up: str
    options: Mapping[str, Any]
    terms: str
    source: str
    lr_ratio: float = 10.0
    settings: Mapping[str, Any] = {}
    wraps: bool = False
