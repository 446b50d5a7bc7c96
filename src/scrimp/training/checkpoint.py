"""Checkpoints that can be trusted: complete or absent, and checked before they are used.

    RUN/checkpoints/step-00000123/
        model.safetensors       the model's tensors
        optimizer.safetensors   the optimizer's, as PARAMETER/KEY
        state.json              everything else the loop needs, plain data
        manifest.json           written last: format, step, model, each file's size and SHA-256

A checkpoint is made under a temporary name and renamed (see `scrimp.base.files`), so at no instant
is there no complete one. The manifest carries a checksum of itself; every later format must keep
that rule, for it is how a newer format is told from a damaged file. No file is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scrimp.base import files
from scrimp.base.errors import ScrimpError

if TYPE_CHECKING:  # finding and verifying a checkpoint needs no torch
    from torch import Tensor

FORMAT = 1
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
_PREFIX = "step-"


class DamagedCheckpointError(ScrimpError):
    """A checkpoint's files are not what its manifest says; `reason` says how, without the path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"the checkpoint {path} is damaged: {reason}; use an earlier one")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Found:
    """The newest checkpoint that can be used, and the newer ones that cannot."""

    path: Path | None
    damaged: list[tuple[Path, str]]  # newest first, each with the reason


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies in the folder of checkpoints."""
    return folder / f"{_PREFIX}{step:08d}"


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.rpartition(_PREFIX)[2])


def save(
    folder: Path,
    *,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    identity: str,
) -> Path:
    """Write a checkpoint; one of the same step is replaced.

    Args:
        folder: The folder of checkpoints, `RUN/checkpoints`; made where it is missing.
        step: Optimizer steps done.
        model: The model's tensors; tied ones are saved once, under the first name.
        optimizer: What `optimizer_tensors` returns.
        state: Plain data for JSON, without infinities and NaN.
        identity: What tells this model from others; resuming compares it.

    Returns:
        The checkpoint's folder.

    Raises:
        ScrimpError: The disk is full, or the folder may not be written to; no earlier checkpoint
            is lost by that.

    Memory: one tensor's bytes on the host at most.
    """
    from scrimp.training.safetensors_stream import without_ties, write_tensors

    path = checkpoint_path(folder, step)
    with files.explained(folder):
        if not folder.exists():
            files.make_directory(folder)
            files.fsync_directory(folder.parent)
    tensors = {MODEL: without_ties(model)[0], OPTIMIZER: optimizer}
    with files.atomic_directory(path) as partial:
        entries = {}
        for name, content in tensors.items():
            # Other readers of this format ask the header for its framework.
            written = write_tensors(partial / name, content, {"format": "pt"})
            entries[name] = {"bytes": written.size, "sha256": written.sha256}
        entries[STATE] = _write_hashed(partial / STATE, _to_json(state))
        manifest = {"format": FORMAT, "step": step, "model": identity, "files": entries}
        _write_hashed(partial / MANIFEST, _to_json({**manifest, "checksum": _checksum(manifest)}))
    return path


def verify(path: Path, *, identity: str | None = None) -> None:
    """Read every byte of a checkpoint and compare it with the manifest.

    Args:
        path: The checkpoint's folder.
        identity: The model it must be of; None for any.

    Raises:
        DamagedCheckpointError: A file is missing, shorter, longer or altered.
        ScrimpError: It is of another model, or of a format that this version cannot read.
    """
    manifest = _read_manifest(path)
    if manifest["format"] > FORMAT:
        raise ScrimpError(
            f"the checkpoint {path} has format {manifest['format']}, and this version reads up to "
            f"{FORMAT}: install a newer scrimp"
        )
    if identity is not None and manifest["model"] != identity:
        raise ScrimpError(
            f"the checkpoint {path} is of another model ({manifest['model']}, not {identity}): "
            "choose another --out, or give the options it was made with"
        )
    for name, entry in manifest["files"].items():
        _check_file(path, name, entry)


def find_usable(folder: Path, *, identity: str | None = None) -> Found:
    """Look for the newest checkpoint that is whole, reading it and any damaged newer one in full.

    Nothing is changed on the disk, so this also works on a folder that a killed program left and
    that `files.recover` has not seen.

    Raises:
        ScrimpError: The newest one that is whole is of another model, or of a newer format.
    """
    damaged = []
    for path in _candidates(folder):
        try:
            verify(path, identity=identity)
        except DamagedCheckpointError as error:
            damaged.append((path, error.reason))
        else:
            return Found(path, damaged)
    return Found(None, damaged)


def read_state(path: Path) -> dict[str, Any]:
    """Return the plain data that was saved with a checkpoint.

    Raises:
        DamagedCheckpointError: It cannot be read.
    """
    return _read_object(path, STATE)


def read_model_into(path: Path, model: Mapping[str, Tensor]) -> None:
    """Fill a model's tensors in place, one by one, tied ones once.

    Raises:
        ScrimpError: A name, dtype or shape differs.
    """
    from scrimp.training.safetensors_stream import read_tensors_into, without_ties

    read_tensors_into(path / MODEL, without_ties(model)[0])


def prune(folder: Path, *, step: int, keep: int, best: int | None = None) -> None:
    """Delete all checkpoints but the newest `keep` and the best.

    Args:
        folder: The folder of checkpoints.
        step: The step just saved. Later ones are of a future that a resume from an earlier
            checkpoint has abandoned (they were damaged): they go, and never count as the newest.
        keep: How many, at least one.
        best: The step of the checkpoint to keep besides.

    Raises:
        ScrimpError: One may not be deleted.
    """
    paths = _checkpoints(folder)
    newest = sorted((found for found in paths if found <= step), reverse=True)[: max(1, keep)]
    for found, path in paths.items():
        if found not in (*newest, best):
            files.discard(path)


def _write_hashed(path: Path, text: str) -> dict[str, Any]:
    with files.hashed_file(path) as file:
        file.write(text.encode())
        return {"bytes": file.size, "sha256": file.sha256}


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _checksum(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _read_object(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((path / name).read_bytes())
    except FileNotFoundError:
        raise DamagedCheckpointError(path, f"{name} is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(path, f"{name} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise DamagedCheckpointError(path, f"{name} is not a JSON object")
    return value


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_object(path, MANIFEST)
    checksum = manifest.pop("checksum", None)
    if checksum != _checksum(manifest):
        raise DamagedCheckpointError(path, f"{MANIFEST} does not match its own checksum")
    return manifest


def _check_file(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    file = path / name
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise DamagedCheckpointError(path, f"{name} has {size} bytes instead of {entry['bytes']}")
        if files.hash_file(file) != entry["sha256"]:
            raise DamagedCheckpointError(path, f"{name} does not match its hash")
    except FileNotFoundError:
        raise DamagedCheckpointError(path, f"{name} is missing") from None
    except OSError as error:
        raise DamagedCheckpointError(path, f"{name} cannot be read ({error.strerror})") from error


def _checkpoints(folder: Path) -> dict[int, Path]:
    return {
        step_of(path): path
        for path in folder.glob(f"{_PREFIX}*")
        if path.is_dir() and path.name.removeprefix(_PREFIX).isdecimal()
    }


def _candidates(folder: Path) -> list[Path]:
    """Return all that may be a complete checkpoint, newest first, successors before predecessors."""
    found = []
    for path in folder.glob(f"*{_PREFIX}*"):
        step = path.name.rpartition(_PREFIX)[2]
        if not step.isdecimal():
            continue
        final = checkpoint_path(folder, int(step))
        if path in (final, files.set_aside(final)):
            found.append((int(step), path == final, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def check_model(path: Path, identity: str) -> None:
    """Refuse a checkpoint of another model, without reading its tensors.

    Raises:
        ScrimpError: It is of another model.
    """
    found = _read_manifest(path)["model"]
    if found != identity:
        raise ScrimpError(f"the checkpoint {path} is of another model: choose another --out")


def complete(folder: Path) -> list[Path]:
    """Return every checkpoint that is whole, oldest first, reading them in full."""
    whole = []
    for _, path in sorted(_checkpoints(folder).items()):
        with contextlib.suppress(DamagedCheckpointError):
            verify(path)
            whole.append(path)
    return whole


def holds(path: Path, model: Mapping[str, Tensor]) -> bool:
    """Tell whether a checkpoint's model has these very bits, reading it tensor by tensor."""
    import torch
    from safetensors import safe_open

    from scrimp.training.safetensors_stream import without_ties

    def raw(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)

    with safe_open(path / MODEL, framework="pt") as stored:
        tensors = without_ties(model)[0]
        return set(stored.keys()) == set(tensors) and all(
            torch.equal(raw(stored.get_tensor(name)), raw(tensor)) for name, tensor in tensors.items()
        )
