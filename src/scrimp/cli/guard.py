"""How a command ends: with its exit code, and one clear sentence where something is wrong.

0 done, 1 our own mistake (with its traceback), 2 the user's, 128 + n stopped by signal n after saving.
"""

from __future__ import annotations

import functools
import json
import math
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from scrimp.base.errors import Interrupted, ScrimpError

debug = False


def set_debug(value: bool) -> None:
    """Show tracebacks for users' mistakes too."""
    global debug  # noqa: PLW0603 - one switch for the process, set once by the command line
    debug = value


def guarded(command: Callable[..., Any]) -> Callable[..., None]:
    """Turn what a command raises into its exit code."""

    @functools.wraps(command)
    def wrapper(*args: Any, **options: Any) -> None:
        as_json = bool(options.get("as_json"))
        try:
            command(*args, **options)
        except ScrimpError as error:
            _leave(str(error), 2, as_json=as_json)
        except Interrupted as stop:
            _leave(str(stop), 128 + stop.signal_number, as_json=as_json)
        except KeyboardInterrupt:
            _leave("interrupted", 128 + signal.SIGINT, as_json=as_json)
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output left: nothing more to say
            raise typer.Exit(0) from None
        except typer.Exit:
            raise
        except Exception:
            traceback.print_exc()
            _leave("this is a bug in scrimp: please report it with the lines above", 1, as_json=as_json)

    return wrapper


def _leave(message: str, code: int, *, as_json: bool) -> None:
    if debug and code == 2:
        traceback.print_exc()
    complain(message, code, as_json=as_json)
    raise typer.Exit(code) from None


def complain(message: str, code: int, *, as_json: bool) -> None:
    """Say why a command ends with `code`, and where JSON was asked for, say it there too."""
    print(f"scrimp: {message}", file=sys.stderr)
    if as_json:
        print_json({"error": message, "exit_code": code})


def print_json(document: Any) -> None:
    """Write the one JSON document of a command to standard output."""
    print(json.dumps(_finite(document), indent=2, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    """Put null for NaN and infinities, which JSON has no words for."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
