"""Profiles by tracing: short traces of a model, extrapolated to its depth and to any batch.

A model of few layers is traced whole. A deep one is traced at two small depths, whole periods of its
layer kinds apart; where the two do not match, the whole model is traced after all. Batches come from
traces of two and of three rows (where a single row holds something else, it is traced for itself).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from scrimp import models
from scrimp.activations.linear_cross_entropy import chunk_tokens
from scrimp.assembly import make_optimizer
from scrimp.base.errors import ScrimpError
from scrimp.memory.extrapolate import NotAligned, Points, deepen, lines_of, points_of
from scrimp.memory.fake import simulation, tensors_of
from scrimp.memory.observer import storage_bytes
from scrimp.memory.profile import (
    Effort,
    EvaluationProfile,
    Line,
    ModelSize,
    OptimizerProfile,
    StepProfile,
    highest,
)
from scrimp.memory.state_bytes import state_tensors
from scrimp.memory.trace import Curve, fake_assembly, trace_micro_batch, tracker_for
from scrimp.memory.untraceable import Untraceable
from scrimp.methods import piece
from scrimp.optim.optimizer import Optimizer
from scrimp.recipe import Recipe, replace

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHALLOW_PERIODS = 3  # of layer kinds in the shallower trace: the outer layers may differ from the others
MAX_PERIOD = 6  # of layer kinds that alternate
MANY_ROWS = 2  # the fewest rows that stand for all larger batches
ALIKE = 0.002  # of the peak: how far one row may lie off the line through two and three

P = TypeVar("P")
Profile = Callable[[Recipe, int, int | None, int], P]  # recipe, rows, more rows, fewest rows it holds for
Found = tuple[Points, tuple[int, int, int], tuple[str, ...]]  # points, costs, what was assumed


class Tracer:
    """Traces the recipes of one model.

    Args:
        config: The model's configuration.
        trust_remote_code: Whether the model's own code may run.
    """

    def __init__(self, config: PreTrainedConfig, *, trust_remote_code: bool = False) -> None:
        self._config = config
        self._layers = int(getattr(config.get_text_config(), "num_hidden_layers", 0) or 0)
        self._trust = trust_remote_code
        self._sizes: dict[str, ModelSize] = {}
        self._alike: dict[tuple[str, int | None], bool] = {}
        self._traced: dict[tuple[str, int, bool], Found] = {}

    def dimensions(self) -> dict[str, int | None]:
        """Return what defaults depend on of the model."""
        return models.dimensions(self._config)._asdict()

    def size(self, recipe: Recipe) -> ModelSize:
        """Count the tensors that stay."""
        key = recipe.model_copy(update={"activations": Recipe().activations}).model_dump_json()
        if key not in self._sizes:
            self._sizes[key] = self._size(recipe)
        return self._sizes[key]

    def _size(self, recipe: Recipe) -> ModelSize:
        with _explained(), simulation() as mode:
            made = fake_assembly(recipe, self._config, mode)
            made.tune.before_step(0, make_optimizer(recipe, made.model))
            sizes = [p.numel() * p.itemsize for p in made.model.parameters()]
            return ModelSize(
                parameters=sum(p.numel() for p in made.model.parameters()),
                layers=self._layers,
                weights=storage_bytes(tensors_of(made.model)),
                loaded=self._loaded(recipe),
                gradients=sum(p.numel() * p.itemsize for p in made.trained.values() if p.requires_grad),
                largest=max(sizes),
            )

    def _loaded(self, recipe: Recipe) -> int:
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        with torch.utils._python_dispatch._disable_current_modes(), torch.device("meta"):
            model = models.create_empty(self._config, dtype=dtype, trust_remote_code=True)
        return storage_bytes(tensors_of(model))

    def step(self, recipe: Recipe, rows: int) -> StepProfile:
        """Trace a micro-batch; the profile holds for `rows`, and where those are many for all larger ones."""
        return self._for_rows(recipe, rows, self._step)

    def evaluation(self, recipe: Recipe, rows: int) -> EvaluationProfile:
        """Trace a micro-batch in evaluation; it holds for `rows` as in `step`."""
        return self._for_rows(recipe, rows, self._evaluation)

    def _for_rows(self, recipe: Recipe, rows: int, profile: Profile[P]) -> P:
        """Make a profile of two traces, which holds for many rows, or else of one for `rows` alone."""
        assert recipe.seq is not None
        many = max(MANY_ROWS, -(-tokens_at_once(recipe, self._config) // recipe.seq))
        with _explained():
            least = 1 if many == MANY_ROWS and self._one_row_is_alike(recipe) else many
            if rows >= least:
                with suppress(NotAligned):
                    return profile(recipe, many, many + 1, least)
            return profile(recipe, rows, None, rows)

    def _one_row_is_alike(self, recipe: Recipe) -> bool:
        """Tell whether the line through two and three rows goes through one, by trying the plainest recipe.

        Falcon, Bloom and Mamba run other operations for a single row. Others do too, but hold the same.
        """
        plain = replace(recipe, {"activations.name": "everything", "activations.loss": "logits"})
        key = (plain.precision, plain.seq)
        if key not in self._alike:
            self._alike[key] = False
            with suppress(NotAligned):
                lines = self._step(plain, MANY_ROWS, MANY_ROWS + 1, 1).first
                true = self._step(plain, 1, None, 1).first
                off = {name: _total(lines[name], 1) - _total(found, 1) for name, found in true.items()}
                peak = max(_total(found, 1) for found in true.values())
                self._alike[key] = max(map(abs, off.values())) <= ALIKE * peak
        return self._alike[key]

    def optimizer(self, recipe: Recipe) -> OptimizerProfile:
        """Trace two updates of every kind of parameter: they know nothing of each other."""
        with _explained(), simulation() as mode:
            made = fake_assembly(recipe, self._config, mode)
            optimizer = make_optimizer(recipe, made.model)
            made.tune.before_step(0, optimizer)
            groups = [
                (p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad
            ]
            kinds: dict[Any, list[tuple[nn.Parameter, dict[str, Any]]]] = defaultdict(list)
            for p, group in groups:
                kinds[optimizer.plan_of(p).kind(), group["weight_decay"], p.dtype].append((p, group))
            traced = [
                (len(alike), _trace_updates(recipe, made.model, optimizer, *alike[0]))
                for alike in kinds.values()
            ]
            paged = [optimizer.plan_of(p).paged_bytes() for p, _ in groups]
            return OptimizerProfile(
                state=sum(optimizer.plan_of(p).state_bytes() for p, _ in groups),
                paged=sum(paged),
                at_hand=max(paged, default=0),
                temporaries=max((found.temporaries for _, found in traced), default=0),
                flops=sum(count * found.flops for count, found in traced),
                moved=sum(count * found.moved for count, found in traced),
            )

    def _step(self, recipe: Recipe, rows: int, more: int | None, least: int) -> StepProfile:
        found = [self._points(recipe, n, training=True) for n in (rows, more) if n is not None]
        points = [p for p, _, _ in found]
        second = points[1] if more is not None else None
        gradients = self.size(recipe).gradients
        return StepProfile(
            rows=(least, rows if more is None else None),
            first=lines_of(points[0], second, rows=rows, least=least),
            later=lines_of(points[0], second, rows=rows, least=least, gradients=gradients),
            effort=_effort([effort for _, effort, _ in found], rows),
            answers=found[0][2],
        )

    def _evaluation(self, recipe: Recipe, rows: int, more: int | None, least: int) -> EvaluationProfile:
        points = [self._points(recipe, n, training=False)[0] for n in (rows, more) if n is not None]
        found = lines_of(points[0], points[1] if more is not None else None, rows=rows, least=least)
        return EvaluationProfile(
            rows=(least, rows if more is None else None),
            lines=tuple(line for lines in found.values() for line in lines),
        )

    def _points(self, recipe: Recipe, rows: int, *, training: bool) -> Found:
        """Return a micro-batch's points at the model's full depth, with its effort and what was assumed."""
        key = (recipe.model_dump_json(), rows, training)
        if key not in self._traced:
            self._traced[key] = self._trace(recipe, rows, training=training)
        return self._traced[key]

    def _trace(self, recipe: Recipe, rows: int, *, training: bool) -> Found:
        def trace(config: Any) -> Curve:
            curve = trace_micro_batch(recipe, config, rows=rows, training=training)
            if training and curve.answers:
                one = trace_micro_batch(recipe, config, rows=rows, routing="one")
                curve.answers += _bound(curve, one)
            return curve

        # Where some layers sleep, what trains is chosen among those there are: such a model is traced whole.
        alike = recipe.tune.name == "full" or piece("tune", recipe.tune.name).freezes_base
        depths = _depths(self._config, self._layers) if alike else None
        if depths is not None:
            # An adapter may need more layers than these, such as one whose layers share a pool.
            with suppress(NotAligned, Unresizable, ScrimpError):
                curves = [trace(_with_layers(self._config, depth)) for depth in depths]
                points = deepen(curves[0], curves[1], layers=depths, wanted=self._layers)
                efforts = [_costs(curve) for curve in curves]
                times = (self._layers - depths[0]) // (depths[1] - depths[0])
                a, b, c = (x + (y - x) * times for x, y in zip(*efforts, strict=True))
                return points, (a, b, c), curves[1].answers
        curve = trace(self._config)
        return points_of(curve), _costs(curve), curve.answers


def _trace_updates(
    recipe: Recipe, model: nn.Module, optimizer: Optimizer, p: nn.Parameter, group: dict[str, Any]
) -> OptimizerProfile:
    """Trace two updates of one parameter, the first of which begins its state and chooses its subspace."""
    grad = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device)  # plain, whatever p is
    optimizer.begin(p)
    tracker = tracker_for(recipe, [*tensors_of(model), grad, *state_tensors(optimizer)])
    with tracker:
        for _ in range(2):
            optimizer.update(p, grad, group)
        record = tracker.record
    return OptimizerProfile(
        state=0,
        paged=0,
        at_hand=0,
        temporaries=max(_alive(record)),
        flops=record.work.flops // 2,
        moved=record.work.moved // 2,
    )


def tokens_at_once(recipe: Recipe, config: Any) -> int:
    """Return how many tokens the loss takes at once; with more of them its bytes grow evenly."""
    return chunk_tokens(config.get_text_config().hidden_size) if recipe.activations.loss == "chunked" else 1


class Unresizable(Exception):  # noqa: N818 - it is no error: the whole model is traced then
    """A configuration whose number of layers cannot be changed alone."""


def _depths(config: Any, layers: int) -> tuple[int, int] | None:
    """Return two depths to trace, a period of the layer kinds apart; None traces the whole model."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or [""] * layers
    for period in range(1, MAX_PERIOD + 1):
        if all(kinds[i] == kinds[i - period] for i in range(period, len(kinds))):
            low = SHALLOW_PERIODS * period + layers % period
            return (low, low + period) if low + 2 * period < layers else None
    return None


def _with_layers(config: Any, layers: int) -> Any:
    """Return a copy of a configuration with fewer layers.

    Raises:
        Unresizable: Other fields depend on their number.
    """
    resized = copy.deepcopy(config)
    text = resized.get_text_config()
    given = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == given:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    if text.num_hidden_layers != layers:
        raise Unresizable
    return resized


def _bound(even: Curve, one: Curve) -> tuple[str, ...]:
    """Say what a mixture would hold whose router sends all tokens to one expert; nothing for other models."""
    more = int(one.total.max()) / int(even.total.max()) - 1
    if abs(more) < ALIKE:
        return ()
    return (f"the experts are hit evenly; with all tokens to one of them a micro-batch holds {more:+.0%}",)


def _total(lines: tuple[Line, ...], rows: int) -> int:
    return sum(highest(lines, rows)[0])


def _costs(curve: Curve) -> tuple[int, int, int]:
    return curve.work.flops, curve.work.moved, curve.work.operations


def _effort(costs: list[tuple[int, int, int]], rows: int) -> Effort:
    first, last = costs[0], costs[-1]
    slopes = [b - a for a, b in zip(first, last, strict=True)]
    return Effort(
        flops=(first[0] - rows * slopes[0], slopes[0]),
        moved=(first[1] - rows * slopes[1], slopes[1]),
        operations=first[2],
    )


def _alive(record: Any) -> list[int]:
    """Return the bytes alive after each operation of a record."""
    change = [0] * (len(record.operations) + 2)
    for storage in record.storages:
        change[storage.born] += storage.size
        if storage.died is not None:
            change[storage.died + 1] -= storage.size
    alive, held = [], 0
    for point, delta in enumerate(change[:-1]):
        held += delta
        alive.append(held + record.scratch.get(point, 0))
    return alive


class _explained:  # noqa: N801 - a context, used as one
    """Turn what a simulation raises into one sentence that names the place in the model's code."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None or isinstance(error, (Untraceable, NotAligned, ScrimpError)):
            return
        if not isinstance(error, Exception):
            return
        place = ""
        while traceback is not None:
            code = traceback.tb_frame.f_code
            if "modeling_" in code.co_filename:
                place = f" in {code.co_qualname}"
            traceback = traceback.tb_next
        first_line = str(error).strip().partition("\n")[0]
        raise Untraceable(f"{type(error).__name__}{place}: {first_line}") from error
