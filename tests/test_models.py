"""Where models come from, and that what is loaded and saved is what it says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from scrimp import models
from scrimp.base.errors import ScrimpError
from scrimp.data import byte_tokenizer, load_tokenizer
from scrimp.shapes import SHAPES

TINY = LlamaConfig(
    vocab_size=264,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
)
HASH = "0123456789abcdef0123456789abcdef01234567"


def _save(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    models.export(models.create(TINY, seed=1, dtype=dtype), byte_tokenizer(), folder)
    return folder


def test_local_names_come_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "_hub", lambda *asked: pytest.fail(f"asked the hub for {asked}"))
    _save(tmp_path / "owner" / "name")
    found = models.locate("owner/name")
    assert (found.kind, found.path) == ("folder", tmp_path / "owner" / "name")
    assert found.has_weights
    assert models.locate("llama-60m").kind == "shape"
    assert not models.locate("llama-60m").has_weights


def test_looking_at_a_recipe_loads_no_torch(tmp_path: Path) -> None:
    """It needs a process of its own, since this one has loaded it."""
    _save(tmp_path / "m")
    (tmp_path / "text.txt").write_text("some text")
    code = (
        "import sys; from scrimp.build import inspect; from scrimp.recipe import parse\n"
        f"inspect(parse({{'model': {str(tmp_path / 'm')!r}, 'data': {str(tmp_path / 'text.txt')!r}}}))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\n"


def test_a_shape_s_name_means_the_shape_and_a_path_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _save(tmp_path / "llama-1m")
    assert models.locate("llama-1m").kind == "shape"
    assert models.locate("./llama-1m").path == tmp_path / "llama-1m"


def test_a_run_s_folder_is_its_model(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    _save(tmp_path / "model")
    assert models.locate(str(tmp_path)).path == tmp_path / "model"


def test_a_home_folder_may_be_written_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    _save(tmp_path / "m")
    assert models.locate("~/m").path == (tmp_path / "m").resolve()


def test_what_was_downloaded_earlier_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "models--owner--name"
    _save(cache / "snapshots" / HASH)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(HASH)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = models.locate("owner/name")
    assert found.path == cache / "snapshots" / HASH
    assert found.name == "owner/name"
    assert found.has_weights


@pytest.mark.parametrize("silent", ["server", "name server"])
def test_a_hub_that_does_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    """The promise is ten seconds: half of it is waited for, and the rest is for imports on a slow machine."""
    assert models.HUB_SECONDS <= 5
    monkeypatch.setattr(models, "HUB_SECONDS", 0.3)
    released = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if silent == "name server":
            address = "http://hub.invalid"
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(20) and [])
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
        began = time.monotonic()
        with pytest.raises(ScrimpError, match=r"cannot be reached .*Time.*llama-60m.*\.gguf"):
            models.locate("owner/name")
        assert 0.2 < time.monotonic() - began < 5
        released.set()


def test_a_tokenizer_is_found_where_a_model_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _save(tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.yaml").write_text("")
    assert models.locate_tokenizer(str(tmp_path / "run")) == folder
    assert models.locate_tokenizer(str(folder)) == folder
    assert models.locate_tokenizer(str(folder / "tokenizer.json")) == folder / "tokenizer.json"
    cached = tmp_path / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(HASH)
    byte_tokenizer().save_pretrained(cached / "snapshots" / HASH)  # without weights: they are not asked for
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert models.locate_tokenizer("owner/name") == cached / "snapshots" / HASH


@pytest.mark.parametrize("name", ["llama-1m", "owner/other"])
def test_a_tokenizer_that_is_nowhere_is_refused(name: str) -> None:
    """A shape's name is no tokenizer's: bytes are what a shape takes where none is named."""
    with pytest.raises(ScrimpError, match=f"tokenizer '{name}': not on this machine"):
        models.locate_tokenizer(name)


def test_a_model_that_the_hub_does_not_have_is_told_from_a_silent_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:  # it would write to the screen
            return

    with HTTPServer(("127.0.0.1", 0), NotFound) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(
            "huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{hub.server_port}"
        )
        with pytest.raises(
            ScrimpError, match=r"did you mean 'llama-60m'.*hub shows none of that name.*llama-7b"
        ):
            models.locate("llama-60")
        hub.shutdown()


def test_a_hub_that_is_not_there_is_given_up_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(ScrimpError, match=r"cannot be reached") as caught:
        models.locate("owner/name")
    assert time.monotonic() - began < 5
    assert all(name in str(caught.value) for name in SHAPES)


def test_weights_are_drawn_from_the_seed_and_leave_no_trace() -> None:
    before = torch.get_rng_state()
    first, again, other = (
        models.create(TINY, seed=seed, dtype=torch.float32).state_dict() for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_exported_is_loaded_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    made = models.create(TINY, seed=1, dtype=dtype)
    models.export(made, byte_tokenizer(), tmp_path / "m")
    loaded = models.load(models.locate(str(tmp_path / "m")), dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    for name, tensor in made.state_dict().items():
        for other in (loaded, theirs):
            assert other.state_dict()[name].dtype == dtype
            assert torch.equal(other.state_dict()[name], tensor)
    tokenizer = load_tokenizer(tmp_path / "m")
    assert tokenizer.get_vocab() == byte_tokenizer().get_vocab()


def test_an_empty_model_has_the_shape_and_ties_of_a_full_one() -> None:
    config = LlamaConfig(**{**TINY.to_dict(), "tie_word_embeddings": True})
    empty = models.create_empty(config, dtype=torch.float32)
    full = models.create(config, seed=0, dtype=torch.float32)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {
        n: t.shape for n, t in full.state_dict().items()
    }
    assert empty.lm_head.weight is empty.model.embed_tokens.weight


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = _save(tmp_path / "m")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ScrimpError, match=r"1 tensors are missing, 'model.norm.weight'"):
        models.load(models.locate(str(folder)), dtype=torch.float32)


def test_loading_draws_no_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    models.load(models.locate(str(_save(tmp_path / "m"))), dtype=torch.float32)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() == bars


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (TINY, 64),
        (LlamaConfig(), 2048),
        ("GPT2Config", 1024),
        ("MptConfig", 2048),
        ("MambaConfig", None),
        ("BloomConfig", None),
    ],
)
def test_the_context_is_that_of_the_family(config: object, limit: int | None) -> None:
    import transformers

    made = getattr(transformers, config)() if isinstance(config, str) else config
    assert models.context_length(made) == limit


@pytest.fixture(scope="module")
def gguf() -> Path:
    """Return a real GGUF model, where the environment names one."""
    path = Path(os.environ.get("SCRIMP_TEST_GGUF", ""))
    if path.suffix != ".gguf" or not path.is_file():
        pytest.skip("needs a GGUF file of a small Llama, named by SCRIMP_TEST_GGUF")
    return path


@pytest.mark.slow
def test_a_gguf_file_is_loaded_with_its_tokenizer(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = models.locate(str(gguf))
    assert (source.kind, source.path, source.has_weights) == ("gguf", gguf.resolve(), True)
    tokenizer = load_tokenizer(gguf)
    config = models.load_config(source, vocab=0)
    assert len(tokenizer) <= config.vocab_size
    model = models.load(source, dtype=torch.float32)
    assert capfd.readouterr() == ("", "")
    text = "The capital of France is Paris. The capital of Germany is Berlin."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 4  # a model with its weights in the wrong places says ln(vocabulary), about 10.8
