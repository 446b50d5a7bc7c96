"""Every byte that tensors hold, after each of torch's operations.

A dispatch mode sees each operation's outputs. A storage counts from the operation that made it to the
one after which it died (views share storages), so the live bytes after every operation are known, on
fake tensors as on real ones.

Two things it must repair to see the truth:

- A dispatch mode changes the run that it watches: the autograd engine adds to a sum of gradients in place
  where nobody else holds it, and scatters into zeros in place, but not while a mode is active. Such an
  operation is recognised (its Python frame is the engine's own, and a sum is as unshared as that of a known
  graph) and done in place.
- What a kernel allocates and frees inside is invisible: `scrimp.memory.scratch` knows it by operation.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scrimp.memory.scratch import Kernels, scratch_bytes
from scrimp.memory.state_bytes import plain
from scrimp.memory.work import Work

aten = torch.ops.aten

_ENGINE = "_engine_run_backward"  # the frame of torch.autograd.graph that C++ runs the backward pass in
# What the engine, and derivatives written in C++, do in place as long as no dispatch mode is active.
_IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.index_put.default: aten.index_put_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter_add.default: aten.scatter_add_.default,
}


@dataclass(slots=True)
class Storage:
    """A storage that was seen.

    Attributes:
        size: Bytes.
        born: The operation that made it.
        died: The last operation it was alive after; None while it lives.
    """

    size: int
    born: int
    died: int | None = None


@dataclass(slots=True)
class Record:
    """What a tracker saw.

    Attributes:
        operations: Names, in order; operation i is point i + 1, and point 0 is the start.
        storages: Every storage that was made.
        scratch: Bytes inside an operation beyond its outputs, by point.
        marks: Points that were named, by name.
        ends: Points at which a forward pass ended.
        work: What the operations cost.
    """

    operations: list[str] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    scratch: dict[int, int] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    work: Work = field(default_factory=Work)


class Tracker(TorchDispatchMode):
    """Records the storages that operations make.

    Args:
        existing: Tensors that are there already and do not count.
        granularity: What the allocator rounds a size up to: 1 on a CPU, 512 on CUDA.
        kernels: Whose scratch memory counts.
        threads: How many threads run a CPU's kernels; None is as many as torch now has.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile trace a function, such as an optimizer's step, while this is on."""
        return True

    def __init__(
        self,
        existing: Iterable[Tensor] = (),
        *,
        granularity: int = 1,
        kernels: Kernels = "cpu",
        threads: int | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = Record()
        self._granularity = granularity
        self._scratch = partial(scratch_bytes, kernels=kernels, threads=threads)
        self._seen: dict[int, Any] = {}  # storage address -> (index or None, weak reference)
        self._fresh = (0, 0)  # how many hold an unshared sum and its storage; before calibration none is
        self._calibrating = False
        for tensor in existing:
            self._watch(tensor.untyped_storage(), None)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Refuse the two frames that torch would put around `__torch_dispatch__`: the caller's is needed."""
        return False

    @property
    def point(self) -> int:
        """How many operations were seen."""
        return len(self.record.operations)

    def mark(self, name: str) -> None:
        """Name the current point; the first of a name stays."""
        self.record.marks.setdefault(name, self.point)

    def forward_ended(self) -> None:
        """Tell that a forward pass ended: what was made in it and lives on is an activation."""
        self.record.ends.append(self.point)

    def index_of(self, tensor: Tensor) -> int | None:
        """Return the index of a tensor's storage in the record; None where it was there before."""
        entry = self._seen.get(tensor.untyped_storage()._cdata)
        return None if entry is None else entry[0]

    def forget(self) -> None:
        """Take what is alive now as given: a new record begins."""
        self.record = Record()
        self._seen = {key: (None, entry[1]) for key, entry in self._seen.items()}

    def calibrate(self) -> None:
        """Learn how unshared a sum is that the engine adds to in place; to be called with the mode active."""
        self._calibrating = True
        with torch.enable_grad():
            leaf = torch.ones(2, requires_grad=True)
            twice = leaf * 2
            (twice.sin() * twice.cos()).sum().backward()
        self._calibrating = False
        self.forget()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # no operation, and two thirds of what fake tensors ask
        if func in _IN_PLACE and sys._getframe(1).f_code.co_name == _ENGINE:
            func, args = self._in_place(func, args, kwargs)
        out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        record = self.record
        record.operations.append(func.__name__)
        made = False
        for leaf in out if isinstance(out, (tuple, list)) else (out,):
            for tensor in leaf if isinstance(leaf, (tuple, list)) else (leaf,):
                for part in plain(tensor) if isinstance(tensor, Tensor) else ():
                    made |= self._watch(part.untyped_storage(), self.point)
        if (extra := self._scratch(func, args, out)) > 0:
            record.scratch[self.point] = extra
        if made or func._schema.is_mutable:
            record.work.add(func, args, kwargs, out)

    def _watch(self, storage: torch.UntypedStorage, point: int | None) -> bool:
        key = storage._cdata
        if key in self._seen:
            return False
        index = None
        if point is not None:
            size = -(-storage.nbytes() // self._granularity) * self._granularity
            index = len(self.record.storages)
            self.record.storages.append(Storage(size, point))
        self._seen[key] = (index, weakref.ref(storage, self._death(key)))
        return True

    def _death(self, key: int) -> Callable[[Any], None]:
        def died(_: Any) -> None:
            index, _ = self._seen.pop(key)
            if index is not None:
                self.record.storages[index].died = self.point

        return died

    def _in_place(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...]]:
        """Return what the engine does where no dispatch mode is active."""
        if func is not aten.add.Tensor:
            return _IN_PLACE[func], args
        first, second = args
        if kwargs or not isinstance(second, Tensor) or first.shape != second.shape:
            return func, args
        shares = _shares(first)
        if self._calibrating:
            self._fresh = shares
        # The first is the sum so far. The engine never adds to the second, which its maker holds too.
        unshared = shares[0] <= self._fresh[0] and shares[1] <= self._fresh[1]
        return (_IN_PLACE[func] if unshared and _is_dense(first) else func), args


def _is_dense(tensor: Tensor) -> bool:
    """Tell whether a tensor's elements fill its extent without overlap."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != extent:
            return False
        extent *= size
    return True


def _shares(tensor: Tensor) -> tuple[int, int]:
    """Return how many hold a tensor and its storage."""
    storage = tensor.untyped_storage()
    return tensor._use_count(), torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in a nested structure."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
