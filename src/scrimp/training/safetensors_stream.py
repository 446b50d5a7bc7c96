"""Safetensors files, written and read one tensor at a time.

The stock `save_file` first copies every tensor that is not on the CPU, the whole model and its
optimizer state at once; the stock reader maps the file, and what it maps counts as resident
memory. Here a save holds at most one tensor's copy on the host, the hash is taken in the same
pass, and a read goes straight into the memory of the tensor it is for.

The format: eight bytes with the header's length, the header as JSON (`dtype`, `shape` and
`data_offsets` for every name, strings under `__metadata__`), and the tensors end to end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from scrimp.base.errors import ScrimpError
from scrimp.base.files import HashedFile, hashed_file
from scrimp.base.paged import release

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
# The stock reader's own limit: a header beyond it is damage, not a large model.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a file, and what it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file holds."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: for the manifest."""

    size: int
    sha256: str


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Written:
    """Write a new safetensors file; any dtype but fp8's rarer forms, any strides, any device.

    `tensors` is asked for each tensor twice, first for its shape and then for its values, and no
    tensor is held longer than it takes to write it, so the mapping may make them as it is asked.
    Tensors that share memory are written as often as they are named; see `without_ties`.

    Args:
        path: A new file; it is not synced (see `files.atomic_directory`).
        tensors: The tensors by name.
        metadata: Strings for the header.

    Raises:
        ScrimpError: The disk is full, or the folder may not be written to.

    Memory: one tensor's bytes on the host where it is on another device or not contiguous, else 0.
    """
    header, order = _encode_header(tensors, metadata or {})
    with hashed_file(path) as file:
        file.write(header)
        for name in order:
            _write_tensor(file, tensors[name])
        return Written(file.size, file.sha256)


def read_header(path: Path) -> Header:
    """Read the names, dtypes and shapes of a safetensors file, and no tensor.

    Raises:
        ScrimpError: The file is absent, or is not a whole safetensors file.
    """
    try:
        with path.open("rb") as file:
            return _decode_header(file, path.stat().st_size)
    except OSError as error:
        raise ScrimpError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ScrimpError(f"{path} is damaged: {error}") from error


def read_tensors_into(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets`, one by one and in place, with the tensors of those names in the file.

    Raises:
        ScrimpError: The names, a dtype or a shape differ (nothing has been changed then), or the
            file is absent or damaged.

    Memory: 0 for contiguous targets on the CPU, else one tensor's bytes on the host.
    """
    stored = read_header(path).tensors
    _check_names(path, stored, targets)
    for name, target in targets.items():
        _check_fits(path, name, stored[name], target)
    with path.open("rb", buffering=0) as file:
        for name, target in targets.items():
            _read_tensor(file, path, stored[name], target)


def without_ties(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Keep one name of each tensor that is there under several, as tied embeddings are.

    Two names are tied when they show the same memory in the same way. Tensors that merely overlap
    are not.

    Returns:
        The tensors under their first names, and for every further name the first one.
    """
    kept: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        # Empty tensors all have the address 0, and sharing nothing is not being tied.
        if tensor.numel() and view in first:
            ties[name] = first[view]
        else:
            first[view] = name
            kept[name] = tensor
    return kept, ties


def _encode_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    kinds = {name: _kind(tensors[name]) for name in tensors}  # `items` would hold on to the last one
    # Widest elements first, so that every tensor starts at a multiple of its element's size.
    order = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    offset = 0
    for name in order:
        dtype, shape = kinds[name]
        if dtype not in _NAMES:
            raise TypeError(f"{name} is of {dtype}, which safetensors files cannot hold")
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _kind(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    return tensor.dtype, tuple(tensor.shape)


def _write_tensor(file: HashedFile, tensor: Tensor) -> None:
    # A call of its own, so that the copy is gone before the next tensor is asked for.
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
    file.write(_bytes_of(plain))
    release(tensor)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor: no copy, whatever its dtype."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _decode_header(file: BinaryIO, file_size: int) -> Header:
    length = int.from_bytes(file.read(8), "little")
    start = 8 + length
    if length > _MAX_HEADER_BYTES or start > file_size:
        raise ValueError("its header does not fit into it")
    entries = json.loads(file.read(length))
    metadata = entries.pop(_METADATA, {})
    tensors = {}
    for name, entry in entries.items():
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize or start + end > file_size:
            raise ValueError(f"the place of {name} does not fit its shape or the file")
        tensors[name] = StoredTensor(dtype, shape, start + begin, end - begin)
    return Header(tensors, metadata)


def _check_names(path: Path, stored: Mapping[str, object], targets: Mapping[str, object]) -> None:
    for name in targets:
        if name not in stored:
            raise ScrimpError(f"{path} holds no tensor {name!r}: it is of another model or optimizer")
    for name in stored:
        if name not in targets:
            raise ScrimpError(f"{path} holds {name!r} besides: it is of another model or optimizer")


def _check_fits(path: Path, name: str, stored: StoredTensor, target: Tensor) -> None:
    if (stored.dtype, stored.shape) != _kind(target):
        raise ScrimpError(
            f"{name!r} in {path} is {_describe(stored.dtype, stored.shape)}, and "
            f"{_describe(*_kind(target))} is wanted: it is of another model or precision"
        )


def _describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} of shape {list(shape)}"


def _read_tensor(file: BinaryIO, path: Path, stored: StoredTensor, target: Tensor) -> None:
    direct = target.device.type == "cpu" and target.is_contiguous() and not target.is_conj()
    host = target.detach() if direct else torch.empty(stored.shape, dtype=stored.dtype)
    file.seek(stored.offset)
    rest = _bytes_of(host)
    while rest:
        count = file.readinto(rest)  # type: ignore[attr-defined]  # BinaryIO lacks what FileIO has
        if not count:
            raise ScrimpError(f"{path} is damaged: it ends too early")
        rest = rest[count:]
    if not direct:
        with torch.no_grad():
            target.copy_(host)
    release(target)
