"""Documents, read one by one: memory does not grow with a file.

A text file is one document up to 64 KiB. A longer one becomes several, cut where it hurts
least: after a line end whose next line does not begin with white space (in code: between
top-level statements; a byte-pair tokenizer gives the same tokens on both sides of such a seam),
else after any line end, else before a space, else between two characters. A row of a table is
one document, as its author drew the line; beyond 1 MiB it is cut in the same way.

Text is handed on as UTF-8 bytes, line ends untouched, so that bytes can be counted exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scrimp.base.errors import ScrimpError
from scrimp.base.suggest import did_you_mean
from scrimp.data.content import encoding_of
from scrimp.data.sources import Source, not_text

Kind = Literal["text", "chat"]
Messages = list[dict[str, Any]]

TEXT_BYTES = 64 << 10
ROW_BYTES = 1 << 20
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Document:
    """One text (UTF-8 bytes) or one conversation, and where it came from.

    Attributes:
        content: The text, or the conversation's messages.
        path: The file.
        row: The line of a `.jsonl` file or the row of a table, from 1; 0 for a plain text.
        read: How many bytes of the file were read up to this document's end.
    """

    content: bytes | Messages
    path: Path
    row: int
    read: int

    @property
    def where(self) -> str:
        """The file, and the line where there is one, as an error names them."""
        return f"{self.path}, line {self.row}" if self.row else str(self.path)


def detect_kind(files: Sequence[Source], text_key: str) -> Kind:
    """Tell conversations from text by the first row of the first table.

    It is a conversation if it has `messages`, unless the user named another column that it has.
    """
    for source in files:
        if source.format not in ("text", "python"):
            columns = next((row for row, _, _ in _rows(source, None)), {})
            is_chat = "messages" in columns and (text_key == "text" or text_key not in columns)
            return "chat" if is_chat else "text"
    return "text"


def read_documents(files: Iterable[Source], kind: Kind, text_key: str) -> Iterator[Document]:
    """Read the documents of all files in order; empty ones are left out.

    Args:
        files: The files, all known to be readable.
        kind: Whether rows hold text or conversations.
        text_key: The column of a row that holds its text.

    Raises:
        ScrimpError: A row is not what `kind` asks for (naming file and line), a file of plain
            text is among conversations, or a file went away.
    """
    for source in files:
        try:
            yield from _source_documents(source, kind, text_key)
        except OSError as error:  # it was there when its content was hashed
            raise ScrimpError(f"{source.path} can no longer be read: {error.strerror or error}") from error


def _source_documents(source: Source, kind: Kind, text_key: str) -> Iterator[Document]:
    if source.format not in ("text", "python"):
        return _row_documents(source, kind, text_key)
    if kind == "text":
        return _text_documents(source)
    raise ScrimpError(f"{source.path} is plain text among conversations: train on one kind at a time")


def _text_documents(source: Source) -> Iterator[Document]:
    pending, read = b"", 0
    try:
        with source.path.open(encoding=encoding_of(source), newline="") as file:
            while text := file.read(TEXT_BYTES):
                block = text.encode()
                read += len(block)
                pending += block
                while len(pending) > TEXT_BYTES:
                    cut = seam(pending, TEXT_BYTES)
                    yield Document(pending[:cut], source.path, 0, read)
                    pending = pending[cut:]
    except UnicodeDecodeError as error:
        raise not_text(source.path) from error
    if pending:
        yield Document(pending, source.path, 0, read)


def seam(text: bytes, limit: int) -> int:
    """Return where to cut `text` (UTF-8, longer than `limit` bytes): at most at `limit`.

    Half of the limit is in reach, so that no piece is short.
    """
    reach = limit // 2
    any_line = line = text.rfind(b"\n", reach, limit)
    while line >= 0 and text[line + 1] in b" \t\r\n\f\v":
        line = text.rfind(b"\n", reach, line)
    if any_line >= 0:
        return (line if line >= 0 else any_line) + 1
    if (space := text.rfind(b" ", reach, limit)) >= 0:
        return space
    cut = limit
    while text[cut] & 0xC0 == 0x80:  # a continuation byte: stay between characters
        cut -= 1
    return cut


def _row_documents(source: Source, kind: Kind, text_key: str) -> Iterator[Document]:
    for row, number, read in _rows(source, "messages" if kind == "chat" else text_key):
        where = f"{source.path}, line {number}"
        if kind == "chat":
            yield Document(_messages(row, where), source.path, number, read)
            continue
        text = _row_text(row, text_key, where)
        while len(text) > ROW_BYTES:
            cut = seam(text, ROW_BYTES)
            yield Document(text[:cut], source.path, number, read)
            text = text[cut:]
        if text:
            yield Document(text, source.path, number, read)


def _row_text(row: dict[str, Any], key: str, where: str) -> bytes:
    text = row.get(key)
    if not isinstance(text, str):
        fault = f"{key!r} is not a text" if key in row else f"there is no {key!r}{did_you_mean(key, row)}"
        columns = ", ".join(map(repr, row)) or "none"
        raise ScrimpError(
            f"{where}: {fault}; the row's columns are {columns}: name the right one with --data.text-key"
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ScrimpError(
            f"{where}: {key!r} holds half a character (a lone surrogate): repair the row"
        ) from error


def _messages(row: dict[str, Any], where: str) -> Messages:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ScrimpError(
            f"{where}: the row has no 'messages', a list of {{'role': …, 'content': …}}: repair it"
        )
    for message in messages:
        fits = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not fits or not isinstance(message.get("content"), str):
            raise ScrimpError(
                f"{where}: a message needs a 'role' and a 'content' that are texts: repair the row"
            )
    # A table fills the keys that a message lacks with None; a template would print them.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _rows(source: Source, column: str | None) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Yield (row, its number from 1, bytes read so far); of a table only `column`, if it has it."""
    if source.format == "jsonl":
        return _jsonl_rows(source.path)
    return _parquet_rows(source.path, column) if source.format == "parquet" else _arrow_rows(source.path)


def _jsonl_rows(path: Path) -> Iterator[tuple[dict[str, Any], int, int]]:
    read = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            read += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                why = str(error)
                if isinstance(error, json.JSONDecodeError):  # its own line number is within this line
                    why = f"{error.msg} at character {error.pos + 1}"
                raise ScrimpError(
                    f"{path}, line {number}: not JSON ({why}): repair or remove the line"
                ) from error
            if not isinstance(row, dict):
                raise ScrimpError(f"{path}, line {number}: not a JSON object: a row is {{'text': …}}")
            yield row, number, read


def _parquet_rows(path: Path, column: str | None) -> Iterator[tuple[dict[str, Any], int, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, number = path.stat().st_size, 0
    try:
        with pq.ParquetFile(path, memory_map=True) as table:
            columns = [column] if column in table.schema_arrow.names else None
            total = table.metadata.num_rows
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield row, number, size * number // total
    except (pa.ArrowException, OSError) as error:
        raise ScrimpError(f"{path} is not a Parquet file that can be read: {error}") from error


def _arrow_rows(path: Path) -> Iterator[tuple[dict[str, Any], int, int]]:
    import pyarrow as pa

    number = 0
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                    for row in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
                        number += 1
                        yield row, number, file.tell()
    except (pa.ArrowException, OSError) as error:
        raise ScrimpError(f"{path} is not an Arrow stream that can be read: {error}") from error
