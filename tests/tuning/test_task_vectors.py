"""Task vectors: merges as peft and the authors compute them, exact factors, and files near the entropy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.tuning.small import PEFT_ASKS, llama
from torch import Tensor

from scrimp.base.adapter_names import COMPRESSED, CONFIG, TENSORS
from scrimp.base.errors import ScrimpError
from scrimp.base.seeds import derive
from scrimp.tuning.merging import pcb
from scrimp.tuning.merging.compeft import (
    compress,
    compress_adapter,
    decompress,
    decompress_adapter,
)
from scrimp.tuning.merging.merging import merge_adapters, merged_changes
from scrimp.tuning.merging.task_vectors import DENSITY, How, Operation, merge

pytestmark = pytest.mark.filterwarnings(PEFT_ASKS)
RANKS = {"first": 2, "second": 3}
EPS = 1e-6


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _lora(seed: int, rank: int, targets: Sequence[str], **settings: Any) -> Any:
    config = LoraConfig(r=rank, lora_alpha=5, target_modules=list(targets), task_type="CAUSAL_LM", **settings)
    model = get_peft_model(llama(layers=1), config)
    for number, (name, p) in enumerate(model.named_parameters()):
        if "lora" in name:
            p.data = _draw(*p.shape, seed=100 * seed + number)
    return model


def _saved(folder: Path, targets: dict[str, Sequence[str]]) -> list[Path]:
    for seed, (name, rank) in enumerate(RANKS.items(), 1):
        _lora(seed, rank, targets[name]).save_pretrained(folder / name)
    return [folder / name for name in RANKS]


def _loaded(folders: Sequence[Path]) -> Any:
    model = PeftModel.from_pretrained(llama(layers=1), folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    return model


def _change(model: Any, layer: str, adapter: str) -> Tensor:
    module = model.get_submodule(f"base_model.model.{layer}")
    found = module.get_delta_weight(adapter) if adapter in module.lora_A else torch.zeros(module.weight.shape)
    assert isinstance(found, Tensor)
    return found.detach()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return _saved(tmp_path, {"first": ("q_proj", "up_proj"), "second": ("up_proj", "down_proj")})


@pytest.mark.parametrize(
    ("how", "theirs"), [("linear", "svd"), ("ties", "ties_svd"), ("magnitude", "magnitude_prune_svd")]
)
def test_merged_changes_equal_peft_s_before_its_svd(folders: list[Path], how: How, theirs: str) -> None:
    model, weights = _loaded(folders), [0.7, -1.3]
    model.base_model.add_weighted_adapter(
        list(RANKS), weights, "both", combination_type=theirs, svd_rank=8, density=0.3
    )
    density = None if how == "linear" else 0.3
    changes = dict(merged_changes(folders, how=how, weights=weights, density=density))
    assert {name.rpartition(".")[2] for name in changes} == {"q_proj", "up_proj", "down_proj"}
    for name, change in changes.items():
        torch.testing.assert_close(change, _change(model, name, "both"), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("how", "theirs"), [("dare", "dare_linear_svd"), ("dare-ties", "dare_ties_svd")])
def test_dare_drops_what_peft_drops_with_the_same_seed(tmp_path: Path, how: How, theirs: str) -> None:
    folders = _saved(tmp_path, dict.fromkeys(RANKS, ("up_proj",)))
    model = _loaded(folders)
    before = torch.get_rng_state()
    [(name, change)] = merged_changes(folders, how=how, weights=[0.7, 1.3], density=0.4, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(derive(3, "dare", name))
    # Making the adapter draws its A; what DARE drops comes after.
    peft_svd = model.base_model._svd_generalized_task_arithmetic_weighted_adapter
    layer = model.get_submodule(f"base_model.model.{name}")
    b, a = reversed(peft_svd(theirs, list(RANKS), [0.7, 1.3], 8, layer, None, None, 0.4, "total"))
    torch.testing.assert_close(change, b @ a, rtol=0, atol=2e-5)
    [(_, again)] = merged_changes(folders, how=how, weights=[0.7, 1.3], density=0.4, seed=4)
    assert not torch.equal(again, change)


def test_a_linear_merge_is_exact_and_plain_peft_loads_it(folders: list[Path], tmp_path: Path) -> None:
    report = merge_adapters(folders, tmp_path / "out", weights=[2.0, -0.5])
    merged, model = _loaded([tmp_path / "out"]), _loaded(folders)
    assert sorted(report.ranks.values()) == [2, 3, 5]
    assert set(report.errors.values()) == {0.0}
    for name in report.ranks:
        expected = 2 * _change(model, name, "first") - 0.5 * _change(model, name, "second")
        torch.testing.assert_close(_change(merged, name, "out"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["linear", "ties"])
def test_a_stated_rank_gives_the_nearest_change_and_its_error(
    folders: list[Path], tmp_path: Path, how: How
) -> None:
    report = merge_adapters(folders, tmp_path / "out", how=how, rank=2)
    merged = _loaded([tmp_path / "out"])
    assert set(report.ranks.values()) == {2}
    for name, change in merged_changes(folders, how=how):
        sizes = torch.linalg.svdvals(change)
        nearest = float(sizes[2:].norm() / sizes.norm())
        assert float((_change(merged, name, "out") - change).norm() / change.norm()) == pytest.approx(
            nearest, abs=EPS
        )
        assert report.errors[name] == pytest.approx(nearest, abs=EPS)
    assert max(report.errors.values()) > 0.1


def test_scales_follow_patterns_and_the_root_of_the_rank(tmp_path: Path) -> None:
    settings = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"up_proj": 7}, "use_rslora": True}
    model = _lora(1, 2, ["q_proj", "up_proj"], **settings)
    model.save_pretrained(tmp_path / "only")
    for name, change in merged_changes([tmp_path / "only"], weights=[1.0]):
        torch.testing.assert_close(change, _change(model, name, "default"), rtol=0, atol=1e-5)


def _authors_pcb(tasks: Tensor, ratio: float) -> Tensor:
    """The equations, on whole vectors (N, d), by sorting."""

    def order(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        ordered, d = x.sort(1).values, x.shape[1]
        return ordered[:, [int(d * low)]], ordered[:, [int(d * (1 - high) - 1)]]

    def norm(x: Tensor) -> Tensor:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return (x - low) / (high - low)

    size = tasks.abs().clamp(*order(tasks.abs(), 1e-4, 1e-4))
    score = (len(tasks) * norm(size) ** 2).exp() * (tasks * tasks.sum(0)).tanh()
    share = norm(score.clamp(*order(score, 1 - ratio, 0)))
    return (tasks.sign() * size * share).sum(0) / share.sum(0).clamp(min=1e-12)


@pytest.mark.parametrize(("count", "scale"), [(2, 0.01), (5, 3.0)])
def test_pcb_in_pieces_is_the_authors_on_the_whole_vector(count: int, scale: float) -> None:
    tasks = scale * _draw(count, 6000)
    vectors = [{"a": task[:4096].view(64, 64), "b": task[4096:]} for task in tasks]
    merged = merge(vectors, Operation(how="pcb", density=0.2))
    found = torch.cat([merged["a"].flatten(), merged["b"]])
    torch.testing.assert_close(found, _authors_pcb(tasks, 0.2), rtol=1e-4, atol=1e-6 * scale)
    assert found.count_nonzero() < len(found)


def test_pcb_of_one_task_is_its_largest_entries_clamped_and_scaled() -> None:
    task = _draw(1000)
    merged = merge([{"w": task}], Operation(how="pcb", weights=(1.2,), density=0.1))["w"]
    kept = merged != 0
    assert int(kept.sum()) == 99  # of 1000, the one at the threshold gets a share of zero
    assert task[kept].abs().min() > task[~kept].abs().max()
    largest = task.abs().sort().values[-2]  # the authors' rank is one below the last
    torch.testing.assert_close(merged[kept], 1.2 * task[kept].clamp(-largest, largest))


def test_pcb_leaves_out_a_task_that_changed_nothing() -> None:
    task = _draw(500)
    merged = merge([{"w": task}, {"w": torch.zeros(500)}], Operation(how="pcb"))["w"]
    assert merged.isfinite().all()
    assert merged.abs().max() > 1


@pytest.mark.parametrize("low", [0.0, -5.0])
def test_order_statistics_over_pieces_equal_those_of_a_sort(low: float) -> None:
    whole = _draw(3, 4001).clamp(min=low)
    whole[0, :7], whole[1, 5] = -0.0, 1e-42
    found = pcb.order_statistics(
        lambda: whole.split([1, 999, 3001], 1), lambda size: (0, 7, size // 2, size - 1)
    )
    assert torch.equal(found, whole.sort(1).values[:, [0, 7, 2000, 4000]])


def test_what_a_vector_lacks_is_zero() -> None:
    one, two = {"a": torch.ones(3)}, {"b": torch.ones(2)}
    merged = merge([one, two], Operation(weights=(2.0, 3.0)))
    assert merged["a"].tolist() == [2.0] * 3
    assert merged["b"].tolist() == [3.0] * 2


def test_sums_average_by_default_and_averages_do_not_twice() -> None:
    same = [{"w": _draw(50)}] * 4
    torch.testing.assert_close(merge(same, Operation())["w"], same[0]["w"])
    torch.testing.assert_close(merge(same, Operation(how="ties", density=1.0))["w"], same[0]["w"])


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_compeft_is_the_authors_formula_on_the_whole_adapter(density: float) -> None:
    vector = {"b": _draw(7, 30), "a": 3 * _draw(20, seed=1)}
    flat = torch.cat([vector["a"], vector["b"].flatten()])
    ordered = flat.abs().sort().values
    threshold = ordered[max(1, 230 - int(230 * density)) - 1]
    expected = 1.5 * flat.std() * flat.sign() * (flat.abs() >= threshold)
    found = decompress(compress(vector, density=density, alpha=1.5))
    torch.testing.assert_close(torch.cat([found["a"], found["b"].flatten()]), expected)
    assert int((expected != 0).sum()) == min(230, int(230 * density) + 1)


def _trained(folder: Path, *, modules: int = 40, dtype: torch.dtype = torch.float32) -> Path:
    """Write an adapter of 40 layers of 256 by 256, rank 16, A larger than B as after training."""
    folder.mkdir()
    config = LoraConfig(r=16, target_modules=["q_proj"], base_model_name_or_path="base")
    config.save_pretrained(str(folder))
    tensors = {}
    for i in range(modules):
        name = f"base_model.model.model.layers.{i}.self_attn.q_proj.lora"
        tensors[f"{name}_A.weight"] = _draw(16, 256, seed=2 * i).to(dtype)
        tensors[f"{name}_B.weight"] = (0.7 * _draw(256, 16, seed=2 * i + 1)).to(dtype)
    save_file(tensors, folder / TENSORS)
    return folder


@pytest.mark.parametrize(("density", "excess"), [(0.05, 1.05), (0.2, 1.03), (0.5, 1.03)])
def test_a_compressed_file_is_near_its_entropy(tmp_path: Path, density: float, excess: float) -> None:
    report = compress_adapter(_trained(tmp_path / "in"), tmp_path / "out", density=density)
    assert report.file_bytes == (tmp_path / "out" / COMPRESSED).stat().st_size
    assert report.file_bytes < excess * report.bound_bytes
    assert report.kept == int(report.entries * density) + 1
    if density == 0.2:
        assert report.file_bytes * 16 < report.half_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressing_and_back_gives_the_ternary_adapter_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    source = _trained(tmp_path / "in", modules=2, dtype=dtype)
    (source / "scrimp.json").write_text('{"config": "c", "weights": "w"}')
    compress_adapter(source, tmp_path / "small", density=0.1, alpha=2.0)
    decompress_adapter(tmp_path / "small", tmp_path / "back")
    expected = decompress(compress(load_file(source / TENSORS), density=0.1, alpha=2.0))
    found = load_file(tmp_path / "back" / TENSORS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected)
    for name in (CONFIG, "scrimp.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_plain_peft_loads_a_decompressed_adapter(folders: list[Path], tmp_path: Path) -> None:
    compress_adapter(folders[0], tmp_path / "small", density=0.5)
    decompress_adapter(tmp_path / "small", tmp_path / "back")
    values = load_file(tmp_path / "back" / TENSORS)
    model = _loaded([tmp_path / "back"])
    loaded = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_A["back"].weight
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(loaded, values[key])
    assert len(values[key].unique()) == 3


def test_a_tensor_with_nothing_kept_comes_back_as_zeros(tmp_path: Path) -> None:
    source = _trained(tmp_path / "in", modules=2)
    tensors = load_file(source / TENSORS)
    first = min(tensors)
    save_file({**tensors, first: tensors[first] * 1e-9}, source / TENSORS)
    compress_adapter(source, tmp_path / "small")
    decompress_adapter(tmp_path / "small", tmp_path / "back")
    found = load_file(tmp_path / "back" / TENSORS)
    assert not found[first].any()
    assert all(found[name].any() for name in tensors if name != first)


def _edit(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | settings))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"base_model_name_or_path": "another"}, "adapters of one base"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"peft_type": "IA3"}, "is IA3"),
    ],
)
def test_what_cannot_be_merged_is_refused(folders: list[Path], settings: dict[str, Any], says: str) -> None:
    _edit(folders[1], **settings)
    with pytest.raises(ScrimpError, match=says):
        merged_changes(folders)


def test_hashes_of_the_base_count_for_more_than_its_name(folders: list[Path]) -> None:
    for folder in folders:
        (folder / "scrimp.json").write_text('{"config": "c", "weights": "w"}')
    _edit(folders[1], base_model_name_or_path="moved")
    assert len(dict(merged_changes(folders))) == 3
    (folders[1] / "scrimp.json").write_text('{"config": "c", "weights": "other"}')
    with pytest.raises(ScrimpError, match="hashes differ"):
        merged_changes(folders)


def test_a_pickled_adapter_is_never_read(folders: list[Path]) -> None:
    (folders[0] / TENSORS).rename(folders[0] / "adapter_model.bin")
    with pytest.raises(ScrimpError, match="could run code"):
        merged_changes(folders)


def test_tensors_beyond_the_factors_are_not_dropped_silently(folders: list[Path], tmp_path: Path) -> None:
    tensors = load_file(folders[0] / TENSORS)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(17, 8)}, folders[0] / TENSORS)
    for action in (lambda: merged_changes(folders), lambda: compress_adapter(folders[0], tmp_path / "out")):
        with pytest.raises(ScrimpError, match="lm_head"):
            action()


def test_adapters_of_other_shapes_conflict(folders: list[Path]) -> None:
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    tensors = load_file(folders[1] / TENSORS)
    save_file({**tensors, key: torch.zeros(3, 9)}, folders[1] / TENSORS)
    with pytest.raises(ScrimpError, match=r"up_proj is \(12, 9\)"):
        merged_changes(folders)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"how": "slerp"}, "no merge is called"),
        ({"how": "ties", "density": 0.0}, "density"),
        ({"how": "linear", "density": 0.5}, "linear merge"),
        ({"weights": [1.0]}, "1 weights for 2"),
        ({"rank": 9}, "rank 9 does not fit"),
        ({"rank": 0}, "rank 0 does not fit"),
        ({"how": "pcb", "density": 1e-5}, "fewer than two"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    folders: list[Path], tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ScrimpError, match=says):
        merge_adapters(folders, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(folders: list[Path]) -> None:
    before = (folders[0] / TENSORS).read_bytes()
    with pytest.raises(ScrimpError, match="in use"):
        merge_adapters(folders, folders[0])
    assert (folders[0] / TENSORS).read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "table", "streams"])
def test_a_damaged_file_is_said_to_be(tmp_path: Path, damage: str) -> None:
    compress_adapter(_trained(tmp_path / "in", modules=1), tmp_path / "small")
    path = tmp_path / "small" / COMPRESSED
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        stored = load_file(path)
        name = {"table": "table", "streams": "signs"}[damage]
        save_file({**stored, name: stored[name][:-20].clone()}, path)
    with pytest.raises(ScrimpError, match="damaged"):
        decompress_adapter(tmp_path / "small", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_every_merge_that_prunes_has_a_density_by_default(folders: list[Path]) -> None:
    for how in DENSITY:
        changes = dict(merged_changes(folders, how=how))  # type: ignore[arg-type]
        assert all(change.isfinite().all() and change.any() for change in changes.values())
