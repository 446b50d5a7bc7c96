"""How the stream of a split is cut into rows of one sequence length.

A row of n + 1 tokens gives n inputs and n targets. `packed`: row i starts at token i * seq,
whatever document that is, so rows overlap by the one token that is first a target and then an
input. `padded`: a row holds one document or, for `long="split"`, a stretch of one; `long="cut"`
keeps each document's beginning and loses the rest.

Nothing here grows with the number of documents but one number in 1024 of them.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from scrimp.data.corpus import Split

Packing = Literal["packed", "padded"]
Boundaries = Literal["join", "isolate"]
Long = Literal["split", "cut"]

_BLOCK = 1024


class Rows(Protocol):
    """A numbering of a split's rows."""

    count: int
    lost_tokens: int

    def span(self, index: int) -> tuple[int, int]:
        """Return where row `index` starts and stops in the stream: at most seq + 1 tokens."""
        ...


def make_rows(split: Split, *, seq: int, packing: Packing, long: Long) -> Rows:
    """Number the rows of a split; all tokens are kept unless `padded` rows are to be `cut`."""
    if packing == "packed":
        return _Packed(len(split.tokens), seq)
    return _Cut(split, seq) if long == "cut" else _Pieces(split, seq)


class _Packed:
    def __init__(self, tokens: int, seq: int) -> None:
        self.count = -(-(tokens - 1) // seq) if tokens else 0
        self.lost_tokens = 0
        self._tokens, self._seq = tokens, seq

    def span(self, index: int) -> tuple[int, int]:
        start = index * self._seq
        return start, min(start + self._seq + 1, self._tokens)


class _Cut:
    def __init__(self, split: Split, seq: int) -> None:
        self.count = split.documents
        self._split, self._seq = split, seq
        self.lost_tokens = 0
        for block in range(0, split.documents, _BLOCK):
            self.lost_tokens += int(np.maximum(_targets(split, block) - seq, 0).sum())

    def span(self, index: int) -> tuple[int, int]:
        start, stop = self._split.row(index)
        return start, min(start + self._seq + 1, stop)


class _Pieces:
    """Each document gives as many rows as it needs.

    `_before[b]` is the number of rows before document 1024 * b; within a block of documents
    rows are counted anew from the offsets on disk.
    """

    def __init__(self, split: Split, seq: int) -> None:
        self._split, self._seq = split, seq
        blocks = range(0, split.documents, _BLOCK)
        self._before = np.cumsum([0, *(int(self._rows(block).sum()) for block in blocks)])
        self.count = int(self._before[-1])
        self.lost_tokens = 0

    def _rows(self, first: int) -> npt.NDArray[np.int64]:
        """Return how many rows each document of a block takes."""
        return -(-_targets(self._split, first) // self._seq)

    def span(self, index: int) -> tuple[int, int]:
        block = int(np.searchsorted(self._before, index, side="right")) - 1
        ends = np.cumsum(self._rows(block * _BLOCK))
        rest = index - int(self._before[block])
        inside = int(np.searchsorted(ends, rest, side="right"))
        piece = rest - (int(ends[inside - 1]) if inside else 0)
        start, stop = self._split.row(block * _BLOCK + inside)
        start += piece * self._seq
        return start, min(start + self._seq + 1, stop)


def _targets(split: Split, first: int) -> npt.NDArray[np.int64]:
    """Return how many tokens of each document in a block come after its first."""
    offsets = np.array(split.offsets[first : first + _BLOCK + 1])
    return np.diff(offsets) + split.shared - 1
