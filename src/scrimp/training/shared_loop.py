"""The loop of several runs at once: rounds of shared slots, and every job's own steps within them.

A job's loss is its own: the decoder or the model runs once for all rows, and then each job's model answers
with its rows of that, so that its loss runs as it is, over the targets of its own step. Its update follows
the last slot that holds rows of its step. All are saved at the same rounds.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.activations.loss import ChunkedTokenLoss, TokenLoss, run
from scrimp.assembly import make_loss
from scrimp.base.errors import Interrupted
from scrimp.base.protocols import IGNORED
from scrimp.base.units import parse_bytes
from scrimp.data.loader import MicroBatch
from scrimp.training.evaluate import on_device
from scrimp.training.loop import CHECKPOINT_SECONDS, Loop, Opened
from scrimp.training.reporter import Reporter, Tick
from scrimp.training.shared_batches import Demand, Part, Slot, pack, step_at
from scrimp.training.stopping import Stopper
from scrimp.tuning.together import Rows, Span, lay_together, share


@dataclass(slots=True, kw_only=True)
class _Step:
    """A job's step whose rows are on their way."""

    batch: MicroBatch
    opened: Opened
    losses: list[Tensor] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Together:
    """Runs the rounds of several loops.

    Attributes:
        trunk: The model that runs the shared batches.
        rows: Whose their rows are.
        loops: One for each job.
        tokens: The most in a shared batch.
        rounds: Of the run.
        turn: The next round.
        predicted: The peak that was predicted for all.
        reporter: Told about every round.
        stopper: Asked between rounds whether to stop.
        out: The folder that holds the jobs'.
    """

    trunk: nn.Module
    rows: Rows
    loops: list[Loop]
    tokens: int
    rounds: int
    turn: int
    predicted: int
    reporter: Reporter
    stopper: Stopper
    out: Path = Path()
    _loss: TokenLoss | ChunkedTokenLoss = field(init=False)
    _steps: dict[int, _Step] = field(default_factory=dict)
    _saved: float = 0.0

    @classmethod
    def over(
        cls,
        base: nn.Module,
        loops: list[Loop],
        *,
        tokens: int,
        rounds: int,
        turn: int = 0,
        predicted: int = 0,
        reporter: Reporter,
        stopper: Stopper,
    ) -> Together:
        """Lay the adapters of all loops over a base that their models share; it stays as it is."""
        trunk = share(base)
        rows = lay_together(trunk, [loop.job.model for loop in loops])
        loops[0].job.activations.apply(trunk)
        return cls(
            trunk=trunk.train(),
            rows=rows,
            loops=loops,
            tokens=tokens,
            rounds=rounds,
            turn=turn,
            predicted=predicted,
            reporter=reporter,
            stopper=stopper,
        )

    def __post_init__(self) -> None:
        self._loss = _shareable(make_loss(self.loops[0].job.recipe, self.trunk))

    def run(self) -> None:
        """Run the rounds that are left.

        Raises:
            Interrupted: A signal asked to stop; the round was finished, and all were saved.
            ScrimpError: A loss is not finite, or a checkpoint could not be written.
        """
        began = self._saved = time.monotonic()
        first, tokens = self.turn, self._tokens_done()
        for loop in self.loops:
            loop.begin()
        while self.turn < self.rounds:
            self.run_round()
            spent = time.monotonic() - began
            self._report(self._tokens_done() - tokens, spent, spent / (self.turn - first))
            self._save_when_due(self.turn - 1)

    def run_round(self) -> None:
        """Take every job's steps of the next round."""
        for slot in pack(self._demands(), self.tokens):
            self._run_slot(slot)
        self.turn += 1

    def _demands(self) -> list[Demand]:
        found = []
        for number, loop in enumerate(self.loops):
            recipe = loop.job.recipe
            assert recipe.steps is not None and recipe.batch is not None and recipe.seq is not None
            begin, end = (step_at(turn, recipe.steps, self.rounds) for turn in (self.turn, self.turn + 1))
            found.append(Demand(number, range(begin, end), recipe.batch, recipe.seq))
        return found

    def _run_slot(self, slot: Slot) -> None:
        job = self.loops[0].job
        for part in slot:
            if part.first == 0:
                self._open(part)
        micros = [_rows_of(self._steps[part.job].batch, part.first, part.last) for part in slot]
        batch = joined(micros)
        edges = list(itertools.accumulate((len(micro.input_ids) for micro in micros), initial=0))
        spans = zip((part.job for part in slot), edges, edges[1:], strict=False)
        self.rows.spans = tuple(Span(*span) for span in spans)
        with job.activations.context(), job.placement.context():
            losses = self._losses(slot, micros, on_device(batch, job.device))
            torch.stack(losses).sum().backward()
        for part, loss in zip(slot, losses, strict=True):
            self._steps[part.job].losses.append(loss.detach())
            if part.last == self.loops[part.job].job.recipe.batch:
                self._close(part)

    def _losses(self, slot: Slot, micros: Sequence[MicroBatch], batch: MicroBatch) -> list[Tensor]:
        """Run all rows once, and let every job's loss read its own."""
        output = run(self._loss.runs, batch, self._loss.autocast)
        # A model that returns logits is asked for them alone.
        name = "logits" if "logits" in output else "last_hidden_state"
        sizes = [len(micro.input_ids) for micro in micros]
        found = []
        for part, micro, labels, answer in zip(
            slot, micros, batch.labels.split(sizes), output[name].split(sizes), strict=True
        ):
            loss = _shareable(self.loops[part.job].job.loss)
            own = MicroBatch(batch.input_ids, labels, None, micro.targets)
            with _answering(loss.runs, SimpleNamespace(**{name: answer})):
                found.append(loss(own, divisor=self._steps[part.job].opened.divisor))
        return found

    def _open(self, part: Part) -> None:
        loop = self.loops[part.job]
        micros = loop.job.loader.step(part.step)
        opened = loop.open_step([on_device(micro, loop.job.device) for micro in micros])
        self._steps[part.job] = _Step(batch=joined(micros), opened=opened)

    def _close(self, part: Part) -> None:
        loop, step = self.loops[part.job], self._steps.pop(part.job)
        loop.seed()  # others drew since the step began
        loss = torch.stack(step.losses).sum()
        loop.close_step(step.opened, loss, loop.update(loss))
        loop.evaluate_when_due()

    def _tokens_done(self) -> int:
        return sum(loop.progress.tokens for loop in self.loops)

    def _report(self, tokens: int, spent: float, a_round: float) -> None:
        last = [loop.progress.last for loop in self.loops if loop.progress.last is not None]
        if not last:
            return
        memory = self.loops[0].job.recipe.memory
        assert memory is not None
        self.reporter.tick(
            Tick(
                step=self.turn,
                steps=self.rounds,
                loss=sum(each.loss for each in last) / len(last),
                tokens_per_s=tokens / spent,
                peak_bytes=max(each.peak_bytes for each in last),
                predicted_bytes=self.predicted,
                budget_bytes=parse_bytes(memory),
                left_s=a_round * (self.rounds - self.turn),
            )
        )

    def _save_when_due(self, before: int) -> None:
        """Save all where one has a checkpoint due, the clock asks, or a signal stops the run."""
        last = self.turn == self.rounds
        due = [last or self._is_due(loop, before) for loop in self.loops]
        late = time.monotonic() - self._saved > CHECKPOINT_SECONDS
        stopping = None if last else self.stopper.requested
        if any(due) or late or stopping is not None:
            for loop, scheduled in zip(self.loops, due, strict=True):
                loop.save(scheduled=scheduled)
            self._saved = time.monotonic()
        if stopping is not None:
            raise Interrupted(
                f"stopped after round {self.turn} of {self.rounds} and saved all {len(self.loops)} runs; "
                "go on with the same command and --resume",
                signal_number=stopping,
                out=self.out,
            )

    def _is_due(self, loop: Loop, before: int) -> bool:
        recipe = loop.job.recipe
        assert recipe.steps is not None and recipe.checkpoint.every is not None
        begin, end = (step_at(turn, recipe.steps, self.rounds) for turn in (before, self.turn))
        return begin // recipe.checkpoint.every < end // recipe.checkpoint.every


def joined(micros: Sequence[MicroBatch]) -> MicroBatch:
    """Put rows of several micro-batches into one, padded on the right and cut after the last target.

    A causal model's rows see nothing of what is on their right, so neither changes a loss.
    """
    kept = max(_used(micro.labels) for micro in micros)

    def whole(tensors: Sequence[Tensor], value: int) -> Tensor:
        return torch.cat([F.pad(t[:, :kept], (0, max(0, kept - t.shape[1])), value=value) for t in tensors])

    positions = [micro.position_ids for micro in micros if micro.position_ids is not None]
    return MicroBatch(
        whole([micro.input_ids for micro in micros], 0),
        whole([micro.labels for micro in micros], IGNORED),
        whole(positions, 0) if positions else None,
        sum(micro.targets for micro in micros),
    )


def _used(labels: Tensor) -> int:
    """Return how many columns there are up to the last with a target; at least one."""
    columns = (labels != IGNORED).any(0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else 1


def _rows_of(batch: MicroBatch, first: int, last: int) -> MicroBatch:
    labels, positions = batch.labels[first:last], batch.position_ids
    own = None if positions is None else positions[first:last]
    return MicroBatch(batch.input_ids[first:last], labels, own, int((labels != IGNORED).sum()))


def _shareable(loss: object) -> TokenLoss | ChunkedTokenLoss:
    return cast("TokenLoss | ChunkedTokenLoss", loss)


@contextmanager
def _answering(module: nn.Module, output: object) -> Iterator[None]:
    """Let a module return what was computed already."""
    vars(module)["forward"] = lambda **_: output
    try:
        yield
    finally:
        del vars(module)["forward"]
