"""Batches as a pure function of the step: any step can be asked for, in any order.

Step k (from 0) covers places k * batch … k * batch + batch - 1 of an endless sequence of
epochs, each a shuffled order of all rows that is computed from the seed and the epoch. So a
resumed run needs its step and nothing else, and cutting a batch into micro-batches changes
nothing about which rows it holds.

Labels are already shifted: `labels[:, t]` is the token after `input_ids[:, t]`, or -100 where
there is nothing to predict (padding, a document's first token, what is not the assistant's).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import IGNORED
from scrimp.base.seeds import derive
from scrimp.data.corpus import Piece, Split
from scrimp.data.evaluation import Selection
from scrimp.data.permutation import permute
from scrimp.data.rows import Boundaries, Long, Packing, make_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STEPS_AT_A_TIME = 64


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model at once.

    Attributes:
        input_ids: int64, shape (b, seq).
        labels: The token after each input, or -100; int64, shape (b, seq).
        position_ids: Places within documents, int64, shape (b, seq), where documents are
            isolated; they start again at 0 where a document does. None otherwise.
        targets: How many labels are not -100.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    targets: int


class Loader:
    """The batches of a training run.

    Args:
        split: What to train on.
        seq: Inputs per row.
        batch: Rows per optimizer step.
        micro_batch: Rows per micro-batch; divides `batch`.
        packing: `packed` rows run over document boundaries; `padded` ones hold one document.
        boundaries: `join` lets a packed row's documents see each other; `isolate` gives them
            positions that start again, from which the model makes its mask.
        long: Whether a padded document longer than `seq` is split into rows or cut.
        seed: The run's seed; the order is derived from it.
        pad_id: What fills short rows; it is never a target.

    Attributes:
        sequences: How many rows an epoch has.
        lost_tokens: How many tokens `long="cut"` leaves out of an epoch.

    Raises:
        ScrimpError: There is no document, or, packed, less than one row of tokens.
    """

    def __init__(
        self,
        split: Split,
        *,
        seq: int,
        batch: int,
        micro_batch: int,
        packing: Packing = "packed",
        boundaries: Boundaries = "join",
        long: Long = "split",
        seed: int = 0,
        pad_id: int,
    ) -> None:
        if batch % micro_batch:
            raise ScrimpError(
                f"the micro-batch {micro_batch} does not divide the batch {batch}: choose a divisor"
            )
        self._rows = make_rows(split, seq=seq, packing=packing, long=long)
        self.sequences, self.lost_tokens = self._rows.count, self._rows.lost_tokens
        if not self.sequences:
            raise ScrimpError("the data are empty: name files that hold text with --data")
        if packing == "packed" and len(split.tokens) <= seq:
            raise ScrimpError(
                f"the data hold {len(split.tokens)} tokens to train on, fewer than one sequence of {seq} "
                f"and the token after it: lower --seq, add data, or choose padded rows"
            )
        self._split, self._seed, self._pad_id = split, seed, pad_id
        self._seq, self._batch, self._micro_batch = seq, batch, micro_batch
        self._isolate = packing == "packed" and boundaries == "isolate"
        self._block, self._orders = -1, np.empty((0, batch), np.int64)

    def order(self, step: int) -> npt.NDArray[np.int64]:
        """Return which rows make up the batch of a step (from 0): shape (batch,)."""
        # numpy's calls cost the same for one batch as for many, so they are made for many at a time.
        block = step // STEPS_AT_A_TIME
        if block != self._block:
            self._block, self._orders = block, self._orders_of(block)
        order: npt.NDArray[np.int64] = self._orders[step % STEPS_AT_A_TIME]
        return order

    def _orders_of(self, block: int) -> npt.NDArray[np.int64]:
        """Return the rows of all batches of a block of steps: shape (steps, batch)."""
        size = STEPS_AT_A_TIME * self._batch
        epochs, places = np.divmod(np.arange(block * size, (block + 1) * size), self.sequences)
        rows = np.empty(size, np.int64)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            rows[now] = permute(places[now], self.sequences, derive(self._seed, "shuffle", int(epoch)))
        return rows.reshape(STEPS_AT_A_TIME, self._batch)

    def step(self, step: int) -> list[MicroBatch]:
        """Return the micro-batches of a step (from 0).

        Raises:
            ScrimpError: No token of the whole batch is a target.
        """
        pieces = [self._split.piece(*self._rows.span(int(row))) for row in self.order(step)]
        self._split.release()
        batches = [
            _micro_batch(part, seq=self._seq, pad_id=self._pad_id, isolate=self._isolate)
            for part in _groups(pieces, self._micro_batch)
        ]
        if not any(batch.targets for batch in batches):
            raise ScrimpError(
                f"the batch of step {step} holds no token to learn from (in conversations only the "
                f"assistant's count): raise --batch or --seq"
            )
        return batches


def _groups(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    iterator = iter(pieces)
    while group := list(islice(iterator, size)):
        yield group


def _micro_batch(pieces: list[Piece], *, seq: int, pad_id: int, isolate: bool) -> MicroBatch:
    inputs = np.full((len(pieces), seq), pad_id, np.int64)
    labels = np.full((len(pieces), seq), IGNORED, np.int64)
    positions = np.tile(np.arange(seq), (len(pieces), 1)) if isolate else None
    for row, piece in enumerate(pieces):
        n = len(piece.tokens) - 1
        inputs[row, :n] = piece.tokens[:-1]
        labels[row, :n] = np.where(piece.targets[1:], piece.tokens[1:].astype(np.int64), IGNORED)
        if positions is not None:
            starts = np.zeros(seq, np.bool_)
            starts[:n] = piece.starts[:-1]
            starts[n : n + 1] = True  # padding is a document of its own: no token sees it or is seen by it
            positions[row] -= np.maximum.accumulate(np.where(starts, positions[row], 0))
    return MicroBatch(
        torch.from_numpy(inputs),
        torch.from_numpy(labels),
        None if positions is None else torch.from_numpy(positions),
        int((labels != IGNORED).sum()),
    )


def evaluation_batches(
    split: Split,
    *,
    seq: int,
    micro_batch: int,
    packing: Packing = "packed",
    boundaries: Boundaries = "join",
    long: Long = "split",
    pad_id: int,
    max_tokens: int | None = None,
) -> Iterator[MicroBatch]:
    """Yield whole documents, each target once; micro-batches without a target are left out.

    Args:
        split: What to evaluate on.
        seq: Inputs per row.
        micro_batch: Rows at once; the last micro-batch may have fewer.
        packing: As for training; packed rows are cut from the chosen documents alone.
        boundaries: As for training.
        long: As for training.
        pad_id: What fills short rows.
        max_tokens: Take documents by the hash of their content, a sample that stays when files
            are added, until one more would exceed this many predicted tokens; but at least
            one. None takes all.
    """
    selection = Selection.of(split, seq=seq, packing=packing, long=long, max_tokens=max_tokens)
    isolate = packing == "packed" and boundaries == "isolate"
    for pieces in _groups(selection.pieces(), micro_batch):
        batch = _micro_batch(pieces, seq=seq, pad_id=pad_id, isolate=isolate)
        split.release()
        if batch.targets:
            yield batch


def evaluation_bytes(
    split: Split,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seq: int,
    packing: Packing = "packed",
    long: Long = "split",
    max_tokens: int | None = None,
) -> int:
    """Count the UTF-8 bytes that the targets of `evaluation_batches` stand for.

    Tokens between documents stand for none; of a document that is cut, what is kept is decoded.
    Bits per byte are the sum of all losses in nats, over ln 2 and these bytes.
    """
    selection = Selection.of(split, seq=seq, packing=packing, long=long, max_tokens=max_tokens)
    return selection.text_bytes(tokenizer)
