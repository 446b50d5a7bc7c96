"""`scrimp generate`: text from a model."""

from __future__ import annotations

from typing import Annotated

import typer

from scrimp.cli.guard import print_json
from scrimp.cli.train import load_torch, make_reporter


def generate(
    target: Annotated[
        str,
        typer.Argument(metavar="RUN|MODEL", help="A run's folder, a model's folder, GGUF file or hub id."),
    ],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="Give the prompt as a user's message, by the chat template.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="The largest number of new tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Sample among the likeliest with this share.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model's own Python code run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as one JSON document.")] = False,
) -> None:
    """Continue a prompt."""
    from scrimp import models

    source = models.locate_trained(target, trust_remote_code=trust_remote_code)
    load_torch(make_reporter())
    import torch

    from scrimp import data
    from scrimp.training.sample import chat_prompt, sample, text_prompt

    model = models.load(source, dtype=torch.float32, trust_remote_code=trust_remote_code)
    assert source.tokenizer is not None
    tokenizer = data.load_tokenizer(source.tokenizer)
    text = sample(
        model,
        tokenizer,
        chat_prompt(tokenizer, prompt) if chat else text_prompt(tokenizer, prompt),
        tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    if as_json:
        print_json({"text": text})
    else:
        print(text)
