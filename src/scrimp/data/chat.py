"""Conversations: rendered by the tokenizer's chat template, loss on the assistant's tokens only.

A template that marks what the model says with `{% generation %}` is taken at its word. One that
does not (most; transformers then returns a mask of zeros without a word) is read turn by turn:

    before = ids(turns up to here, and the header of an answer)
    after  = ids(turns up to here, and the answer)
    target = after[len(before):]         if before is a prefix of after, and after of the whole

without the white space that follows the end-of-turn token. A template that renders the
beginning of a conversation differently from the whole (one that drops earlier reasoning, say)
fails the check and is refused by name; guessing would train on the user's words in silence.

Unlike in plain text, special tokens written out in a message are parsed: the template itself
is made of them.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scrimp.base.errors import ScrimpError
from scrimp.data.documents import Document, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A rendered conversation of n tokens.

    Attributes:
        ids: The tokens, int64, shape (n,).
        targets: Which of them the model is to say, bool, shape (n,); the first never is.
    """

    ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.bool_]


class ChatEncoder:
    """Turns conversations into tokens and targets with one tokenizer's chat template.

    Raises:
        ScrimpError: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.name = str(tokenizer.name_or_path or "that was chosen")
        template = tokenizer.chat_template
        if not isinstance(template, str):
            raise ScrimpError(
                f"the data are conversations, and the tokenizer {self.name} has no chat template for them: "
                "name another model or --data.tokenizer, or train on plain text"
            )
        self._tokenizer = tokenizer
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._marks_generation = _GENERATION.search(template) is not None
        self._special = set(tokenizer.all_special_ids) | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def encode(self, document: Document) -> Conversation:
        """Render one conversation.

        Raises:
            ScrimpError: The template fails on it (naming file and line), the assistant's tokens
                cannot be told apart, or there are none.
        """
        assert isinstance(document.content, list)  # the reader checked every row
        messages, where = document.content, document.where
        render = self._marked if self._marks_generation else self._turn_by_turn
        conversation = render(messages, where)
        conversation.targets[:1] = False  # nothing comes before it to predict it from
        if not conversation.targets.any():
            raise ScrimpError(
                f"{where}: the conversation holds no token of the assistant's to learn from: remove it"
            )
        return conversation

    def _marked(self, messages: Messages, where: str) -> Conversation:
        rendered = self._apply(
            messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return Conversation(
            np.array(rendered["input_ids"], np.int64), np.array(rendered["assistant_masks"], np.bool_)
        )

    def _turn_by_turn(self, messages: Messages, where: str) -> Conversation:
        ids = self._ids(messages, where)
        targets = np.zeros(len(ids), np.bool_)
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._ids(messages[:turn], where, add_generation_prompt=True)
                after = self._ids(messages[: turn + 1], where)
                if not (_begins(after, before) and _begins(ids, after)):
                    raise ScrimpError(
                        f"{where}: the chat template of {self.name} renders the beginning of a conversation "
                        f"differently from the whole, so the assistant's tokens cannot be told apart: "
                        f"use a template that marks them with {{% generation %}}"
                    )
                targets[len(before) : self._end_of_turn(after)] = True
        return Conversation(ids, targets)

    def _end_of_turn(self, ids: npt.NDArray[np.int64]) -> int:
        """Return the end of `ids` without the white space behind a special token that closes the turn."""
        end = len(ids)
        while end and not _decoded(self._tokenizer, ids[end - 1 : end]).strip():
            end -= 1
        return end if end and int(ids[end - 1]) in self._special else len(ids)

    def _ids(
        self, messages: Messages, where: str, *, add_generation_prompt: bool = False
    ) -> npt.NDArray[np.int64]:
        text = self._apply(messages, where, tokenize=False, add_generation_prompt=add_generation_prompt)
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int64)

    def _apply(self, messages: Messages, where: str, **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, TypeError, KeyError, IndexError) as error:
            raise ScrimpError(
                f"{where}: the chat template of {self.name} does not take this conversation: {error}"
            ) from error

    def target_bytes(self, conversation: Conversation) -> int:
        """Count the UTF-8 bytes of what the assistant said, the end-of-turn tokens left out."""
        return decoded_bytes(self._tokenizer, conversation.ids[conversation.targets])


def _begins(whole: npt.NDArray[np.int64], beginning: npt.NDArray[np.int64]) -> bool:
    return len(beginning) <= len(whole) and bool((whole[: len(beginning)] == beginning).all())


def decoded_bytes(tokenizer: PreTrainedTokenizerFast, ids: npt.NDArray[Any]) -> int:
    """Count the UTF-8 bytes that tokens stand for; special tokens stand for none.

    A character that was cut in its middle at the end (decoded as U+FFFD) is not counted.
    """
    return len(_decoded(tokenizer, ids, skip_special_tokens=True).rstrip("\ufffd").encode())


def _decoded(
    tokenizer: PreTrainedTokenizerFast, ids: npt.NDArray[Any], *, skip_special_tokens: bool = False
) -> str:
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str)  # one row of ids gives one text
    return text
