"""Tokenizers and small corpora that the tests of the data share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from scrimp.data import Corpus, byte_tokenizer, find_sources, prepare

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Return the built-in tokenizer: the stream is `bos d1 eos bos d2 eos`."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with merges and ChatML: the stream is `eos d1 eos d2 eos`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(json.__file__).read_text("utf-8")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return a cache folder of the test's own."""
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Return a function that writes a file of the test's own and returns its path."""

    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


@pytest.fixture
def corpus_of(tmp_path: Path, cache: Path) -> Callable[..., Corpus]:
    """Return a function that prepares a corpus with one document for each row given."""

    def make(rows: list[Any], tokenizer: PreTrainedTokenizerFast, held_out: float = 0.0) -> Corpus:
        path = tmp_path / "rows.jsonl"
        lines = [{"text": row} if isinstance(row, str) else {"messages": row} for row in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        return prepare(find_sources([str(path)]), tokenizer, held_out=held_out, cache=cache)

    return make
