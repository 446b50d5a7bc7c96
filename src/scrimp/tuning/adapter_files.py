"""Adapters on disk, in peft's own form: `adapter_config.json` and `adapter_model.safetensors`.

    write_lora    any change of low rank, exactly, as a plain LoRA whose scale is 1
    write_shira   any sparse change, exactly, as peft's Supertuning
    write_own     tensors that only we can use, with `peft_type` SCRIMP

Plain peft and `transformers.load_adapter` read the first two without us.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from scrimp.base import files
from scrimp.base.adapter_names import CONFIG, TENSORS
from scrimp.base.errors import ScrimpError

if TYPE_CHECKING:
    from scrimp.tuning.deltas.delta import Delta, Factors

OWN = "SCRIMP"
_PREFIX = "base_model.model."


def write_lora(folder: Path, factors: Mapping[str, Factors], *, base: str) -> None:
    """Write low-rank changes as a plain LoRA.

    Args:
        folder: Where; made where it is missing.
        factors: By the path of their layer; ranks may differ.
        base: The name of the model they belong to.
    """
    from peft import LoraConfig

    ranks = {name: each.a.shape[0] for name, each in factors.items()}
    usual = max(ranks.values(), key=list(ranks.values()).count)
    odd = {name: rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=odd,
        alpha_pattern=odd,  # alpha over rank is 1 everywhere
        target_modules=sorted(factors),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    tensors = {}
    for name, each in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = each.a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = each.b
    _write(folder, config, tensors)


def write_shira(folder: Path, deltas: Mapping[str, Delta], *, base: str) -> None:
    """Write sparse changes as peft's Supertuning, exactly.

    Not as its SHiRA: that keeps its indices where `transformers.load_adapter` does not see them, and the
    values would land, without an error, at random places. One density goes for all layers, so the sparser
    ones are padded with zeros. Over a bf16 base peft rounds the values themselves before it adds them.

    Args:
        folder: Where; made where it is missing.
        deltas: By the path of their layer, each a `Sparse`.
        base: The name of the model they belong to.
    """
    from peft import SupertuningConfig

    from scrimp.tuning.deltas.sparse import Sparse, common_sparsity, padded

    sparse = {name: delta for name, delta in deltas.items() if isinstance(delta, Sparse)}
    sparsity, counts = common_sparsity({n: (each.shape, len(each.values)) for n, each in sparse.items()})
    config = SupertuningConfig(
        sparsity=sparsity,
        target_modules=sorted(sparse),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    tensors = {}
    for name, each in sparse.items():
        indices, values = padded(each.indices.cpu(), each.values.detach().cpu(), counts[name], each.shape)
        tensors[f"{_PREFIX}{name}.supertuning_indices"] = indices
        tensors[f"{_PREFIX}{name}.supertuning_values"] = values
    _write(folder, config, tensors)


def write_own(
    folder: Path, tensors: Mapping[str, Tensor], *, base: str, name: str, settings: Mapping[str, Any]
) -> None:
    """Write an adapter that only we can use.

    Args:
        folder: Where; made where it is missing.
        tensors: By their name in the model.
        base: The name of the model they belong to.
        name: The method's.
        settings: Its options, as its builder takes them; plain data.
    """
    config = {
        "peft_type": OWN,
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "tune": {"name": name, "settings": dict(settings)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_tensors(folder, tensors)


def read_own(folder: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Read what `write_own` wrote: the method's name, its options and its tensors.

    Raises:
        ScrimpError: It is not that, or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tune = read_config(folder)["tune"]
        name, settings = str(tune["name"]), dict(tune["settings"])
        return name, settings, load_file(folder / TENSORS)
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise ScrimpError(f"adapter {folder}: it cannot be read ({error}); copy or train it again") from error


def _write(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    _write_tensors(folder, tensors)


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / TENSORS, {"format": "pt"})


def read_config(folder: Path) -> dict[str, Any]:
    """Return an adapter's configuration as plain data."""
    with files.explained(folder):
        return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
