"""Adapters read from disk, of peft's own form: what they hold, and a plain LoRA's factors.

Only `adapter_model.safetensors` is ever read: a pickled file can run code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scrimp.base import files
from scrimp.base.adapter_names import BASE, CONFIG, TENSORS
from scrimp.base.errors import ScrimpError
from scrimp.tuning.adapter_files import read_config
from scrimp.tuning.deltas.delta import Factors

_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")
# Settings of peft under which dW is not s B A, or not of the base as it was.
_NOT_PLAIN = (
    "use_dora",
    "use_bdlora",
    "arrow_config",
    "alora_invocation_tokens",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
)
# Initialisations that leave the base as it is.
_HARMLESS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as it is on disk.

    Attributes:
        folder: Where.
        config: Its `adapter_config.json`.
        tensors: Its `adapter_model.safetensors`.
        identity: The hashes of its base's configuration and weights; None where there is no `scrimp.json`.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    identity: tuple[str, str] | None

    @property
    def base(self) -> str:
        """The name of the base."""
        return str(self.config.get("base_model_name_or_path") or "")


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter in peft's form.

    Raises:
        ScrimpError: There is none, or only a pickled one, or it cannot be read.
    """
    if not (folder / CONFIG).is_file():
        raise ScrimpError(f"{folder} holds no {CONFIG}, so it is no adapter; give the folder that has it")
    if not (folder / TENSORS).is_file():
        pickled = sorted(folder.glob("*.bin"))
        what = f"only {pickled[0].name}, which could run code when read" if pickled else f"no {TENSORS}"
        raise ScrimpError(f"{folder} holds {what}; save the adapter with peft as safetensors")
    try:
        config, identity = read_config(folder), _identity(folder / BASE)
    except (ValueError, KeyError, TypeError) as error:
        raise ScrimpError(
            f"the settings in {folder} cannot be read ({error}); copy the adapter again"
        ) from error
    return Adapter(folder, config, read_tensors(folder / TENSORS), identity)


def _identity(path: Path) -> tuple[str, str] | None:
    if not path.is_file():
        return None
    known = json.loads(path.read_text(encoding="utf-8"))
    return known["config"], known["weights"]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ScrimpError: It is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ScrimpError(f"{path} is damaged ({error}); copy or make it again") from error


def factors_of(adapter: Adapter) -> dict[str, Factors]:
    """Return a plain LoRA's factors by the path of their layer, the scale in B, float32.

    Raises:
        ScrimpError: It is no plain LoRA, or holds more than factors of linear layers.
    """
    _check_plain(adapter)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise ScrimpError(
                f"{adapter.folder} holds {key}, and only factors of linear layers can be merged with other "
                "adapters; merge it into its base alone"
            )
        halves.setdefault(match["layer"], {})[match["factor"]] = tensor.float()
    for layer, pair in halves.items():
        if len(pair) != 2 or len(pair["A"]) != pair["B"].shape[1]:
            raise ScrimpError(f"{adapter.folder} holds no pair of factors of {layer} that fit; save it again")
    return {
        layer: Factors(pair["A"], pair["B"] * _scale(adapter.config, layer)) for layer, pair in halves.items()
    }


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Fill a folder that is there as a whole or not at all.

    Raises:
        ScrimpError: It is in use.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ScrimpError(f"{out} is in use; choose a folder that does not exist, or empty it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_directory(out) as new:
        yield new


def _check_plain(adapter: Adapter) -> None:
    config = adapter.config
    if config.get("peft_type") != "LORA":
        raise ScrimpError(
            f"{adapter.folder} is {config.get('peft_type')}, and only LoRA adapters can be merged with "
            "others; merge it into its base alone"
        )
    odd = next((name for name in _NOT_PLAIN if config.get(name)), None)
    if odd is None and config.get("init_lora_weights", True) not in _HARMLESS:
        odd = f"init_lora_weights={config['init_lora_weights']}"
    if odd is not None:
        raise ScrimpError(
            f"{adapter.folder} has {odd}, so its change is not the product of its factors; "
            "export it as a plain LoRA first"
        )


def _scale(config: Mapping[str, Any], layer: str) -> float:
    from peft.utils.other import get_pattern_key

    def of(pattern: str, usual: str) -> float:
        table: dict[str, float] = config.get(pattern) or {}
        return float(table.get(get_pattern_key(list(table), layer), config[usual]))

    rank, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
