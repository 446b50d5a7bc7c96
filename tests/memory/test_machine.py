"""What there is to run on is found out once, and answered from the cache without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scrimp.base import platform
from scrimp.memory import calibrate, machine
from scrimp.memory.machine import CUDA_CONTEXT, Machine, Roofline, known, look
from scrimp.recipe import Recipe
from scrimp.recipe import replace as changed

ROOFLINE = Roofline(
    flops={"fp32": 1e11, "bf16": 4e11, "bf16-mixed": 4e11}, bandwidth=1e10, seconds_per_operation=1e-5
)
FIXED = {"fp32": 380 << 20, "bf16-mixed": 390 << 20, "bf16": 390 << 20, "adapter": 40 << 20}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the two measurements, which take seconds, and note which were made."""
    made: list[str] = []

    def fixed() -> dict[str, int]:
        made.append("fixed")
        return FIXED

    def roofline(device: str) -> Roofline:
        made.append(device)
        return ROOFLINE

    monkeypatch.setattr(machine, "_fixed_in_a_child", fixed)
    monkeypatch.setattr(calibrate, "measure_roofline", roofline)
    return made


def test_a_time_is_the_sum_of_products_bytes_and_operations() -> None:
    assert ROOFLINE.seconds(2e11, 3e10, 1e5, "fp32") == pytest.approx(2 + 3 + 1)
    assert ROOFLINE.seconds(2e11, 3e10, 1e5, "bf16-mixed") == pytest.approx(0.5 + 3 + 1)


def test_what_was_measured_is_known_from_then_on(tmp_path: Path, measured: list[str]) -> None:
    assert known(tmp_path) is None
    first = look(tmp_path)
    assert known(tmp_path) == first == look(tmp_path)
    assert measured == ["fixed"] and first.roofline is None
    second = look(tmp_path, calibrate=True)
    assert second == replace(first, roofline=ROOFLINE)
    assert known(tmp_path) == second == look(tmp_path) == look(tmp_path, calibrate=True)
    assert measured == ["fixed", first.device]


def test_the_machine_is_the_one_that_auto_means(tmp_path: Path, measured: list[str]) -> None:
    from scrimp.resolve import choose_device

    found = look(tmp_path)
    assert found.device == choose_device(Recipe()).type
    assert set(found.memory) >= {"cpu", found.device}
    assert found.memory["cpu"] == platform.total_memory_bytes() >= platform.available_memory_bytes()
    assert found.has_bf16 == (torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    assert found.name


@pytest.mark.parametrize(
    ("name", "value"),
    [("processor_name", "another"), ("usable_cores", 99), ("nvidia_gpus", ["a new one"])],
)
def test_another_machine_is_looked_at_anew(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    look(tmp_path)
    monkeypatch.setattr(platform, name, lambda: value)
    assert known(tmp_path) is None
    look(tmp_path)
    assert measured == ["fixed", "fixed"]


def test_another_torch_is_looked_at_anew(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    look(tmp_path)
    monkeypatch.setattr(machine, "version", lambda name: "1.0" if name == "torch" else machine.version(name))
    monkeypatch.setattr(machine, "_PACKAGES", ("torch",))
    assert known(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 1}', "null"])
def test_a_broken_cache_is_looked_at_anew(tmp_path: Path, measured: list[str], text: str) -> None:
    found = look(tmp_path)
    (tmp_path / "plans" / "machine.json").write_text(text)
    assert known(tmp_path) is None
    assert look(tmp_path) == found == known(tmp_path)


def test_a_machine_whose_fields_were_others_is_looked_at_anew(tmp_path: Path, measured: list[str]) -> None:
    look(tmp_path)
    path = tmp_path / "plans" / "machine.json"
    document = json.loads(path.read_text())
    document["machine"]["colour"] = "grey"
    path.write_text(json.dumps(document))
    assert known(tmp_path) is None


def test_the_memory_is_read_every_time(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    look(tmp_path)
    monkeypatch.setattr(platform, "total_memory_bytes", lambda: 77)
    found = known(tmp_path)
    assert found is not None and found.memory["cpu"] == 77


def test_a_cache_that_cannot_be_written_is_no_loss(tmp_path: Path, measured: list[str]) -> None:
    (tmp_path / "plans").write_text("a file where the folder should be")
    assert look(tmp_path).fixed == FIXED


def test_the_process_counts_on_a_cpu_and_the_context_on_cuda() -> None:
    found = Machine(fixed=FIXED)
    on = {device: changed(Recipe(), {"device": device, "precision": "bf16"}) for device in ("cpu", "cuda")}
    assert found.fixed_bytes(on["cpu"]) == FIXED["bf16"]
    adapted = changed(on["cpu"], {"tune.name": "lora"})
    assert found.fixed_bytes(adapted) == FIXED["bf16"] + FIXED["adapter"]
    assert found.fixed_bytes(on["cuda"]) == CUDA_CONTEXT


# A program of its own: what it imports, and how long that takes, is the question.
def test_what_is_known_is_there_at_once_and_without_torch(tmp_path: Path, measured: list[str]) -> None:
    look(tmp_path)
    program = f"""
import sys, time
from pathlib import Path
from scrimp.memory.machine import known
began = time.process_time()
assert known(Path({str(tmp_path)!r})) is not None
print(time.process_time() - began, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, has_torch = done.stdout.split()
    assert float(seconds) < 0.05
    assert has_torch == "False"


# The only test that starts the process that is measured: its result is held against a real one's size.
def test_a_training_process_holds_what_is_measured_before_its_model_exists() -> None:
    fixed = machine._fixed_in_a_child()
    assert set(fixed) == set(FIXED)
    assert 100 << 20 < fixed["fp32"] <= fixed["bf16-mixed"] <= fixed["bf16"] < 1 << 30
    assert fixed["bf16"] - fixed["fp32"] < 100 << 20


def test_a_roofline_is_measured_and_threads_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "PRODUCTS", {"cpu": ((64, 128, 256),)})
    monkeypatch.setattr(calibrate, "SIZES", {"cpu": (2**20,)})
    before = torch.get_num_threads(), torch.get_rng_state()
    began = time.monotonic()
    found = calibrate.measure_roofline("cpu")
    assert time.monotonic() - began < 20
    assert torch.get_num_threads() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    # Far apart, but no unit is mistaken: a core does 1e8 to 1e13 operations, an operation takes microseconds.
    assert all(1e8 < rate < 1e13 for rate in found.flops.values())
    assert 1e7 < found.bandwidth < 1e12
    assert 1e-7 < found.seconds_per_operation < 1e-2
