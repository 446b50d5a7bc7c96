"""Text from a trained model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from scrimp import models
from scrimp.base.errors import ScrimpError
from scrimp.data import separator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scrimp.data.documents import Kind

KEPT_TOKENS = 160
KEPT_SEED = 1


def sample(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """Continue a prompt.

    Args:
        model: The model; it is left as it was.
        tokenizer: Its tokenizer.
        prompt: The tokens to go on from, by `text_prompt` or `chat_prompt`.
        tokens: The largest number of new tokens; fewer where the model's context ends first.
        temperature: 0 takes the likeliest token each time.
        top_p: Sample among the likeliest tokens that hold this much probability.
        seed: Of the draws.

    Returns:
        The prompt and its continuation, without special tokens.

    Raises:
        ScrimpError: The prompt leaves no room in the model's context, or the model's logits are not finite.
    """
    given = torch.tensor([list(prompt)], device=model.device)
    limit = models.context_length(model.config)
    if limit is not None and given.shape[1] >= limit:
        raise ScrimpError(
            f"the prompt is {given.shape[1]} tokens long and the model has positions for {limit}: shorten it"
        )
    choice = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if temperature > 0
        else {"do_sample": False}
    )
    was_training = model.training
    model.eval()
    generate: Any = model.generate  # transformers leaves it untyped
    with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")  # peft's, of a prompt
        if not torch.isfinite(model(input_ids=given, use_cache=False).logits).all():
            model.train(was_training)
            raise ScrimpError("the model's logits are not finite: its training diverged, so it says nothing")
        torch.manual_seed(seed)
        out = generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=tokens if limit is None else min(tokens, limit - given.shape[1]),
            pad_token_id=tokenizer.pad_token_id,
            **choice,
        )
    model.train(was_training)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def kept_sample(model: PreTrainedModel, tokenizer: Any, kind: Kind = "text") -> str:
    """Return the sample that a run shows at its end and keeps, by the same draws.

    A model of bytes says control characters too, and a terminal would obey them: they are replaced.

    Args:
        model: The finished model; it is left as it was.
        tokenizer: Its tokenizer.
        kind: What it was trained on: it begins a document, or answers a greeting.
    """
    try:
        prompt = chat_prompt(tokenizer, "Hello") if kind == "chat" else text_prompt(tokenizer, "")
        text = sample(model, tokenizer, prompt, tokens=KEPT_TOKENS, seed=KEPT_SEED)
    except ScrimpError as error:  # a finished run is no place to fail for want of a sample
        return f"(none: {error})"
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def text_prompt(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of the start of a document, beginning as documents do in training."""
    return [separator(tokenizer).start, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def chat_prompt(tokenizer: Any, message: str) -> list[int]:
    """Render a user's message by the tokenizer's chat template, up to where the assistant begins.

    Raises:
        ScrimpError: The tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ScrimpError("--chat: this model's tokenizer has no chat template; leave --chat out")
    conversation = [{"role": "user", "content": message}]
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    return [int(token) for token in ids]
