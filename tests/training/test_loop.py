"""The loop against one that the test writes out in bare PyTorch, and what must hold of every step."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.training.conftest import write_gpt2, write_model
from torch import Tensor
from torch.nn import Module
from transformers import AutoModelForCausalLM

from scrimp.base.errors import ScrimpError
from scrimp.base.protocols import Probe
from scrimp.base.seeds import derive
from scrimp.data import MicroBatch
from scrimp.recipe_file import load_recipe
from scrimp.tuning.full import Full

if TYPE_CHECKING:
    from tests.training.conftest import Lab, Recorder

# Both sides compute in fp32 and sum in other orders: some units in the last place (1.2e-7) a step.
LOSS_TOLERANCE = {"rtol": 1e-5, "atol": 0}
GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-7}
# Adam divides by a root that starts near zero, which makes a small difference a larger one.
WEIGHT_TOLERANCE = {"rtol": 1e-3, "atol": 2e-5}


def whole_step(micros: list[MicroBatch]) -> dict[str, Tensor]:
    """Return all rows of a step as transformers takes them: labels beside their own tokens."""
    ids = torch.cat([micro.input_ids for micro in micros])
    labels = torch.cat([micro.labels for micro in micros])
    first, last = torch.full_like(labels[:, :1], -100), torch.zeros_like(ids[:, :1])
    return {"input_ids": torch.cat([ids, last], 1), "labels": torch.cat([first, labels], 1)}


def bare_loop(lab: Lab, **changes: Any) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train with transformers' own loss and torch's own optimizer; return losses, norms and weights."""
    job = lab.job(lab.recipe(**changes))
    recipe, model, floor = job.recipe, job.model, job.recipe.schedule.floor
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    losses, norms = [], []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * step / recipe.steps)) / 2
            group["lr"] = 1e-2 * (floor + (1 - floor) * cosine)
        torch.manual_seed(derive(recipe.seed, "step", step))
        loss = model.train()(**whole_step(job.loader.step(step))).loss
        loss.backward()
        clip = recipe.clip or math.inf
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, model.state_dict()


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e9])
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_losses_norms_and_weights_equal_a_bare_pytorch_loop(lab: Lab, packing: str, clip: float) -> None:
    changes = {"steps": 8, "clip": clip, "data.packing": packing, "schedule.warmup": 0, "micro_batch": 1}
    run = lab.train(lab.recipe(**changes))
    losses, norms, weights = bare_loop(lab, **changes)
    rows = lab.rows(kind="train")
    assert len(rows) == 8 and len({round(norm, 4) for norm in norms}) > 1
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=LOSS_TOLERANCE["rtol"])
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-3)
    ours = AutoModelForCausalLM.from_pretrained(run.model).state_dict()
    assert set(ours) == set(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(ours[name], weight, **WEIGHT_TOLERANCE)


def test_clipping_changes_the_run(lab: Lab) -> None:
    # AdamW hardly feels the scale of all gradients at once, so the clip must differ between steps.
    runs = {clip: lab.train(lab.recipe(clip=clip), f"clip-{clip}").metrics.loss for clip in (0.0, 0.5, 1e9)}
    assert runs[0.0] == runs[1e9] != runs[0.5]


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_accumulated_gradients_equal_those_of_the_whole_step(
    lab: Lab, packing: str, micro_batch: int
) -> None:
    job = lab.job(lab.recipe(data__packing=packing, batch=8, micro_batch=micro_batch))
    # Of all steps the one whose micro-batches differ most in targets: in `packed` the one with the
    # stream's short last window. A mean of means would be wrong there.
    steps = [job.loader.step(step) for step in range(-(-job.loader.sequences // 8))]
    spread = [max(m.targets for m in s) - min(m.targets for m in s) for s in steps]
    batch = steps[spread.index(max(spread))]
    assert micro_batch == 8 or max(spread) > 0
    targets = sum(micro.targets for micro in batch)
    loss = job.estimator.step(lambda micro: job.loss(micro, divisor=targets), batch)
    ours = {name: parameter.grad.clone() for name, parameter in job.trained.items()}

    job.model.zero_grad()
    expected = job.model(**whole_step(batch)).loss
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), **LOSS_TOLERANCE)
    for name, parameter in job.trained.items():
        torch.testing.assert_close(ours[name], parameter.grad, **GRADIENT_TOLERANCE)


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_the_micro_batch_changes_a_run_by_rounding_only(lab: Lab, packing: str) -> None:
    losses = []
    for micro_batch in (1, 2, 4):
        recipe = lab.recipe(micro_batch=micro_batch, data__packing=packing)
        lab.train(recipe, f"micro-{micro_batch}")
        losses.append([row["loss"] for row in lab.rows(f"micro-{micro_batch}", kind="train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[1] == pytest.approx(losses[2], rel=1e-4)


def test_a_start_measures_other_batches_at_each_call_and_a_schedule_the_same(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []

    def look(tune: Full, step: int, optimizer: Any, probe: Probe | None = None) -> None:
        if probe is not None:
            seen.append([probe().item() for _ in range(3)])

    recipe = lab.recipe(steps=2)
    lab.train(recipe, "bare")
    monkeypatch.setattr(Full, "before_step", look)
    lab.train(recipe)
    assert lab.weights() == lab.weights("bare")  # the order of training is as it was
    job = lab.job(recipe)
    first, second, third = *job.loader.step(0), job.loader.step(1)[0]
    losses = [job.loss(m, divisor=m.targets).item() for m in (first, second, third)]
    assert seen[0] == pytest.approx(losses, rel=LOSS_TOLERANCE["rtol"]) and len(set(losses)) == 3
    assert seen[1][0] == seen[1][1] == seen[1][2]


def test_tokens_count_targets_and_not_padding(lab: Lab) -> None:
    recipe = lab.recipe(data__packing="padded")
    run = lab.train(recipe)
    loader = lab.job(recipe).loader
    counts = [sum(micro.targets for micro in loader.step(step)) for step in range(6)]
    rows = lab.rows(kind="train")
    assert [row["tokens"] for row in rows] == [sum(counts[: step + 1]) for step in range(6)]
    assert run.metrics.tokens == sum(counts) < 6 * 4 * 16


def test_two_runs_of_a_recipe_are_equal_bit_for_bit(lab: Lab) -> None:
    lab.train(lab.recipe(), "a")
    lab.train(lab.recipe(), "b")
    assert lab.rows("a") == lab.rows("b") and lab.weights("a") == lab.weights("b")
    lab.train(lab.recipe(seed=1), "c")
    assert lab.weights("c") != lab.weights("a")
    assert [row["tokens"] for row in lab.rows("c")] != [row["tokens"] for row in lab.rows("a")]  # other order


def test_a_run_repeats_bit_for_bit_from_the_recipe_it_stored(lab: Lab) -> None:
    recipe = lab.recipe(steps=None, tokens=200, micro_batch=None, schedule__name="wsd", schedule__decay=0.3)
    run = lab.train(recipe, "a")
    stored = load_recipe(lab.path / "a" / "recipe.yaml")
    assert stored == run.recipe and stored.steps == 4 and stored.micro_batch == 4
    again = lab.train(stored, "b")
    assert again.recipe == stored
    assert lab.rows("a") == lab.rows("b") and lab.weights("a") == lab.weights("b")


def test_dropout_is_on_in_training_and_repeats(lab: Lab) -> None:
    for name, rate in (("a", 0.1), ("b", 0.1), ("without", 0.0)):
        lab.train(lab.recipe(model=str(write_gpt2(lab.path / f"gpt2-{name}", dropout=rate))), name)
    assert lab.rows("a") == lab.rows("b") and lab.weights("a") == lab.weights("b")
    losses = [[row["loss"] for row in lab.rows(name, kind="train")] for name in ("a", "without")]
    assert all(with_it != without for with_it, without in zip(*losses, strict=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16"])
def test_a_16_bit_run_learns_and_repeats(lab: Lab, precision: str) -> None:
    dtype = {"bf16-mixed": torch.float32, "bf16": torch.bfloat16}[precision]
    for name in ("a", "b"):
        run = lab.train(lab.recipe(precision=precision, steps=20), name)
    losses = [row["loss"] for row in lab.rows("a", kind="train")]
    assert losses[-1] < losses[0] - 0.5
    assert lab.rows("a") == lab.rows("b") and lab.weights("a") == lab.weights("b")
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    fp32 = [row["loss"] for row in lab.rows(lab.train(lab.recipe(steps=20), "fp32").out.name, kind="train")]
    assert losses != fp32 and losses[0] == pytest.approx(fp32[0], rel=2**-7)  # one rounding to bf16


def test_pure_bf16_says_what_it_costs(lab: Lab) -> None:
    for precision, warns in (("bf16", True), ("bf16-mixed", False), ("fp32", False)):
        reporter = lab.reporter()
        lab.train(lab.recipe(precision=precision, steps=1), precision, reporter=reporter)
        assert any("weights of 16 bits" in note for note in reporter.notes) is warns


def poison_weights(lab: Lab, at: int) -> Recorder:
    """Return a reporter with which the loss of step `at` is NaN."""
    reporter = lab.reporter()

    def poison(model: Module, *_: object) -> None:
        if model.training and len(reporter.ticks) == at - 1:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = math.nan

    reporter.after[0] = lambda: reporter.job.model.register_forward_pre_hook(poison)
    return reporter


def test_a_non_finite_loss_stops_the_run_and_names_the_last_good_checkpoint(lab: Lab) -> None:
    with pytest.raises(ScrimpError, match=r"loss at step 3 is nan.*checkpoints/step-00000002\. ") as error:
        lab.train(lab.recipe(), reporter=poison_weights(lab, 3))
    assert "--nonfinite skip" in str(error.value)
    assert lab.checkpoints() == [1, 2]
    assert lab.rows()[-1] == {**lab.rows()[-1], "kind": "train", "step": 3, "loss": None, "grad_norm": None}
    lab.train(lab.recipe(), resume=True)  # without the poison it goes on


def test_a_rate_that_destroys_the_weights_is_noticed_by_the_gradient(lab: Lab) -> None:
    with pytest.raises(ScrimpError, match=r"loss at step 2 is 5\.\d+ and its gradient norm nan"):
        lab.train(lab.recipe(optimizer__lr=1e30, schedule__warmup=0))


def spoil_gradient(lab: Lab, at: int, seen: list[Tensor]) -> Recorder:
    """Return a reporter with which the gradient of step `at` is NaN while its loss is finite."""
    reporter = lab.reporter()

    def spoil(gradient: Tensor) -> Tensor:
        if len(reporter.ticks) == at - 1:
            seen.append(reporter.job.model.lm_head.weight.detach().clone())
            return gradient * math.nan
        return gradient

    def install() -> None:
        next(iter(reporter.job.trained.values())).register_hook(spoil)

    reporter.after[0] = install
    reporter.after[at] = lambda: seen.append(reporter.job.model.lm_head.weight.detach().clone())
    return reporter


def test_a_non_finite_gradient_stops_the_run_before_it_is_saved(lab: Lab) -> None:
    with pytest.raises(ScrimpError, match=r"gradient norm nan.*checkpoints/step-00000002\. "):
        lab.train(lab.recipe(), reporter=spoil_gradient(lab, 3, []))
    assert lab.checkpoints() == [1, 2]
    losses = [row["loss"] for row in lab.rows(kind="train")]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)


def test_skip_leaves_the_weights_untouched_at_that_step_and_counts_it(lab: Lab) -> None:
    seen: list[Tensor] = []
    run = lab.train(lab.recipe(nonfinite="skip", micro_batch=4), reporter=spoil_gradient(lab, 3, seen))
    assert len(seen) == 2 and torch.equal(*seen)
    assert run.skipped == 1 and lab.rows()[-1]["skipped"] == 1
    rows = lab.rows(kind="train")
    assert [row["grad_norm"] is None for row in rows] == [False, False, True, False, False, False]
    assert all(
        weight.isfinite().all() for weight in AutoModelForCausalLM.from_pretrained(run.model).parameters()
    )


def test_a_run_that_skips_all_later_steps_still_saves_and_ends(lab: Lab) -> None:
    run = lab.train(lab.recipe(nonfinite="skip"), reporter=poison_weights(lab, 2))
    assert run.skipped == 5 and math.isnan(run.metrics.loss)
    assert lab.rows()[-1]["loss"] is None and lab.rows()[-1]["eval_loss"] is None
    assert lab.checkpoints() == [1, 5, 6]  # the best is the one before
    assert lab.train(lab.recipe(nonfinite="skip"), resume=True).skipped == 5


def test_measured_memory_is_positive_and_never_falls(lab: Lab) -> None:
    from scrimp.training.metrics import read_metrics

    lab.train(lab.recipe())
    rows = read_metrics(lab.path / "run" / "metrics.jsonl")
    peaks = [row["peak_bytes"] for row in rows]
    assert peaks[0] > 2**26 and all(before <= after for before, after in pairwise(peaks))
    assert {row["predicted_bytes"] for row in rows} == {rows[0]["predicted_bytes"]} and peaks[0] < 2**34
    assert all(row["tokens_per_s"] > 0 for row in rows)


def test_more_memory_than_the_budget_is_said_once(lab: Lab) -> None:
    from scrimp.base.platform import resident_bytes

    reporter = lab.reporter()
    ballast: list[Tensor] = []
    reporter.after = {step: lambda: ballast.append(torch.ones(2**24)) for step in (1, 2, 3)}  # 64 MiB each
    lab.train(lab.recipe(memory=f"{resident_bytes() // 2**20 + 64}MiB"), reporter=reporter)
    assert sum("over the budget" in note for note in reporter.notes) == 1


def test_a_step_is_reported_with_its_numbers(lab: Lab) -> None:
    reporter = lab.reporter()
    lab.train(lab.recipe(), reporter=reporter)
    assert [tick.step for tick in reporter.ticks] == [1, 2, 3, 4, 5, 6]
    assert [tick.loss for tick in reporter.ticks] == [row["loss"] for row in lab.rows(kind="train")]
    assert reporter.ticks[-1].left_s == 0 and all(tick.budget_bytes == 2**33 for tick in reporter.ticks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own compiler says so
def test_a_compiled_run_has_the_same_losses(lab: Lab) -> None:
    # One layer and one graph: nothing is held out, since evaluation would compile another.
    write_model(lab.model, num_hidden_layers=1)
    changes = {"steps": 3, "data.held_out": 0, "micro_batch": 4}
    eager = lab.train(lab.recipe(**changes), "eager")
    compiled = lab.train(lab.recipe(**changes, compile=True), "compiled")
    assert load_recipe(compiled.out / "recipe.yaml").compile is True
    losses = [[row["loss"] for row in lab.rows(name, kind="train")] for name in ("eager", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    models = [AutoModelForCausalLM.from_pretrained(run.model).state_dict() for run in (eager, compiled)]
    assert set(models[0]) == set(models[1])  # no trace of the compiler in the names
    for name, weight in models[0].items():
        torch.testing.assert_close(weight, models[1][name], **WEIGHT_TOLERANCE)
