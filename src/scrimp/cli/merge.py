"""`scrimp merge`: adapters and their base as one ordinary model, several adapters as one, one made small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from scrimp.base.errors import ScrimpError
from scrimp.cli.guard import print_json
from scrimp.cli.train import load_torch, make_reporter


def merge(
    adapters: Annotated[list[str], typer.Argument(metavar="RUN|ADAPTER...", help="What holds adapters.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model; it must not exist yet.")],
    how: Annotated[
        Literal["linear", "magnitude", "dare", "ties", "dare-ties", "pcb"],
        typer.Option(help="How the changes of several adapters become one."),
    ] = "linear",
    weights: Annotated[
        str | None, typer.Option(help="Factor of each adapter, as 0.5,0.5; none: what suits the way.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of each change that is kept; none: the way's.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="With --as-adapter: rank of the result; none: their sum.")
    ] = None,
    as_adapter: Annotated[bool, typer.Option("--as-adapter", help="Write an adapter, not a model.")] = False,
    compress: Annotated[
        float | None,
        typer.Option(metavar="DENSITY", help="Write an adapter as signs of this share of it (ComPEFT)."),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale of --compress's signs; none: 1.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what dare leaves out.")] = 0,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        typer.Option(help="Of the merged weights; auto: as the base is stored."),
    ] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model's own Python code run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as one JSON document.")] = False,
) -> None:
    """Merge adapters into the model they were trained on, or several into one; or write one smaller."""
    from scrimp import models

    way: dict[str, Any] = {"weights": _numbers(weights), "density": density, "rank": rank}
    _check(way, len(adapters), how=how, as_adapter=as_adapter, compress=compress, alpha=alpha)
    found = [models.locate(name, trust_remote_code=trust_remote_code) for name in adapters]
    for name, source in zip(adapters, found, strict=True):
        if source.kind != "adapter":
            raise ScrimpError(
                f"merge {name}: it holds no adapter, but a whole model; name a run or folder with an "
                "adapter: its base is found by itself"
            )
    _check_out(out)
    reporter = make_reporter()
    load_torch(reporter)
    from scrimp import merged

    reporter.phase("merging" if compress is None else "compressing", None)
    chosen, said = merged.Way(how=how, seed=seed, **way), {"out": str(out), "errors": {}}
    if compress is not None:
        said |= asdict(merged.write_compressed(found[0], out, density=compress, alpha=alpha or 1.0))
    elif as_adapter:
        said["errors"] = merged.write_adapter(found, out, chosen)
    else:
        merged.write_model(found, out, chosen, precision=precision, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(said)
    else:
        print(*_lines(said), sep="\n")


def _lines(said: Mapping[str, Any]) -> list[str]:
    """Return what a reader is told."""
    lines = []
    if "file_bytes" in said:
        smaller = said["half_bytes"] / said["file_bytes"]
        lines.append(f"{said['file_bytes']} bytes, {smaller:.1f} times fewer than at 16 bits a number")
    elif (lost := max(said["errors"].values(), default=0.0)) > 0:
        lines.append(f"the nearest of that rank: {lost:.1%} of a change is lost at most")
    return [*lines, said["out"]]


def _check(
    way: Mapping[str, Any],
    count: int,
    *,
    how: str,
    as_adapter: bool,
    compress: float | None,
    alpha: float | None,
) -> None:
    """Refuse options that would change nothing.

    Raises:
        ScrimpError: One would.
    """
    given = [name for name in ("weights", "density") if way[name] is not None]
    if how != "linear":
        given.insert(0, "how")
    if compress is not None:
        if count > 1 or as_adapter or given or way["rank"] is not None:
            raise ScrimpError(
                "merge: --compress writes one adapter smaller, and merges nothing: leave the other options "
                "out, or merge with --as-adapter first"
            )
    elif alpha is not None:
        raise ScrimpError("merge: --alpha belongs to --compress; for factors of adapters use --weights")
    if count == 1 and given and not as_adapter:
        raise ScrimpError(f"merge: --{given[0]} says how several adapters become one, and there is one alone")
    if way["rank"] is not None and not as_adapter:
        raise ScrimpError("merge: --rank is an adapter's; add --as-adapter, as a model has none")


def _check_out(out: Path) -> None:
    """Refuse to write over anything.

    Raises:
        ScrimpError: There is something.
    """
    if out.is_file():
        raise ScrimpError(
            f"merge: --out {out} is a file, and what is merged is a folder (a GGUF file is never changed in "
            "place): choose another name"
        )
    if out.exists() and any(out.iterdir()):
        raise ScrimpError(f"merge: --out {out} holds something already: choose another folder")


def _numbers(text: str | None) -> list[float] | None:
    """Read factors as `0.5,0.5`.

    Raises:
        ScrimpError: One is no number.
    """
    try:
        return None if text is None else [float(word) for word in text.split(",")]
    except ValueError:
        raise ScrimpError(
            f"merge: --weights {text} must be numbers with commas, one for each adapter"
        ) from None
