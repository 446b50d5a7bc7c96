from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from scrimp.base.errors import ScrimpError
from scrimp.data import Corpus, load_tokenizer
from scrimp.data.chat import ChatEncoder, Conversation
from scrimp.data.documents import Document

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello!\n"},
    {"role": "assistant", "content": "Hi, naïve one."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": " \n"},
    {"role": "user", "content": "unanswered"},
]
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def document(messages: list[dict[str, Any]]) -> Document:
    return Document(messages, Path("chat.jsonl"), 3, 0)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        name_or_path="mine",
        chat_template=template,
    )


def said(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> list[str]:
    """Return the stretches of text that are targets."""
    stretches: list[list[int]] = [[]]
    for token, target in zip(conversation.ids.tolist(), conversation.targets.tolist(), strict=True):
        if target:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [str(tokenizer.decode(stretch)) for stretch in stretches if stretch]


@pytest.mark.parametrize("template", ["unmarked", "marked"])
def test_targets_are_the_assistants_words_and_the_end_of_turn(
    merging_tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    tokenizer = with_template(
        merging_tokenizer, MARKED if template == "marked" else merging_tokenizer.chat_template
    )
    conversation = ChatEncoder(tokenizer).encode(document(TALK))
    assert said(tokenizer, conversation) == ["Hi, naïve one.<|im_end|>", " \n<|im_end|>"]
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(conversation.ids.tolist()) == whole


def test_marking_and_reading_turn_by_turn_agree(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    by_turn = ChatEncoder(merging_tokenizer).encode(document(TALK))
    marked = ChatEncoder(with_template(merging_tokenizer, MARKED)).encode(document(TALK))
    assert by_turn.ids.tolist() == marked.ids.tolist()
    assert by_turn.targets.tolist() == marked.targets.tolist()


def test_bytes_are_those_of_the_assistants_words(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = ChatEncoder(merging_tokenizer)
    expected = len("Hi, naïve one. \n".encode())
    assert encoder.target_bytes(encoder.encode(document(TALK))) == expected


@pytest.mark.slow
def test_the_template_of_smollm2(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    """It marks no generation and puts in a system turn of its own: the real one, on the real tokenizer."""
    pytest.importorskip("gguf")
    path = os.environ.get("SCRIMP_TEST_GGUF")
    if not path:
        pytest.skip("SCRIMP_TEST_GGUF names no GGUF file of SmolLM2-135M-Instruct")
    tokenizer = load_tokenizer(path)
    conversation = ChatEncoder(tokenizer).encode(document(TALK[1:]))
    assert said(tokenizer, conversation) == ["Hi, naïve one.<|im_end|>", " \n<|im_end|>"]
    assert "named SmolLM" in tokenizer.decode(conversation.ids.tolist())


@pytest.mark.parametrize(
    "template",
    [
        # The last answer is rendered in another way than earlier ones, as templates for reasoning do.
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{{ '!' if loop.last else '?' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        # The header of an answer is not what precedes an answer.
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>model{% endif %}",
    ],
)
def test_a_template_whose_turns_are_no_prefixes_is_refused_by_name(
    merging_tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    encoder = ChatEncoder(with_template(merging_tokenizer, template))
    with pytest.raises(ScrimpError, match=r"chat\.jsonl, line 3: the chat template of mine renders"):
        encoder.encode(document(TALK))


def test_a_template_that_rejects_a_conversation_names_the_row(
    merging_tokenizer: PreTrainedTokenizerFast,
) -> None:
    encoder = ChatEncoder(with_template(merging_tokenizer, "{{ raise_exception('no system role') }}"))
    with pytest.raises(ScrimpError, match=r"chat\.jsonl, line 3: .* no system role"):
        encoder.encode(document(TALK))


def test_a_conversation_without_an_answer_is_an_error(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ScrimpError, match=r"chat\.jsonl, line 3: .* no token of the assistant's"):
        ChatEncoder(merging_tokenizer).encode(document(TALK[:2]))


def test_a_tokenizer_without_a_template_is_an_error(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ScrimpError, match="mine has no chat template"):
        ChatEncoder(with_template(merging_tokenizer, None))


def test_a_corpus_of_conversations_keeps_their_targets(
    merging_tokenizer: PreTrainedTokenizerFast, corpus_of: Callable[..., Corpus]
) -> None:
    corpus = corpus_of([TALK, TALK[1:4]], merging_tokenizer)
    encoder = ChatEncoder(merging_tokenizer)
    expected = [encoder.encode(document(talk)) for talk in (TALK, TALK[1:4])]
    assert corpus.kind == "chat"
    assert corpus.train.targets is not None
    for index, conversation in enumerate(expected):
        start, stop = corpus.train.row(index)
        assert corpus.train.tokens[start:stop].tolist() == conversation.ids.tolist()
        assert corpus.train.targets[start:stop].tolist() == conversation.targets.tolist()
    assert corpus.train.bytes.tolist() == [encoder.target_bytes(conversation) for conversation in expected]


def test_the_order_of_keys_does_not_decide_where_a_conversation_falls(
    merging_tokenizer: PreTrainedTokenizerFast, corpus_of: Callable[..., Corpus]
) -> None:
    turned = [dict(reversed(message.items())) for message in TALK]
    assert json.dumps(turned) != json.dumps(TALK)
    one, other = corpus_of([TALK, turned], merging_tokenizer).train.hashes.tolist()
    assert one == other
