"""What each parameter of a model is: a matrix that maps activations, an embedding, a head, a norm, ...

Low-rank methods project the matrices inside the layers and nothing else, and Adam-mini groups elements by
what they are. The authors decide by class and name (`nn.Linear` whose name holds "attn" or "mlp"), which
misses GPT-2, whose matrices are transposed and of another class, and experts stacked into one 3-D parameter.
Here the owning module decides, then the shape; a name decides only what nothing else tells (routers, heads
of classifiers). Odd cases:

    tied embedding and head     one parameter, named once: an embedding
    experts                     a 3-D parameter is a batch of matrices, one for each expert
    router                      its rows are the experts; a Linear called `gate` may be part of an MLP
    adapters                    lora_A and lora_B are linear wherever they sit, thin as they are
    parametrizations            torch's (weight normalisation): the matrix has its module's role
    wrappers                    DistributedDataParallel, torch.compile and peft change names, not roles

No package but torch is imported: transformers' and peft's classes are known by what they have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from scrimp.optim.pieces import Role

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_experts")
_QUERIES = {"q_proj", "wq", "query"}
_KEYS = {"k_proj", "wk", "key"}
_HEADS = {"lm_head", "embed_out", "classifier", "score", "qa_outputs"}
# What wrappers put into a name: peft's layers around a layer, DDP, torch.compile.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:base_layer|original_module|modules_to_save\.[^.]+|module|_orig_mod)\."
)
_ADAPTER = re.compile(r"\blora_(?:embedding_)?[AB]\b")
_BIAS = re.compile(r"^bias|bias$")
# The usual words, for parameters that come with a name and without a model.
_NORM_WORDS = re.compile(r"norm|(?:^|\.)ln(?:_\w+|\d+)?\.", re.IGNORECASE)
_EMBEDDING_WORDS = re.compile(
    r"embed|embd|(?:^|\.)(?:wte|wpe|shared|cls_token|mask_token|relative_attention_bias)(?:\.|$)",
    re.IGNORECASE,
)
_INNER_WORDS = re.compile(
    r"proj|attn|attention|mlp|ffn|feed_forward|dense|linear|query|key|value|(?:^|\.|_)fc"
)


def roles(model: nn.Module) -> dict[str, Role]:
    """Return the role of every parameter.

    Args:
        model: Any module; DistributedDataParallel's, torch.compile's and peft's wrappers are seen through.

    Returns:
        Role by name, for the names and in the order of `model.named_parameters()`: tied weights once.
    """
    heads, experts = _heads(model), _expert_counts(model)
    owners = {place.name: place for place in _places(model)}
    return {
        name: _role(owners[name], parameter, heads, experts) for name, parameter in model.named_parameters()
    }


def heads(model: nn.Module) -> dict[str, int]:
    """Return among how many attention heads the rows of query and key projections are divided.

    Args:
        model: As in `roles`. The numbers are those of the nearest `config` that has `num_attention_heads`
            (and `num_key_value_heads`), as transformers' models carry it.

    Returns:
        Heads by the name of the weight; weights whose rows do not divide by them are left out.
    """
    found = {}
    for place in _places(model):
        *_, module, last = ("", "", *place.path)
        if last != "weight" or module not in _QUERIES | _KEYS:
            continue
        count = place.config("num_attention_heads")
        if module in _KEYS:
            count = place.config("num_key_value_heads") or count
        if count and place.parameter.ndim == 2 and place.parameter.shape[0] % count == 0:
            found[place.name] = count
    return found


def role_by_name(name: str, ndim: int) -> Role | None:
    """Return the role that a name tells, by the words that the field's models use; None where it does not.

    Args:
        name: A parameter's name in a model that is not at hand.
        ndim: The parameter's number of dimensions.
    """
    *path, last = _WRAPPERS.sub("", name).split(".")
    if _ADAPTER.search(name):
        return "linear" if ndim >= 2 else "other"
    if _BIAS.search(last):
        return "bias"
    if _NORM_WORDS.search(name) or (ndim == 1 and last == "weight"):
        return "norm"
    if "router" in path or path[-1:] == ["shared_expert_gate"]:
        return "router"
    if _is_named_head(path) or path == ["output"]:
        return "head"
    if _EMBEDDING_WORDS.search(name):
        return "embedding"
    if ndim > 2 and "conv" in name:
        return "conv"
    # A module called `gate` is a router or part of an MLP: the shape has to tell.
    if ndim in (2, 3) and _INNER_WORDS.search(name) and path[-1:] != ["gate"]:
        return "linear" if ndim == 2 else "experts"
    return None


@dataclass(frozen=True, slots=True)
class _Place:
    """A parameter and where it sits.

    Attributes:
        name: Its name in the model.
        parameter: Itself.
        owners: The modules around it, innermost first.
    """

    name: str
    parameter: Tensor
    owners: tuple[nn.Module, ...]

    @property
    def path(self) -> list[str]:
        """Its name's parts, without those of wrappers."""
        return _WRAPPERS.sub("", self.name).split(".")

    @property
    def classes(self) -> list[str]:
        """The class names of its module and of the module around that."""
        return [type(module).__name__ for module in self.owners[:2]]

    def config(self, key: str) -> int | None:
        """The nearest configuration's number of that name."""
        for module in self.owners:
            value = getattr(getattr(module, "config", None), key, None)
            if isinstance(value, int):
                return value
        return None


def _places(model: nn.Module) -> Iterator[_Place]:
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        around = (".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1))
        # A ParameterDict's keys, and a module that is there under another name, are no names of modules.
        yield _Place(name, parameter, tuple(modules[at] for at in around if at in modules))


def _heads(model: nn.Module) -> set[int]:
    """Return the ids of the output heads' weights."""
    asked = [module for module in model.modules() if callable(getattr(module, "get_output_embeddings", None))]
    if asked:
        given: list[Any] = [module.get_output_embeddings() for module in asked]  # type: ignore[operator]
        return {id(weight) for head in given if (weight := getattr(head, "weight", None)) is not None}
    rows = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return {id(module.weight) for module in linear[-1:] if module.out_features in rows}


def _expert_counts(model: nn.Module) -> set[int]:
    configs = [getattr(module, "config", None) for module in model.modules()]
    found = [getattr(config, key, None) for config in configs for key in _EXPERT_COUNTS]
    return {count for count in found if isinstance(count, int) and count > 1}


def _role(place: _Place, parameter: Tensor, heads: set[int], experts: set[int]) -> Role:
    """Return the role; the order matters: a bias in a norm is a bias, a router's `classifier` no head."""
    module, *_ = place.owners
    last = place.path[-1]
    if type(module).__name__ == "ParametrizationList":  # torch's, around one tensor of the module itself
        module = place.owners[2]
        return "linear" if isinstance(module, nn.Linear) and min(parameter.shape) > 1 else "other"
    if _ADAPTER.search(place.name):
        return "linear" if parameter.ndim >= 2 else "other"
    if _BIAS.search(last):
        return "bias"
    if isinstance(module, nn.Embedding) or "Embedding" in type(module).__name__:
        return "embedding"
    if isinstance(module, _CONVOLUTIONS) or ("Conv" in type(module).__name__ and parameter.ndim > 2):
        return "conv"
    if parameter.ndim >= 2 and _is_router(place, parameter, experts):
        return "router"
    if id(parameter) in heads or (parameter.ndim == 2 and _is_named_head(place.path[:-1])):
        return "head"
    return _inner_role(module, parameter, last)


def _inner_role(module: nn.Module, parameter: Tensor, last: str) -> Role:
    """Return the role of what is neither bias, embedding, convolution, router nor head."""
    kind = type(module).__name__
    is_linear = isinstance(module, nn.Linear) or (kind == "Conv1D" and hasattr(module, "nf"))
    if is_linear and parameter.ndim == 2:
        return "linear"
    if "Norm" in kind or (parameter.ndim == 1 and last == "weight"):
        return "norm"
    # The first dimension counts experts; of length 1 it is one to broadcast over (position embeddings).
    if parameter.ndim == 3 and min(parameter.shape) > 1:
        return "experts"
    is_matrix = "weight" in last or "Linear" in kind or "Expert" in kind
    return "linear" if parameter.ndim == 2 and is_matrix else "other"


def _is_router(place: _Place, parameter: Tensor, experts: set[int]) -> bool:
    if any(kind.endswith("Router") for kind in place.classes):
        return True
    module = place.path[-2] if len(place.path) > 1 else ""
    if module.endswith("expert_gate"):
        return True
    is_named = module in {"gate", "router"} or any(
        kind.endswith(("Gate", "Gating")) for kind in place.classes
    )
    return is_named and parameter.shape[0] in experts


def _is_named_head(path: list[str]) -> bool:
    return not _HEADS.isdisjoint(path) or path[-1:] == ["head"]
