"""`scrimp report`: runs, or a suite, as one page; it reads files alone, so torch is not asked for."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from scrimp.base.errors import ScrimpError
from scrimp.cli.guard import print_json

SUITE = "bench.json"
# What every page holds, before its document, and hardly any other file.
MARK = b'<script id="document" type="application/json">'


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, or the one folder that a suite wrote."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The page; none: report.html, in the run's folder or, of several, here."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace --out even if it is no report.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the figures as one JSON document.")] = False,
) -> None:
    """Show runs on one page that needs no network: curves, memory against plan, samples, what differs."""
    from scrimp.training.folder import RunFolder

    target = out or RunFolder(runs[0] if len(runs) == 1 else Path()).report
    document = _document(runs)
    _check(target, overwrite=overwrite)
    from scrimp.report.page import write_page

    write_page(document, target)
    if as_json:
        print_json(document)
        return
    from scrimp.report import run_table, suite_table
    from scrimp.report.plan_svg import printable

    table = suite_table if document["kind"] == "suite" else run_table
    table.write(document, sys.stdout)
    print(f"\nreport: {printable(str(target))}")


def _document(paths: Sequence[Path]) -> Mapping[str, Any]:
    """Read what is to be shown.

    Raises:
        ScrimpError: A folder holds neither runs nor a suite, or a suite is not alone.
    """
    suites = [path for path in paths if (path / SUITE).is_file()]
    if not suites:
        from scrimp.report.run_document import run_document

        return run_document(paths)
    if len(paths) > 1:
        raise ScrimpError(f"{suites[0]} holds a suite ({SUITE}), which has a page of its own: name it alone")
    return _suite(suites[0] / SUITE)


def _suite(path: Path) -> Mapping[str, Any]:
    """Read a suite's document.

    Raises:
        ScrimpError: The file is damaged.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ScrimpError(f"{path}: it cannot be read ({error.strerror})") from None
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("kind") != "suite":
        raise ScrimpError(f"{path}: this is no suite that `scrimp bench` wrote; make it again")
    _check_whole(document, path)
    return document


def _check_whole(document: Mapping[str, Any], path: Path) -> None:
    """Raise unless a suite's document can be shown: what shows it says best what it must hold.

    Raises:
        ScrimpError: Something in it is missing, or not what it should be.
    """
    from scrimp.report import suite_table
    from scrimp.report.page import page

    try:
        page(document)
        suite_table.write(document, io.StringIO())
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ScrimpError(
            f"{path}: this file is damaged: it is not what `scrimp bench` writes; make it again"
        ) from error


def _check(path: Path, *, overwrite: bool) -> None:
    """Refuse a place where no page may go.

    Raises:
        ScrimpError: Its name is not that of a page, its folder is missing, or something else is there.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise ScrimpError(f"--out {path}: the report is a page, so its name must end in .html")
    if path.is_dir():
        raise ScrimpError(f"--out {path}: this is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ScrimpError(f"--out {path}: there is no folder {path.parent}; make it first")
    if path.exists() and not overwrite and MARK not in path.read_bytes():
        raise ScrimpError(
            f"--out {path}: this file is no report; choose another --out, or replace it by --overwrite"
        )
