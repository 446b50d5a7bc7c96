"""Which documents an evaluation covers, as rows and as bytes.

Every target of the chosen documents is covered once, whatever the rows look like, so that the
loss per byte of text means the same for any sequence length, packing and tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scrimp.data.chat import decoded_bytes
from scrimp.data.corpus import Piece, Split
from scrimp.data.rows import Long, Packing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Selection:
    """Chosen documents, and how rows are cut from them."""

    split: Split
    documents: Sequence[int]
    seq: int
    packing: Packing
    long: Long

    @classmethod
    def of(cls, split: Split, *, seq: int, packing: Packing, long: Long, max_tokens: int | None) -> Selection:
        """Choose all documents in their order, or the first by the hash of their content.

        Args:
            split: Whose documents.
            seq: Inputs per row.
            packing: How rows are cut.
            long: What becomes of long documents in padded rows.
            max_tokens: The most tokens to predict, though at least one document; None for all.
        """
        documents: Sequence[int] = range(split.documents)
        if max_tokens is not None and len(split.tokens) > max_tokens:
            order = np.argsort(split.hashes, kind="stable")
            targets = np.cumsum(np.diff(split.offsets)[order] + split.shared - 1)
            count = int(np.searchsorted(targets, max_tokens, side="right"))
            documents = order[: max(1, count)].tolist()
        return cls(split, documents, seq, packing, long)

    def text_bytes(self, tokenizer: PreTrainedTokenizerFast) -> int:
        """Count the UTF-8 bytes that the targets stand for; tokens between documents stand for none.

        Of a document that is cut, what is kept is decoded.
        """
        total = 0
        for document in self.documents:
            start, stop = self.split.row(document)
            if self._cuts and stop - start > self.seq + 1:
                kept = self.split.piece(start + 1, start + self.seq + 1)
                total += decoded_bytes(tokenizer, kept.tokens[kept.targets])
            else:
                total += int(self.split.bytes[document])
        return total

    def pieces(self) -> Iterator[Piece]:
        """Yield the rows: at most seq + 1 tokens each."""
        return self._packed() if self.packing == "packed" else self._padded()

    @property
    def _cuts(self) -> bool:
        return self.packing == "padded" and self.long == "cut"

    def _padded(self) -> Iterator[Piece]:
        for document in self.documents:
            start, stop = self.split.row(document)
            for first in range(start, start + 1 if self._cuts else stop - 1, self.seq):
                yield self.split.piece(first, min(first + self.seq + 1, stop))

    def _packed(self) -> Iterator[Piece]:
        """Cut the stream that the chosen documents would make on their own."""
        pending: Piece | None = None
        for document in self.documents:
            piece = self.split.piece(*self.split.row(document))
            # A shared separator ends what is pending and begins this piece: it is there once.
            overlap = -1 if self.split.shared else None
            pending = piece if pending is None else Piece.join([pending[:overlap], piece])
            done = 0
            while len(pending.tokens) - done > self.seq + 1:
                yield pending[done : done + self.seq + 1]
                done += self.seq
            pending = pending[done:]
        if pending is not None and len(pending.tokens) > 1:
            yield pending
