"""Models: where one comes from, how it is made or loaded, and how it is saved for others.

A name is tried as a named shape, as something on this disk (a Hugging Face folder, a run folder, a
GGUF file), and last as a hub id. Finding out imports no torch. Weights are read by transformers
tensor by tensor into place, from safetensors or GGUF only: a pickled checkpoint is refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal, cast

from scrimp import adapted
from scrimp.base import extras
from scrimp.base.deadline import within
from scrimp.base.errors import ScrimpError
from scrimp.base.platform import passive_openmp
from scrimp.base.suggest import did_you_mean
from scrimp.shapes import CONTEXT, SHAPES, Dimensions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

HUB_SECONDS = 5.0  # without an answer from the hub before it counts as unreachable
REASON_CHARACTERS = 300  # of another library's error that a sentence quotes
HUB_ID = re.compile(r"(?![./])[\w.-]+(/[\w.-]+)?")
TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: The name it was asked for by; paths are absolute.
        kind: A named shape, a Hugging Face folder, a GGUF file, or an adapter over another model.
        path: The folder or file; None for a named shape.
        base: What an adapter lies over.
    """

    name: str
    kind: Literal["shape", "folder", "gguf", "adapter"]
    path: Path | None = None
    base: Source | None = None

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to start from."""
        if self.kind == "folder":
            assert self.path is not None
            return any(self.path.glob("*.safetensors"))
        return self.kind in ("gguf", "adapter")

    @property
    def tokenizer(self) -> Path | None:
        """Where its tokenizer lies: an adapter of peft's alone has none beside it, and takes its base's."""
        if self.base is None or self.path is None or (self.path / "tokenizer.json").is_file():
            return self.path
        return self.base.tokenizer


def locate(name: str, *, trust_remote_code: bool = False) -> Source:
    """Find a model by name, asking the hub only for what is not on this machine.

    Raises:
        ScrimpError: There is no such model, it cannot be used, or the hub cannot be reached.
    """
    if name in SHAPES:
        return Source(name, "shape")
    path = Path(name).expanduser()
    if path.is_file():
        return _file(path.resolve())
    if path.is_dir():
        return _folder(path.resolve(), trust_remote_code=trust_remote_code)
    if not HUB_ID.fullmatch(name) or path.suffix == ".gguf":
        raise ScrimpError(f"model {name!r}: there is no such file or folder{did_you_mean(name, SHAPES)}")
    folder = _hub("model", name, MODEL_FILES)
    _folder(folder, trust_remote_code=trust_remote_code)
    return Source(name, "folder", folder)


def locate_trained(name: str, *, trust_remote_code: bool = False) -> Source:
    """Find a model that has weights to work with.

    Raises:
        ScrimpError: As for `locate`, or it has none.
    """
    source = locate(name, trust_remote_code=trust_remote_code)
    if not source.has_weights:
        raise ScrimpError(f"model {name}: it holds no weights; train it first, and name the run's folder")
    return source


def locate_tokenizer(name: str) -> Path:
    """Find a tokenizer: a file, the folder of a model or run, or a hub id, whose weights stay there.

    Raises:
        ScrimpError: There is no such tokenizer, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.exists():
        if (path / "recipe.yaml").is_file():
            path = path / ("model" if (path / "model").is_dir() else "adapter")
        return path.resolve()
    if not HUB_ID.fullmatch(name):
        raise ScrimpError(f"tokenizer {name!r}: there is no such file or folder")
    return _hub("tokenizer", name, TOKENIZER_FILES)


def _file(path: Path) -> Source:
    if path.suffix != ".gguf":
        raise ScrimpError(
            f"model {path}: a single file must be a .gguf file; for safetensors name the folder that also "
            "holds config.json"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ScrimpError(f"model {path}: this is no GGUF file (its first four bytes are not 'GGUF')")
    extras.require("gguf", extra="gguf", purpose="reading a GGUF file")
    return Source(str(path), "gguf", path)


def _folder(path: Path, *, trust_remote_code: bool) -> Source:
    if (path / "recipe.yaml").is_file():
        finished = next((path / name for name in ("model", "adapter") if (path / name).is_dir()), None)
        if finished is None:
            raise ScrimpError(
                f"model {path}: this run has not finished, so it holds no model yet; "
                f"finish it with: scrimp train --out {path} --resume"
            )
        path = finished
    if adapted.is_adapter(path):
        base = locate(adapted.base_name(path), trust_remote_code=trust_remote_code)
        return Source(str(path), "adapter", path, base)
    config = path / "config.json"
    if not config.is_file():
        raise ScrimpError(f"model {path}: the folder holds no config.json, so it is no Hugging Face model")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ScrimpError(f"model {config}: it is not JSON: {error}") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ScrimpError(f"model {config}: it names no model_type, so it is no Hugging Face model")
    _check_code(path, values, trust_remote_code=trust_remote_code)
    if not any(path.glob("*.safetensors")) and (pickled := [*path.glob("*.bin"), *path.glob("*.pt*")]):
        raise ScrimpError(
            f"model {path}: its weights are pickled ({pickled[0].name}), which could run code when read; "
            "convert them to safetensors first"
        )
    return Source(str(path), "folder", path)


def _check_code(path: Path, config: dict[str, Any], *, trust_remote_code: bool) -> None:
    if "auto_map" not in config or trust_remote_code:
        return
    with passive_openmp():  # this imports torch
        from transformers import CONFIG_MAPPING
    if config.get("model_type") not in CONFIG_MAPPING:
        raise ScrimpError(
            f"model {path}: it needs Python code of its own ({config['auto_map']}); "
            "read that code, and if you trust it add --trust-remote-code"
        )


def _hub(kind: Literal["model", "tokenizer"], name: str, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    needed = ("config.json", "*.safetensors") if kind == "model" else ("tokenizer*",)
    with contextlib.suppress(LocalEntryNotFoundError):
        cached = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        if all(any(cached.glob(pattern)) for pattern in needed):
            return cached
    near = did_you_mean(name, SHAPES) if kind == "model" else ""
    shapes = f"there are the named shapes {', '.join(SHAPES)}; " if kind == "model" else ""
    local = f"On this machine {shapes}a folder or a .gguf file works too."
    try:
        within(HUB_SECONDS, lambda: HfApi().model_info(name, timeout=HUB_SECONDS))
        return Path(snapshot_download(name, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise ScrimpError(
            f"{kind} {name!r}: not on this machine{near}, and the hub shows none of that name. {local}"
        ) from None
    except Exception as error:
        raise ScrimpError(
            f"{kind} {name!r}: not on this machine{near}, and the Hugging Face hub cannot be reached "
            f"({type(error).__name__}). {local}"
        ) from None


def load_config(source: Source, *, vocab: int, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration of a model.

    Args:
        source: Where it comes from.
        vocab: Size of the tokenizer, for a shape that takes it from there.
        trust_remote_code: Let the model's own Python code run.

    Raises:
        ScrimpError: Transformers does not know it, or it is no causal language model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, LlamaConfig

    if source.kind == "shape":
        shape = SHAPES[source.name]
        return LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_attention_heads=shape.heads,
            num_hidden_layers=shape.layers,
            vocab_size=shape.vocab or vocab,
            tie_word_embeddings=shape.tied,
            initializer_range=shape.init_std,
            max_position_embeddings=CONTEXT,
        )
    if source.base is not None:
        return load_config(source.base, vocab=vocab, trust_remote_code=trust_remote_code)
    assert source.path is not None
    try:
        if source.kind == "gguf":
            config = AutoConfig.from_pretrained(source.path.parent, gguf_file=source.path.name)
        else:
            config = AutoConfig.from_pretrained(source.path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = shorten(str(error), REASON_CHARACTERS)
        raise ScrimpError(f"model {source.name}: its configuration cannot be read: {reason}") from error
    if not trust_remote_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ScrimpError(
            f"model {source.name}: {config.model_type!r} is no causal language model, which scrimp trains"
        )
    return cast("PreTrainedConfig", config)


def create(
    config: PreTrainedConfig, *, seed: int, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Make a model with random weights drawn from `seed`, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        return cast("PreTrainedModel", model)


def create_empty(
    config: PreTrainedConfig, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Make a model whose weights are yet to be read into place, without drawing any."""
    from transformers import initialization

    with initialization.no_init_weights():
        model = create(config, seed=0, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()  # which is part of the initialisation that was left out
    return model


def load(source: Source, *, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a model with its stored weights, on the CPU.

    Raises:
        ScrimpError: There are no weights, or they do not fit the model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GgufConfig

    if not source.has_weights:
        raise ScrimpError(
            f"model {source.name}: it holds no weights; start from random ones with --model.init scratch"
        )
    assert source.path is not None
    if source.base is not None:
        base = load(source.base, dtype=dtype, trust_remote_code=trust_remote_code)
        return adapted.lay_over(base, source.path)
    gguf = source.kind == "gguf"
    try:
        with _quiet():
            from_pretrained: Any = AutoModelForCausalLM.from_pretrained
            model, report = from_pretrained(
                source.path.parent if gguf else source.path,
                gguf_file=source.path.name if gguf else None,
                quantization_config=GgufConfig(dequantize=True) if gguf else None,
                dtype=dtype,
                use_safetensors=None if gguf else True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = shorten(str(error), REASON_CHARACTERS)
        raise ScrimpError(f"model {source.name}: it cannot be loaded: {reason}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ScrimpError(
            f"model {source.name}: {len(missing)} tensors are missing, {missing[0]!r} among them"
        )
    return cast("PreTrainedModel", model)


def stored_dtype(source: Source) -> torch.dtype:
    """Return the dtype that most of a model's weights are stored in; float32 for what torch has none for."""
    import torch
    from safetensors import safe_open

    if source.kind != "folder" or source.path is None:
        return torch.float32
    first = min(source.path.glob("*.safetensors"))
    with safe_open(first, framework="pt") as stored:
        name = max(stored.keys(), key=lambda key: math.prod(stored.get_slice(key).get_shape()))
        found = stored.get_slice(name).get_dtype()
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(found, torch.float32)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and notices off the screen: the run draws its own."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The GGUF reader's bar obeys no switch of transformers.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the longest sequence the model's positions allow, or None where there is no limit."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    return next((limit for name in names if (limit := getattr(text, name, None))), None)


def dimensions(config: PreTrainedConfig) -> Dimensions:
    """Return what defaults depend on of a model."""
    text = config.get_text_config()
    return Dimensions(
        context_length(config), int(text.hidden_size), getattr(text, "num_hidden_layers", None) or 1
    )


def non_embedding(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> int:
    """Count the parameters that the scaling laws count, without making them.

    Matrices alone: norms and biases are left out, and so are embeddings of tokens and positions and the
    output head, tied or not. Of a mixture every expert counts.

    Args:
        config: The model's configuration.
        trust_remote_code: Let the model's own Python code run.
    """
    import torch
    from torch import nn

    with torch.device("meta"):
        model = create_empty(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    outside = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outside += [head for head in [model.get_output_embeddings()] if head is not None]
    left_out = {id(parameter) for module in outside for parameter in module.parameters()}
    return sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in left_out)


def export(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write an ordinary Hugging Face folder.

    Shards of at most 2 GB bound what is copied to the host at a time; on a CPU nothing is copied.

    Raises:
        ScrimpError: The disk is full.
    """
    from safetensors import SafetensorError

    try:
        with _quiet():
            model.save_pretrained(folder, max_shard_size="2GB")
            tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # what its writer makes of the system's error
        raise ScrimpError(
            f"the model could not be written to {folder} ({error}): is the disk full?"
        ) from error
