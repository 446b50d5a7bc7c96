"""Write the tables of the documentation from the code, so that they cannot lie.

A page marks the place with `<!-- table: NAME -->` and `<!-- end of table -->`.
`python scripts/docs_tables.py` rewrites what stands between; `tests/test_docs.py` fails while a page
differs from the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from inspect import signature
from pathlib import Path

import yaml
from typer.main import get_command

from scrimp.assembly import load_function, takes_besides
from scrimp.cli import app
from scrimp.methods import METHODS, PIECES, Piece
from scrimp.recipe import fields
from scrimp.reported import sentence
from scrimp.shapes import SHAPES

DOCS = Path(__file__).parents[1] / "docs"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def _plain(value: object) -> str:
    """Write a default as it would stand in a recipe."""
    if value is None or value == ():
        return ""
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
    return "`" + text.removesuffix("...\n").strip() + "`"


def fields_table() -> str:
    """Every field of a recipe, its default and what it means."""
    rows = [(f"`{name}`", _plain(info.default), info.description) for name, info in fields().items()]
    return _table(("field", "default", "meaning"), rows)


def shapes_table() -> str:
    """Every named shape; parameters with its own vocabulary, or that of bytes."""
    rows = [
        (
            f"`{name}`",
            f"{shape.parameters(shape.vocab or 259) / 1e6:,.1f} M",
            *(str(number) for number in (shape.hidden, shape.ffn, shape.heads, shape.layers)),
            f"{shape.vocab:,}" if shape.vocab else "the tokenizer's",
        )
        for name, shape in SHAPES.items()
    ]
    return _table(("name", "parameters", "hidden", "ffn", "heads", "layers", "vocabulary"), rows)


def methods_table() -> str:
    """The catalogue."""
    rows = [
        (
            f"`{method.name}`",
            ", ".join(f"`{choice}: {piece}`" for choice, piece in method.pieces.items()),
            method.terms,
            method.source,
            sentence(method.name),
        )
        for method in METHODS
    ]
    return _table(("method", "pieces", "memory", "source", "reported there"), rows)


def _options(piece: Piece) -> str:
    """A piece's options with their defaults, but for what every optimizer takes alike."""
    usual = [("store", "fp32"), ("reset_every", 0)]
    shown = [option for option in piece.options.items() if option not in usual]
    return ", ".join(f"`{name}` {_short(value)}" for name, value in shown)


def _short(value: object) -> str:
    """Write an option's default in a sentence."""
    if value is None:
        return "a quarter of the width"
    if isinstance(value, tuple):
        return " and ".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def pieces_table() -> str:
    """What the choices but the optimizer may be, and what each costs."""
    rows = [
        (f"`{piece.choice}`", f"`{piece.name}`", piece.summary, _options(piece), piece.gives_up)
        for piece in PIECES
        if piece.choice != "optimizer"
    ]
    return _table(("choice", "piece", "what it is", "options and defaults", "gives up"), rows)


def besides_table() -> str:
    """What `options` of a section may hold, with each function's defaults."""
    rows = []
    for piece in PIECES:
        if names := takes_besides(piece.choice, piece.name):
            defaults = signature(load_function(piece.builder)).parameters
            stated = (f"`{name}` {_brief(defaults[name].default)}" for name in names)
            rows.append((f"`{piece.choice}`", f"`{piece.name}`", ", ".join(stated)))
    return _table(("section", "its name", "options and defaults"), rows)


def _brief(value: object) -> str:
    return f"`{value:g}`" if isinstance(value, float) else _plain(value) or "none"


def optimizers_table() -> str:
    """Every optimizer's options, and its learning rate beside AdamW's."""
    rows = [
        (
            f"`{piece.name}`",
            f"`{piece.builder.partition(':')[2]}`",
            piece.summary,
            f"{piece.lr_ratio:g}",
            _options(piece),
        )
        for piece in PIECES
        if piece.choice == "optimizer"
    ]
    head = ("`optimizer.name`", "in Python", "what it is", "rate over AdamW's", "options and defaults")
    return _table(head, rows)


def commands_table() -> str:
    """Every command's own arguments and options; the fields of a recipe have a table of their own."""
    rows = [
        (f"`scrimp {name}`", f"`{parameter.metavar or parameter.opts[0]}`", parameter.help)
        for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
        for parameter in command.params
        if not parameter.name.startswith("field_") and not getattr(parameter, "hidden", False)
    ]
    return _table(("command", "argument or option", "meaning"), rows)


TABLES = {
    "fields": fields_table,
    "shapes": shapes_table,
    "methods": methods_table,
    "pieces": pieces_table,
    "besides": besides_table,
    "optimizers": optimizers_table,
    "commands": commands_table,
}


def with_tables(page: str) -> str:
    """Return a page with its tables written anew."""
    return PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]]()}\n\n{place[4]}", page)


def main() -> None:
    """Rewrite every page that has a table."""
    for path in sorted(DOCS.rglob("*.md")):
        old = path.read_text(encoding="utf-8")
        new = with_tables(old)
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {path.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
