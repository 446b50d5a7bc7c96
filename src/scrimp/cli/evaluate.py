"""`scrimp eval`: loss, perplexity and bits per byte of a model on any text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from scrimp.cli.guard import print_json
from scrimp.cli.train import load_torch, make_reporter


def evaluate(
    target: Annotated[
        str,
        typer.Argument(metavar="RUN|MODEL", help="A run's folder, a model's folder, GGUF file or hub id."),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text to evaluate on; none: what the run held out.", show_default=False),
    ] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="Tokens a sequence; none: the run's.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences at a time; none: the run's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps; none: the run's.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of the token files.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model's own Python code run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as one JSON document.")] = False,
) -> None:
    """Evaluate a model: loss, perplexity, bits per byte."""
    from scrimp import models

    models.locate_trained(target, trust_remote_code=trust_remote_code)
    reporter = make_reporter()
    load_torch(reporter)
    from scrimp.training.scoring import score

    given = {"seq": seq, "micro_batch": micro_batch, "batch": micro_batch, "device": device}
    found = score(
        target,
        paths=data or [],
        options={name: value for name, value in given.items() if value is not None},
        reporter=reporter,
        cache=cache,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json(asdict(found))
        return
    print(f"loss           {found.eval_loss:.4f} nats a token")
    print(f"perplexity     {found.perplexity:.3f}")
    print(f"bits per byte  {found.bits_per_byte:.4f}")
    print(f"on             {found.eval_tokens:,} tokens, {found.eval_bytes:,} bytes")
