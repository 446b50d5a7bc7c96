"""Models that are an adapter over another model: which base it belongs to, and how both become one.

An adapter's folder is peft's, with a tokenizer and one file of ours, `scrimp.json`: the base's name, a hash
of its configuration and a fingerprint of its weights, so that an adapter is not laid over a model that it was
not trained on. Where the base was kept in codes (`weights: nf4`), the file says which, and an adapter is laid
over what they decode to: the model it was trained on. Folders of peft's alone are taken as they are, and a
compressed adapter (`scrimp.tuning.merging.compeft`) through what it decompresses to.
"""

from __future__ import annotations

import hashlib
import json
import pkgutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from scrimp.base import files
from scrimp.base.adapter_names import BASE, COMPRESSED, CONFIG, TENSORS
from scrimp.base.errors import ScrimpError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

_PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
_VALUES = 64  # of each tensor that count for the fingerprint


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter."""
    return (folder / CONFIG).is_file()


def base_name(folder: Path) -> str:
    """Return the name of the model that an adapter belongs to.

    Raises:
        ScrimpError: The folder is no adapter that can be read safely, or names no base.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        name = config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ScrimpError(f"adapter {folder}: its {CONFIG} cannot be read ({error})") from None
    if not ((folder / TENSORS).is_file() or (folder / COMPRESSED).is_file()):
        raise ScrimpError(
            f"adapter {folder}: it holds no {TENSORS}; a pickled adapter (.bin) could run code when read: "
            "convert it to safetensors first"
        )
    if not isinstance(name, str) or not name:
        raise ScrimpError(f"adapter {folder}: its {CONFIG} names no base model; add base_model_name_or_path")
    return name


def config_hash(config: PreTrainedConfig) -> str:
    """Return a hash of what a configuration says of the architecture."""
    said = {name: value for name, value in config.to_dict().items() if name not in _PASSING}
    text = json.dumps(said, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def fingerprint(model: nn.Module) -> str:
    """Return a hash of some numbers of every weight, the same in every precision it may be loaded in."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, p in sorted(model.named_parameters()):
        flat = p.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _VALUES)][:_VALUES].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(p.shape)}".encode())
        digest.update(some.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def write_base(
    folder: Path, *, name: str, config: str, weights: str, stored: Mapping[str, Any] | None = None
) -> None:
    """Write which base an adapter belongs to.

    Args:
        folder: The adapter's.
        name: The base's name.
        config: Its `config_hash`.
        weights: Its `fingerprint`.
        stored: How its matrices were kept in training: `name` of a piece of the catalogue, its `options`, and
            the `dtype` that was coded; None is as they were.
    """
    known: dict[str, Any] = {"base": name, "config": config, "weights": weights}
    if stored is not None:
        known["stored"] = dict(stored)
    files.write_atomic(folder / BASE, json.dumps(known, indent=1) + "\n")


def lay_over(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return a base model with an adapter: merged where that is possible, else wrapped by peft.

    Raises:
        ScrimpError: The adapter is of another base, or its tensors do not fit.
    """
    from peft import PeftModel

    from scrimp import own_adapter

    check_base(base, folder)
    decode_as_trained(base, [folder])
    if own_adapter.is_ours(folder):
        return own_adapter.lay_over(base, folder)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            with readable(folder) as plain:
                wrapped: Any = PeftModel.from_pretrained(cast("Any", base), str(plain))
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ScrimpError(f"adapter {folder}: it does not fit its base: {error}") from error
    missing = [str(each.message) for each in found if "missing adapter keys" in str(each.message)]
    if missing:
        raise ScrimpError(f"adapter {folder}: {missing[0].partition(chr(10))[0]}")
    config = wrapped.active_peft_config
    if config.is_prompt_learning or not hasattr(wrapped, "merge_and_unload"):
        return cast("PreTrainedModel", wrapped)
    try:
        return cast("PreTrainedModel", wrapped.merge_and_unload())
    except (AttributeError, NotImplementedError, ValueError):  # a tuner that no weight can hold
        return cast("PreTrainedModel", wrapped)


def is_wrapped(model: nn.Module) -> bool:
    """Tell whether a model runs with an adapter that its weights could not hold."""
    from scrimp import own_adapter

    return hasattr(model, "peft_config") or own_adapter.is_laid_over(model)


@contextmanager
def readable(folder: Path) -> Iterator[Path]:
    """Yield a folder in peft's own form: the adapter's, or of a compressed one a passing copy.

    Raises:
        ScrimpError: The compressed file is damaged.
    """
    if (folder / TENSORS).is_file() or not (folder / COMPRESSED).is_file():
        yield folder
        return
    from scrimp.tuning.merging.compeft import decompress_adapter

    with tempfile.TemporaryDirectory() as passing:
        plain = Path(passing) / folder.name
        decompress_adapter(folder, plain)
        yield plain


def check_base(base: PreTrainedModel, folder: Path) -> None:
    """Refuse an adapter over a model that it was not trained on, where the adapter says which that was.

    Raises:
        ScrimpError: It is another one.
    """
    known = _known(folder)
    if not known:
        return
    if known["config"] != config_hash(base.config):
        what = "its configuration is another one"
    elif known["weights"] != fingerprint(base):
        what = "its weights have changed"
    else:
        return
    raise ScrimpError(
        f"adapter {folder}: it was trained on {known['base']}, and the model there is not that one any more "
        f"({what}); bring that model back, or name it with base_model_name_or_path in {CONFIG}"
    )


def decode_as_trained(base: PreTrainedModel, folders: Sequence[Path]) -> None:
    """Give a base the weights that adapters were trained on, in place, where those were coded.

    Args:
        base: The base as it is stored; it keeps its dtype.
        folders: The adapters. Where they were trained on different codes, the base stays as it is.
    """
    import torch

    from scrimp.methods import piece

    first, *others = [_known(folder).get("stored") for folder in folders]
    if first is None or any(each != first for each in others):
        return
    weights = pkgutil.resolve_name(piece("weights", first["name"]).builder)(**first["options"])
    dtype = base.dtype
    _cast(base, getattr(torch, first["dtype"]))
    weights.apply(base)
    weights.materialize(base)
    _cast(base, dtype)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters another dtype; buffers, such as the frequencies of positions, keep theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _known(folder: Path) -> dict[str, Any]:
    """Return what an adapter says of its base; nothing where it is peft's alone."""
    if not (folder / BASE).is_file():
        return {}
    with files.explained(folder):
        return dict(json.loads((folder / BASE).read_text(encoding="utf-8")))
