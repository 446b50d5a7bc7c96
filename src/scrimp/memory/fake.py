"""A model without its bytes: the real one of transformers, on fake tensors.

It is made on the `meta` device (half a second for 70B), where adapters can be put around it too, and then
every parameter, buffer and plain tensor is replaced by a fake CPU tensor of the same shape, stride and
dtype; ties stay tied. `meta` itself would not do: attention takes another path there.

Questions that only real values answer are answered beforehand, and remembered (`Simulation`):

- Rows hold one sequence each. A model asks its position ids by value, and when it cannot see them it builds
  a (batch, 1, seq, seq) mask that the real run has not.
- A mixture's tokens go where a `Routing` says. Only the eager loop over experts asks; a grouped product
  has the same bytes wherever they go.
- Any other number is 1, any other condition False, and of a mask every element is chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from scrimp.memory.state_bytes import plain

aten = torch.ops.aten

Routing = Literal["balanced", "one"]


class Simulation(FakeTensorMode):
    """Fake tensors that answer what only real ones know.

    Args:
        routing: Where the tokens of a mixture go: `balanced`, the same number to every expert; `one`, each
            token to the last expert first, and the rest of its choices evenly to the others: the routing
            that needs the most memory.

    Attributes:
        answers: Who asked, and what they were told.
    """

    def __init__(self, routing: Routing = "balanced") -> None:
        super().__init__()
        self.answers: list[str] = []
        self._routing = routing
        self._experts = 1
        self._turn = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Any = {},  # noqa: B006 - as torch has it; never written to
    ) -> Any:
        """Run an operation, or answer it."""
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._number(args[0])
        if func is aten.nonzero.default:
            return self._nonzero(args[0])
        if func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return _grouped_product(*args[:3])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _number(self, tensor: FakeTensor) -> Any:
        if tensor.constant is not None:
            return tensor.constant.item()
        answer = torch.ones((), dtype=tensor.dtype).item() if tensor.dtype != torch.bool else False
        self._remember(f"was told {answer!r}")
        return answer

    def _nonzero(self, mask: Tensor) -> Tensor:
        """Answer which elements are not zero: how many, since bytes depend on no more.

        A mixture asks first for its experts that were hit, a vector with one place more than there are
        experts, and then for each of them which of (choices, tokens) are its own.
        """
        if mask.ndim == 1:
            self._experts, self._turn = max(1, mask.numel() - 1), 0
            rows = self._experts
        elif mask.ndim == 2:
            self._turn += 1
            rows = self._rows(*mask.shape)
        else:
            rows = mask.numel()
        self._remember(f"was told that {rows} of {mask.numel()} are not zero")
        return mask.new_empty((rows, mask.ndim), dtype=torch.int64)

    def _rows(self, choices: int, tokens: int) -> int:
        """Return how many tokens go to the expert whose turn it is."""
        if self._routing == "balanced" or self._experts == 1:
            return -(-choices * tokens // self._experts)
        if self._turn == self._experts:
            return tokens
        return max(1, (choices - 1) * tokens // (self._experts - 1))

    def _remember(self, answer: str) -> None:
        frame: Any = sys._getframe(2)
        while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
            frame = frame.f_back
        said = f"{frame.f_code.co_qualname} {answer}"
        if said not in self.answers:
            self.answers.append(said)


def _grouped_product(first: Tensor, second: Tensor, ends: Tensor) -> Tensor:
    """Return the result of a grouped product on a CPU; torch's own rule for fake tensors takes bf16 alone."""
    rows, columns = first.shape[-2], second.shape[-1]
    if first.ndim == second.ndim:
        return first.new_empty((len(ends) if first.ndim == 2 else len(first), rows, columns))
    return first.new_empty((rows, columns))


def _is_inside(filename: str) -> bool:
    """Tell whether a file belongs to what carries a question, not to who asks."""
    return "/torch/" in filename or "/scrimp/memory/" in filename


def to_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every tensor of a model on `meta` by a fake CPU tensor, in place."""
    memo: dict[int, Any] = {}

    def replaced(tensor: Any) -> Any:
        if id(tensor) not in memo:
            if hasattr(tensor, "__tensor_flatten__"):  # a subclass, made of other tensors
                names, context = tensor.__tensor_flatten__()
                parts = {name: replaced(getattr(tensor, name)) for name in names}
                fake = type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
            else:
                with mode:
                    fake = torch.empty_strided(
                        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                    )
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = fake
        return memo[id(tensor)]

    for module in model.modules():
        own = vars(module)  # among it the parameters and buffers, and peft's dictionary of a prompt's tokens
        dictionaries: list[dict[Any, Any]] = [value for value in own.values() if type(value) is dict]
        for tensors in [own, *dictionaries]:
            for name, value in list(tensors.items()):
                if isinstance(value, Tensor):
                    tensors[name] = replaced(value)


@contextmanager
def simulation(routing: Routing = "balanced") -> Iterator[Simulation]:
    """Enter a mode in which tensors have no bytes, with questions about values answered.

    Args:
        routing: As in `Simulation`.
    """
    from transformers import masking_utils

    mode = Simulation(routing)
    asked = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _not_packed
    try:
        with mode:
            yield mode
    finally:
        masking_utils.find_packed_sequence_indices = asked


def _not_packed(position_ids: Tensor) -> None:
    """Stand in for transformers' test of position ids."""


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Return a model's parameters and buffers, and what else it keeps as attributes, as plain tensors."""
    values: list[Any] = [value for module in model.modules() for value in vars(module).values()]
    found = [*model.parameters(), *model.buffers(), *(t for t in values if isinstance(t, Tensor))]
    return [part for tensor in found for part in plain(tensor)]
