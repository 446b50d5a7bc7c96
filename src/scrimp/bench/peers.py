"""Other people's packages as contestants: by name, and whether they are there.

Free of torch and of the packages themselves, so that names are checked and missing packages listed at
once. A peer is named by its package (`galore-torch`: the best-known method in it) or by `PACKAGE:CLASS`.
Any optimizer class of torch or pytorch-optimizer is a peer too, although only those with settings of
their own are in the table.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from scrimp.base.errors import ScrimpError
from scrimp.base.suggest import did_you_mean
from scrimp.bench import machine
from scrimp.bench.peer_table import LION_LR, PEERS, PROJECTED_LR, Peer

__all__ = ["PEERS", "Peer", "install_line", "installed_version", "peer"]

BUILT_IN = ("torch", "transformers", "peft")  # what scrimp itself depends on

# Any optimizer class of these packages is a peer: the module, the file, and the list that names them.
_OPEN = {
    "torch": ("torch", "optim/__init__.py", "__all__"),
    "pytorch-optimizer": ("pytorch_optimizer", "optimizer/__init__.py", "OPTIMIZER_LIST"),
}
_NO_CLASS = {"OPTIMIZER_LIST", "Optimizer", "OptimizerType"}
_OPEN_LR = {
    "Lion": LION_LR,
    "GaLore": PROJECTED_LR,
    "Fira": PROJECTED_LR,
    "APOLLO": PROJECTED_LR,
}


def peer(name: str) -> Peer:
    """Return the peer of that name.

    Raises:
        ScrimpError: There is none; the message names the nearest.
    """
    for known in PEERS:
        if known.name == name:
            return known
    package, _, title = name.partition(":")
    if package not in _OPEN:
        raise ScrimpError(f"there is no peer {name}{did_you_mean(name, (p.name for p in PEERS))}")
    return _any_class(package, title)


def _any_class(package: str, title: str) -> Peer:
    """Make a peer of any optimizer class; where the package is missing every name will do."""
    known = _class_names(package)
    if not title or (known and title not in known):
        raise ScrimpError(
            f"{package} has no optimizer {title!r}{did_you_mean(title, known)}; name one as {package}:CLASS"
        )
    return Peer(
        name=f"{package}:{title}",
        title=title,
        adapt="scrimp.bench.any_class:any_class",
        lr_ratio=_OPEN_LR.get(title, 1.0),
        settings={"package": package, "class": title},
        summary=f"{package}'s {title} with its own defaults",
    )


def _class_names(package: str) -> set[str]:
    """Read which optimizers a package offers from its files; empty if it is not installed."""
    module, inside, listed = _OPEN[package]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return set()
    tree = ast.parse((Path(spec.origin).parent / inside).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        target = getattr(node, "target", None) or next(iter(getattr(node, "targets", [])), None)
        if isinstance(target, ast.Name) and target.id == listed:
            names = {getattr(part, "id", getattr(part, "value", "")) for part in ast.walk(node)}
            return {name for name in names if isinstance(name, str) and name[:1].isupper()} - _NO_CLASS
    return set()


def installed_version(peer: Peer) -> str | None:
    """Return the version of a peer's package, or None; nothing is imported."""
    return machine.installed_version(peer.package)


def install_line(peer: Peer) -> str:
    """Return what a user types to have a peer's package."""
    return "pip install scrimp" if peer.package in BUILT_IN else "pip install 'scrimp[oracles]'"
