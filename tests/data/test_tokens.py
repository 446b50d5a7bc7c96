from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from scrimp.base.errors import ScrimpError
from scrimp.data import Corpus, Split, byte_tokenizer, cache_bytes, cache_folder, find_sources, prepare
from scrimp.data.cache import new_folder
from scrimp.data.corpus import SplitWriter

Write = Callable[[str, str | bytes], Path]
ROWS = [f"document number {number}, naïve {'x' * (number % 17)}" for number in range(300)]


def texts(split: Split, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    rows = [split.tokens[slice(*split.row(index))] for index in range(split.documents)]
    return [str(tokenizer.decode(row.tolist(), skip_special_tokens=True)) for row in rows]


@pytest.mark.parametrize("name", ["bytes_tokenizer", "merging_tokenizer"])
def test_every_document_comes_back_as_its_text(
    name: str, request: pytest.FixtureRequest, corpus_of: Callable[..., Corpus]
) -> None:
    tokenizer = request.getfixturevalue(name)
    corpus = corpus_of(ROWS, tokenizer, held_out=0.1)
    assert sorted(texts(corpus.train, tokenizer) + texts(corpus.held_out, tokenizer)) == sorted(ROWS)
    for split in (corpus.train, corpus.held_out):
        assert split.bytes.tolist() == [len(text.encode()) for text in texts(split, tokenizer)]
    assert corpus.report.documents == len(ROWS)
    assert corpus.report.tokens == len(corpus.train.tokens) + len(corpus.held_out.tokens)


def test_the_stream_has_both_tokens_around_documents_where_they_differ(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: Callable[..., Corpus]
) -> None:
    train = corpus_of(["ab", "c"], bytes_tokenizer).train
    assert train.tokens.tolist() == [257, 97, 98, 258, 257, 99, 258]
    assert train.offsets.tolist() == [0, 4, 7]
    assert train.tokens.dtype == np.uint16


def test_the_stream_has_one_token_between_documents_where_it_serves_for_both(
    merging_tokenizer: PreTrainedTokenizerFast, corpus_of: Callable[..., Corpus]
) -> None:
    train = corpus_of(["a", "b"], merging_tokenizer).train
    sep = merging_tokenizer.eos_token_id
    a, b = (merging_tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    assert train.tokens.tolist() == [sep, a, sep, b, sep]
    assert [train.row(index) for index in (0, 1)] == [(0, 3), (2, 5)]


def test_a_vocabulary_beyond_sixteen_bits_takes_wider_tokens(corpus_of: Callable[..., Corpus]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens([f"<|{number}|>" for number in range(1 << 16)])
    train = corpus_of(["ab"], tokenizer).train
    assert train.tokens.dtype == np.uint32
    assert train.tokens.tolist() == [257, 97, 98, 258]


def test_the_second_time_nothing_is_tokenised(
    write: Write, cache: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    sources = find_sources([str(write("a.jsonl", "".join(json.dumps({"text": row}) + "\n" for row in ROWS)))])
    first = prepare(sources, bytes_tokenizer, cache=cache)
    messages: list[str] = []
    second = prepare(
        sources, bytes_tokenizer, cache=cache, progress=lambda message, done: messages.append(message)
    )
    assert (first.report.cached, second.report.cached) == (False, True)
    assert "tokenising" not in messages
    assert second.fingerprint == first.fingerprint
    assert second.train.tokens.tolist() == first.train.tokens.tolist()
    assert cache_bytes(cache) > 2 * len(first.train.tokens)


def test_the_fingerprint_sees_content_tokenizer_and_split(
    write: Write,
    cache: Path,
    bytes_tokenizer: PreTrainedTokenizerFast,
    merging_tokenizer: PreTrainedTokenizerFast,
) -> None:
    one, other = write("a.txt", "one\n" * 50), write("b.txt", "two\n" * 50)
    prints = [
        prepare(find_sources([str(path)]), tokenizer, held_out=held_out, cache=cache).fingerprint
        for path, tokenizer, held_out in (
            (one, bytes_tokenizer, 0.1),
            (other, bytes_tokenizer, 0.1),
            (one, merging_tokenizer, 0.1),
            (one, bytes_tokenizer, 0.2),
        )
    ]
    assert len(set(prints)) == 4


@pytest.mark.parametrize("damage", ["truncate", "delete", "meta"])
def test_a_damaged_cache_is_made_again(
    write: Write, cache: Path, bytes_tokenizer: PreTrainedTokenizerFast, damage: str
) -> None:
    sources = find_sources([str(write("a.txt", "text\n" * 500))])
    expected = prepare(sources, bytes_tokenizer, cache=cache).train.tokens.tolist()
    (folder,) = (cache / "tokens").iterdir()
    if damage == "truncate":
        os.truncate(folder / "train.tokens", 10)
    elif damage == "delete":
        (folder / "held_out.offsets").unlink()
    else:
        (folder / "meta.json").write_text("{")
    again = prepare(sources, bytes_tokenizer, cache=cache)
    assert not again.report.cached
    assert again.train.tokens.tolist() == expected


PREPARE_ON_SIGNAL = """
import sys
from pathlib import Path
from scrimp.data import byte_tokenizer, find_sources, prepare
tokenizer = byte_tokenizer()
print("ready", flush=True)
sys.stdin.readline()
corpus = prepare(find_sources([sys.argv[1]]), tokenizer, cache=Path(sys.argv[2]))
print(corpus.fingerprint, int(corpus.train.tokens.sum(dtype="int64")))
"""


@pytest.mark.slow
def test_two_writers_at_once_end_with_one_whole_folder(write: Write, cache: Path) -> None:
    """Two processes, since only they can collide on the disk."""
    path = write("a.txt", "some text\n" * 200_000)
    command = [sys.executable, "-c", PREPARE_ON_SIGNAL, str(path), str(cache)]
    writers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    found = {writer.communicate(timeout=60)[0] for writer in writers}
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(found) == 1
    assert len(list((cache / "tokens").iterdir())) == 1


def test_the_loser_of_two_writers_adopts_what_the_winner_wrote(tmp_path: Path) -> None:
    target = tmp_path / "tokens" / "name"
    with new_folder(target) as slow:
        (slow / "by").write_text("slow")
        with new_folder(target) as fast:
            (fast / "by").write_text("fast")
    assert (target / "by").read_text() == "fast"
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "name") as draft:
        (draft / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_program_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    for name, age in ((".name.1-aa", 10**5), (".name.2-bb", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
        for path in (tmp_path / name / "half", tmp_path / name):
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    with new_folder(tmp_path / "name"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".name.2-bb", "name"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_may_not_be_written_is_named(
    tmp_path: Path, write: Write, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    sources = find_sources([str(write("a.txt", "text\n"))])
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(ScrimpError, match=r"locked.* may not be written"):
        prepare(sources, bytes_tokenizer, cache=locked)


def test_a_full_disk_is_named_and_nothing_stays_behind(
    write: Write, cache: Path, bytes_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SplitWriter, "_write", full)
    with pytest.raises(ScrimpError, match="no space left"):
        prepare(find_sources([str(write("a.txt", "text\n" * 10))]), bytes_tokenizer, cache=cache)
    assert list((cache / "tokens").iterdir()) == []


def test_a_cache_that_is_a_file_is_named(write: Write, bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    sources = find_sources([str(write("a.txt", "text\n" * 10))])
    with pytest.raises(ScrimpError, match="could not be written"):
        prepare(sources, bytes_tokenizer, cache=write("file", "x"))


def test_data_that_change_while_they_are_read_are_refused(
    write: Write, cache: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write("a.txt", "text\n" * 1000)

    def meddle(message: str, done: float | None) -> None:
        if message == "tokenising":
            path.write_text("other\n")

    with pytest.raises(ScrimpError, match="changed while being read"):
        prepare(find_sources([str(path)]), bytes_tokenizer, cache=cache, progress=meddle)
    assert list((cache / "tokens").iterdir()) == []


def test_where_a_document_falls_depends_on_it_alone(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: Callable[..., Corpus]
) -> None:
    few = corpus_of(ROWS[:150], bytes_tokenizer, held_out=0.1)
    held_before = set(texts(few.held_out, bytes_tokenizer))
    trained_before = set(texts(few.train, bytes_tokenizer))
    many = corpus_of(ROWS[::-1], bytes_tokenizer, held_out=0.1)
    assert held_before
    assert held_before <= set(texts(many.held_out, bytes_tokenizer))
    assert trained_before <= set(texts(many.train, bytes_tokenizer))


def test_about_the_fraction_asked_for_is_held_out(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: Callable[..., Corpus]
) -> None:
    rows = [f"row {number}" for number in range(2000)]
    # Binomial: 200 expected, standard deviation 13.4; the rows are fixed, so this cannot flicker.
    assert abs(corpus_of(rows, bytes_tokenizer, held_out=0.1).held_out.documents - 200) < 4 * 13.4


def test_copies_of_a_text_are_on_one_side(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: Callable[..., Corpus]
) -> None:
    corpus = corpus_of(ROWS * 2, bytes_tokenizer, held_out=0.3)
    assert not set(texts(corpus.train, bytes_tokenizer)) & set(texts(corpus.held_out, bytes_tokenizer))


def test_where_none_falls_to_the_held_out_side_the_smallest_hash_does(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: Callable[..., Corpus]
) -> None:
    corpus = corpus_of(ROWS[:20], bytes_tokenizer, held_out=1e-9)
    assert corpus.held_out.documents == 1
    assert corpus.held_out.hashes[0] < corpus.train.hashes.min()
    assert sorted(texts(corpus.train, bytes_tokenizer) + texts(corpus.held_out, bytes_tokenizer)) == sorted(
        ROWS[:20]
    )
    assert "is held out" in corpus.report.notes[0]


def test_where_all_fall_to_the_held_out_side_the_largest_hash_trains(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: Callable[..., Corpus]
) -> None:
    corpus = corpus_of(ROWS[:20], bytes_tokenizer, held_out=math.nextafter(1, 0))
    assert corpus.train.documents == 1
    assert corpus.train.hashes[0] > corpus.held_out.hashes.max()
    assert "trains" in corpus.report.notes[0]


@pytest.mark.parametrize(
    ("text", "head", "tail"),
    [
        ("".join(f"line {number}\n" for number in range(10)), 8, 2),
        ("word " * 10, None, None),
        ("é" * 30, None, None),
    ],
)
def test_a_single_text_is_cut_near_its_end(
    bytes_tokenizer: PreTrainedTokenizerFast,
    corpus_of: Callable[..., Corpus],
    text: str,
    head: int | None,
    tail: int | None,
) -> None:
    corpus = corpus_of([text], bytes_tokenizer, held_out=0.15)
    (train,), (held,) = texts(corpus.train, bytes_tokenizer), texts(corpus.held_out, bytes_tokenizer)
    assert train + held == text
    assert 0.15 <= len(held) / len(text) < 0.35
    if head is not None:
        assert (train.count("\n"), held.count("\n")) == (head, tail)
    assert "the only document was cut" in corpus.report.notes[0]


def test_a_single_conversation_trains(
    merging_tokenizer: PreTrainedTokenizerFast, corpus_of: Callable[..., Corpus]
) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    corpus = corpus_of([talk], merging_tokenizer, held_out=0.5)
    assert (corpus.train.documents, corpus.held_out.documents) == (1, 0)
    assert "nothing is held out" in corpus.report.notes[0]


def test_nothing_is_held_out_where_nothing_is_asked_for(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: Callable[..., Corpus]
) -> None:
    corpus = corpus_of(ROWS, bytes_tokenizer, held_out=0)
    assert texts(corpus.train, bytes_tokenizer) == ROWS
    assert (corpus.held_out.documents, len(corpus.held_out.tokens)) == (0, 0)
    assert corpus.report.notes == ()


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2, math.nan])
def test_a_fraction_that_leaves_nothing_is_an_error(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: Callable[..., Corpus], fraction: float
) -> None:
    with pytest.raises(ScrimpError, match="held-out fraction"):
        corpus_of(ROWS, bytes_tokenizer, held_out=fraction)


def test_rows_that_are_all_empty_are_an_error(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: Callable[..., Corpus], cache: Path
) -> None:
    with pytest.raises(ScrimpError, match="no document with any text"):
        corpus_of(["", ""], bytes_tokenizer)
    assert list((cache / "tokens").iterdir()) == []


def test_pages_given_back_are_read_again(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: Callable[..., Corpus]
) -> None:
    train = corpus_of(ROWS, bytes_tokenizer).train
    before = train.tokens.tolist()
    train.release()
    assert train.tokens.tolist() == before


def test_the_cache_lies_where_the_platform_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("linux") == tmp_path / "scrimp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder("linux") == Path.home() / ".cache" / "scrimp"
    assert cache_folder("darwin") == Path.home() / "Library" / "Caches" / "scrimp"
    assert cache_folder("win32") == tmp_path / "local" / "scrimp" / "Cache"
