"""What all coded weights share: the layer that holds one, and how a model's layers are coded in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

BLOCK = 1 << 21  # elements that are decoded at once: few products, and a processor's cache still holds them


class CodedLinear(nn.Linear):
    """An `nn.Linear` whose weight is coded, and whose `state_dict` holds the weight's parts.

    Args:
        weight: The weight (out, in), as a parameter, with its `parts` by name.
        bias: (out,), or None.
    """

    weight: Any

    def __init__(self, weight: Any, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    def plain(self) -> nn.Linear:
        """Return an `nn.Linear` of the decoded weight and the same bias."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(self.weight.detach().dequantize(), self.weight.requires_grad)
        made.bias = self.bias
        return made.train(self.training)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight"]
        for name, part in self.weight.parts.items():
            destination[f"{prefix}weight_{name}"] = part.detach()


def code_in_turn(
    model: nn.Module,
    tied: dict[Tensor, list[str]],
    code: Callable[[str, Tensor], Any],
    layer: Callable[[Any, nn.Parameter | None], nn.Module],
) -> None:
    """Code matrices in place, one after the other: a full one is held by nobody when the next one is coded.

    Args:
        model: Whose layers they are.
        tied: The layers that hold each matrix; emptied on the way.
        code: Makes the coded parameter of a layer's name and its matrix.
        layer: Makes the layer of that and a bias.
    """
    while tied:
        weight, names = tied.popitem()
        coded = code(names[0], weight)
        for name in names:
            old: Any = model.get_submodule(name)
            model.set_submodule(name, layer(coded, old.bias).train(old.training))


def by_weight(linears: Iterable[tuple[str, nn.Linear]]) -> dict[Tensor, list[str]]:
    """Return the names of the layers that hold each matrix."""
    tied: dict[Tensor, list[str]] = {}
    for name, linear in linears:
        tied.setdefault(linear.weight, []).append(name)
    return tied


def materialize(model: nn.Module, kind: type[CodedLinear]) -> None:
    """Decode every matrix of a kind in place, one after the other: they are plain `nn.Linear` again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, kind):
            model.set_submodule(name, module.plain())


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yield the rows of a matrix in blocks of about `BLOCK` elements."""
    size = max(1, BLOCK // columns)
    for first in range(0, rows, size):
        yield slice(first, min(rows, first + size))


def weight_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the weight among the arguments of `F.linear`."""
    return args[1] if len(args) > 1 else kwargs["weight"]


def decoded(tree: Any, kind: type[Tensor]) -> Any:
    """Return arguments with plain tensors for the coded weights among them."""
    return tree_map_only(kind, lambda weight: weight.dequantize(), tree)


def written(func: Any, args: tuple[Any, ...], kind: type[Tensor]) -> list[Any]:
    """Return the coded weights that an operation would write to."""
    found = [
        value
        for value, argument in zip(args, func._schema.arguments, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, kind)]


def autocast(input: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return what `F.linear` would compute with: its autocast happens below the level that is taken over."""
    kind = input.device.type
    if not torch.is_autocast_enabled(kind):
        return input, bias
    dtype = torch.get_autocast_dtype(kind)
    return input.to(dtype), None if bias is None else bias.to(dtype)
