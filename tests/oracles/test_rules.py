"""Rules against the packages of their authors: the same gradients, 50 steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.optim.driver import Driver, gradients, oracle, relative
from torch import Tensor, nn

from scrimp.optim.pieces import Rule, Target
from scrimp.optim.rules.adafactor import Adafactor
from scrimp.optim.rules.adam import Adam
from scrimp.optim.rules.adam_mini import AdamMini
from scrimp.optim.rules.lion import Lion
from scrimp.optim.rules.sgd import SGD
from scrimp.optim.rules.sm3 import SM3

for package in ("adam_mini", "galore_torch", "lion_pytorch", "pytorch_optimizer"):
    pytest.importorskip(package)

STEPS = 50
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SHAPES = [(24, 16), (16, 24), (24,), (3, 8, 6), ()]
Make = Callable[[nn.Parameter], torch.optim.Optimizer]


def distance(
    rule: Rule,
    make: Make,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float64,
    target: Target | None = None,
    **options: Any,
) -> float:
    """Return how far apart a rule and an oracle end."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    given = gradients(shape or (1,), STEPS, dtype=dtype)
    given = [g.view(shape) for g in given]
    p = nn.Parameter(w.clone())
    theirs = oracle(make(p), p, given)
    return relative(Driver(rule, w, target=target, options=options).run(given), theirs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_adam_follows_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    found = distance(Adam(), lambda p: torch.optim.AdamW([p], **options), shape, dtype=dtype, **options)
    assert found < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_hf_adam_follows_an_unprojected_parameter_of_galore(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.1}

    def make(p: nn.Parameter) -> torch.optim.Optimizer:
        from galore_torch import GaLoreAdamW

        return GaLoreAdamW([p], no_deprecation_warning=True, **options)

    found = distance(Adam(convention="hf"), make, (24, 16), dtype=dtype, **options)
    assert found < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "rule",
    [SGD(momentum=0), SGD(momentum=0.9), SGD(momentum=0.9, dampening=0.3), SGD(momentum=0.8, nesterov=True)],
)
def test_sgd_follows_torch(rule: SGD, dtype: torch.dtype) -> None:
    def make(p: nn.Parameter) -> torch.optim.Optimizer:
        own = {"momentum": rule.momentum, "dampening": rule.dampening, "nesterov": rule.nesterov}
        return torch.optim.SGD([p], lr=1e-2, **own)

    assert distance(rule, make, (24, 16), dtype=dtype) < TOLERANCE[dtype]


def test_sgd_without_momentum_decays_as_torch_does() -> None:
    found = distance(
        SGD(momentum=0), lambda p: torch.optim.SGD([p], lr=1e-2, weight_decay=0.3), (24, 16), weight_decay=0.3
    )
    assert found < 1e-12


def test_sgd_with_momentum_decays_apart_from_it_where_torch_lets_it_remember() -> None:
    options = {"momentum": 0.9, "weight_decay": 0.3}
    found = distance(
        SGD(momentum=0.9), lambda p: torch.optim.SGD([p], lr=1e-2, **options), (24, 16), weight_decay=0.3
    )
    assert found > 1e-3


def lion_pytorch(p: nn.Parameter, **options: Any) -> torch.optim.Optimizer:
    import lion_pytorch as package

    return package.Lion([p], **options)


def pytorch_optimizer(name: str, p: nn.Parameter, **options: Any) -> torch.optim.Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pytorch_optimizer as package
    return getattr(package, name)([p], **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lion_follows_both_packages(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.95, 0.98), "weight_decay": 0.3}
    for make in (
        lambda p: lion_pytorch(p, **options),
        lambda p: pytorch_optimizer("Lion", p, **options),
    ):
        assert distance(Lion(), make, (24, 16), dtype=dtype, **options) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("scale_parameter", [False, True])
@pytest.mark.parametrize("relative_step", [False, True])
@pytest.mark.parametrize("shape", [(24, 16), (24,), (3, 8, 6)])
def test_adafactor_follows_hugging_face(
    shape: tuple[int, ...],
    relative_step: bool,
    scale_parameter: bool,
    beta1: float | None,
    dtype: torch.dtype,
) -> None:
    from transformers import Adafactor as Theirs

    own: dict[str, Any] = {
        "relative_step": relative_step,
        "scale_parameter": scale_parameter,
        "beta1": beta1,
        "warmup_init": relative_step and scale_parameter,
    }
    lr = None if relative_step else 1e-2
    found = distance(
        Adafactor(**own),
        lambda p: Theirs([p], lr=lr, weight_decay=0.1, **own),
        shape,
        dtype=dtype,
        weight_decay=0.1,
    )
    assert found < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(24, 16), (24,)])
def test_adafactor_follows_torch_while_the_rate_is_below_its_cap(shape: tuple[int, ...]) -> None:
    rule = Adafactor(relative_step=False, scale_parameter=True)
    # 50 steps: 1/sqrt(t) stays above 0.1; torch has no 1e-30 but a floor of 1e-32.
    found = distance(rule, lambda p: torch.optim.Adafactor([p], lr=0.1), shape, lr=0.1)
    assert found < 1e-12


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
def test_sm3_follows_pytorch_optimizer(shape: tuple[int, ...], momentum: float, dtype: torch.dtype) -> None:
    def make(p: nn.Parameter) -> torch.optim.Optimizer:
        return pytorch_optimizer("SM3", p, lr=0.1, momentum=momentum)

    assert distance(SM3(momentum=momentum), make, shape, dtype=dtype, lr=0.1) < TOLERANCE[dtype]


def test_sm3_of_a_vector_is_adagrad() -> None:
    found = distance(SM3(momentum=0), lambda p: torch.optim.Adagrad([p], lr=0.1, eps=0), (24,), lr=0.1)
    assert found < 1e-12


HEADS, KEY_HEADS, WIDTH = 4, 2, 16
BRANCHES = [
    ("layers.0.self_attn.q_proj.weight", (16, 16), Target(name="q", shape=(), role="linear", heads=HEADS)),
    ("layers.0.self_attn.k_proj.weight", (8, 16), Target(name="k", shape=(), role="linear", heads=KEY_HEADS)),
    ("layers.0.self_attn.v_proj.weight", (8, 16), Target(name="v", shape=(), role="linear")),
    ("layers.0.self_attn.o_proj.weight", (16, 16), Target(name="o", shape=(), role="linear")),
    ("layers.0.mlp.up_proj.weight", (24, 16), Target(name="up", shape=(), role="linear")),
    ("embed_tokens.weight", (40, 16), Target(name="embed", shape=(), role="embedding")),
    ("lm_head.weight", (40, 16), Target(name="head", shape=(), role="head")),
    ("layers.0.mlp.up_proj.bias", (24,), Target(name="bias", shape=(), role="bias")),
    ("layers.0.input_layernorm.weight", (16,), Target(name="norm", shape=(), role="norm")),
    ("layers.0.mlp.down_proj.weight", (1, 24), Target(name="one row", shape=(), role="linear")),
]


def adam_mini(name: str, p: nn.Parameter, **options: Any) -> torch.optim.Optimizer:
    from adam_mini import Adam_mini

    return Adam_mini([(name, p)], dim=WIDTH, n_heads=HEADS, n_kv_heads=KEY_HEADS, verbose=False, **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "shape", "target"), BRANCHES)
def test_adam_mini_follows_its_authors_on_every_branch(
    name: str, shape: tuple[int, ...], target: Target, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-3}
    decay = 0.0 if "norm" in name or "bias" in name else 0.1  # the package leaves these out by itself

    def make(p: nn.Parameter) -> torch.optim.Optimizer:
        return adam_mini(name, p, weight_decay=0.1, **options)

    found = distance(AdamMini(), make, shape, dtype=dtype, target=target, weight_decay=decay, **options)
    assert found < TOLERANCE[dtype]


def test_adam_mini_gives_a_fused_projection_a_number_a_row_where_the_package_has_one() -> None:
    target = Target(name="h.0.attn.c_attn.weight", shape=(48, 16), role="linear")
    rows = {slot.name: slot.shape for slot in AdamMini().slots((48, 16), target)}["exp_avg_sq"]
    p = nn.Parameter(torch.ones(48, 16))
    theirs = adam_mini(target.name, p, lr=1e-2)
    oracle(theirs, p, [torch.ones(48, 16)])
    state: dict[str, Tensor] = theirs.state[p]
    assert rows == (48, 1)
    assert state["vmean"].shape == ()
