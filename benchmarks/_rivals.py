"""Other people's optimizers over a model, as their own documentation sets them up; and ours beside them.

All have the same matrices in their projected group (those inside the layers), rank 128 where there is a rank
to choose, 200 steps between refreshes, no weight decay, and otherwise their own defaults. Packages are
imported only when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.assembly import load_function
from scrimp.methods import piece
from scrimp.optim import Optimizer
from scrimp.optim.roles import roles

RANK = 128
EVERY = 200
_LR = 1e-4

Make = Callable[[nn.Module], torch.optim.Optimizer]


def ours(method: str, model: nn.Module, *, compiles: bool) -> Optimizer:
    """Return a method of the catalogue over a model."""
    found = piece("optimizer", method)
    rank = {"rank": RANK} if "rank" in found.options else {}
    make: Callable[..., Optimizer] = load_function(found.builder)
    return make(model, lr=_LR, weight_decay=0.0, compile=compiles, **rank)


def _split(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the matrices inside the layers, and all other parameters."""
    inner = {name for name, role in roles(model).items() if role in ("linear", "experts")}
    named = list(model.named_parameters())
    return [p for name, p in named if name in inner], [p for name, p in named if name not in inner]


def _groups(model: nn.Module, **keys: Any) -> list[dict[str, Any]]:
    projected, rest = _split(model)
    return [{"params": rest}, {"params": projected, **keys}]


_GAP = {"rank": RANK, "update_proj_gap": EVERY}
_APOLLO = {**_GAP, "scale": 1.0, "proj": "random", "scale_type": "channel", "proj_type": "std"}
_MINI = {"rank": 1, "scale": 128.0, "scale_type": "tensor"}


def _galore_torch(model: nn.Module) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    groups = _groups(model, **_GAP, scale=0.25, proj_type="std")
    made: torch.optim.Optimizer = GaLoreAdamW(groups, lr=_LR, no_deprecation_warning=True)
    return made


def _fira(model: nn.Module) -> torch.optim.Optimizer:
    from fira import FiraAdamW

    groups = _groups(model, **_GAP, alpha=0.25, proj_type="std")
    made: torch.optim.Optimizer = FiraAdamW(groups, lr=_LR, no_deprecation_warning=True)
    return made


def _apollo(model: nn.Module, **keys: Any) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    made: torch.optim.Optimizer = APOLLOAdamW(_groups(model, **{**_APOLLO, **keys}), lr=_LR)
    return made


def _bitsandbytes(name: str) -> Make:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        import bitsandbytes

        made: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(
            model.parameters(), lr=_LR, weight_decay=0.0
        )
        return made

    return make


def _torchao(name: str) -> Make:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        import torchao.optim

        made: torch.optim.Optimizer = getattr(torchao.optim, name)(
            model.parameters(), lr=_LR, weight_decay=0.0
        )
        return made

    return make


def _lion(model: nn.Module) -> torch.optim.Optimizer:
    from lion_pytorch import Lion

    return Lion(model.parameters(), lr=_LR)


def _adam_mini(model: Any) -> torch.optim.Optimizer:
    from adam_mini import Adam_mini

    config = model.config
    made: torch.optim.Optimizer = Adam_mini(
        list(model.named_parameters()),
        lr=_LR,
        weight_decay=0.0,
        dim=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        verbose=False,
    )
    return made


def _adafactor(model: nn.Module) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(model.parameters(), lr=_LR, relative_step=False, scale_parameter=False)


def _pytorch_optimizer(name: str, projected: dict[str, Any] | None = None, **options: Any) -> Make:
    """Return what makes one of pytorch-optimizer's classes, `projected` being the keys of its group."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        import pytorch_optimizer

        given = model.parameters() if projected is None else _groups(model, **projected)
        made: torch.optim.Optimizer = getattr(pytorch_optimizer, name)(given, lr=_LR, **options)
        return made

    return make


_PROJECTION = {**_GAP, "scale": 0.25, "projection_type": "std"}
_SKETCH = {**_GAP, "scale": 1.0, "projection_type": "std"}

FUSED = "torch fused AdamW"
RIVALS: dict[str, dict[str, Make]] = {
    "adamw": {
        FUSED: lambda model: torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.0, fused=True),
        "torch AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.0),
    },
    "lion": {"lion-pytorch": _lion, "pytorch-optimizer": _pytorch_optimizer("Lion")},
    "sgd-m": {
        "torch SGD": lambda model: torch.optim.SGD(model.parameters(), lr=_LR, momentum=0.9),
    },
    "adafactor": {
        "transformers": _adafactor,
        "pytorch-optimizer": _pytorch_optimizer(
            "AdaFactor", betas=(None, 0.999), relative_step=False, scale_parameter=False
        ),
    },
    "adam-mini": {"adam-mini": _adam_mini},
    "adamw-8bit": {"bitsandbytes": _bitsandbytes("AdamW8bit"), "torchao": _torchao("AdamW8bit")},
    "lion-8bit": {"bitsandbytes": _bitsandbytes("Lion8bit")},
    "adamw-4bit": {"torchao": _torchao("AdamW4bit")},
    "adamw-fp8": {"torchao": _torchao("AdamWFp8")},
    "galore": {"galore-torch": _galore_torch, "pytorch-optimizer": _pytorch_optimizer("GaLore", _PROJECTION)},
    "fira": {"fira": _fira, "pytorch-optimizer": _pytorch_optimizer("Fira", _PROJECTION)},
    "apollo": {
        "apollo-torch": _apollo,
        "pytorch-optimizer": _pytorch_optimizer("APOLLO", _SKETCH, scale_type="channel"),
    },
    "apollo-mini": {
        "apollo-torch": lambda model: _apollo(model, **_MINI),
        "pytorch-optimizer": _pytorch_optimizer("APOLLO", {**_SKETCH, "rank": 1, "scale": 128.0}),
    },
}
# Beside every method: what a step costs at the least that keeps two moments a parameter.
for _rivals in RIVALS.values():
    _rivals.setdefault(FUSED, RIVALS["adamw"][FUSED])
