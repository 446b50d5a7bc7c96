"""Speed in turns: a contestant and the reference are alive at once, and take a few steps one after the other.

The first turn of each warms up and does not count: kernels are loaded, functions compiled, the first subspace
found. Then who goes first alternates. A ratio is taken within each pair of turns, so that it does not see a
machine that slows down over a minute.
"""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from scrimp.base.errors import ScrimpError
from scrimp.bench.protocol import turn_order
from scrimp.bench.tasks import Place


@dataclass(slots=True)
class Player:
    """A process that takes turns."""

    place: Place
    process: subprocess.Popen[str]

    def turn(self, steps: int) -> float:
        """Take `steps` steps, and return the tokens a second.

        Raises:
            ScrimpError: Its process ended.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ScrimpError(self._why()) from None
        found = self.read()
        return float(found["tokens"] / found["seconds"])

    def read(self) -> dict[str, Any]:
        """Return its next answer.

        Raises:
            ScrimpError: Its process ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):  # a package may print on standard output too
            line = self.process.stdout.readline()
        if not line:
            raise ScrimpError(self._why())
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _why(self) -> str:
        self.process.wait()
        result = self.place.result
        return str(result["why"]) if result else self.place.last_words()


def compare(contestant: Place, reference: Place, *, pairs: int, steps: int) -> dict[str, list[float]]:
    """Let two prepared tasks take turns.

    Args:
        contestant: A task of mode `turns`.
        reference: The reference's.
        pairs: Turns of each that count.
        steps: Optimizer steps a turn.

    Returns:
        `contestant` and `reference`: tokens a second in each turn; `warm_up`: those of the first turns.

    Raises:
        ScrimpError: One of them could not be run.
    """
    with ExitStack() as stack:
        players = []
        for place in (contestant, reference):
            player = Player(place, place.start(talks=True))
            stack.callback(player.end)
            players.append(player)
        for player in players:
            player.read()
        warm_up = [player.turn(steps) for player in players]
        speeds: dict[str, list[float]] = {"contestant": [], "reference": []}
        for contestant_first in turn_order(pairs):
            order = ("contestant", "reference") if contestant_first else ("reference", "contestant")
            for side in order:
                speeds[side].append(players[side == "reference"].turn(steps))
    return {**speeds, "warm_up": warm_up}
