from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from scrimp.base.errors import MissingExtraError, ScrimpError
from scrimp.data import byte_tokenizer, fingerprint, load_tokenizer, separator
from scrimp.data.tokenizer import Separator, text_encoder, vocabulary_size

TEXTS = ["", "plain", "naïve 的 🦓\r\n\t\0", "<|eos|> <|im_end|><|bos|>", " leading", "a" * 1000]


def test_the_byte_tokenizer_is_256_bytes_and_three_specials(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    every_byte = "".join(map(chr, range(128))) + "é的🦓"
    ids = bytes_tokenizer(every_byte, add_special_tokens=False).input_ids
    assert ids == list(every_byte.encode())
    assert len(bytes_tokenizer) == 259
    assert bytes_tokenizer.decode(ids) == every_byte
    assert bytes_tokenizer("a").input_ids == [bytes_tokenizer.bos_token_id, ord("a")]
    specials = [bytes_tokenizer.pad_token_id, bytes_tokenizer.bos_token_id, bytes_tokenizer.eos_token_id]
    assert specials == [256, 257, 258]


def test_it_is_an_ordinary_tokenizer_that_transformers_loads(
    tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    bytes_tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        for text in TEXTS:
            assert loaded(text).input_ids == bytes_tokenizer(text).input_ids
        assert loaded.special_tokens_map == bytes_tokenizer.special_tokens_map
        assert fingerprint(loaded, chat=False) == fingerprint(bytes_tokenizer, chat=False)


def test_a_bare_tokenizer_file_is_known_by_the_names_of_its_tokens(
    tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "mine.json"
    bytes_tokenizer.backend_tokenizer.save(str(path))
    loaded = load_tokenizer(path)
    assert loaded.special_tokens_map == bytes_tokenizer.special_tokens_map
    assert separator(loaded) == separator(bytes_tokenizer)


def test_the_table_of_bytes_is_exactly_the_tokenizer(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    generator = np.random.default_rng(0)
    texts = [*TEXTS, "".join(map(chr, generator.integers(1, 0xD800, 500)))]
    backend = Tokenizer.from_str(bytes_tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    expected = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    encoded = text_encoder(bytes_tokenizer)([text.encode() for text in texts])
    assert [ids.tolist() for ids in encoded] == expected


def test_special_tokens_written_in_a_text_stay_text(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "end<|im_end|>start"
    (ids,) = text_encoder(merging_tokenizer)([text.encode()])
    assert merging_tokenizer.eos_token_id not in ids
    assert merging_tokenizer.decode(ids.tolist()) == text
    assert merging_tokenizer.eos_token_id in merging_tokenizer(text).input_ids  # the user's own is untouched


def test_what_an_earlier_call_truncated_is_no_part_of_the_tokenizer(
    merging_tokenizer: PreTrainedTokenizerFast,
) -> None:
    before = fingerprint(merging_tokenizer, chat=False)
    merging_tokenizer("a long text", truncation=True, max_length=2, padding="max_length")
    assert fingerprint(merging_tokenizer, chat=False) == before
    (ids,) = text_encoder(merging_tokenizer)([b"a long text"])
    assert merging_tokenizer.decode(ids.tolist()) == "a long text"


@pytest.mark.parametrize("change", ["normalizer", "prefix", "word", "added"])
def test_a_tokenizer_that_does_more_than_look_up_bytes_is_not_taken_for_one_that_does(change: str) -> None:
    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    if change == "normalizer":
        backend.normalizer = normalizers.Lowercase()
    elif change == "prefix":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "added":
        backend.add_tokens(["ABC"])
    else:
        description = json.loads(backend.to_str())
        description["model"]["vocab"]["ABC"] = 256
        description["model"]["ignore_merges"] = True
        description["added_tokens"] = []
        description["post_processor"] = None
        backend = Tokenizer.from_str(json.dumps(description))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    expected = backend.encode("ABC", add_special_tokens=False).ids
    assert expected != list(b"ABC")
    assert text_encoder(tokenizer)([b"ABC"])[0].tolist() == expected


def test_the_tokens_between_documents(
    bytes_tokenizer: PreTrainedTokenizerFast, merging_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert separator(bytes_tokenizer) == Separator(257, 258)  # it adds its bos
    eos = merging_tokenizer.eos_token_id
    assert separator(merging_tokenizer) == Separator(eos, eos)  # it has a bos, and does not add it
    backend = merging_tokenizer.backend_tokenizer
    only_bos = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>")
    assert separator(only_bos) == Separator(only_bos.bos_token_id, only_bos.bos_token_id)
    with pytest.raises(ScrimpError, match="neither an eos nor a bos"):
        separator(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_the_fingerprint_sees_all_that_decides_the_tokens(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    backend = merging_tokenizer.backend_tokenizer
    other_eos = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    other_chat = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template="other"
    )
    plain = fingerprint(merging_tokenizer, chat=False)
    assert fingerprint(other_eos, chat=False) != plain
    assert fingerprint(other_chat, chat=False) == plain
    assert fingerprint(other_chat, chat=True) != fingerprint(merging_tokenizer, chat=True)


def test_the_vocabulary_counts_gaps() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    assert vocabulary_size(PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == 10


@pytest.mark.parametrize("name", ["missing", "broken.json", "empty"])
def test_a_tokenizer_that_cannot_be_read_is_named(
    tmp_path: Path, write: Callable[[str, str], Path], name: str
) -> None:
    write("broken.json", '{"version": 1}')
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScrimpError, match=name):
        load_tokenizer(tmp_path / name)


def test_a_gguf_file_without_the_package_names_the_extra(
    write: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("model.gguf", "GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"model\.gguf.*scrimp\[gguf\]"):
        load_tokenizer(path)
