"""Documents into rows of tokens, a batch of about a mebibyte of text at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scrimp.data.chat import ChatEncoder
from scrimp.data.corpus import Array
from scrimp.data.documents import Kind
from scrimp.data.held_out import Placed
from scrimp.data.tokenizer import separator, text_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """A document's tokens, without one that it shares with the next.

    Attributes:
        tokens: Shape (n,).
        bytes: The UTF-8 bytes that its targets stand for.
        targets: For conversations, whether each token is a target: bool, shape (n,).
    """

    tokens: Array
    bytes: int
    targets: Array | None


_EncodeBatch = Callable[[list[Placed]], Iterable[Row]]


def encode(
    documents: Iterable[Placed], tokenizer: PreTrainedTokenizerFast, kind: Kind
) -> Iterator[tuple[Placed, Row]]:
    """Tokenise documents in order.

    Raises:
        ScrimpError: The tokenizer has no token to put between texts, or a conversation cannot
            be rendered (naming file and line).
    """
    encode_batch = _text_batches(tokenizer) if kind == "text" else _chat_batches(tokenizer)
    for batch in _batches(documents):
        yield from zip(batch, encode_batch(batch), strict=True)


def _batches(documents: Iterable[Placed]) -> Iterator[list[Placed]]:
    batch, size = list[Placed](), 0
    for placed in documents:
        batch.append(placed)
        content = placed.document.content
        size += len(content) if isinstance(content, bytes) else sum(len(turn["content"]) for turn in content)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _text_batches(tokenizer: PreTrainedTokenizerFast) -> _EncodeBatch:
    around, encode = separator(tokenizer), text_encoder(tokenizer)
    before = np.array([around.start], np.uint32)
    after = np.array([] if around.shared else [around.end], np.uint32)

    def rows(batch: list[Placed]) -> Iterator[Row]:
        texts = [placed.document.content for placed in batch]
        assert all(isinstance(text, bytes) for text in texts)  # the reader knows the kind
        for text, ids in zip(texts, encode(texts), strict=True):  # type: ignore[arg-type]
            yield Row(np.concatenate((before, ids, after)), len(text), None)

    return rows


def _chat_batches(tokenizer: PreTrainedTokenizerFast) -> _EncodeBatch:
    encoder = ChatEncoder(tokenizer)

    def rows(batch: list[Placed]) -> Iterator[Row]:
        for placed in batch:
            conversation = encoder.encode(placed.document)
            yield Row(conversation.ids, encoder.target_bytes(conversation), conversation.targets)

    return rows
