"""Which documents are held out of training: decided by the content of each, one by one.

A document is held out if the hash of its content, read as a number in [0, 1), is below the
fraction asked for. So its side never depends on the other documents: adding files moves none,
and copies of one text are never on both sides. Three cases bend the rule so that neither side
is empty:

- no document falls below: the one with the smallest hash is held out;
- every document does: the one with the largest hash trains;
- there is one document: its last lines are held out.

The first two need no second pass: until both sides have a document, the one nearest to the
other side is kept in hand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from scrimp.base.errors import ScrimpError
from scrimp.data.documents import Document

_HASHES = 2**64


@dataclass(frozen=True, slots=True)
class Placed:
    """A document, the 64-bit hash of its content, and its side."""

    document: Document
    hash: int
    held_out: bool


def content_hash(document: Document) -> int:
    """Hash a text, or the messages of a conversation whatever the order of their keys."""
    content = document.content
    if not isinstance(content, bytes):
        content = json.dumps(content, sort_keys=True, ensure_ascii=False).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def divide(documents: Iterable[Document], fraction: float, note: Callable[[str], None]) -> Iterator[Placed]:
    """Give each document its side.

    Args:
        documents: Read once, in order.
        fraction: The share to hold out, at least 0 and less than 1.
        note: Called with a sentence where the rule had to be bent.
    """
    limit = fraction * _HASHES
    in_hand: Placed | None = None
    count, settled = 0, not fraction
    for document in documents:
        count += 1
        digest = content_hash(document)
        placed = Placed(document, digest, digest < limit)
        if settled:
            yield placed
        elif in_hand is None:
            in_hand = placed
        elif in_hand.held_out != placed.held_out:
            settled = True
            yield in_hand
            yield placed
        else:
            # Both on one side: let go of the one further from the other side.
            smaller, larger = sorted((in_hand, placed), key=lambda one: one.hash)
            in_hand, free = (larger, smaller) if placed.held_out else (smaller, larger)
            yield free
    if in_hand is not None and not settled:
        yield from _bent(in_hand, count, fraction, note)


def _bent(last: Placed, count: int, fraction: float, note: Callable[[str], None]) -> Iterator[Placed]:
    content = last.document.content
    if count > 1:
        side = "trains although all fell to" if last.held_out else "is held out although none fell to"
        note(f"of {count} documents, one {side} the held-out side")
        yield dataclasses.replace(last, held_out=not last.held_out)
    elif isinstance(content, bytes) and (cut := _tail(content, fraction)):
        note(f"the only document was cut: its last {len(content) - cut} of {len(content)} bytes are held out")
        for part, is_held_out in ((content[:cut], False), (content[cut:], True)):
            document = dataclasses.replace(last.document, content=part)
            yield Placed(document, content_hash(document), is_held_out)
    else:
        note("nothing is held out: there is one document, and it cannot be cut")
        yield dataclasses.replace(last, held_out=False)


def _tail(text: bytes, fraction: float) -> int:
    """Return where the last `fraction` starts, or the line (word, character) it falls in; 0 if nowhere."""
    limit = int(len(text) * (1 - fraction))
    for mark in (b"\n", b" "):
        if cut := text.rfind(mark, 0, limit) + 1:
            return cut
    while limit and text[limit] & 0xC0 == 0x80:
        limit -= 1
    return limit


def check_fraction(fraction: float) -> None:
    """Check a held-out fraction.

    Raises:
        ScrimpError: It is negative, or leaves nothing to train on.
    """
    if not 0 <= fraction < 1:
        raise ScrimpError(f"the held-out fraction is {fraction}: it must be at least 0 and less than 1")
