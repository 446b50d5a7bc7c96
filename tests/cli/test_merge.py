"""`scrimp merge`: models and adapters that hold what the adapters add, small files, and refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tuning.small import PEFT_ASKS
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from scrimp import adapted
from scrimp.base.adapter_names import COMPRESSED, CONFIG, TENSORS
from scrimp.tuning.adapter_files import write_lora
from scrimp.tuning.deltas.delta import Factors
from scrimp.tuning.merging.compeft import decompress_adapter
from scrimp.tuning.merging.merging import merged_changes

pytestmark = pytest.mark.filterwarnings(PEFT_ASKS)
Cli = Callable[..., Any]
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def _save_adapter(folder: Path, base: Path, ranks: dict[str, int], *, seed: int) -> None:
    """Write an adapter with random factors, as a run does."""
    model = LlamaForCausalLM.from_pretrained(base)
    draw = torch.Generator().manual_seed(seed)
    factors = {}
    for name, rank in ranks.items():
        rows, columns = model.get_submodule(name).weight.shape
        factors[name] = Factors(
            torch.randn(rank, columns, generator=draw), torch.randn(rows, rank, generator=draw)
        )
    write_lora(folder, factors, base=str(base))
    adapted.write_base(
        folder,
        name=str(base),
        config=adapted.config_hash(model.config),
        weights=adapted.fingerprint(model),
    )


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a tiny model with weights and two adapters over it; it is to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny, folder / "base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny)).save_pretrained(folder / "base")
    _save_adapter(folder / "first", folder / "base", {Q: 2, UP: 3}, seed=1)
    _save_adapter(folder / "second", folder / "base", {UP: 1}, seed=2)
    return folder


@pytest.fixture
def place(here: Path, trained: Path) -> Path:
    """Return the working folder, with the adapters; their base lies elsewhere."""
    for name in ("first", "second"):
        shutil.copytree(trained / name, here / name)
    return here


def _weights(folder: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: p.detach() for name, p in model.named_parameters()}


def _added(out: Path, base: Path) -> dict[str, Tensor]:
    """Return what a merged model has more than its base, by layer."""
    before, found = _weights(base), {}
    for name, weight in _weights(out).items():
        if not torch.equal(weight, before[name]):
            found[name.removesuffix(".weight")] = weight - before[name]
    return found


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=0, atol=1e-5)


def test_one_adapter_becomes_an_ordinary_model(cli: Cli, place: Path, trained: Path) -> None:
    outcome = cli("merge", "first", "--out", "merged")
    assert (outcome.code, outcome.out) == (0, "merged\n"), outcome.err
    assert not (place / "merged" / CONFIG).exists()
    _assert_same(_added(place / "merged", trained / "base"), dict(merged_changes([place / "first"])))


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ("--weights 0.5,2", {"weights": [0.5, 2.0]}),
        ("--how ties --density 0.3", {"how": "ties", "density": 0.3}),
        ("--how dare-ties --seed 3", {"how": "dare-ties", "seed": 3}),
    ],
)
def test_several_adapters_become_one_model(
    cli: Cli, place: Path, trained: Path, options: str, way: dict[str, Any]
) -> None:
    assert cli("merge", "first", "second", "--out", "merged", *options.split()).code == 0
    expected = dict(merged_changes([place / "first", place / "second"], **way))
    _assert_same(_added(place / "merged", trained / "base"), expected)


def test_several_adapters_become_one_adapter_which_merges_to_the_same(
    cli: Cli, place: Path, trained: Path
) -> None:
    outcome = cli("merge", "first", "second", "--out", "both", "--as-adapter", "--json")
    assert outcome.document == {"out": "both", "errors": {Q: 0.0, UP: 0.0}}
    assert cli("merge", "both", "--out", "merged").code == 0
    expected = dict(merged_changes([place / "first", place / "second"]))
    _assert_same(_added(place / "merged", trained / "base"), expected)
    assert cli("generate", "both", "--prompt", "x", "--tokens", "2").code == 0  # with its base's tokenizer
    lossy = cli("merge", "first", "second", "--out", "one", "--as-adapter", "--rank", "1")
    assert "of a change is lost" in lossy.out


def test_a_compressed_adapter_is_used_like_any_other(cli: Cli, place: Path, trained: Path) -> None:
    made = cli("merge", "first", "--out", "small", "--compress", "0.2", "--alpha", "2", "--json").document
    assert made["file_bytes"] == (place / "small" / COMPRESSED).stat().st_size
    assert not (place / "small" / TENSORS).exists()
    decompress_adapter(place / "small", place / "plain")
    expected = dict(merged_changes([place / "plain", place / "second"]))
    assert cli("merge", "small", "--out", "merged").code == 0
    _assert_same(_added(place / "merged", trained / "base"), dict(merged_changes([place / "plain"])))
    assert cli("generate", "small", "--prompt", "x", "--tokens", "2").code == 0
    assert cli("merge", "small", "second", "--out", "both").code == 0
    _assert_same(_added(place / "both", trained / "base"), expected)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("first --out first", "holds something already"),
        ("first --out model.gguf", "a GGUF file is never changed in place"),
        ("first --out merged --how ties", "there is one alone"),
        ("first second --out merged --rank 2", "add --as-adapter"),
        ("first second --out merged --weights 1", "1 weights for 2"),
        ("first second --out merged --weights 1,x", "must be numbers"),
        ("first second --out merged --weights 1,nan", "not all numbers"),
        ("first second --out merged --density 0.5", "keeps every entry"),
        ("first second --out small --compress 0.2", "merges nothing"),
        ("first --out small --compress 0", "density 0.0"),
        ("first --out merged --alpha 2", "belongs to --compress"),
    ],
)
def test_what_makes_no_sense_is_refused(
    refused: Callable[..., str], place: Path, arguments: str, says: str
) -> None:
    (place / "model.gguf").write_bytes(b"GGUF")
    assert says in refused("merge", *arguments.split())


def test_a_model_without_an_adapter_is_refused(
    refused: Callable[..., str], here: Path, trained: Path
) -> None:
    (here / "run").mkdir()
    shutil.copytree(trained / "base", here / "run" / "model")
    (here / "run" / "recipe.yaml").touch()
    assert "holds no adapter" in refused("merge", "run", "--out", "merged")
    assert "holds no adapter" in refused("merge", "run/model", "--out", "merged", as_json=True)


def test_another_base_is_refused(refused: Callable[..., str], place: Path, trained: Path) -> None:
    shutil.copytree(trained / "base", place / "base")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(place / "base")).save_pretrained(place / "base")
    _save_adapter(place / "other", place / "base", {UP: 1}, seed=3)
    for more in ((), ("--as-adapter",)):
        assert "whose names or hashes differ" in refused("merge", "first", "other", "--out", "merged", *more)
    settings = place / "first" / CONFIG
    settings.write_text(settings.read_text().replace(str(trained / "base"), str(place / "base")))
    assert "its weights have changed" in refused("merge", "first", "--out", "merged")
    assert "its weights have changed" in refused("merge", "first", "first", "--out", "merged")


def test_what_no_weight_can_hold_is_refused(refused: Callable[..., str], here: Path, trained: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = LlamaForCausalLM.from_pretrained(trained / "base")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, prompt).save_pretrained(here / "prompt")
    assert "no weight of the model can hold" in refused("merge", "prompt", "--out", "merged")
