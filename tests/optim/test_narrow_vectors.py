"""The CPU's kernels as a processor without AVX-512 runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the other tests run what this CPU has"
)
def test_the_kernels_hold_with_avx2() -> None:
    files = [HERE / name for name in ("test_stores.py", "test_fused_cpu.py", "test_fused_projected.py")]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "kernel or fused", *map(str, files)],
        env=own | {"ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert int(run.stdout.rsplit(" passed", 1)[0].split()[-1]) > 100
