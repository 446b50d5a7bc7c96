"""Tokenizers: the built-in byte tokenizer, others from files, and what makes one what it is.

The stream of tokens that documents are stored in has one of two forms:

    dedicated   bos d1 eos bos d2 eos …    if the tokenizer adds a bos that is not its eos
    shared      sep d1 sep d2 sep …        otherwise; sep = eos (or bos, where there is no eos)

A bos is never a target; a shared separator is one once: it ends a document and begins the next.
Strings that look like special tokens are literal text in a document: data cannot inject them.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scrimp.base.errors import ScrimpError
from scrimp.base.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = npt.NDArray[np.integer[Any]]

_PAD, _BOS, _EOS = "<|pad|>", "<|bos|>", "<|eos|>"
# How a bare tokenizer.json, which names no roles, calls the token that ends a text, and begins it.
_EOS_NAMES = ("<|eos|>", "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>")
_BOS_NAMES = ("<|bos|>", "<s>", "<bos>", "<|begin_of_text|>")


@dataclass(frozen=True, slots=True)
class Separator:
    """The tokens around a document in the stream; they are one and the same if `shared`."""

    start: int
    end: int

    @property
    def shared(self) -> bool:
        """Whether one token ends a document and begins the next."""
        return self.start == self.end


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are the 256 bytes and three specials, without merges.

    Id 0 to 255 is the byte itself; then come `<|pad|>`, `<|bos|>` and `<|eos|>`. It is an
    ordinary `tokenizer.json` (byte-level BPE) and puts its bos before a text, as Llama's does,
    so that a prompt given to it by any program begins as the documents in training do.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.BPE(vocab={char: byte for byte, char in _byte_characters().items()}, merges=[])
    )
    # Without the regular expression that cuts words: there are no merges for it to bound.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in (_PAD, _BOS, _EOS)]
    )
    bos = (_BOS, tokenizer.token_to_id(_BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A {_BOS} $B", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> dict[int, str]:
    """Return the printable character that byte-level tokenizers write for each byte (GPT-2's table)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def load_tokenizer(where: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """Load a tokenizer from what lies on this machine; nothing is downloaded.

    Args:
        where: A folder that `save_pretrained` wrote, a `tokenizer.json`, or a GGUF file. A
            `tokenizer.json` alone names no roles: its eos and bos are then known by their names.
        trust_remote_code: Allow a folder's own Python code.

    Raises:
        ScrimpError: There is no tokenizer, it cannot be read, or it has no `tokenizer.json` form.
        MissingExtraError: A GGUF file is given without the package `gguf`.
    """
    path = Path(where)
    if not path.exists():
        raise ScrimpError(f"there is no tokenizer at {path}: name a folder, a tokenizer.json or a GGUF file")
    if path.suffix.lower() == ".gguf":
        require("gguf", extra="gguf", purpose=f"reading the tokenizer in {path}")
    try:
        tokenizer: PreTrainedTokenizerFast = _load(path, trust_remote_code)
    except ScrimpError:
        raise
    except Exception as error:  # tokenizers raises bare Exception; transformers a dozen kinds
        if path.is_dir() and not any(path.glob("*token*")):
            raise ScrimpError(f"{path} holds no tokenizer: name one with --data.tokenizer") from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(" :")
        raise ScrimpError(f"the tokenizer at {path} cannot be read: {reason}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ScrimpError(f"the tokenizer at {path} has no tokenizer.json form: convert it with transformers")
    return tokenizer


def _load(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    if path.suffix.lower() == ".gguf":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **options)
    if path.is_dir():
        return AutoTokenizer.from_pretrained(path, **options)
    if (path.parent / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(path.parent, **options)
    return _from_bare_file(path)


def _from_bare_file(path: Path) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(path))
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    eos = next((name for name in _EOS_NAMES if name in special), None)
    bos = next((name for name in _BOS_NAMES if name in special), None)
    pad = _PAD if _PAD in special else eos
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        bos_token=bos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )


def separator(tokenizer: PreTrainedTokenizerFast) -> Separator:
    """Return the tokens that begin and end a document in the stream (see the module's docstring).

    Raises:
        ScrimpError: The tokenizer has neither an eos nor a bos.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None and eos is None:
        raise ScrimpError(
            "the tokenizer has neither an eos nor a bos token to put between documents: "
            "name one in its tokenizer_config.json"
        )
    if eos is None or bos is None:
        only = bos if eos is None else eos
        return Separator(only, only)
    adds_bos = tokenizer.backend_tokenizer.encode("a").ids[:1] == [bos]
    return Separator(bos, eos) if adds_bos else Separator(eos, eos)


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return how many rows an embedding needs to hold every id (ids may have gaps)."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def fingerprint(tokenizer: PreTrainedTokenizerFast, *, chat: bool) -> str:
    """Hash what decides which tokens a text becomes: 32 hexadecimal digits.

    That is its `tokenizer.json` without the truncation and padding of the last call, the roles
    of its special tokens and, for conversations, the chat template.
    """
    parts = [_serialised(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id]
    parts += [tokenizer.chat_template] if chat else []
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _serialised(tokenizer: PreTrainedTokenizerFast) -> str:
    backend = tokenizer.backend_tokenizer
    if backend.truncation or backend.padding:  # what the last call asked for, not what the tokenizer is
        backend = copy.deepcopy(backend)
        backend.no_truncation()
        backend.no_padding()
    return backend.to_str()


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[Sequence[bytes]], list[Ids]]:
    """Return a function from a batch of texts (UTF-8) to the ids of each, without specials around.

    A tokenizer of bytes without merges becomes one table look-up; any other runs in the
    threads of `tokenizers`. The tokenizer itself is left as it is.
    """
    from tokenizers import Tokenizer

    serialised = _serialised(tokenizer)
    table = _byte_table(json.loads(serialised))
    if table is not None:
        return lambda texts: [table[np.frombuffer(text, np.uint8)] for text in texts]
    backend = Tokenizer.from_str(serialised)
    backend.encode_special_tokens = True  # "<|eos|>" in a text is seven characters, no token

    def encode(texts: Sequence[bytes]) -> list[Ids]:
        batch = [text.decode() for text in texts]
        return [
            np.array(row.ids, np.uint32) for row in backend.encode_batch_fast(batch, add_special_tokens=False)
        ]

    return encode


def _byte_table(description: dict[str, Any]) -> Ids | None:
    """Return the id of each byte (256,) if the tokenizer does nothing but look it up, else None."""
    model, cutter = description["model"], description["pre_tokenizer"] or {}
    plain = (
        model["type"] == "BPE"
        and not model["merges"]
        and not any(
            model.get(key) for key in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
        )
        and description["normalizer"] is None
        and cutter.get("type") == "ByteLevel"
        and not cutter["add_prefix_space"]
        and all(token["special"] for token in description["added_tokens"])
    )
    vocabulary = model.get("vocab", {})
    characters = _byte_characters()
    if not plain or any(char not in vocabulary for char in characters.values()):
        return None
    return np.array([vocabulary[characters[byte]] for byte in range(256)], np.uint32)
