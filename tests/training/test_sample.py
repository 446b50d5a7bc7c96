"""Text from a model: seeded, and with no trace left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from scrimp.base.errors import ScrimpError
from scrimp.training.sample import chat_prompt, sample, text_prompt

if TYPE_CHECKING:
    from tests.training.conftest import Lab


@pytest.fixture
def pair(lab: Lab) -> tuple[Any, Any]:
    """Return a tiny model with random weights, and its tokenizer."""
    job = lab.job(lab.recipe())
    return job.model, job.prepared.tokenizer


def test_a_sample_begins_with_its_prompt_and_repeats_by_seed(pair: tuple[Any, Any]) -> None:
    texts = [sample(*pair, text_prompt(pair[1], "the cat"), tokens=20, seed=seed) for seed in (1, 1, 2)]
    assert all(text.startswith("the cat") for text in texts)
    assert texts[0] == texts[1] != texts[2]


def test_a_sample_leaves_the_model_and_the_random_state_alone(pair: tuple[Any, Any]) -> None:
    model = pair[0].train()
    before = torch.get_rng_state()
    sample(*pair, text_prompt(pair[1], ""), tokens=5)
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_temperature_zero_takes_the_likeliest_token(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    ids = [tokenizer.bos_token_id, *tokenizer("the", add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert (
        sample(model, tokenizer, text_prompt(tokenizer, "the"), tokens=6, temperature=0, seed=3) == expected
    )


def test_every_token_that_top_p_allows_can_be_drawn(pair: tuple[Any, Any]) -> None:
    """Transformers would otherwise keep the likeliest 50 in silence."""
    model, tokenizer = pair
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as any other
    model.generation_config.eos_token_id = None
    model.config.max_position_embeddings = 2048
    kinds: set[str] = set()
    for seed in range(4):
        kinds |= set(
            sample(
                model,
                tokenizer,
                text_prompt(tokenizer, ""),
                tokens=100,
                temperature=1.0,
                top_p=1.0,
                seed=seed,
            )
        )
    assert len(kinds) > 60


def test_a_sample_ends_where_the_models_context_does(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    model.generation_config.eos_token_id = None
    text = sample(model, tokenizer, text_prompt(tokenizer, ""), tokens=10_000, temperature=0)
    assert 0 < len(tokenizer(text)["input_ids"]) <= 64 * 3  # a token that is no text becomes three bytes
    with pytest.raises(ScrimpError, match="shorten it"):
        sample(model, tokenizer, text_prompt(tokenizer, "x" * 64), tokens=1)


def test_a_chat_prompt_is_the_templates_own(pair: tuple[Any, Any]) -> None:
    tokenizer = pair[1]
    tokenizer.chat_template = None
    with pytest.raises(ScrimpError, match="no chat template"):
        chat_prompt(tokenizer, "hello")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert tokenizer.decode(chat_prompt(tokenizer, "hello")) == "<user>hello</><assistant>"
