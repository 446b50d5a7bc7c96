"""Safetensors files are exact, hold one tensor at a time, and say what is wrong with them."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Mapping

import pytest
import torch
from safetensors import safe_open

from scrimp.base import files
from scrimp.base.errors import ScrimpError
from scrimp.training.safetensors_stream import read_header, read_tensors_into, without_ties, write_tensors


def awkward_tensors():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**8, (3, 5), generator=generator, dtype=torch.uint8)
    return {
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 4),
        "ünïcode/with slash": torch.arange(7, dtype=torch.int64) - 2**60,
        "transposed": torch.randn(4, 6, generator=generator).t(),
        "strided": torch.randn(9, generator=generator)[::2],
        "expanded": torch.tensor([1.5]).expand(3, 2),
        "bf16": torch.randn(3, 7, generator=generator).bfloat16(),
        "fp16": torch.randn(1, generator=generator).half(),
        "fp64": torch.randn(3, generator=generator, dtype=torch.float64),
        "odd": torch.tensor([float("nan"), -0.0, float("-inf")]),
        "e4m3": torch.randn(5, generator=generator).to(torch.float8_e4m3fn),
        "e5m2": torch.randn(5, generator=generator).to(torch.float8_e5m2),
        "codes": codes,
        "int8": codes.view(torch.int8),
        "int16": torch.tensor([-5, 5], dtype=torch.int16),
        "int32": torch.tensor([[-5]], dtype=torch.int32),
        "uint16": torch.tensor([65535], dtype=torch.uint16),
        "uint32": torch.tensor([2**32 - 1], dtype=torch.uint32),
        "uint64": torch.tensor([2**63], dtype=torch.uint64),
        "bool": torch.tensor([True, False, True]),
        "complex": torch.randn(3, generator=generator, dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.randn(2, generator=generator)),
    }


def as_bytes(tensor):
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(ours, theirs):
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert as_bytes(ours) == as_bytes(theirs)  # nan and minus zero included


def test_the_stock_reader_reads_every_dtype_and_layout_bit_for_bit(tmp_path):
    tensors = awkward_tensors()
    written = write_tensors(tmp_path / "a", tensors, {"format": "pt"})
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert_same(file.get_tensor(name), tensor)
    assert written.size == (tmp_path / "a").stat().st_size
    assert written.sha256 == files.hash_file(tmp_path / "a")


def test_every_dtype_and_layout_is_read_back_in_place_bit_for_bit(tmp_path):
    tensors = awkward_tensors()
    del tensors["expanded"]  # several of its elements are one place in memory
    write_tensors(tmp_path / "a", tensors)
    targets = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    targets["transposed"] = torch.empty(4, 6).t()
    targets["strided"] = torch.empty(9)[::2]
    targets["parameter"] = torch.nn.Parameter(torch.empty(2))
    places = {name: target.data_ptr() for name, target in targets.items()}
    read_tensors_into(tmp_path / "a", targets)
    for name, tensor in tensors.items():
        assert_same(targets[name], tensor)
        assert targets[name].data_ptr() == places[name]


def test_every_tensor_starts_at_a_multiple_of_its_elements_size(tmp_path):
    write_tensors(tmp_path / "a", awkward_tensors())
    stored = read_header(tmp_path / "a").tensors
    assert len(stored) == len(awkward_tensors())
    assert [name for name, at in stored.items() if at.offset % at.dtype.itemsize] == []


def test_a_file_of_no_tensors_is_a_file(tmp_path):
    write_tensors(tmp_path / "a", {})
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert list(file.keys()) == []
    read_tensors_into(tmp_path / "a", {})


def test_a_tensor_larger_than_a_chunk_is_whole(tmp_path):
    tensor = torch.arange(files._CHUNK_BYTES // 4 * 2 + 5, dtype=torch.int32)
    write_tensors(tmp_path / "a", {"large": tensor})
    target = torch.zeros_like(tensor)
    read_tensors_into(tmp_path / "a", {"large": target})
    assert torch.equal(target, tensor)


def test_no_tensor_is_held_longer_than_it_takes_to_write_it(tmp_path):
    class MadeWhenAsked(Mapping):
        """Makes each tensor anew, and checks that the one before is gone by then."""

        last = None
        asked = 0

        def __getitem__(self, name):
            assert self.last is None or self.last() is None
            tensor = torch.full((1000,), float(name))
            self.last = weakref.ref(tensor.untyped_storage())
            self.asked += 1
            # Not contiguous: its copy must go too, and would keep nothing of this one alive.
            return tensor[::2]

        def __iter__(self):
            return iter("12345")

        def __len__(self):
            return 5

    gc.disable()  # reference counts alone must do it
    try:
        tensors = MadeWhenAsked()
        write_tensors(tmp_path / "a", tensors)
    finally:
        gc.enable()
    assert tensors.asked == 10
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert [file.get_tensor(name).unique().item() for name in "12345"] == [1, 2, 3, 4, 5]


def test_tied_tensors_are_found_and_views_and_empty_ones_are_not_tied():
    embedding = torch.zeros(6, 6)
    tensors = {
        "embed": embedding,
        "lm_head": embedding.view(6, 6),
        "first row": embedding[0],
        "transposed": embedding.t(),
        "empty a": torch.empty(0),
        "empty b": torch.empty(0),
    }
    kept, ties = without_ties(tensors)
    assert ties == {"lm_head": "embed"}
    assert list(kept) == ["embed", "first row", "transposed", "empty a", "empty b"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"c": torch.zeros(1)}, "holds no tensor 'c'"),
        ({"b": None}, "holds 'b' besides"),
        (
            {"a": torch.zeros(2, 3)},
            r"'a' .* is float32 of shape \[3, 2\], and float32 of shape \[2, 3\] is wanted",
        ),
        ({"a": torch.zeros(3, 2).half()}, "float16 of shape .* is wanted"),
    ],
)
def test_a_name_a_shape_or_a_dtype_that_differs_is_named_and_nothing_is_changed(tmp_path, change, sentence):
    write_tensors(tmp_path / "file", {"a": torch.ones(3, 2), "b": torch.ones(2)})
    targets = {"a": torch.zeros(3, 2), "b": torch.zeros(2)} | change
    targets = {name: target for name, target in targets.items() if target is not None}
    with pytest.raises(ScrimpError, match=sentence):
        read_tensors_into(tmp_path / "file", targets)
    assert all(not target.any() for target in targets.values())


@pytest.mark.parametrize("length", [0, 7, 8, 30, -1])
def test_a_file_that_ends_too_early_is_damaged(tmp_path, length):
    write_tensors(tmp_path / "a", {"a": torch.ones(3)})
    os.truncate(tmp_path / "a", length % (tmp_path / "a").stat().st_size)
    with pytest.raises(ScrimpError, match="is damaged"):
        read_tensors_into(tmp_path / "a", {"a": torch.zeros(3)})


def test_a_file_that_is_something_else_is_damaged(tmp_path):
    (tmp_path / "a").write_bytes(b"\x08" + b"\0" * 7 + b"[1,2,3] " * 9)
    with pytest.raises(ScrimpError, match="is damaged"):
        read_header(tmp_path / "a")
    with pytest.raises(ScrimpError, match="cannot be read"):
        read_header(tmp_path / "absent")
