"""`scrimp methods`: the catalogue."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from scrimp.bench.peers import PEERS, install_line, installed_version
from scrimp.cli.guard import print_json
from scrimp.methods import METHODS, PIECES, Method
from scrimp.reported import reported, sentence


def methods(
    as_json: Annotated[
        bool, typer.Option("--json", help="Write the catalogue as one JSON document.")
    ] = False,
) -> None:
    """List the methods, the pieces that a recipe can name, and the peers that the bench knows."""
    if as_json:
        print_json(
            {
                "methods": [_plain(method) for method in METHODS],
                "pieces": [asdict(piece) for piece in PIECES],
                "peers": [{**asdict(peer), "version": installed_version(peer)} for peer in PEERS],
            }
        )
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    catalogue = Table(
        "method", "pieces", "memory", "source", "reported", title="Methods", title_justify="left"
    )
    for method in METHODS:
        pieces = ", ".join(f"{choice}: {name}" for choice, name in method.pieces.items())
        catalogue.add_row(method.name, pieces, method.terms, method.source, sentence(method.name))
    console.print(catalogue)
    pieces_table = Table("choice", "name", "what it is", title="Pieces", title_justify="left")
    for piece in PIECES:
        pieces_table.add_row(piece.choice, piece.name, piece.summary)
    console.print(pieces_table)
    peers_table = Table("peer", "what it is", "here", title="Peers of scrimp bench", title_justify="left")
    for peer in PEERS:
        here = installed_version(peer) or install_line(peer)
        peers_table.add_row(peer.name, peer.summary, escape(here))  # its square brackets are no markup
    console.print(peers_table)


def _plain(method: Method) -> dict[str, Any]:
    return {**asdict(method), "reported": [figure.plain() for figure in reported(method.name)]}
