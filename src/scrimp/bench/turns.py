"""Speed in turns: a contestant and the reference are alive at once, and take a few steps one after the other.

The first turn of each warms up and does not count: kernels are loaded, functions compiled, the first subspace
found. Then who goes first alternates. A ratio is taken within each pair of turns, so that it does not see a
machine that slows down over a minute. Whoever takes far longer than the reference is ended.
"""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from scrimp.base.deadline import within
from scrimp.base.errors import ScrimpError
from scrimp.bench.protocol import turn_order
from scrimp.bench.tasks import ANSWER, Place

PATIENCE = 20.0  # times what the reference took
LEAST_PATIENCE_S = 900.0
A_DAY_S = 86_400.0
LEAST_WARM_UP = 4  # steps: in its first two our own loop follows every tensor


class PlayerError(ScrimpError):
    """A player ended, or takes far too long.

    Attributes:
        is_reference: Whether it is the reference.
    """

    def __init__(self, message: str, *, is_reference: bool) -> None:
        super().__init__(message)
        self.is_reference = is_reference


@dataclass(slots=True)
class Player:
    """A process that takes turns.

    Attributes:
        place: Where its task lies.
        process: It.
        is_reference: Whether it is the reference.
    """

    place: Place
    process: subprocess.Popen[str]
    is_reference: bool

    def turn(self, steps: int, *, patience: float) -> float:
        """Take `steps` steps, and return the tokens a second.

        Raises:
            PlayerError: Its process ended, or takes longer than `patience` seconds.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except OSError:
            raise self._error() from None
        found = self.read(patience=patience)
        return float(found["tokens"] / found["seconds"])

    def read(self, *, patience: float) -> dict[str, Any]:
        """Return its next answer.

        Raises:
            PlayerError: Its process ended, or takes longer than `patience` seconds.
        """
        try:
            line = within(patience, self._next_answer)
        except TimeoutError:
            raise PlayerError(
                f"ended after {patience:,.0f} s of one turn, far longer than the reference takes",
                is_reference=self.is_reference,
            ) from None
        if not line:
            raise self._error()
        found: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
        return found

    def _next_answer(self) -> str:
        """Return the next line that is meant for us: a package may print on standard output too."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        while line and not line.startswith(ANSWER):
            line = self.process.stdout.readline()
        return line

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what it did not read any more
                pipe.close()

    def _error(self) -> PlayerError:
        self.process.wait()
        result = self.place.result
        why = str(result["why"]) if result else self.place.last_words()
        return PlayerError(why, is_reference=self.is_reference)


def warm_up(steps: int) -> int:
    """Return the steps before the first turn that counts, where a turn is `steps` long."""
    return max(LEAST_WARM_UP, steps)


def compare(contestant: Place, reference: Place, *, pairs: int, steps: int) -> dict[str, Any]:
    """Let two prepared tasks take turns.

    Args:
        contestant: A task of mode `turns`.
        reference: The reference's.
        pairs: Turns of each that count.
        steps: Optimizer steps a turn.

    Returns:
        `settings` of the contestant; `speeds`: tokens a second of `contestant` and `reference` in each turn.

    Raises:
        PlayerError: One of them could not be run.
    """
    with ExitStack() as stack:
        mine, other = (
            _enter(stack, Player(place, place.start(talks=True), is_reference))
            for place, is_reference in ((contestant, False), (reference, True))
        )
        began = time.monotonic()
        other.read(patience=A_DAY_S)
        other.turn(warm_up(steps), patience=A_DAY_S)
        patience = max(LEAST_PATIENCE_S, PATIENCE * (time.monotonic() - began))
        settings = mine.read(patience=patience)["settings"]
        mine.turn(warm_up(steps), patience=patience)
        mine_speeds: list[float] = []
        other_speeds: list[float] = []
        for contestant_first in turn_order(pairs):
            order = [(mine, mine_speeds), (other, other_speeds)]
            for player, speeds in order if contestant_first else reversed(order):
                speeds.append(player.turn(steps, patience=patience))
    return {"settings": settings, "speeds": {"contestant": mine_speeds, "reference": other_speeds}}


def _enter(stack: ExitStack, player: Player) -> Player:
    stack.callback(player.end)
    return player
