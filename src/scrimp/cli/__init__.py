"""The command line: a thin reader of recipes. One file a command; none imports torch before it must."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from scrimp import __version__
from scrimp.cli import (
    bench,
    doctor,
    evaluate,
    generate,
    merge,
    methods,
    plan,
    report,
    together,
    train,
    verify,
)
from scrimp.cli.guard import complain, guarded, set_debug

app = typer.Typer(
    name="scrimp",
    help="Train any language model in the memory you have.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "together": together.together,
    "plan": plan.plan,
    "bench": bench.bench,
    "eval": evaluate.evaluate,
    "generate": generate.generate,
    "merge": merge.merge,
    "verify": verify.verify,
    "report": report.report,
    "methods": methods.methods,
    "doctor": doctor.doctor,
}
for name, command in COMMANDS.items():
    app.command(name)(guarded(command))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"scrimp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a mistake; allowed anywhere.")
    ] = False,
) -> None:
    set_debug(debug)


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:] or ["--help"]
    if "--debug" in arguments:
        arguments.remove("--debug")
        arguments.insert(0, "--debug")
    try:
        code = app(arguments, prog_name="scrimp", standalone_mode=False)
    except typer.TyperException as error:  # no such command or option, or one that lacks its value
        code = 2
        complain(
            f"{error.format_message().rstrip('.')}; see scrimp --help", code, as_json="--json" in arguments
        )
    sys.exit(code)
