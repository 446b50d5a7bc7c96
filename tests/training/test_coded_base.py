"""An adapter over a base kept in codes: it trains, resumes, and is merged into what it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.training.conftest import write_model

from scrimp import merged, models
from scrimp.base.adapter_names import BASE
from scrimp.base.errors import ScrimpError
from scrimp.data import byte_tokenizer
from scrimp.weights.nf4 import nf4

if TYPE_CHECKING:
    from tests.training.conftest import Lab

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
QLORA: dict[str, Any] = {"weights__name": "nf4", "tune__name": "lora", "tune__rank": 4}


def write_base(folder: Path) -> Path:
    config = models.load_config(models.locate(str(write_model(folder, **SIZES))), vocab=0)
    base = models.create(config, seed=3, dtype=torch.float32)
    models.export(base, byte_tokenizer(), folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(models.load(models.locate(str(folder)), dtype=torch.float32).state_dict())


def test_a_resumed_run_is_the_whole_one_and_merges_into_the_decoded_base(lab: Lab) -> None:
    base = write_base(lab.path / "base")
    recipe = lab.recipe(model=str(base), **QLORA, checkpoint__every=2, tune__merge=True)
    lab.train(recipe, "whole")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.train(recipe, "cut", reporter=lab.reporter({4: stop}))
    lab.train(recipe, "cut", resume=True)
    name = "adapter/adapter_model.safetensors"
    assert (lab.path / "cut" / name).read_bytes() == (lab.path / "whole" / name).read_bytes()

    # The codes are no part of a checkpoint, and what comes out of a run is what `scrimp merge` makes.
    source = models.locate(str(lab.path / "whole" / "adapter"))
    merged.write_model([source], lab.path / "out", merged.Way())
    found, trained = tensors(lab.path / "out"), tensors(lab.path / "whole" / "model")
    assert found.keys() == trained.keys()
    assert all((found[n] - trained[n]).abs().max() <= 1e-6 for n in found)

    decoded = models.load(models.locate(str(base)), dtype=torch.float32)
    nf4().apply(decoded)
    nf4().materialize(decoded)
    weight = "model.layers.0.mlp.up_proj.weight"
    change = found[weight] - decoded.get_parameter(weight)
    assert change.any()
    assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 4  # of the adapter alone: nothing of the coding
    over_the_original = found[weight] - tensors(base)[weight]
    assert torch.linalg.matrix_rank(over_the_original, rtol=1e-3) > 4


def test_the_adapter_says_how_its_base_was_kept(lab: Lab) -> None:
    base = write_base(lab.path / "base")
    lab.train(lab.recipe(model=str(base), **QLORA, steps=1))
    known = json.loads((lab.path / "run" / "adapter" / BASE).read_text(encoding="utf-8"))
    assert known["stored"] == {"name": "nf4", "options": {"group": 64, "double": True}, "dtype": "float32"}


def test_what_would_change_codes_is_refused_before_training(lab: Lab) -> None:
    with pytest.raises(ScrimpError, match=r"nf4 never train, and tune full trains them: .*--tune lora"):
        lab.recipe(weights__name="nf4")
    base = write_base(lab.path / "base")
    recipe = lab.recipe(model=str(base), **{**QLORA, "tune__name": "olora"})
    with pytest.raises(ScrimpError, match=r"tune olora changes the base weights, and .* stored as codes"):
        lab.train(recipe)
    assert not (lab.path / "run").exists()
