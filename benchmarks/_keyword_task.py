"""A task whose score needs no judge: which of ten keywords of Python comes next?

    system     Next keyword?
    user       for name, module
    assistant  in

The user's turn is the end of what stands before a keyword in the source of the standard library. What is
learnt from and what is asked lie in different files, each keyword as often as every other one. The answer is
the keyword whose first token is likeliest where the assistant's turn begins (all differ): chance gives 0.1.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn

KEYWORDS = ("and", "as", "else", "for", "if", "import", "in", "is", "not", "return")
SYSTEM = "Next keyword?"
TRAIN, VALIDATION, QUESTIONS = "train", "validation", "questions"
ASKED_SHARE = 4  # every fourth file is kept for the questions
ANSWER_TOKENS = 2  # a keyword and the end of its turn
CHARACTERS = 400  # before a keyword, of which the last tokens are taken
BATCH = 16  # questions at a time


class Example(NamedTuple):
    """What stands before a keyword, and the keyword."""

    before: str
    keyword: str

    @property
    def question(self) -> list[dict[str, str]]:
        """The turns before the answer."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.before}]

    @property
    def chat(self) -> dict[str, Any]:
        """The row of a chat file."""
        return {"messages": [*self.question, {"role": "assistant", "content": self.keyword}]}


def write_task(folder: Path, tokenizer: Any, *, seq: int, counts: Mapping[str, int]) -> dict[str, Any]:
    """Write a chat file for each part, and return what the task is.

    Args:
        folder: Where.
        tokenizer: With a chat template.
        seq: Tokens of a conversation at most.
        counts: Conversations of each part, a multiple of the number of keywords.
    """
    length = seq - len(_ids(tokenizer, Example("", "").question)) - ANSWER_TOKENS
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for path in root.rglob("*.py") if not {"test", "tests", "site-packages"} & {*path.parts}
    )
    asked = set(files[::ASKED_SHARE])
    learnt = _drawn([path for path in files if path not in asked], counts[TRAIN] + counts[VALIDATION])
    found = {
        TRAIN: learnt[: counts[TRAIN]],
        VALIDATION: learnt[counts[TRAIN] :],
        QUESTIONS: _drawn(sorted(asked), counts[QUESTIONS]),
    }
    digest = hashlib.sha256()
    for part, examples in found.items():
        cut = [Example(_end(tokenizer, one.before, length), one.keyword) for one in examples]
        text = "".join(json.dumps(one.chat) + "\n" for one in cut)
        digest.update(text.encode())
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")
    sizes = {part: len(examples) for part, examples in found.items()}
    return {"keywords": KEYWORDS, "chance": 1 / len(KEYWORDS), **sizes, "sha256": digest.hexdigest()}


def _drawn(files: list[Path], count: int) -> list[Example]:
    """Return so many examples in a random order in which the keywords take turns."""
    every: dict[str, list[Example]] = {keyword: [] for keyword in KEYWORDS}
    for path in files:
        for one in _examples(path):
            every[one.keyword].append(one)
    draw = random.Random(count)
    each = [draw.sample(every[keyword], count // len(KEYWORDS)) for keyword in KEYWORDS]
    turns = [list(turn) for turn in zip(*each, strict=True)]
    for turn in turns:
        draw.shuffle(turn)
    return list(itertools.chain.from_iterable(turns))


def _examples(path: Path) -> Iterator[Example]:
    """Find the keywords of a file, with what stands before each."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    lines = text.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME and token.string in KEYWORDS:
                place = starts[token.start[0] - 1] + token.start[1]
                if place > CHARACTERS:
                    yield Example(text[place - CHARACTERS : place].rstrip(), token.string)
    except (tokenize.TokenError, SyntaxError):  # the library holds files for tests of just that
        return


def _end(tokenizer: Any, text: str, length: int) -> str:
    """Return the last tokens of a text."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    return text[spans[-length][0] :]


def ask(model: nn.Module, tokenizer: Any, path: Path) -> dict[str, float]:
    """Ask a model all questions of a file.

    Returns:
        `accuracy`, the share whose likeliest keyword is the right one; and `loss`, the mean negative
        logarithm of the right one's share among the keywords, in nats.
    """
    import torch
    import torch.nn.functional as F

    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    firsts = torch.tensor([tokenizer(word, add_special_tokens=False).input_ids[0] for word in KEYWORDS])
    assert len(set(firsts.tolist())) == len(KEYWORDS)
    asked = [(_ids(tokenizer, row[:-1]), KEYWORDS.index(row[-1]["content"])) for row in rows]
    asked.sort(key=lambda one: len(one[0]))
    right, nats = 0, 0.0
    model.eval()
    with torch.no_grad():
        for _, same in itertools.groupby(asked, key=lambda one: len(one[0])):  # so that none needs padding
            questions, answers = (torch.tensor(column) for column in zip(*same, strict=True))
            for ids, answer in zip(questions.split(BATCH), answers.split(BATCH), strict=True):
                logits = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1, firsts].float()
                right += int((logits.argmax(1) == answer).sum())
                nats += float(F.cross_entropy(logits, answer, reduction="sum"))
    return {"accuracy": right / len(asked), "loss": nats / len(asked)}


def _ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)
