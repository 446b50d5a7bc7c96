"""Int8 weights: the decoder's matrices as 8-bit codes, all else as it was.

As Q-GaLore and quantised APOLLO train: the linear layers of the decoder (their seven of a Llama: q, k, v,
o, up, down, gate) hold codes; embeddings, the head, norms, biases and routers keep the model's precision.
A matrix (m, n) takes m n + 2 m ceil(n / group) itemsize bytes: 1.016 a weight in groups of 256 with bf16
scales, against 2. How codes are made stands in `affine8`, how they multiply in `int8_weight`.

Oddities:

- A model on the `meta` device can be coded there. After `to_empty` and transformers' own
  `initialize_weights`, it was drawn block by block and never held in another precision.
- `state_dict` holds plain tensors, `weight_codes`, `weight_scale` and `weight_offset` in place of `weight`.
  Either form loads: a full-precision `weight` is coded, rounded to nearest.
- GPT-2's transposed `Conv1D` and stacked experts are no `nn.Linear`, and stay as they are.

Source: Q-GaLore, Zhang et al. 2024, arXiv 2407.08296 (groups of 256); APOLLO, Zhu et al., MLSys 2025, arXiv
2412.05270 (128).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from scrimp.base.errors import ScrimpError
from scrimp.weights.affine8 import Affine8, Variant
from scrimp.weights.coded import CodedLinear, by_weight, code_in_turn, materialize
from scrimp.weights.int8_weight import DTYPES, PARTS, Int8Weight

ROUTERS = frozenset({"router", "gate", "shared_expert_gate"})


class Int8Linear(CodedLinear):
    """An `nn.Linear` whose weight is an `Int8Weight`, and whose `state_dict` holds the weight's parts.

    Args:
        weight: The weight (out, in), as a parameter.
        bias: (out,), or None.
    """

    weight: Int8Weight

    def extra_repr(self) -> str:
        """Tell of the codes beside the sizes."""
        return f"{super().extra_repr()}, int8 in groups of {self.weight.codec.group}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        names = {part: f"{prefix}weight_{part}" for part in PARTS}
        if all(name in state_dict for name in names.values()):
            parts = {part: state_dict.pop(name) for part, name in names.items()}
            if parts["scale"].shape != self.weight.scale.shape:
                error_msgs.append(
                    f"{names['scale']} is {tuple(parts['scale'].shape)} and not "
                    f"{tuple(self.weight.scale.shape)}: it was saved in other groups than of "
                    f"{self.weight.codec.group}"
                )
                return
            codec = replace(self.weight.codec, dtype=parts["scale"].dtype)
            state_dict[f"{prefix}weight"] = Int8Weight(**parts, codec=codec)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """The parametrisation by 8-bit codes.

    Attributes:
        group: Elements of a row that share a scale.
        variant: The code, as in `Affine8`.
        targets: The linear layers to code, by the last part of their names; None takes all those of the
            decoder layers but routers.
    """

    group: int = 256
    variant: Variant = "paper"
    targets: frozenset[str] | None = None

    def apply(self, model: nn.Module) -> None:
        """Code the matrices of `model` in place, one after the other, rounded to nearest.

        Raises:
            ScrimpError: There is nothing to code, or it is of another dtype than bfloat16 or float32.
        """
        tied = by_weight(_linears(model, self._takes))
        if not tied:
            wanted = "linear layer" if self.targets is None else f"linear layer named {sorted(self.targets)}"
            raise ScrimpError(
                f"weights int8: the decoder layers of model {type(model).__name__} have no {wanted}; "
                "use weights dense"
            )
        code_in_turn(model, tied, self._code, Int8Linear)

    def materialize(self, model: nn.Module) -> None:
        """Decode every matrix of `model` in place, one after the other: they are plain `nn.Linear` again."""
        materialize(model, Int8Linear)

    def _takes(self, name: str) -> bool:
        return name in self.targets if self.targets is not None else name not in ROUTERS

    def _code(self, name: str, weight: Tensor) -> Int8Weight:
        if weight.dtype not in DTYPES:
            raise ScrimpError(
                f"weights int8: {name} is {weight.dtype}, and codes stand for bfloat16 or float32; "
                "use one of those precisions"
            )
        codec = Affine8(group=self.group, dtype=weight.dtype, variant=self.variant)
        coded = Int8Weight.of(weight.detach(), codec)
        made: Any = nn.Parameter(coded, weight.requires_grad)
        return made  # type: ignore[no-any-return]


def int8(group: int = 256, *, variant: Variant = "paper", targets: tuple[str, ...] | None = None) -> Int8:
    """Build the int8 parametrisation.

    Args:
        group: Elements of a row that share a scale: 256 in Q-GaLore, 128 in quantised APOLLO.
        variant: "paper", around the offset of a group; "released", as Q-GaLore's code does it.
        targets: The linear layers to code, by the last part of their names (`q_proj`); None takes all those
            of the decoder layers but routers.

    Raises:
        ScrimpError: `group` is no whole number from 2.
    """
    if type(group) is not int or group < 2:
        raise ScrimpError(
            f"weights int8: group must be a whole number from 2, not {group!r}; usual are 128 and 256"
        )
    return Int8(group=group, variant=variant, targets=None if targets is None else frozenset(targets))


def _linears(model: nn.Module, takes: Callable[[str], bool]) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the wanted linear layers within lists of layers, and so neither heads nor embeddings."""
    lists = tuple(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{each}.") for each in lists)
        if inside and type(module) is nn.Linear and takes(name.rpartition(".")[2]):
            yield name, module
