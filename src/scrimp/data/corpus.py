"""A tokenised corpus on disk: two splits of flat arrays, read where they lie.

    NAME.tokens      uint16, or uint32 for a vocabulary beyond 65536: the whole stream
    NAME.offsets     int64, (documents + 1,): where each document starts in the stream
    NAME.bytes       int64, (documents,): the UTF-8 bytes that its targets stand for
    NAME.hashes      uint64, (documents,): the hash of its content, which decided the split
    NAME.targets     uint8, as long as tokens: whether a token is a target; conversations only

NAME is `train` or `held_out`; `meta.json` says the rest. Document i is the row of tokens
`offsets[i] : offsets[i + 1] + shared`: with a shared separator (see `tokenizer`) the token that
ends it begins the next one too. The first token of a row is never predicted, all others are,
unless `targets` says otherwise.

Pages of a mapped file that were read count as resident memory until the system wants them back;
`Split.release` gives them back, so that a run's memory does not grow with its data.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from scrimp.base.platform import fsync_file

Array = npt.NDArray[Any]


class MappedArray:
    """A one-dimensional array in a file, of which only what is read is in memory."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._map: mmap.mmap | None = None
        if path.stat().st_size:  # an empty file cannot be mapped
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.array: Array = np.frombuffer(b"" if self._map is None else self._map, dtype)

    def release(self) -> None:
        """Give back the memory of the pages that were read; a later read maps them again."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of n tokens with what the loss and the mask must know of them.

    Attributes:
        tokens: Their ids, shape (n,).
        targets: Whether each may be predicted from the one before it, bool, shape (n,).
        starts: Whether each begins a document, bool, shape (n,).
    """

    tokens: Array
    targets: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.bool_]

    @classmethod
    def join(cls, pieces: Sequence[Piece]) -> Piece:
        """Put pieces one after the other."""
        return cls(
            np.concatenate([piece.tokens for piece in pieces]),
            np.concatenate([piece.targets for piece in pieces]),
            np.concatenate([piece.starts for piece in pieces]),
        )

    def __getitem__(self, part: slice) -> Piece:
        return Piece(self.tokens[part], self.targets[part], self.starts[part])


@dataclass(frozen=True, slots=True)
class Shape:
    """What the files of both splits have in common.

    Attributes:
        dtype: Of a token: `uint16` or `uint32`.
        shared: The token that ends a document and begins the next, if one does both.
        start: The token that begins a document and is never predicted, if there is one.
        chat: Whether there are targets, because the documents are conversations.
    """

    dtype: str
    shared: int | None
    start: int | None
    chat: bool


class Split:
    """One side of a corpus: its documents as one stream of tokens.

    Attributes:
        shared: 1 if a document's last token is the next one's first, else 0.
        documents: How many there are.
    """

    def __init__(self, folder: Path, name: str, shape: Shape) -> None:
        self._tokens = MappedArray(folder / f"{name}.tokens", shape.dtype)
        self._offsets = MappedArray(folder / f"{name}.offsets", np.int64)
        self._bytes = MappedArray(folder / f"{name}.bytes", np.int64)
        self._hashes = MappedArray(folder / f"{name}.hashes", np.uint64)
        self._targets = MappedArray(folder / f"{name}.targets", np.bool_) if shape.chat else None
        self._start = shape.start
        self.shared = int(shape.shared is not None)
        self.documents = len(self._bytes.array)

    @property
    def tokens(self) -> Array:
        """The stream, uint16 or uint32."""
        return self._tokens.array

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each document's row starts, and at last where one more would: (documents + 1,)."""
        return self._offsets.array

    @property
    def bytes(self) -> npt.NDArray[np.int64]:
        """The UTF-8 bytes that each document's targets stand for: (documents,)."""
        return self._bytes.array

    @property
    def hashes(self) -> npt.NDArray[np.uint64]:
        """The hash of each document's content: (documents,)."""
        return self._hashes.array

    @property
    def targets(self) -> npt.NDArray[np.bool_] | None:
        """Whether each token of the stream is a target; None for plain text."""
        return None if self._targets is None else self._targets.array

    def row(self, document: int) -> tuple[int, int]:
        """Return where a document's row starts and stops in the stream."""
        return int(self.offsets[document]), int(self.offsets[document + 1]) + self.shared

    def piece(self, start: int, stop: int) -> Piece:
        """Copy a stretch of the stream out of the file."""
        tokens = np.array(self.tokens[start:stop])
        if self.targets is not None:
            targets = np.array(self.targets[start:stop])
        elif self._start is not None:
            targets = tokens != self._start  # a text holds no special tokens, so every bos begins one
        else:
            targets = np.ones(len(tokens), np.bool_)
        starts = np.zeros(len(tokens), np.bool_)
        # Keys of the array's own type: with any other, searchsorted would first copy the array.
        low, high = np.searchsorted(self.offsets[: self.documents], np.array([start, stop], np.int64))
        starts[self.offsets[low:high] - start] = True
        return Piece(tokens, targets, starts)

    def release(self) -> None:
        """Give back the memory of all pages read so far."""
        for mapped in (self._tokens, self._offsets, self._bytes, self._hashes, self._targets):
            if mapped is not None:
                mapped.release()


class SplitWriter:
    """Appends documents to the files of one split; memory does not grow with them.

    Use it as a context: the files are complete, and on the disk, at its end.
    """

    def __init__(self, folder: Path, name: str, shape: Shape) -> None:
        self._dtype = np.dtype(shape.dtype)
        self._shared = shape.shared
        self._files: dict[str, BinaryIO] = {
            part: (folder / f"{name}.{part}").open("wb", buffering=1 << 18)
            for part in ("tokens", "offsets", "bytes", "hashes", *(["targets"] if shape.chat else []))
        }
        self.tokens = 0
        self.documents = 0

    def append(self, row: Array, *, content_bytes: int, content_hash: int, targets: Array | None) -> None:
        """Add a document: its row without the token it shares with the next one."""
        self._write("offsets", np.int64(self.tokens))
        self._write("tokens", row.astype(self._dtype, copy=False))
        self._write("bytes", np.int64(content_bytes))
        self._write("hashes", np.uint64(content_hash))
        if targets is not None:
            self._write("targets", targets.astype(np.bool_, copy=False))
        self.tokens += len(row)
        self.documents += 1

    def _write(self, part: str, values: Array | np.generic) -> None:
        self._files[part].write(values.tobytes())

    def _finish(self) -> None:
        if self.documents:
            self._write("offsets", np.int64(self.tokens))
            if self._shared is not None:
                self._write("tokens", np.array([self._shared], self._dtype))
                self.tokens += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for file in self._files.values():
                file.close()
        if kind is None:
            for file in self._files.values():
                fsync_file(Path(file.name))
