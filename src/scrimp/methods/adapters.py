"""The catalogue's adapters as pieces and methods: what trains beside a model whose own weights stay."""

from __future__ import annotations

from scrimp.methods.adapter_entry import Entry
from scrimp.methods.own_adapters import OWN_ENTRIES
from scrimp.methods.peft_adapters import PEFT_ENTRIES
from scrimp.methods.types import Method, Piece

_RANK = 4  # below all that train every weight: an adapter is what one asks for by name
_ENTRIES: tuple[Entry, ...] = (*PEFT_ENTRIES, *OWN_ENTRIES)

ADAPTERS: tuple[Piece, ...] = tuple(
    Piece(
        choice="tune",
        name=entry.name,
        builder=entry.builder,
        summary=entry.summary,
        gives_up=entry.gives_up,
        rank=_RANK,
        options=entry.options,
        lr_ratio=entry.lr_ratio,
        freezes_base=True,
        wraps=entry.wraps,
    )
    for entry in _ENTRIES
)

ADAPTER_METHODS: tuple[Method, ...] = tuple(
    Method(
        name=entry.name,
        pieces={"tune": entry.name},
        terms=f"gradients and optimizer state: {entry.terms}",
        source=entry.source,
        settings=entry.settings,
    )
    for entry in _ENTRIES
)
