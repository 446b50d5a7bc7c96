"""The command line run in this process, as a shell would run it, and small things to run it on."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scrimp.cli import guard, main

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on standard output: anything else there fails to parse."""
        return json.loads(self.out)


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Return a function that runs `scrimp` with arguments."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr("sys.argv", ["scrimp", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    yield run
    guard.set_debug(False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder to work in; token files go elsewhere."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text of a few thousand bytes in several documents' worth of lines."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"def f{n}(x):\n    return x * {n} + {n * n}\n\n" * 4} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def save_tiny() -> Callable[..., Path]:
    """Return a function that saves the configuration of a tiny Llama, without weights, and a tokenizer."""
    from transformers import LlamaConfig

    from scrimp.data import byte_tokenizer

    def save(folder: Path, *, vocab: int = 264, positions: int = 64, chat: bool = False) -> Path:
        tokenizer = byte_tokenizer()
        if chat:
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
            tokenizer.chat_template = CHATML
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=vocab,
            max_position_embeddings=positions,
        ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny(save_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Llama without weights, for 64 positions."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_chat(save_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one whose tokenizer has a chat template."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-chat", chat=True)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache folder that the commands of these tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small(tiny: Path, text: Path, cache: Path) -> tuple[str, ...]:
    """Return the options of a run of four steps on the tiny model."""
    options = f"--model {tiny} --data {text} --cache {cache} --data.held-out 0.1"
    options += " --steps 4 --batch 2 --micro-batch 2 --seq 16 --threads 1"
    return tuple(options.split())


@pytest.fixture(scope="session")
def finished(tiny: Path, text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run with the options `small`; it is to be copied, not changed."""
    from scrimp.build import inspect
    from scrimp.recipe import parse
    from scrimp.report.lines import LineReporter
    from scrimp.training.run import execute
    from scrimp.training.start import choose_start

    numbers = {"steps": 4, "batch": 2, "micro_batch": 2, "seq": 16, "threads": 1}
    recipe = parse({"model": str(tiny), "data": {"path": str(text), "held_out": 0.1}, **numbers})
    start = choose_start(recipe, out=tmp_path_factory.mktemp("finished") / "run", resume=False)
    return execute(start, inspect(recipe, cache=cache), LineReporter(io.StringIO())).out


@pytest.fixture
def run(here: Path, finished: Path) -> Path:
    """Return a copy of the finished run, `run` in the working folder."""
    return Path(shutil.copytree(finished, here / "run"))


def _content(folder: Path) -> dict[str, bytes | None]:
    """Return every file's bytes and every folder, but for the lock, which stays in a run's folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


@pytest.fixture
def refused(cli: Cli, here: Path) -> Callable[..., str]:
    """Return a function that runs a command that must be refused, and returns what it said.

    It holds what every refusal promises: exit code 2, a last line that says what is wrong, no traceback,
    nothing on standard output but the one JSON document where it is asked for, and nothing changed here.
    """

    def run(*arguments: str | Path, as_json: bool = False) -> str:
        before = _content(here)
        outcome = cli(*arguments, *(["--json"] if as_json else []))
        assert outcome.code == 2, outcome.err
        assert "Traceback" not in outcome.err
        said = outcome.err.splitlines()[-1]
        assert said.startswith("scrimp: ")
        assert len(said) < 500
        if as_json:
            assert outcome.document == {"error": said.removeprefix("scrimp: "), "exit_code": 2}
        else:
            assert outcome.out == ""
        assert _content(here) == before
        return said

    return run
