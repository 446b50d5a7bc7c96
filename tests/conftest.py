"""What every test stands on: no network, no cache of the user's, one thread, a seeded generator.

Tests run under stricter rules than users do: warnings are errors (pyproject.toml), and any connection
that leaves the machine fails as it does with the cable pulled, so that a test that needs the network
shows itself. The environment is set before torch is imported, since torch reads it once; programs that
a test starts inherit it.
"""

from __future__ import annotations

import errno
import gc
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

# Two workers share two cores (pyproject.toml), and the same thread count gives the same bits everywhere.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Output under test is the same whatever terminal pytest was started from.
os.environ["COLUMNS"] = "120"
for _name in ("FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE"):
    os.environ.pop(_name, None)

# One home for all workers, who inherit it from the process that starts them: a kernel is built once, a model
# traced once.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _home = tempfile.TemporaryDirectory(prefix="scrimp-tests-", ignore_cleanup_errors=True)
    for _name in ("XDG_CACHE_HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ[_name] = os.path.join(_home.name, _name.lower())  # noqa: PTH118 - a plain string is wanted

_LOCAL = ("127.0.0.1", "::1", "localhost")


def _is_local(address: Any) -> bool:
    """Tell whether a socket address stays on this machine: a path (AF_UNIX), or loopback."""
    return not isinstance(address, tuple) or address[0] in _LOCAL


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Let no connection and no look-up of a name leave the machine."""

    def guard(real: Any, name: str) -> Any:
        def guarded(self: socket.socket, address: Any) -> Any:
            if not _is_local(address):
                raise OSError(errno.ENETUNREACH, f"tests have no network: {name} to {address!r}")
            return real(self, address)

        return guarded

    def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        if host is not None and host not in _LOCAL:
            raise socket.gaierror(socket.EAI_NONAME, f"tests have no network: look-up of {host!r}")
        return real_getaddrinfo(host, *args, **options)

    real_getaddrinfo = socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard(socket.socket.connect, "connect"))
        patch.setattr(socket.socket, "connect_ex", guard(socket.socket.connect_ex, "connect_ex"))
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


@pytest.fixture(autouse=True, scope="module")
def frozen_modules() -> None:
    """Let no collection walk what is imported by now: every run collects, and a process of tests holds a lot.

    Garbage is collected first, so that nothing which could be freed is kept.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def generator() -> Any:
    """Return a torch generator with a fixed seed: the one source of random test input."""
    import torch

    return torch.Generator().manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason in the report, what needs a GPU where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))
