"""One HTML file that is a whole report: figures, charts, and everything needed to look closer.

The tables and words are written here, so that a reader without JavaScript has all of them; the script (plain
JavaScript in `web/`, no library, no build) draws the charts from the document and makes the tables sort and
filter. Style, script and document stand in the file itself, and its content security policy names the hashes
of the two and forbids everything else: no font, no image, no request.

Floating-point numbers are rounded to five significant digits on the way in; whole numbers stay exact.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from scrimp.base.errors import ScrimpError
from scrimp.base.files import write_atomic
from scrimp.report.plan_bars import COLOURS
from scrimp.report.plan_svg import PATTERNS
from scrimp.report.web import runs, suite
from scrimp.report.web.markup import safe

SCHEMA = 1
BODIES = {"suite": suite.body, "runs": runs.body}
# In this order: a script may use what an earlier one declares.
SCRIPTS = (
    "dom.js",
    "scale.js",
    "tip.js",
    "chart.js",
    "bars.js",
    "table.js",
    "losses.js",
    "suite.js",
    "runs.js",
    "report.js",
)
DIGITS = 5


def page(document: Mapping[str, Any]) -> str:
    """Return a report as one HTML page, complete in itself.

    Args:
        document: What a suite (`kind` is `suite`) or runs (`runs`) left, as plain data.

    Raises:
        ScrimpError: The document is of another kind, or of another version of its format.
    """
    kind, schema = document.get("kind"), document.get("schema")
    if kind not in BODIES or schema != SCHEMA:
        raise ScrimpError(
            f"a report cannot be made of a document of kind {kind!r} and schema {schema!r}: "
            f"give one of kind {' or '.join(map(repr, BODIES))} and schema {SCHEMA}, made by this version"
        )
    plain = rounded(document)
    script = "\n".join(["'use strict';", "(() => {", *map(_resource, SCRIPTS), "})();"])
    style = _resource("report.css")
    return Template(_resource("report.html")).substitute(
        policy=_policy(script, style),
        title=safe(str(plain["title"])),
        style=style,
        patterns=_patterns(),
        body=BODIES[kind](plain),
        # Within a script element `<` alone can end the data (`</script>`) or turn it around (`<!--`).
        data=json.dumps(plain, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        script=script,
    )


def write_page(document: Mapping[str, Any], path: Path) -> None:
    """Write a report, replacing an earlier one at once.

    Args:
        document: As for `page`.
        path: The HTML file.

    Raises:
        ScrimpError: As for `page`; or the file cannot be written, and an earlier one stays.
    """
    write_atomic(path, page(document))


def rounded(value: Any) -> Any:
    """Round every floating-point number of plain data; what is no number becomes `None`, as JSON needs."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def _resource(name: str) -> str:
    return files("scrimp.report.web").joinpath(name).read_text(encoding="utf-8")


def _policy(script: str, style: str) -> str:
    """Allow this script and this style, the empty icon, and nothing else."""
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _patterns() -> str:
    """Write the fills of the memory terms, the same as in a plan; the script reads the terms off them."""
    return "".join(
        f'<pattern id="term-{term.replace(" ", "-")}" data-term="{term}" '
        'width="8" height="8" patternUnits="userSpaceOnUse">'
        f'<rect width="8" height="8" fill="{colour}"/>'
        f'<path class="tile" d="{PATTERNS[term]}"/></pattern>'
        for term, colour in COLOURS.items()
    )
