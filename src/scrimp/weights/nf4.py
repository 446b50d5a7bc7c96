"""NF4 weights: the decoder's matrices as frozen 4-bit codes, all else as it was.

As QLoRA trains: the linear layers of the decoder hold codes and never change, adapters beside them do.
Embeddings, the head, norms, biases and routers keep the model's precision. A matrix (m, n) takes
m n / 2 + m n / 64 bytes and a 256-th of the latter times four: 4.127 bits a weight, against 16. How codes are
made stands in `nf4_code`, how they multiply in `nf4_weight`.

Oddities:

- `state_dict` holds plain tensors: `weight_codes`, `weight_absmax`, `weight_second_scale` and
  `weight_offset` in place of `weight`. Either form loads: a full-precision `weight` is coded.
- An adapter learns to correct the decoded weights, so that those are what it is merged into, and the merged
  model's loss is that of training but for the merged weights' own rounding. Over the original weights, where
  plain peft lays it, the same adapter has another loss, by about what coding costs.
- GPT-2's transposed `Conv1D` and stacked experts are no `nn.Linear`, and stay as they are.

Why not bitsandbytes: its 0.50.2 on a CPU decodes wrongly, silently, where a row is no whole number of
groups (llama-60m's 1376), and loses input gradients after one evaluation. On CUDA its kernel decodes ours
where it is installed (`nf4_cuda`).

Source: QLoRA, Dettmers et al., NeurIPS 2023, arXiv 2305.14314.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.base.decoder_layers import decoder_layers
from scrimp.base.errors import ScrimpError
from scrimp.weights.coded import CodedLinear, by_weight, code_in_turn, materialize
from scrimp.weights.int8 import ROUTERS
from scrimp.weights.nf4_code import NF4Code
from scrimp.weights.nf4_weight import DTYPES, NF4Weight


class NF4Linear(CodedLinear):
    """An `nn.Linear` whose weight is an `NF4Weight`, and whose `state_dict` holds the weight's parts.

    Args:
        weight: The weight (out, in), as a parameter.
        bias: (out,), or None.
    """

    weight: NF4Weight

    def extra_repr(self) -> str:
        """Tell of the codes beside the sizes."""
        return f"{super().extra_repr()}, nf4 in groups of {self.weight.codec.group}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        weight = self.weight
        names = {part: f"{prefix}weight_{part}" for part in weight.parts}
        if all(name in state_dict for name in names.values()):
            parts = {part: state_dict.pop(name) for part, name in names.items()}
            for part, found in parts.items():
                if (found.shape, found.dtype) != (weight.parts[part].shape, weight.parts[part].dtype):
                    error_msgs.append(
                        f"{names[part]} is {tuple(found.shape)} {found.dtype} and not "
                        f"{tuple(weight.parts[part].shape)} {weight.parts[part].dtype}: it was saved with "
                        f"other options than {weight.codec}"
                    )
                    return
            state_dict[f"{prefix}weight"] = NF4Weight(parts, weight.codec, tuple(weight.shape))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NF4:
    """The parametrisation by 4-bit codes.

    Attributes:
        group: Elements that share an absmax.
        double: Whether absmax is coded too.
    """

    group: int = 64
    double: bool = True

    def apply(self, model: nn.Module) -> None:
        """Code the matrices of `model` in place, one after the other, and freeze them.

        Raises:
            ScrimpError: There is nothing to code, it is of a dtype that codes do not stand for, or it holds
                what is no finite number.
        """
        tied = by_weight(_linears(model))
        if not tied:
            raise ScrimpError(
                f"weights nf4: the decoder layers of model {type(model).__name__} have no linear layer; "
                "use weights dense"
            )
        code_in_turn(model, tied, self._code, NF4Linear)

    def materialize(self, model: nn.Module) -> None:
        """Decode every matrix of `model` in place, one after the other: they are plain `nn.Linear` again."""
        materialize(model, NF4Linear)

    def _code(self, name: str, weight: Tensor) -> NF4Weight:
        if weight.dtype not in DTYPES:
            raise ScrimpError(
                f"weights nf4: {name} is {weight.dtype}, and codes stand for bfloat16, float16 or float32; "
                "use one of those precisions"
            )
        codec = NF4Code(group=self.group, double=self.double, dtype=weight.dtype)
        coded = NF4Weight.of(weight.detach(), codec)
        if not (weight.is_meta or _is_finite(weight)):
            raise ScrimpError(
                f"weights nf4: {name} holds values that are not finite, and no group of them can be coded; "
                "mend the model's file"
            )
        made: Any = nn.Parameter(coded, requires_grad=False)
        return made  # type: ignore[no-any-return]


def nf4(group: int = 64, *, double: bool = True) -> NF4:
    """Build the nf4 parametrisation.

    Args:
        group: Elements that share an absmax: 64 in QLoRA. As in bitsandbytes a power of two, 32 to 4096.
        double: Code absmax in 8 bits too (4.127 bits a weight in groups of 64, instead of 4.5).

    Raises:
        ScrimpError: `group` is none of those.
    """
    if type(group) is not int or group not in {2**power for power in range(5, 13)}:
        raise ScrimpError(
            f"weights nf4: group must be a power of two from 32 to 4096, not {group!r}; usual is 64"
        )
    return NF4(group=group, double=double)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers within the decoder layers but routers."""
    within = {part for layer in decoder_layers(model) for part in layer.modules()}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module in within and name.rpartition(".")[2] not in ROUTERS:
            yield name, module


def _is_finite(weight: Tensor) -> bool:
    return bool(torch.isfinite(weight.detach().abs().amax()))
