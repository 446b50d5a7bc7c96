from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scrimp.base.errors import ScrimpError
from scrimp.data import find_sources
from scrimp.data.documents import ROW_BYTES, TEXT_BYTES, Document, detect_kind, read_documents, seam

Write = Callable[[str, str | bytes], Path]


def read(path: Path, kind: str = "text", text_key: str = "text") -> list[Document]:
    return list(read_documents(find_sources([str(path)]).files, kind, text_key))  # type: ignore[arg-type]


def contents(path: Path, **options: str) -> list[object]:
    return [document.content for document in read(path, **options)]


def test_a_text_up_to_the_limit_is_one_document_byte_for_byte(write: Write) -> None:
    text = "naïve\r\nline ends\rstay\n" + "x" * 100
    assert contents(write("a.txt", text)) == [text.encode()]
    assert len(read(write("b.txt", "y" * TEXT_BYTES))) == 1


def test_the_mark_at_the_start_of_a_file_is_no_text(write: Write) -> None:
    assert contents(write("a.txt", b"\xef\xbb\xbfhello")) == [b"hello"]


def test_a_python_file_is_read_as_its_coding_line_says(write: Write) -> None:
    source = "# -*- coding: latin-1 -*-\nname = 'é'\n"
    assert contents(write("a.py", source.encode("latin-1"))) == [source.encode()]


def test_a_long_text_is_cut_into_documents_that_join_to_the_text(write: Write) -> None:
    generator = random.Random(0)
    words = ["zebra", "ï", "的", "🦓", " ", "\n", "\n    ", "\t"]
    text = "".join(generator.choices(words, k=150_000))
    documents = contents(write("a.txt", text))
    assert b"".join(documents) == text.encode()  # type: ignore[arg-type]
    assert len(documents) > 3
    assert max(len(document) for document in documents) <= TEXT_BYTES  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "head"),
    [
        (b"aaaaaa\n  b\nc\n  dddddd", b"aaaaaa\n  b\n"),  # before a line that starts at the margin
        (b"aaaaaaaa\n  b\n  ccc\n  ddd", b"aaaaaaaa\n  b\n"),  # else at any line end
        (b"aaaaaaaaaa bbb cccccccc", b"aaaaaaaaaa bbb"),  # else before a space
        (b"\xc3\xa9" * 10, b"\xc3\xa9" * 7),  # else between two characters
        (b"a\n" + b"x" * 30, b"a\n" + b"x" * 13),  # what is not in reach is no seam
    ],
)
def test_the_seam_is_where_it_hurts_least(text: bytes, head: bytes) -> None:
    assert text[: seam(text, 15)] == head


def test_rows_of_a_jsonl_file_are_documents_and_blank_lines_are_none(write: Write) -> None:
    path = write("a.jsonl", '{"text": "one"}\n\n{"text": "two\\r\\n", "other": 1}\n{"text": ""}\n')
    assert contents(path) == [b"one", b"two\r\n"]
    assert [document.where for document in read(path)] == [f"{path}, line 1", f"{path}, line 3"]


def test_a_row_beyond_a_mebibyte_is_cut(write: Write) -> None:
    text = "word " * (ROW_BYTES // 3)
    documents = contents(write("a.jsonl", json.dumps({"text": text})))
    assert b"".join(documents) == text.encode()  # type: ignore[arg-type]
    assert len(documents) == 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "cut short', "line 2: not JSON"),
        ("[1, 2]", "line 2: not a JSON object"),
        ('{"texts": "x"}', r"line 2: there is no 'text' \(did you mean 'texts'\?\)"),
        ('{"text": 7}', "line 2: 'text' is not a text"),
        ('{"text": "\\ud800"}', "line 2: .*surrogate"),
    ],
)
def test_a_bad_line_is_named(write: Write, line: str, complaint: str) -> None:
    path = write("bad.jsonl", '{"text": "good"}\n' + line + "\n")
    with pytest.raises(ScrimpError, match=rf"bad\.jsonl, {complaint}"):
        read(path)


def test_bytes_that_are_no_utf8_in_a_jsonl_file_are_named(write: Write) -> None:
    path = write("bad.jsonl", b'{"text": "caf\xe9"}\n')
    with pytest.raises(ScrimpError, match=r"bad\.jsonl, line 1: not JSON"):
        read(path)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "x"},
        {"messages": []},
        {"messages": "hello"},
        {"messages": ["hello"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    ],
)
def test_a_chat_row_without_proper_messages_is_named(write: Write, row: object) -> None:
    path = write("chat.jsonl", json.dumps(row) + "\n")
    with pytest.raises(ScrimpError, match=r"chat\.jsonl, line 1: "):
        read(path, kind="chat")


def test_a_table_gives_its_rows(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(300)]
    table = pa.table({"text": texts, "other": list(range(300))})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=70)
    assert contents(path) == [text.encode() for text in texts]
    with pytest.raises(ScrimpError, match=r"line 1: there is no 'body'.* columns are 'text', 'other'"):
        read(path, text_key="body")


def test_conversations_in_a_table_lose_the_keys_that_arrow_filled_in(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "name": "x"}]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), path)
    assert contents(path, kind="chat") == [messages]


def test_an_arrow_stream_gives_its_rows(tmp_path: Path) -> None:
    table = pa.table({"text": [f"row {number}" for number in range(200)]})
    path = tmp_path / "a.arrow"
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table, max_chunksize=90)
    assert contents(path) == [f"row {number}".encode() for number in range(200)]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_table_that_is_none_is_named(write: Write, name: str) -> None:
    with pytest.raises(ScrimpError, match=rf"{name} is not an? (Parquet|Arrow)"):
        read(write(name, "not a table, but long enough to look at"))


def test_the_first_row_tells_conversations_from_text(write: Write) -> None:
    messages = [{"role": "user", "content": "hi"}]
    chat = write("chat.jsonl", json.dumps({"messages": messages, "text": "x", "body": "y"}))
    text = write("text.jsonl", json.dumps({"text": "x"}))
    plain = write("plain.txt", "x")

    def kind(path: Path, text_key: str = "text") -> str:
        return detect_kind(find_sources([str(path)]).files, text_key)

    assert (kind(chat), kind(text), kind(plain)) == ("chat", "text", "text")
    assert kind(chat, "body") == "text"


def test_plain_text_among_conversations_is_an_error(write: Write) -> None:
    with pytest.raises(ScrimpError, match="plain text among conversations"):
        read(write("a.txt", "x"), kind="chat")


def test_how_far_the_reader_is_grows_to_the_size_of_the_file(write: Write) -> None:
    path = write("a.jsonl", '{"text": "one"}\n' * 50)
    progress = [document.read for document in read(path)]
    assert progress == sorted(progress)
    assert progress[-1] == path.stat().st_size
