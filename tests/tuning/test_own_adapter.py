"""Adapters in our own form: saved, laid over a fresh base, and merged where that can be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tuning.small_adapted import begin, llama, logits, train
from transformers import LlamaForCausalLM

from scrimp import own_adapter
from scrimp.base.errors import ScrimpError
from scrimp.tuning import adapter_files
from scrimp.tuning.low_rank.routed import FlyLora
from scrimp.tuning.modules.bottleneck import InvertibleAdapter, ParallelAdapter, SeriesAdapter
from scrimp.tuning.modules.dept import DePT
from scrimp.tuning.modules.scaling import SSF, DiffFit
from scrimp.tuning.quantised_tuning import PEQA
from scrimp.tuning.sparse.kernel import Snell

BUILDERS: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "ssf": (SSF, {"std": 0.1, "targets": ("q_proj", "down_proj")}),
    "difffit": (DiffFit, {}),
    "series-adapter": (SeriesAdapter, {"bottleneck": 4, "activation": "tanh", "sublayers": "both"}),
    "parallel-adapter": (ParallelAdapter, {"bottleneck": 4, "scale": 2.0}),
    "invertible-adapter": (InvertibleAdapter, {"reduction": 4}),
    "dept": (DePT, {"prompt": 3, "rank": 2, "length": 16, "ratio": 7.0, "alpha": 3.0}),
    "flylora": (FlyLora, {"rank": 4, "active": 2, "targets": ("v_proj",)}),
    "snell": (Snell, {"rank": 4, "targets": ("v_proj",)}),
    "peqa": (PEQA, {"group": 16, "targets": ("v_proj", "o_proj")}),
}


def trained(name: str, folder: Path) -> tuple[LlamaForCausalLM, Any]:
    """Train a method a little, and save its adapter."""
    builder, options = BUILDERS[name]
    model, tune = llama(), builder(**options, **({} if builder is PEQA else {"seed": 3}))
    _, optimizer = begin(model, tune)
    train(model, tune, optimizer, range(2))
    tune.save(model, folder, "the/base")
    return model, tune


@pytest.mark.parametrize("name", BUILDERS)
def test_a_saved_adapter_laid_over_a_fresh_base_is_the_model_that_was_trained(
    name: str, tmp_path: Path
) -> None:
    model, tune = trained(name, tmp_path)
    expected = logits(model)
    assert not torch.allclose(expected, logits(llama()), atol=1e-4)
    assert own_adapter.is_ours(tmp_path)
    laid = own_adapter.lay_over(llama(), tmp_path)
    assert torch.allclose(logits(laid), expected, atol=1e-5 if tune.is_mergeable else 0)
    assert own_adapter.is_laid_over(laid) is not tune.is_mergeable
    if tune.is_mergeable:
        assert laid.state_dict().keys() == llama().state_dict().keys()


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    trained("dept", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "SCRIMP" and config["base_model_name_or_path"] == "the/base"
    name, settings, tensors = adapter_files.read_own(tmp_path)
    assert name == "dept" and settings == BUILDERS["dept"][1]
    assert {n.removeprefix("model.attached.") for n in tensors} == {"prompt", "a", "b"}


def test_a_tensor_that_is_missing_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    trained("dept", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if not n.endswith("prompt")}, path)
    with pytest.raises(ScrimpError, match=r"it lacks tensor model\.attached\.prompt"):
        own_adapter.lay_over(llama(), tmp_path)
    save_file({n: t[:1] if n.endswith("prompt") else t for n, t in tensors.items()}, path)
    with pytest.raises(ScrimpError, match=r"is \(1, 32\) and its base has \(3, 32\)"):
        own_adapter.lay_over(llama(), tmp_path)


def test_an_option_of_another_version_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    trained("dept", tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["tune"]["settings"]["depth"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(ScrimpError, match="no option 'depth'"):
        own_adapter.lay_over(llama(), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x08")
    with pytest.raises(ScrimpError, match="cannot be read"):
        own_adapter.lay_over(llama(), tmp_path)
