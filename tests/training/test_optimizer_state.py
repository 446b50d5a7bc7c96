"""An optimizer that is saved and loaded goes on bit for bit, whatever its state is made of."""

from __future__ import annotations

import json

import pytest
import torch

from scrimp.base.errors import ScrimpError
from scrimp.training import checkpoint
from scrimp.training.optimizer_state import load_optimizer, optimizer_numbers, optimizer_tensors
from scrimp.training.safetensors_stream import write_tensors


def assert_same(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3), torch.nn.Linear(3, 2))
    model[1].requires_grad_(False)  # parameters that never have state
    return model


def groups(model):
    weights = [p for p in model.parameters() if p.ndim == 2]
    return [
        {"params": weights},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]


OPTIMIZERS = {
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "AdamW, lr in a tensor": lambda params: torch.optim.AdamW(params, lr=torch.tensor(1e-2), foreach=False),
    "AMSGrad": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=1e-2),
}


def train(model, optimizer, first, last):
    losses = []
    for step in range(first, last):
        batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:  # a schedule
            group["lr"] = group["lr"] * 0.9
        optimizer.step()
        losses.append(loss.item())
    return losses


def save_run(folder, model, optimizer):
    named = list(model.named_parameters())
    return checkpoint.save(
        folder,
        step=3,
        model=model.state_dict(),
        optimizer=optimizer_tensors(optimizer, named),
        state={"optimizer": optimizer_numbers(optimizer, named)},
        identity="net",
    )


def load_run(path, model, optimizer):
    checkpoint.read_model_into(path, model.state_dict())
    numbers = checkpoint.read_state(path)["optimizer"]
    load_optimizer(path / checkpoint.OPTIMIZER, optimizer, model.named_parameters(), numbers)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path, name):
    model = network(1)
    optimizer = OPTIMIZERS[name](groups(model))
    train(model, optimizer, 0, 3)
    path = save_run(tmp_path, model, optimizer)
    losses = train(model, optimizer, 3, 6)

    resumed = network(2)
    fresh = OPTIMIZERS[name](list(reversed(groups(resumed))))  # the order of the groups is not the law
    load_run(path, resumed, fresh)
    assert train(resumed, fresh, 3, 6) == losses
    for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    named, other = dict(model.named_parameters()), dict(resumed.named_parameters())
    mine, yours = optimizer_tensors(optimizer, named.items()), optimizer_tensors(fresh, other.items())
    assert mine.keys() == yours.keys()
    for key in mine:
        assert_same(mine[key], yours[key])


def test_state_is_named_by_parameter_and_never_by_position():
    model = network(1)
    optimizer = OPTIMIZERS["fused AdamW"](groups(model))
    train(model, optimizer, 0, 1)
    assert set(optimizer_tensors(optimizer, model.named_parameters())) == {
        f"{layer}.{kind}/{key}"
        for layer in (0, 2)
        for kind in ("weight", "bias")
        for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_an_optimizer_before_its_first_step_is_restored_without_state(tmp_path):
    model = network(1)
    optimizer = OPTIMIZERS["fused AdamW"](groups(model))
    path = save_run(tmp_path, model, optimizer)
    used = OPTIMIZERS["fused AdamW"](groups(model))
    train(model, used, 0, 2)
    load_run(path, model, used)
    assert not used.state
    assert used.param_groups[0]["lr"] == 1e-2


class Coded(torch.optim.Optimizer):
    """Keeps what torch's own loader would cast: codes, a seed, fp32 beside bf16 weights."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99)})

    def fill(self):
        for index, param in enumerate(p for group in self.param_groups for p in group["params"]):
            self.state[param] = {
                "codes": torch.full(param.shape, index + 1, dtype=torch.uint8),
                "scale": torch.full((3,), 1 / 3, dtype=torch.float32),
                "seed": torch.tensor(2**62 + 1 + index),
                "refreshed_at": index,
                "skipped": None,
            }


def test_state_keeps_its_dtype_its_shape_and_its_plain_values(tmp_path):
    model = network(1).bfloat16()
    optimizer = Coded(model.parameters())
    optimizer.fill()
    path = save_run(tmp_path, model, optimizer)
    fresh = Coded(model.parameters())
    load_run(path, model, fresh)
    for param in model.parameters():
        assert list(fresh.state[param]) != []
        assert fresh.state[param].keys() == optimizer.state[param].keys()
        for key, value in optimizer.state[param].items():
            if isinstance(value, torch.Tensor):
                assert_same(fresh.state[param][key], value)
            else:
                assert fresh.state[param][key] == value
    assert fresh.param_groups[0]["betas"] == (0.9, 0.99)


def test_state_has_the_parameters_strides_as_fused_steps_demand(tmp_path):
    param = torch.nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).t())
    optimizer = torch.optim.AdamW([param], fused=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    named = [("weight", param)]
    numbers = optimizer_numbers(optimizer, named)
    write_tensors(tmp_path / "a", optimizer_tensors(optimizer, named))
    moment = optimizer.state[param]["exp_avg"].clone()
    load_optimizer(tmp_path / "a", optimizer, named, json.loads(json.dumps(numbers)))
    assert optimizer.state[param]["exp_avg"].stride() == param.stride() == (1, 6)
    assert torch.equal(optimizer.state[param]["exp_avg"], moment)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: OPTIMIZERS["SGD"](groups(m)), "of another optimizer: the option"),
        (lambda m: OPTIMIZERS["fused AdamW"](m.parameters()), "has no group of the parameters '0.bias'"),
    ],
)
def test_another_optimizer_is_an_error_that_names_what_differs(tmp_path, change, sentence):
    model = network(1)
    optimizer = OPTIMIZERS["fused AdamW"](groups(model))
    train(model, optimizer, 0, 1)
    path = save_run(tmp_path, model, optimizer)
    with pytest.raises(ScrimpError, match=sentence):
        load_run(path, model, change(model))


def test_another_models_optimizer_is_an_error(tmp_path):
    model = network(1)
    optimizer = OPTIMIZERS["fused AdamW"](groups(model))
    train(model, optimizer, 0, 1)
    path = save_run(tmp_path, model, optimizer)
    numbers = checkpoint.read_state(path)["optimizer"]
    with pytest.raises(ScrimpError, match=r"'0.bias/.*', and the model has no such parameter"):
        named = [(f"layer{name}", param) for name, param in model.named_parameters()]
        load_optimizer(path / checkpoint.OPTIMIZER, optimizer, named, numbers)


@pytest.mark.parametrize("value", [object(), float("inf"), [object()]])
def test_what_neither_file_can_hold_is_refused_before_anything_is_written(value):
    model = network(1)
    optimizer = OPTIMIZERS["fused AdamW"](groups(model))
    optimizer.state[model[0].weight]["projector"] = value
    with pytest.raises(TypeError, match="projector"):
        optimizer_numbers(optimizer, model.named_parameters())


@pytest.mark.gpu
def test_on_a_gpu_every_state_tensor_returns_to_its_own_device(tmp_path):
    param = torch.nn.Parameter(torch.ones(5, 3, device="cuda"))
    for fused in (True, False):  # the step counter lies on the device, or on the host
        optimizer = torch.optim.AdamW([param], fused=fused)
        param.grad = torch.ones_like(param)
        optimizer.step()
        named = [("weight", param)]
        write_tensors(tmp_path / "a", optimizer_tensors(optimizer, named))
        before = {key: value.clone() for key, value in optimizer.state[param].items()}
        load_optimizer(tmp_path / "a", optimizer, named, optimizer_numbers(optimizer, named))
        for key, value in before.items():
            assert optimizer.state[param][key].device == value.device
            assert torch.equal(optimizer.state[param][key], value)
        optimizer.step()
