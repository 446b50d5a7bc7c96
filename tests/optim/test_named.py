"""The named methods: what they all share, and AdamW against its equations and torch's own."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from tests.optim.methods import NAMED, apart, differing, gradients, make, method, parameters, run, values
from torch import Tensor, nn

from scrimp import optim
from scrimp.base.errors import ScrimpError
from scrimp.optim import AdamW, GaLore
from scrimp.optim.stores import STORES

SETTINGS: list[dict[str, Any]] = [
    {"lr": 1e-2},
    {"lr": 1e-2, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3},
    {"lr": 1e-2, "weight_decay": 0.0},
]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 24))


def mean_square(module: nn.Module) -> Tensor:
    loss: Tensor = module(torch.ones(2, 24)).square().mean()
    return loss


# ---- what all share -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_a_model_its_parameters_and_named_ones_are_taken(name: str) -> None:
    results = []
    for hand_in in (
        lambda module: module,
        lambda module: module.parameters(),
        lambda module: list(module.named_parameters()),
        lambda module: [{"params": list(module.parameters())}],
    ):
        module = model()
        optimizer = method(name)(
            hand_in(module), weight_decay=0.0, **({"rank": 4} if "rank" in known(name) else {})
        )
        mean_square(module).backward()
        optimizer.step()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in module.parameters()}
        results.append({key: p.detach() for key, p in module.named_parameters()})
        assert all(optimizer.state[p]["step"] == 1 for p in module.parameters())
    if name != "AdamMini":  # whose blocks go by roles, which a model alone shows
        assert apart(results[0], results[2]) < 1e-6


def known(name: str) -> Any:
    return inspect.signature(method(name)).parameters


@pytest.mark.parametrize("name", NAMED)
def test_everything_but_the_parameters_is_given_by_name_and_explained(name: str) -> None:
    own = [p for p in known(name).values() if p.kind is not p.VAR_KEYWORD]
    assert own[0].name == "params" and all(p.kind is p.KEYWORD_ONLY for p in own[1:])
    text = inspect.getdoc(method(name)) or ""
    assert all(f"{p.name}:" in text for p in own) and "Memory:" in text
    assert "arXiv" in text or name == "SGDM"


@pytest.mark.parametrize("name", NAMED)
def test_an_unknown_option_is_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(TypeError, match=r"no option 'sede'.*seed"):
        method(name)(model(), sede=3)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", ["AdamW", "GaLore", "Lion", "Adafactor"])
def test_every_method_takes_every_store(name: str, store: str) -> None:
    ps = parameters()
    optimizer = make(name, ps, store=store, lr=0.01)
    run(optimizer, ps, gradients(ps, 4))
    assert all(p.isfinite().all() for p in ps.values())
    held = [v for entries in optimizer.state.values() for v in entries.values() if isinstance(v, Tensor)]
    dtypes = {
        "bf16": torch.bfloat16,
        "bf16-nearest": torch.bfloat16,
        "8bit": torch.uint8,
        "4bit": torch.uint8,
    }
    assert dtypes.get(store, torch.float32) in {value.dtype for value in held} or name == "Adafactor"


def test_the_seed_decides_what_is_drawn() -> None:
    results = []
    for seed in (0, 0, 1):
        ps = parameters(torch.bfloat16)
        run(make("Apollo", ps, seed=seed), ps, gradients(ps, 3))
        results.append(values(ps))
    assert differing(results[0], results[1]) == []
    assert {"tall", "wide", "table"} <= set(differing(results[0], results[2]))


def test_one_group_may_have_a_store_and_resets_of_its_own() -> None:
    ps = parameters(shapes={"a": (70, 64), "b": (70, 64)})
    optimizer = AdamW([{"params": [ps["a"]], "store": "8bit", "reset_every": 2}, {"params": [ps["b"]]}])
    run(optimizer, ps, gradients(ps, 1))
    assert sorted(optimizer.state[ps["a"]]) != sorted(optimizer.state[ps["b"]])
    assert [group["pieces"] for group in optimizer.param_groups] == ["Adam + Dynamic8 + Reset", "Adam + Full"]
    with pytest.raises(ScrimpError, match="there is no 'int8'"):
        AdamW([{"params": [nn.Parameter(torch.ones(3))], "store": "int8"}])


def test_every_named_method_is_public_once() -> None:
    from scrimp.optim import named

    assert sorted(named.__all__) == sorted(NAMED)
    assert len(set(optim.__all__)) == len(optim.__all__)
    assert all(callable(method(name)) for name in NAMED)


def test_the_package_needs_torch_alone() -> None:
    code = (
        "import sys, scrimp.optim\n"
        "heavy = {'transformers', 'peft', 'pydantic', 'typer', 'pyarrow', 'tokenizers', 'yaml', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- AdamW --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("store", ["fp32", "own arithmetic"])
def test_adamw_is_its_equations(settings: dict[str, Any], store: str) -> None:
    ps = parameters(torch.float64)
    expected, steps = values(ps), [gradients(ps, 1, seed=step)[0] for step in range(20)]
    # A reset that never comes is what torch's kernel does not know.
    optimizer = AdamW(list(ps.items()), reset_every=0 if store == "fp32" else 1000, **settings)
    run(optimizer, ps, steps)
    lr, eps, wd = settings["lr"], settings.get("eps", 1e-8), settings.get("weight_decay", 0.01)
    beta1, beta2 = settings.get("betas", (0.9, 0.999))
    for name, w in expected.items():
        m = v = torch.zeros_like(w)
        for t, step in enumerate(steps, 1):
            m = beta1 * m + (1 - beta1) * step[name]
            v = beta2 * v + (1 - beta2) * step[name] ** 2
            update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
            w = (1 - lr * wd) * w - lr * update  # noqa: PLW2901 - the equation
        torch.testing.assert_close(ps[name].detach(), w, rtol=1e-12, atol=1e-14)  # fp64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adamw_follows_torchs_unfused_one(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    steps = gradients(ours, 50)
    run(AdamW(ours.values(), lr=1e-2), ours, steps)
    run(torch.optim.AdamW(theirs.values(), lr=1e-2, fused=False, foreach=False), theirs, steps)
    rounding = 50 * torch.finfo(dtype).eps  # one rounding a step
    for name, p in theirs.items():
        torch.testing.assert_close(ours[name], p, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", ["AdamW", "GaLore"])
def test_a_models_matrices_decay_and_its_norms_and_biases_do_not(name: str) -> None:
    module = model()
    before = {key: p.detach().clone() for key, p in module.named_parameters()}
    options = {"rank": 4} if name == "GaLore" else {}
    optimizer = method(name)(module, lr=0.1, weight_decay=0.5, **options)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)  # decay is all that is left
    optimizer.step()
    for key, p in module.named_parameters():
        factor = 1 - 0.1 * 0.5 if p.ndim >= 2 else 1
        torch.testing.assert_close(p.detach(), before[key] * factor, rtol=1e-6, atol=0)


def test_adamw_takes_eight_bytes_a_parameter() -> None:
    ps = parameters()
    optimizer = AdamW(ps.values(), lr=1e-3)
    run(optimizer, ps, gradients(ps, 1))
    held = [
        v.nbytes for entries in optimizer.state.values() for v in entries.values() if isinstance(v, Tensor)
    ]
    assert sum(held) == 8 * sum(p.numel() for p in ps.values())


def test_galore_without_a_rank_is_its_adam_on_every_parameter() -> None:
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    steps = gradients(ours, 3)
    whole = GaLore(list(ours.items()), rank=None, lr=0.01)
    assert all(whole.plan_of(p).composition.projector is None for p in ours.values())
    run(whole, ours, steps)
    groups = [{"params": list(theirs.items())}]
    run(GaLore(groups, rank=None, lr=0.01, scale=7.0, refresh_every=2), theirs, steps)
    assert differing(values(ours), values(theirs)) == []
