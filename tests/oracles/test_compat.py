"""The drop-in modules: one script, run with the authors' import and with ours in its place.

The scripts train a small model on its own gradients, so that every difference feeds back into the next step.
apollo-torch is CC-BY-NC: it is run here, and nothing of it is copied.
"""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.base.errors import ScrimpError
from scrimp.optim import Optimizer
from scrimp.optim.compat import apollo_torch, fira, galore_torch

for package in ("apollo_torch", "bitsandbytes", "fira", "galore_torch"):
    pytest.importorskip(package)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# 1 - lr * decay is a float32 number: rounded, it would be off by the same 3e-8 at every step, in ours as in
# torch's own, but not in theirs.
LR, DECAY = 2**-7, 2**-3

MODEL = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy, silu

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp_up = nn.Linear(16, 24)
        self.mlp_gate = nn.Linear(16, 24, bias=False)
        self.mlp_down = nn.Linear(24, 16)
        self.attn = nn.Linear(16, 16)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attn(y).tanh() + self.mlp_down(silu(self.mlp_gate(y)) * self.mlp_up(y))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(16, 32)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

torch.manual_seed(0)
model = Model().to(DTYPE)
before = [p.detach().clone() for p in model.parameters()]
first, second = model.layers
data = [torch.randint(32, (8, 17)) for _ in range(5)]

def loss_of(batch):
    return cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

def train(optimizer, schedule=True):
    if schedule:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 5))
    for step in range(50):
        loss_of(data[step % 5]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if schedule:
            scheduler.step()
        optimizer.zero_grad()

chosen = [first.mlp_up.weight, first.mlp_down.weight, first.attn.weight]
others = [second.mlp_gate.weight, second.mlp_down.weight]
regular = [p for p in model.parameters() if all(p is not q for q in chosen + others)]
"""

GALORE = """
from galore_torch import GaLoreAdamW
galore = {"update_proj_gap": 7, "scale": 0.25}
groups = [{"params": regular},
          {"params": chosen, "rank": 4, "proj_type": "std", **galore},
          {"params": others, "rank": 6, "proj_type": "left", "weight_decay": DECAY, **galore}]
train(GaLoreAdamW(groups, lr=LR, no_deprecation_warning=True))
"""

WHOLE_RANK = """
from galore_torch import GaLoreAdamW
galore = {"update_proj_gap": 7, "scale": 0.25}
groups = [{"params": regular}, {"params": chosen + others, "rank": 40, "proj_type": "std", **galore}]
train(GaLoreAdamW(groups, LR, (0.8, 0.99), 1e-3, DECAY, False))
"""

# The README's loop: one optimizer a parameter, run in the backward pass.
PER_LAYER = """
from galore_torch import GaLoreAdamW
optimizer_dict = {}
for p in model.parameters():
    if any(p is q for q in chosen):
        group = {"params": [p], "rank": 4, "update_proj_gap": 7 * 2, "scale": 0.25, "proj_type": "std"}
        optimizer_dict[p] = GaLoreAdamW([group], lr=LR, weight_decay=DECAY)
    else:
        optimizer_dict[p] = GaLoreAdamW([p], lr=LR, weight_decay=DECAY)

def optimizer_hook(p):
    if p.grad is None:
        return
    optimizer_dict[p].step()
    optimizer_dict[p].zero_grad()

for p in model.parameters():
    if p.requires_grad:
        p.register_post_accumulate_grad_hook(optimizer_hook)

for step in range(50):
    loss_of(data[step % 5]).backward()
"""

ADAFACTOR = """
from galore_torch import GaLoreAdafactor
galore = {"update_proj_gap": 7, "scale": 0.25}
groups = [{"params": regular},
          {"params": chosen, "rank": 4, "proj_type": "std", **galore},
          {"params": others, "rank": 6, "proj_type": "right", **galore}]
train(GaLoreAdafactor(groups, OPTIONS)SCHEDULE)
"""

APOLLO = """
from apollo_torch import APOLLOAdamW
apollo = {"proj": "PROJ", "update_proj_gap": 7, "proj_type": "std"}
groups = [{"params": regular[:5]},
          {"params": chosen, "rank": 4, "scale_type": "channel", "scale": 2, **apollo},
          {"params": regular[5:], "weight_decay": 0.0},
          {"params": others, "rank": 1, "scale_type": "tensor", "scale": 128, **apollo}]
train(APOLLOAdamW(groups, lr=LR, weight_decay=DECAY, OPTIONS))
"""

FIRA = """
from fira import FiraAdamW, divide_params
groups = divide_params(model, target_modules_list=["attn", "mlp"], rank=4, update_proj_gap=7, alpha=ALPHA)
assert [len(group["params"]) for group in groups] == [len(list(model.parameters())) - 8, 8]
train(FiraAdamW(groups, lr=LR, weight_decay=DECAY, no_deprecation_warning=True))
"""

SCRIPTS = {
    "galore": GALORE,
    "galore of whole rank": WHOLE_RANK,
    "galore per layer": PER_LAYER,
    "adafactor, its own rate": ADAFACTOR.replace("OPTIONS", "").replace("SCHEDULE", ", False"),
    "adafactor, a given rate": ADAFACTOR.replace(
        "OPTIONS", "lr=LR, beta1=0.9, relative_step=False, scale_parameter=False, weight_decay=DECAY"
    ).replace("SCHEDULE", ""),
    "apollo": APOLLO.replace("PROJ", "random").replace("OPTIONS", ""),
    "apollo, scale in front": APOLLO.replace("PROJ", "random").replace("OPTIONS", "scale_front=True"),
    "apollo by singular vectors, no limiter": APOLLO.replace("PROJ", "svd").replace(
        "OPTIONS", "disable_nl=True"
    ),
    "fira": FIRA.replace("ALPHA", "0.25"),
    "fira at alpha 1": FIRA.replace("ALPHA", "1.0"),
}


def run(script: str, path: Path, dtype: torch.dtype) -> list[Tensor]:
    """Return how far a script's parameters went."""
    path.write_text(MODEL + script, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # theirs call themselves deprecated
        warnings.filterwarnings("ignore", "the rank is above", UserWarning)
        names: dict[str, Any] = runpy.run_path(str(path), {"DTYPE": dtype, "LR": LR, "DECAY": DECAY})
    return [(p - old).detach() for p, old in zip(names["model"].parameters(), names["before"], strict=True)]


# The last singular vectors belong to singular values near zero: in float32 their signs are rounding's.
CASES = [
    (name, dtype)
    for name in SCRIPTS
    for dtype in TOLERANCE
    if (name, dtype) != ("galore of whole rank", torch.float32)
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_script_does_the_same_with_its_import_replaced(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    theirs = SCRIPTS[name]
    ours = theirs.replace("\nfrom ", "\nfrom scrimp.optim.compat.", 1)
    assert ours != theirs
    pairs = zip(
        run(ours, tmp_path / "ours.py", dtype), run(theirs, tmp_path / "theirs.py", dtype), strict=True
    )
    assert max(float((a - b).norm() / b.norm()) for a, b in pairs) < TOLERANCE[dtype]


def test_the_classes_can_be_asked_for_and_derived_from() -> None:
    class Mine(galore_torch.GaLoreAdamW):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            return super().step(closure)

    p = nn.Parameter(torch.ones(8, 6))
    optimizer = Mine([{"params": [p], "rank": 2, "update_proj_gap": 3, "scale": 1.0, "proj_type": "std"}])
    assert isinstance(optimizer, galore_torch.GaLoreAdamW | Optimizer)
    group = optimizer.param_groups[0]
    assert (group["rank"], group["update_proj_gap"], group["proj_type"]) == (2, 3, "std")
    p.grad = torch.ones(8, 6)
    optimizer.step()
    assert optimizer.steps == 1 and not torch.equal(p.detach(), torch.ones(8, 6))


@pytest.mark.parametrize("side", ["std", "full"])
def test_a_rank_above_the_smaller_sides_is_cut_with_one_warning(side: str) -> None:
    ps = [nn.Parameter(torch.ones(shape)) for shape in [(8, 6), (6, 9), (20, 20)]]
    group = {"params": ps, "rank": 10, "update_proj_gap": 3, "scale": 1.0, "proj_type": side}
    with pytest.warns(UserWarning, match=r"parameter 0 \(6\), group 0, parameter 1 \(6\), and cut") as caught:
        optimizer = galore_torch.GaLoreAdamW([group])
    assert len(caught) == 1 and caught[0].filename == __file__
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    shapes = [tuple(optimizer.state[p]["exp_avg"].shape) for p in ps]
    assert shapes == ([(8, 6), (9, 6), (20, 10)] if side == "std" else [(6, 6), (6, 6), (10, 10)])


def test_apollos_run_resumes_bit_for_bit_with_its_seeds(generator: torch.Generator, tmp_path: Path) -> None:
    def make() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        ps = [nn.Parameter(torch.ones(shape)) for shape in [(5,), (8, 6), (6, 9)]]
        group = {"rank": 2, "update_proj_gap": 3, "scale": 1, "proj_type": "std", "proj": "random"}
        groups = [{"params": ps[:1]}, {"params": ps[1:], "scale_type": "channel", **group}]
        return ps, apollo_torch.APOLLOAdamW(groups, lr=LR)

    def walk(ps: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: list[list[Tensor]]) -> None:
        for step in steps:
            for p, g in zip(ps, step, strict=True):
                p.grad = g.clone()
            optimizer.step()

    ps, optimizer = make()
    steps = [[torch.randn(p.shape, generator=generator) for p in ps] for _ in range(12)]
    walk(ps, optimizer, steps[:5])
    torch.save([optimizer.state_dict(), ps], tmp_path / "checkpoint.pt")
    walk(ps, optimizer, steps[5:])
    state, weights = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again, resumed = make()
    resumed.load_state_dict(state)
    with torch.no_grad():
        for p, weight in zip(again, weights, strict=True):
            p.copy_(weight)
    walk(again, resumed, steps[5:])
    assert all(map(torch.equal, ps, again))


def on_this_cpu(monkeypatch: pytest.MonkeyPatch, cls: Any) -> Any:
    """Let a class of the authors' run without a GPU, and as it was meant with today's bitsandbytes."""
    given = cls.get_config
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    # What it hands over by position has other names by now, and one option is not there any more.
    meant = {"max_unorm": 0.0, "skip_zeros": False, "percentile_clipping": 100}
    monkeypatch.setattr(cls, "get_config", lambda self, *args: {**given(self, *args), **meant})
    return cls


BITSANDBYTES: dict[str, dict[str, Any]] = {
    "GaLoreAdamW8bit": {},
    "QAPOLLOAdamW": {"proj": "random", "scale_type": "channel"},
}


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_what_stands_on_bitsandbytes_follows_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On fp32 moments: on a CPU the 8-bit ones of theirs differ (tests/oracles/test_eight_bit.py).
    def moved(cls: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        ps = [
            nn.Parameter(torch.randn(s, generator=generator)) for s in [(16,), (24, 16), (24, 16), (40, 60)]
        ]
        before = [p.detach().clone() for p in ps]
        group = {"rank": 8, "update_proj_gap": 7, "scale": 0.25, "proj_type": "std", **BITSANDBYTES[name]}
        groups = [{"params": ps[:2]}, {"params": ps[2:], **group}]
        optimizer = cls(groups, lr=LR, weight_decay=DECAY, min_8bit_size=10_000)
        for _ in range(50):
            for p in ps:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
            optimizer.zero_grad()
        return [(p - old).detach() for p, old in zip(ps, before, strict=True)]

    import apollo_torch as theirs  # type: ignore[import-untyped]

    ours = moved(getattr(apollo_torch, name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = moved(on_this_cpu(monkeypatch, getattr(theirs, name)))
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(ours, expected, strict=True)) < 1e-5


MATRIX = {"rank": 2, "update_proj_gap": 3, "proj_type": "std"}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda p: galore_torch.GaLoreAdamW([{"params": [p], "rank": 2, "refresh_every": 3}]),
            "refresh_every",
        ),
        (lambda p: galore_torch.GaLoreAdamW([{"params": [p], **MATRIX}]), "only matrices"),
        (lambda p: galore_torch.GaLoreAdamW([{"params": [p], **MATRIX, "rank": 0}]), "rank must be"),
        (lambda p: galore_torch.GaLoreAdafactor([p], lr=0.1), "relative_step"),
        (lambda p: galore_torch.GaLoreAdamW8bit([p], is_paged=True), "is_paged"),
        (lambda p: apollo_torch.APOLLOAdamW([{"params": [p], **MATRIX, "proj": "svdd"}]), "proj is 'svdd'"),
        (lambda p: apollo_torch.APOLLOAdamW([{"params": [p], **MATRIX, "proj_type": "full"}]), "side 'full'"),
        (lambda p: fira.FiraAdamW([{"params": [p], **MATRIX, "proj_type": "full"}]), "side 'full'"),
    ],
)
def test_mistakes_are_refused_at_construction(make: Any, says: str) -> None:
    p = nn.Parameter(torch.ones(8, 6))
    p_row = nn.Parameter(torch.ones(6))
    with pytest.raises(ScrimpError, match=says):
        make(p_row if says == "only matrices" else p)
