"""The documentation agrees with the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "scripts" / "docs_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_in_the_docs_are_those_of_the_code(tables: ModuleType) -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))}
    found = [name for page in pages.values() for _, name, _, _ in tables.PLACE.findall(page)]
    assert sorted(found) == sorted(tables.TABLES)
    stale = [path.name for path, page in pages.items() if tables.with_tables(page) != page]
    assert stale == [], "run: python scripts/docs_tables.py"


def test_every_page_is_in_the_navigation() -> None:
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    assert len(pages) > 8
    assert {line.split(": ")[-1].strip() for line in navigation.splitlines() if line.endswith(".md")} == pages
