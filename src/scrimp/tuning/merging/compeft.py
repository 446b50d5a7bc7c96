"""ComPEFT: an adapter as signs, positions and one number; a twentieth of its size and less.

    tau^ = alpha std(tau) sign(tau) [|tau| >= t]      t: the (d - floor(d k))-th smallest of d

k is the density; tau is the whole adapter as one vector, and std is over all of it, unpruned, with d - 1. For
LoRA tau is A and B themselves, as the authors take it: one adapter is compressed, never added to another, so
that A and B need no alignment, and dW is not sparse. For IA3 it is l - 1.

On disk, in `adapter_compeft.safetensors`: gaps between the kept entries in Rice's code, each tensor with its
own parameter b. Gap g (entries skipped) is g >> b in unary and b low bits; unary parts, low bits and signs
each form one stream of bits, which lets whole streams be coded at once. At a density of 0.2 this is 2 % above
the entropy of independent entries; where A is denser than B, below the entropy of the adapter as a whole.

Oddities: the threshold's rank keeps floor(d k) + 1 entries, one more than the paper's top k, as the released
code does. That code returns an adapter unchanged for k = 1; here all its entries become ternary.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scrimp.base.adapter_names import BASE, COMPRESSED, CONFIG, TENSORS
from scrimp.base.errors import ScrimpError
from scrimp.tuning.merging.reading import Adapter, new_folder, read_adapter, read_tensors

_FORMAT = 1
_ORIGIN = {"LORA": 0.0, "IA3": 1.0}
_DTYPES = {str(kind)[6:]: kind for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
_LARGEST_TABLE = 64 * 1024**2
# Of bits, one an element, or of whole numbers.
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Ternary:
    """A task vector of three values.

    Attributes:
        scale: Of every entry kept, 0-d float32.
        signs: By name: -1, 0 or 1, int8.
    """

    scale: Tensor
    signs: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Compressed:
    """What a compression came to.

    Attributes:
        file_bytes: Of the file.
        bound_bytes: The entropy of independent entries: d (H(k) + k) bits, and two bytes for the scale.
        half_bytes: What the adapter takes at two bytes an entry.
        entries: d.
        kept: Of these.
    """

    file_bytes: int
    bound_bytes: float
    half_bytes: int
    entries: int
    kept: int


def compress(vector: Mapping[str, Tensor], *, density: float = 0.2, alpha: float = 1.0) -> Ternary:
    """Return a task vector's ternary form.

    Args:
        vector: By name, any shapes and float dtypes.
        density: k, the share kept; the paper tries 0.05 to 0.5.
        alpha: Of the scale; the paper chooses it on validation data.

    Raises:
        ScrimpError: A density outside (0, 1], an alpha that is not positive, or no entries.

    References:
        ComPEFT, Yadav et al., 2023, arXiv 2311.13171.
    """
    if not 0 < density <= 1 or not 0 < alpha < math.inf:
        raise ScrimpError(
            f"compeft cannot use density {density} with alpha {alpha}; choose a density above 0, up to 1, "
            "and a positive alpha"
        )
    flat = torch.cat([torch.zeros(0), *(vector[name].detach().float().flatten() for name in sorted(vector))])
    if len(flat) < 2:
        raise ScrimpError(f"an adapter of {len(flat)} entries has no spread to keep; give a trained adapter")
    size = flat.abs()
    threshold = size.kthvalue(max(1, len(flat) - int(len(flat) * density))).values
    return Ternary(
        alpha * flat.std(),
        {name: (x.sign() * (x.float().abs() >= threshold)).to(torch.int8) for name, x in vector.items()},
    )


def decompress(ternary: Ternary) -> dict[str, Tensor]:
    """Return the task vector, float32."""
    return {name: signs * ternary.scale for name, signs in ternary.signs.items()}


def compress_adapter(folder: Path, out: Path, *, density: float = 0.2, alpha: float = 1.0) -> Compressed:
    """Write a compressed copy of a LoRA or IA3 adapter.

    Args:
        folder: In peft's form.
        out: Where: `adapter_config.json` and `adapter_compeft.safetensors`. It must not exist, or be empty.
        density: As in `compress`.
        alpha: As in `compress`.

    Raises:
        ScrimpError: No such adapter, or one that holds more than factors; as in `compress`; `out` is in use.
    """
    adapter = read_adapter(folder)
    origin = _origin(adapter)
    ternary = compress(
        {name: tensor.float() - origin for name, tensor in adapter.tensors.items()},
        density=density,
        alpha=alpha,
    )
    dtypes = {name: str(tensor.dtype)[6:] for name, tensor in adapter.tensors.items()}
    with new_folder(out) as new:
        _copy_settings(folder, new)
        _write(new / COMPRESSED, ternary, dtypes, origin)
        file_bytes = (new / COMPRESSED).stat().st_size
    entries = sum(tensor.numel() for tensor in adapter.tensors.values())
    kept = sum(int(signs.count_nonzero()) for signs in ternary.signs.values())
    return Compressed(file_bytes, entropy_bytes(entries, kept), 2 * entries, entries, kept)


def decompress_adapter(folder: Path, out: Path) -> None:
    """Write a compressed adapter as an ordinary one, which plain peft loads.

    Args:
        folder: What `compress_adapter` wrote.
        out: Where. It must not exist, or be empty.

    Raises:
        ScrimpError: There is no compressed adapter, it is damaged, or `out` is in use.
    """
    from safetensors.torch import save_file

    if not (folder / COMPRESSED).is_file():
        raise ScrimpError(f"{folder} holds no {COMPRESSED}; give a folder that a compression wrote")
    try:
        ternary, dtypes, origin = _read(folder / COMPRESSED)
    except ScrimpError:
        raise
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, zlib.error) as error:
        raise ScrimpError(f"{folder / COMPRESSED} is damaged ({error}); copy or make it again") from error
    tensors = {
        name: (tensor + origin).to(_DTYPES[dtypes[name]]) for name, tensor in decompress(ternary).items()
    }
    with new_folder(out) as new:
        _copy_settings(folder, new)
        save_file(tensors, new / TENSORS, {"format": "pt"})


def entropy_bytes(entries: int, kept: int) -> float:
    """Return what `kept` signed entries among `entries` take at the least, with a half-precision scale."""
    share = kept / entries
    positions = -sum(p * math.log2(p) for p in (share, 1 - share) if p)
    return entries * (positions + share) / 8 + 2


def _origin(adapter: Adapter) -> float:
    kind = adapter.config.get("peft_type")
    if kind not in _ORIGIN:
        raise ScrimpError(
            f"{adapter.folder} is {kind}, and compeft is for LoRA and IA3; compress one of these"
        )
    parts = (".lora_A.weight", ".lora_B.weight", ".ia3_l")
    other = [name for name in adapter.tensors if not name.endswith(parts)]
    if other:
        raise ScrimpError(
            f"{adapter.folder} holds {other[0]}, which has no meaning as three values; "
            "compress adapters of plain LoRA or IA3 alone"
        )
    return _ORIGIN[kind]


def _copy_settings(folder: Path, new: Path) -> None:
    for name in (CONFIG, BASE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, new / name)


def _write(path: Path, ternary: Ternary, dtypes: Mapping[str, str], origin: float) -> None:
    from safetensors.torch import save_file

    rows, streams = [], []
    for name in sorted(ternary.signs):
        signs = ternary.signs[name].flatten().numpy()
        places = np.flatnonzero(signs)
        skipped = np.diff(places, prepend=-1) - 1
        low = _rice(len(signs), len(places))
        rows.append([name, list(ternary.signs[name].shape), dtypes[name], len(places), low])
        streams.append((_unary(skipped >> low), _low_bits(skipped, low), signs[places] > 0))
    table = json.dumps({"format": _FORMAT, "origin": origin, "tensors": rows}).encode()
    tensors = {
        "table": _bytes(zlib.compress(table, 9)),
        "scale": ternary.scale.reshape(1),
        **{
            name: _pack(parts)
            for name, parts in zip(("unary", "low", "signs"), zip(*streams, strict=True), strict=True)
        },
    }
    save_file(tensors, path)


def _read(path: Path) -> tuple[Ternary, dict[str, str], float]:
    stored = read_tensors(path)
    unpacker = zlib.decompressobj()
    table = json.loads(unpacker.decompress(stored["table"].numpy().tobytes(), _LARGEST_TABLE))
    if table["format"] != _FORMAT:
        raise ScrimpError(
            f"{path} has format {table['format']}, and this version reads {_FORMAT}; update scrimp"
        )
    unary, low_bits, signs = (np.unpackbits(stored[name].numpy()) for name in ("unary", "low", "signs"))
    ends = np.flatnonzero(unary)
    quotients = np.diff(ends, prepend=-1) - 1
    result, dtypes = {}, {}
    at = bit = 0
    for name, shape, dtype, count, low in table["tensors"]:
        if at + count > min(len(quotients), len(signs)) or bit + count * low > len(low_bits):
            raise ValueError(f"{name} is cut off")
        skipped = (quotients[at : at + count] << low) | _numbers(
            low_bits[bit : bit + count * low], count, low
        )
        places = np.cumsum(skipped + 1) - 1
        flat = np.zeros(math.prod(shape), dtype=np.int8)
        flat[places] = signs[at : at + count].astype(np.int8) * 2 - 1
        result[name], dtypes[name] = torch.from_numpy(flat).view(shape), dtype
        at, bit = at + count, bit + count * low
    return Ternary(stored["scale"][0], result), dtypes, float(table["origin"])


def _rice(size: int, count: int) -> int:
    """Return the number of low bits for `count` entries kept among `size`."""
    # A geometric gap of mean g costs least where 2^b is near its median, g log 2.
    mean = (size - count) / max(count, 1)
    return max(0, round(math.log2(max(1.0, mean * math.log(2)))))


def _unary(numbers: Array) -> Array:
    """Return each number as that many zeros and a one."""
    ends = np.cumsum(numbers + 1) - 1
    bits = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=np.uint8)
    bits[ends] = 1
    return bits


def _low_bits(numbers: Array, width: int) -> Array:
    return (numbers[:, None] >> np.arange(width) & 1).astype(np.uint8).ravel()


def _numbers(bits: Array, count: int, width: int) -> Array:
    whole: Array = (bits.reshape(count, width).astype(np.int64) << np.arange(width)).sum(1)
    return whole


def _pack(parts: Iterable[Array]) -> Tensor:
    return torch.from_numpy(np.packbits(np.concatenate(list(parts))))


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
