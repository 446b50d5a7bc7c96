"""Text in, batches out: sources, tokenizers, the token cache and the loader.

Names of the loader need torch and are looked up when first used; nothing else here imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scrimp.data.cache import cache_bytes, cache_folder
from scrimp.data.corpus import Split
from scrimp.data.sources import Source, Sources, find_sources
from scrimp.data.tokenizer import (
    byte_tokenizer,
    fingerprint,
    load_tokenizer,
    separator,
)
from scrimp.data.tokens import Corpus, Report, prepare

if TYPE_CHECKING:
    from scrimp.data.loader import Loader, MicroBatch, evaluation_batches, evaluation_bytes

__all__ = [
    "Corpus",
    "Loader",
    "MicroBatch",
    "Report",
    "Source",
    "Sources",
    "Split",
    "byte_tokenizer",
    "cache_bytes",
    "cache_folder",
    "evaluation_batches",
    "evaluation_bytes",
    "find_sources",
    "fingerprint",
    "load_tokenizer",
    "prepare",
    "separator",
]

_OF_LOADER = {"Loader", "MicroBatch", "evaluation_batches", "evaluation_bytes"}


def __getattr__(name: str) -> Any:
    if name not in _OF_LOADER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from scrimp.data import loader

    return getattr(loader, name)
