"""Run a command in a terminal of its own and draw what it showed as an SVG.

    python scripts/terminal_picture.py [--out PICTURE.svg] [COMMAND...]      the default: scrimp train

The command runs in a pseudo-terminal (not on Windows), in an empty folder and with an empty cache. What it
writes goes through a small model of a screen, so that a bar that was drawn over itself is one line. A bar
is gone when a command ends; one frame of it, from the middle of the run, is put back where it stood.
The picture is made of text and names no address to fetch anything from.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import shlex
import struct
import sys
import tempfile
import termios
from dataclasses import dataclass, field
from pathlib import Path

from rich.cells import get_character_cell_size
from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "default-run.svg"
COLUMNS, ROWS = 100, 50
BAR = re.compile(r"step \d+/\d+ .* left$")  # tells the bar of the training steps from other lines drawn over
MIDDLE = 0.6  # which of its frames is shown
PROMPT = "\x1b[1;32m$\x1b[0m "

CODE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")
FONT_FACE = re.compile(r"@font-face\s*{.*?}\s*", re.DOTALL)
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

Line = dict[int, tuple[str, str]]  # by column: the character, and the colour codes in force


@dataclass(slots=True)
class Screen:
    """Endless lines, a cursor, and the codes that rich sends.

    Attributes:
        lines: What is on the screen.
        erased: Lines that were drawn over, with where they stood.
    """

    lines: list[Line] = field(default_factory=lambda: [{}])
    erased: list[tuple[int, Line]] = field(default_factory=list)
    _row: int = 0
    _column: int = 0
    _style: str = ""

    def write(self, text: str) -> None:
        """Take what a program wrote."""
        at = 0
        while at < len(text):
            if code := CODE.match(text, at):
                self._obey(code[1], code[2])
                at = code.end()
            else:
                self._put(text[at])
                at += 1

    def _put(self, char: str) -> None:
        if char == "\n":
            self._move(self._row + 1)
        elif char == "\r":
            self._column = 0
        elif char.isprintable():
            width = get_character_cell_size(char)
            if self._column + width > COLUMNS:
                self._move(self._row + 1)
                self._column = 0
            self.lines[self._row][self._column] = (char, self._style)
            self._column += width

    def _move(self, row: int) -> None:
        self._row = max(0, row)
        while len(self.lines) <= self._row:
            self.lines.append({})

    def _obey(self, numbers: str, letter: str) -> None:
        if letter == "m":
            self._style = "" if numbers in ("", "0") else f"{self._style}\x1b[{numbers}m"
        elif letter in "AB":
            self._move(self._row + int(numbers or 1) * (1 if letter == "B" else -1))
        elif letter == "K":
            if self.lines[self._row]:
                self.erased.append((self._row, self.lines[self._row]))
            self.lines[self._row] = {}

    def picture(self) -> str:
        """Return all lines with their colours, and a frame of the bar where it stood."""
        lines = [_ansi(line) for line in self.lines]
        bars = [(row, line) for row, line in self.erased if BAR.match(_plain(line))]
        if bars:
            row, line = bars[int(len(bars) * MIDDLE)]
            lines.insert(row, _ansi(line))
        return "\n".join(lines).rstrip()


def _plain(line: Line) -> str:
    return "".join(char for _, (char, _) in sorted(line.items()))


def _ansi(line: Line) -> str:
    text, end = "", 0
    for column, (char, style) in sorted(line.items()):
        text += " " * (column - end) + f"{style}{char}\x1b[0m"
        end = column + get_character_cell_size(char)
    return text


def run(command: list[str]) -> tuple[Screen, int]:
    """Run a command in a pseudo-terminal; return what it showed, and its exit code."""
    screen = Screen()
    with tempfile.TemporaryDirectory(prefix="scrimp-picture-") as folder:
        process, terminal = pty.fork()
        if process == 0:
            _become(command, Path(folder))
        pending = b""
        while block := _read(terminal):
            sys.stdout.buffer.write(block)
            sys.stdout.flush()
            whole = (pending + block).rpartition(b"\n")  # neither a code nor a character is cut in two
            screen.write((whole[0] + whole[1]).decode(errors="replace"))
            pending = whole[2]
        screen.write(pending.decode(errors="replace"))
        return screen, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _become(command: list[str], folder: Path) -> None:
    """Turn this process into the command, as a person's first run in an empty folder."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    place = {
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    work = folder / "work"
    work.mkdir()
    os.chdir(work)
    os.execvpe(command[0], command, {**kept, **place, "TERM": "xterm-256color", "COLORTERM": "truecolor"})


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # how Linux says that the other end is closed
        return b""


def draw(ansi: str, *, title: str) -> str:
    """Draw lines with colour codes as an SVG that needs nothing but itself."""
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(Text.from_ansi(ansi), soft_wrap=True)
    console.print()  # the picture cuts the descenders of its last line
    svg = console.export_svg(title=title, unique_id="scrimp")
    svg = FONT_FACE.sub("", svg)
    return re.sub(r"font-family: [^;]+;", f"font-family: {FONTS};", svg)


def main() -> int:
    """Run, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command or ["scrimp", "train"]
    screen, code = run(command)
    if code:
        print(f"{shlex.join(command)} ended with {code}: no picture was drawn", file=sys.stderr)
        return code
    shown = shlex.join(command)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(draw(f"{PROMPT}{shown}\n{screen.picture()}", title=shown), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
