"""A user's mistake gives one clear sentence and exit code 2, and costs nothing.

Every test goes through `refused`, which holds the whole promise: the last line on standard error says
what is wrong, there is no traceback, nothing on standard output, and not a byte is changed in the
working folder. `early` also holds that torch was not asked for: what a recipe alone shows is said at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scrimp.methods import Choice, names
from scrimp.recipe import fields

Refused = Callable[..., str]
SMALL = ("--steps", "2", "--batch", "2", "--seq", "16", "--threads", "1", "--out", "out")
SIX: tuple[Choice, ...] = ("weights", "tune", "gradient", "optimizer", "activations", "placement")


@pytest.fixture
def early(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Return a function that runs a command which must be refused before torch is loaded."""

    def load_torch(_: object) -> None:
        raise AssertionError("torch was asked for")

    for command in ("train", "evaluate", "generate"):
        monkeypatch.setattr(f"scrimp.cli.{command}.load_torch", load_torch)
    return refused


# The recipe: keys and values


def test_an_unknown_key_in_a_file_names_the_nearest(early: Refused, here: Path) -> None:
    (here / "r.yaml").write_text("optimizer:\n  learning_rate: 0.1\n  weigth_decay: 0\n")
    said = early("train", "r.yaml")
    assert "r.yaml: there is no field 'optimizer.learning_rate'" in said
    (here / "r.yaml").write_text("optimizer:\n  weigth_decay: 0\n")
    assert "did you mean 'optimizer.weight_decay'?" in early("train", "r.yaml")
    (here / "r.yaml").write_text("micro-batch: 2\n")
    assert "did you mean 'micro_batch'?" in early("train", "r.yaml")


@pytest.mark.parametrize("json_too", [False, True])
def test_an_unknown_option_names_the_nearest(early: Refused, json_too: bool) -> None:
    said = early("train", "--schedule.warmpu", "3", as_json=json_too)
    assert "No such option: --schedule.warmpu" in said
    assert "--schedule.warmup" in said


def test_an_unknown_command_is_refused(early: Refused) -> None:
    assert "No such command 'trian'" in early("trian")


@pytest.mark.parametrize("choice", SIX)
def test_an_unknown_piece_names_those_that_exist(early: Refused, choice: Choice) -> None:
    said = early("train", f"--{choice}.name", "magic", *SMALL)
    assert f"{choice}.name: there is no 'magic'" in said
    assert all(name in said for name in names(choice)) or "`scrimp methods` lists them all" in said


def test_a_mistyped_method_names_the_nearest(early: Refused) -> None:
    assert "did you mean 'adamw'?" in early("train", "--optimizer", "adam", *SMALL)


def _numbers() -> list[str]:
    return [name for name, info in fields().items() if {"int", "float"} & set(_words(str(info.annotation)))]


def _words(annotation: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in annotation).split()


def test_no_number_may_be_negative_or_nonsense(early: Refused) -> None:
    numbers = _numbers()
    assert len(numbers) > 18
    for name in numbers:
        # What the schedule `power` raises tokens to is the one number that must be negative.
        for value in ("1" if name == "schedule.exponent" else "-1", "nan", ""):
            given = f"{value},{value}" if name == "optimizer.betas" else value
            said = early("train", f"--{name.replace('_', '-')}={given}", "--out", "out")
            assert name in said, (name, value)


ZERO_IS_A_VALUE = {
    "seed",
    "clip",
    "data.held_out",
    "optimizer.betas",
    "optimizer.weight_decay",
    "optimizer.reset_every",
    "schedule.warmup",
    "schedule.floor",
}


def test_zero_is_refused_wherever_it_means_nothing(early: Refused) -> None:
    refused_ones = [name for name in _numbers() if name not in ZERO_IS_A_VALUE]
    assert len(refused_ones) > 10
    for name in (*refused_ones, "memory"):
        assert name in early("train", f"--{name.replace('_', '-')}=0", "--out", "out")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--optimizer.betas", "0.9"), "optimizer.betas"),
        (("--optimizer.betas", "0.9,1"), "at least 0 and below 1"),
        (("--data.held-out", "1"), "less than 1"),
        (("--steps", "3", "--tokens", "9"), "give one of them"),
        (("--batch", "8", "--micro-batch", "3"), "micro_batch 3 does not divide batch 8"),
        (("--memory", "lots"), "6GiB"),
        (("--precision", "bf61"), "did you mean 'bf16'?"),
        (("--device", "gpu"), "'cuda'"),
        (("--data.packing", "paded"), "did you mean 'padded'?"),
        (("--data.text-key", "messages"), "name the column of plain text"),
        (("--schedule.name", "cosin"), "did you mean 'cosine'?"),
        (("--log", "wanbd"), "did you mean 'wandb'?"),
    ],
)
def test_a_value_that_is_not_allowed_says_what_is(
    early: Refused, arguments: tuple[str, ...], sentence: str
) -> None:
    assert sentence in early("train", *arguments, "--out", "out")


def test_yaml_builds_no_object(early: Refused, here: Path) -> None:
    bad = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{here}/made']]\n"
    (here / "r.yaml").write_text(f"model: {bad}")
    said = early("train", "r.yaml", "--out", "out")
    assert "r.yaml:1" in said
    assert "plain values only" in said
    assert not (here / "made").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"model: [llama-1m", "it is not YAML"),
        (b"- llama-1m\n", "a mapping of fields"),
        (b"llama-1m\n", "a mapping of fields"),
        (b"model: caf\xe9\n", "cannot be read"),
        (b"model: {name: 7}\n", "model.name"),
        (b"1: 2\n", "keys should be strings"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(
    early: Refused, here: Path, content: bytes, sentence: str
) -> None:
    (here / "r.yaml").write_bytes(content)
    said = early("train", "r.yaml", "--out", "out")
    assert "r.yaml" in said
    assert sentence in said


def test_a_recipe_that_is_not_there_is_refused(early: Refused, here: Path) -> None:
    assert "there is no such recipe file" in early("train", "r.yaml")
    (here / "d.yaml").mkdir()
    assert "d.yaml" in early("train", "d.yaml")


def test_a_text_in_the_recipe_s_place_is_explained(early: Refused, here: Path) -> None:
    (here / "book.txt").write_text("Once upon a time")
    assert "name text with --data" in early("train", "book.txt")


# The model


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("llama-60", "did you mean 'llama-60m'?"),
        ("./llama", "no such file or folder"),
        ("no/such/folder", "no such file or folder"),
        ("model.gguf", "no such file or folder"),
        ("", "model.name"),
    ],
)
def test_an_unknown_model_is_refused(early: Refused, name: str, sentence: str) -> None:
    assert sentence in early("train", f"--model={name}", *SMALL)


def test_without_the_hub_the_local_alternatives_are_named(early: Refused) -> None:
    for command in (
        ("train", "--model", "owner/name", *SMALL),
        ("eval", "owner/name"),
        ("generate", "owner/name"),
    ):
        said = early(*command)
        assert "the Hugging Face hub cannot be reached" in said
        assert "llama-60m" in said
        assert ".gguf" in said


def _config(folder: Path, content: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(content)
    return folder


LLAMA = '{"model_type": "llama"}'


def test_a_folder_that_is_no_model_is_refused(early: Refused, here: Path) -> None:
    folder = here / "m"
    folder.mkdir()
    assert "no config.json" in early("train", "--model", "m", *SMALL)
    for content, sentence in (
        ("{", "not JSON"),
        ("[]", "names no model_type"),
        ("{}", "names no model_type"),
    ):
        _config(folder, content)
        assert sentence in early("train", "--model", "m", *SMALL)


def test_pickled_weights_are_refused(early: Refused, here: Path) -> None:
    _config(here / "m", LLAMA)
    (here / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    said = early("train", "--model", "m", *SMALL)
    assert "pytorch_model.bin" in said
    assert "convert them to safetensors" in said


def test_a_model_with_code_of_its_own_needs_the_flag(early: Refused, here: Path) -> None:
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    _config(here / "m", json.dumps({"model_type": "own", "auto_map": auto_map}))
    (here / "m" / "own.py").write_text(f"open({str(here / 'made')!r}, 'w')\n")
    said = early("train", "--model", "m", *SMALL)
    assert "add --trust-remote-code" in said
    assert not (here / "made").exists()


def test_a_recipe_cannot_trust_code(early: Refused, here: Path) -> None:
    (here / "r.yaml").write_text("trust_remote_code: true\n")
    assert "there is no field 'trust_remote_code'" in early("train", "r.yaml")


def test_a_gguf_file_needs_its_extra(early: Refused, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "m.gguf").write_bytes(b"GGUF" + bytes(60))
    monkeypatch.setattr("scrimp.base.extras.is_installed", lambda module: module != "gguf")
    assert "pip install 'scrimp[gguf]'" in early("train", "--model", "m.gguf", *SMALL)


def test_a_file_that_is_no_model_is_refused(early: Refused, here: Path) -> None:
    (here / "m.gguf").write_bytes(b"not it")
    assert "no GGUF file" in early("train", "--model", "m.gguf", *SMALL)
    (here / "m.safetensors").write_bytes(b"")
    assert "name the folder" in early("train", "--model", "m.safetensors", *SMALL)


def test_a_broken_gguf_file_is_refused(refused: Refused, here: Path) -> None:
    (here / "m.gguf").write_bytes(b"GGUF" + bytes(60))
    assert "m.gguf" in refused("train", "--model", "m.gguf", *SMALL)


def test_a_shape_has_no_weights_to_use(early: Refused) -> None:
    for command in ("eval", "generate"):
        assert "holds no weights" in early(command, "llama-1m")


def test_a_run_that_has_not_finished_is_no_model(early: Refused, run: Path) -> None:
    (run / "model").rename(run / "gone")
    assert "--resume" in early("train", "--model", "run", *SMALL)


def test_weights_that_are_not_there_are_refused(
    refused: Refused, tiny: Path, text: Path, cache: Path
) -> None:
    options = ("--model", tiny, "--model.init", "weights", "--data", text, "--cache", cache)
    assert "--model.init scratch" in refused("train", *options, *SMALL)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ('{"model_type": "llama9"}', "llama9"),
        ('{"model_type": "t5"}', "no causal language model"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}', "30"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(
    refused: Refused, here: Path, tiny: Path, text: Path, config: str, sentence: str
) -> None:
    _config(here / "m", config)
    said = refused("train", "--model", "m", "--data.tokenizer", tiny, "--data", text, *SMALL)
    assert "m: " in said
    assert sentence in said


def test_weights_of_another_shape_are_refused(refused: Refused, run: Path, text: Path, cache: Path) -> None:
    config = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    said = refused("train", "--model", run / "model", "--data", text, "--cache", cache, *SMALL)
    assert "cannot be loaded" in said


def test_cut_off_weights_are_refused(refused: Refused, run: Path, text: Path, cache: Path) -> None:
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    said = refused("train", "--model", run / "model", "--data", text, "--cache", cache, *SMALL)
    assert "cannot be loaded" in said


def test_a_vocabulary_larger_than_the_model_s_is_refused(
    refused: Refused, here: Path, save_tiny: Callable[..., Path], text: Path, cache: Path
) -> None:
    model = save_tiny(here / "m", vocab=258)
    said = refused("train", "--model", model, "--data", text, "--cache", cache, *SMALL)
    assert "259 tokens" in said
    assert "only 258" in said
    assert "--data.tokenizer" in said


def test_a_sequence_longer_than_the_model_allows_is_refused(
    refused: Refused, tiny: Path, text: Path, cache: Path
) -> None:
    options = ("--model", tiny, "--data", text, "--cache", cache, "--out", "out")
    assert "positions for 64 tokens" in refused("train", *options, "--seq", "65")


def test_a_tokenizer_that_is_not_there_or_broken_is_refused(
    refused: Refused, here: Path, text: Path, cache: Path
) -> None:
    options = ("--data", text, "--cache", cache, *SMALL)
    assert "no/such/file" in refused("train", "--data.tokenizer", "no/such/file", *options)
    (here / "tokenizer.json").write_text("{}")
    assert "cannot be read" in refused("train", "--data.tokenizer", "tokenizer.json", *options)


# The data


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.txt", None, "missing.txt"),
        ("empty.txt", b"", "empty"),
        ("image.txt", b"\x89PNG\r\n\0\0\0", "is not text"),
        ("zeros.jsonl", b"\0\0\0", "is not text"),
    ],
)
def test_a_file_that_cannot_be_text_is_refused_at_once(
    early: Refused, here: Path, name: str, content: bytes | None, sentence: str
) -> None:
    if content is not None:
        (here / name).write_bytes(content)
    said = early("train", "--data", name, *SMALL)
    assert name in said
    assert sentence in said


def test_a_mistyped_file_names_the_nearest(early: Refused, here: Path) -> None:
    (here / "book.txt").write_text("text")
    assert "did you mean 'book.txt'?" in early("train", "--data", "bok.txt", *SMALL)


def test_a_pattern_or_folder_without_files_is_refused(early: Refused, here: Path) -> None:
    assert "no file matches *.md" in early("train", "--data", "*.md", *SMALL)
    (here / "folder").mkdir()
    assert "no file in folder" in early("train", "--data", "folder", *SMALL)


def test_a_dataset_needs_its_extra(early: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scrimp.base.extras.is_installed", lambda module: module != "datasets")
    assert "pip install 'scrimp[hub]'" in early("train", "--data", "owner/name", *SMALL)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("latin.txt", b"caf\xe9 " * 99, "latin.txt is not text"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "b"\n', "rows.jsonl, line 2: not JSON"),
        ("rows.jsonl", b'{"text": "a"}\n\n["b"]\n', "rows.jsonl, line 3: not a JSON object"),
        ("rows.jsonl", b'{"txt": "a"}\n', "rows.jsonl, line 1: there is no 'text' (did you mean 'txt'?)"),
        ("rows.jsonl", b'{"text": 5}\n', "rows.jsonl, line 1: 'text' is not a text"),
        ("rows.jsonl", b'{"text": ""}\n', "no document with any text"),
        ("rows.parquet", b"PAR1 no", "rows.parquet"),
        ("short.txt", b"short", "fewer than one sequence"),
        ("blank.txt", b"\xef\xbb\xbf", "no document with any text"),
    ],
)
def test_a_file_whose_content_is_wrong_is_refused(
    refused: Refused, here: Path, tiny: Path, tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (here / name).write_bytes(content)
    options = ("--model", tiny, "--data", name, "--cache", tmp_path / "cache", *SMALL)
    assert sentence in refused("train", *options)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "x"}, "line 2: the row has no 'messages'"),
        ({"messages": []}, "line 2: the row has no 'messages'"),
        ({"messages": [{"role": "user"}]}, "line 2: a message needs a 'role' and a 'content'"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "line 2: the conversation holds no token"),
    ],
)
def test_a_chat_row_that_is_none_is_refused(
    refused: Refused, here: Path, tiny_chat: Path, tmp_path: Path, row: dict[str, Any], sentence: str
) -> None:
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    (here / "chat.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    options = ("--model", tiny_chat, "--data", "chat.jsonl", "--cache", tmp_path / "cache", *SMALL)
    assert sentence in refused("train", *options)


def test_chats_need_a_template(refused: Refused, here: Path, tiny: Path, tmp_path: Path) -> None:
    (here / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    options = ("--model", tiny, "--data", "chat.jsonl", "--cache", tmp_path / "cache", *SMALL)
    assert "chat template" in refused("train", *options)


# The machine, and the folder


def test_a_device_that_is_not_there_is_refused(refused: Refused, small: tuple[str, ...]) -> None:
    import torch

    missing = next(
        name
        for name, there in (("mps", torch.backends.mps.is_available()), ("cuda", torch.cuda.is_available()))
        if not there
    )
    assert "torch sees none here" in refused("train", *small, "--device", missing, "--out", "out")


def test_a_budget_that_cannot_hold_the_model_is_refused(refused: Refused, small: tuple[str, ...]) -> None:
    said = refused("train", *small, "--memory", "1MiB", "--out", "out")
    assert "memory 1MiB: nothing fits" in said
    assert "it would take --memory" in said


@pytest.mark.parametrize("extra", ["wandb", "trackio", "tensorboard"])
def test_a_logger_that_is_not_installed_is_refused(
    early: Refused, monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    monkeypatch.setattr("scrimp.base.extras.is_installed", lambda module: module != extra)
    assert f"pip install 'scrimp[{extra}]'" in early("train", "--log", extra, *SMALL)


def test_a_used_folder_is_refused_with_both_remedies(early: Refused, run: Path) -> None:
    said = early("train", "--out", "run")
    assert "holds another run" in said
    assert "--resume" in said
    assert "--overwrite" in said


def test_a_folder_with_other_things_is_refused_even_to_overwrite(early: Refused, here: Path) -> None:
    (here / "photos").mkdir()
    (here / "photos" / "cat.jpg").write_bytes(b"cat")
    for options in ((), ("--overwrite",), ("--resume",)):
        assert "'cat.jpg', which is no run of scrimp" in early("train", "--out", "photos", *options)
    assert "a file is in the way" in early("train", "--out", "photos/cat.jpg")


def test_resume_and_overwrite_exclude_each_other(early: Refused) -> None:
    assert "give one of them" in early("train", "--resume", "--overwrite", "--out", "out")
    assert "add --out DIR" in early("train", "--resume")


def test_more_than_one_process_is_refused(early: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one device for now" in early("train", *SMALL)


def test_a_folder_that_may_not_be_made_is_refused(
    refused: Refused, here: Path, small: tuple[str, ...]
) -> None:
    (here / "file").write_text("in the way")
    assert "file" in refused("train", *small, "--out", "file/below")


def test_without_a_folder_named_a_refused_run_leaves_none(
    refused: Refused, here: Path, tiny: Path, tmp_path: Path
) -> None:
    (here / "short.txt").write_text("short")
    options = ("--model", tiny, "--data", "short.txt", "--cache", tmp_path / "cache", "--seq", "64")
    assert "fewer than one sequence" in refused("train", *options)
    (here / "runs").write_text("in the way")
    assert "runs" in refused("train", *options)


def test_isolation_that_a_model_cannot_give_is_refused(
    refused: Refused, here: Path, text: Path, cache: Path
) -> None:
    from transformers import OPTConfig

    from scrimp.data import byte_tokenizer

    OPTConfig(
        vocab_size=264,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
    ).save_pretrained(here / "opt")
    byte_tokenizer().save_pretrained(here / "opt")
    options = ("--model", "opt", "--data", text, "--cache", cache, "--data.boundaries", "isolate")
    said = refused("train", *options, *SMALL)
    assert "data.boundaries isolate" in said
    assert "--data.packing padded" in said


def test_generate_and_eval_refuse_what_they_cannot_use(refused: Refused, run: Path, cache: Path) -> None:
    assert "positions for 64" in refused("generate", "run", "--prompt", "x" * 64)
    assert "no chat template" in refused("generate", "run", "--chat", "--prompt", "hi")
    assert "name the text with --data" in refused("eval", run / "model", "--cache", cache)
    assert "missing.txt" in refused("eval", "run", "--data", "missing.txt", "--cache", cache)
    assert "holds no run" in refused("verify", run / "model")
