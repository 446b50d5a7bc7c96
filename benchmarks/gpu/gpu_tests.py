"""The tests that need a CUDA device, `pytest -m gpu`, as counts."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from _tasks import ROOT, Expect, Part, Row, Setting, Task, answer, own

TINY = "tests/placement"  # one of them, skipped where there is no GPU


def tasks(setting: Setting, _: Mapping[str, Row], __: Callable[[], float]) -> Iterator[Task]:
    yield own("gpu_tests", "pytest -m gpu", {"tests": TINY if setting.tiny else "tests"})


def summary(rows: list[Row], expect: Expect) -> dict[str, Any]:
    found = rows[0] if rows and "tests" in rows[0] else None
    if found is None:
        return {}
    expect("tests: run on the GPU", found["tests"] - found["skipped"], at_least=1)
    expect("tests: failures", found["failures"] + found["errors"], below=1)
    return {name: found[name] for name in ("tests", "skipped", "failures", "errors")}


PART = Part(name="tests", minutes=1.5, tasks=tasks, summary=summary)


def work(spec: dict[str, Any]) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-n",
            "0",
            f"--junitxml={report}",
            spec["tests"],
        ]
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        if not report.is_file():
            raise SystemExit(done.returncode or 1)
        return counts(report.read_text(encoding="utf-8"))


def counts(report: str) -> Row:
    """Read a report in JUnit's form."""
    suites = ElementTree.fromstring(report).iter("testsuite")
    row: Row = dict.fromkeys(("tests", "skipped", "failures", "errors"), 0)
    broken: list[str] = []
    for suite in suites:
        for name in row:
            row[name] += int(suite.get(name, 0))
        for case in suite.iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            problems = (*case.iter("failure"), *case.iter("error"))
            broken.extend(f"{name}: {problem.get('message')}"[:500] for problem in problems)
    return {**row, "broken": broken}


if __name__ == "__main__":
    answer(work)
