"""The documentation agrees with the code: tables, results, commands, options, links and the picture."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.report.suite_document import suite_document
from typer.main import get_command

from scrimp.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TOP = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
PAGES = sorted([*DOCS.rglob("*.md"), *(ROOT / name for name in TOP)])
PICTURE = DOCS / "assets" / "default-run.svg"

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
GROUP: Any = get_command(app)


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return _load("docs_tables")


@pytest.fixture(scope="module")
def results() -> ModuleType:
    return _load("results_table")


@pytest.fixture(scope="module")
def suites() -> ModuleType:
    return _load("results_page")


def test_tables_in_the_docs_are_those_of_the_code(tables: ModuleType) -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
    found = [name for page in pages.values() for _, name, _, _ in tables.PLACE.findall(page)]
    assert sorted(found) == sorted(tables.TABLES)
    stale = [path.name for path, page in pages.items() if tables.with_tables(page) != page]
    assert stale == [], "run: python scripts/docs_tables.py"


def test_every_page_is_in_the_navigation() -> None:
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    assert len(pages) > 8
    assert {line.split(": ")[-1].strip() for line in navigation.splitlines() if line.endswith(".md")} == pages


def test_benchmarks_page_is_what_the_results_say(results: ModuleType) -> None:
    page = results.PAGE.read_text(encoding="utf-8")
    assert len(results.PLACE.findall(page)) == 1
    assert results.page(page) == page, "run: python scripts/results_table.py"
    suites = ("bench-", "gpu")  # these are the results page's
    own = {path.stem for path in results.RESULTS.glob("*.json") if not path.stem.startswith(suites)}
    assert own <= {*results.TITLES, *results.MORE_OF_IT}


def test_a_result_becomes_a_table_and_a_missing_one_says_so(results: ModuleType, tmp_path: Path) -> None:
    document = {
        "command": ["python", "benchmarks/startup.py", "--runs", "2"],
        "busy": True,
        "environment": {"cpu": "Abacus", "cores": 2, "versions": {"python": "3.11.7"}},
        "targets": [
            {"what": "seconds", "value": 0.31249, "below": 0.5, "met": True},
            {"what": "packages", "value": 46, "below": 46, "met": False},
        ],
        "results": {},
    }
    (tmp_path / "startup.json").write_text(json.dumps(document), encoding="utf-8")
    section = results.section("startup", tmp_path / "startup.json")
    assert "| seconds | 0.3125 | below 0.5 | yes |" in section
    assert "| packages | 46 | below 46 | **no** |" in section
    assert "Abacus, 2 cores, python 3.11.7. Command: `python benchmarks/startup.py --runs 2`." in section
    assert "busy" in section
    assert "No result yet" in results.section("loop", tmp_path / "loop.json")
    assert all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in results.TITLES)


def test_results_page_is_what_the_suites_documents_say(suites: ModuleType) -> None:
    page = suites.PAGE.read_text(encoding="utf-8")
    assert suites.page() == page, "run: python scripts/results_page.py"
    assert page.count("\n## ") >= len(suites.SUITES)


def test_pictures_and_reports_of_the_results_are_of_the_committed_documents(suites: ModuleType) -> None:
    from scrimp.report.page import page as report_page
    from scrimp.report.suite_plots import fingerprint

    wanted = set()
    for name, _, document in suites.documents():
        for path in suites.pictures(name, document):
            assert fingerprint(document) in path.read_text(encoding="utf-8"), path.name
            wanted.add(path.name)
        assert suites.report(name).read_text(encoding="utf-8") == report_page(document), name
        wanted.add(suites.report(name).name)
    there = {path.name for pattern in ("bench-*", "gpu*") for path in suites.ASSETS.glob(f"{pattern}.*")}
    assert there == wanted, "run: python scripts/results_page.py"


def test_a_number_that_a_reading_types_is_an_error(suites: ModuleType) -> None:
    allowed = "{job.tokens} of two with 8-bit AdamW8bit at 60M (arXiv 2403.03507), `--seeds 3`, llama-1m."
    assert suites.bare_numbers(allowed) == []
    assert suites.bare_numbers("below 1.93, by 12 % on 3 of 307,200.") == ["1.93", "12", "3", "307,200"]
    assert suites.filled(allowed, suite_document()).startswith("307,200 of two")
    with pytest.raises(ValueError, match="typed, not filled in: 12"):
        suites.filled("by 12 %", suite_document())


def test_a_perplexity_that_is_asked_for_is_no_other_figure_of_the_paper(suites: ModuleType) -> None:
    document = suite_document()
    row = next(one for one in document["contestants"] if one["name"] == "galore-torch")
    entry = {"model": "60M", "metric": "tokens/s", "value": 1257.0}
    row["reported"].insert(0, {**row["reported"][0], **entry})
    assert suites.filled("{galore-torch.reported.60M}", document) == "34.88"
    row["reported"] = row["reported"][:1]
    with pytest.raises(ValueError, match="no such figure"):
        suites.filled("{galore-torch.reported.60M}", document)


def test_every_reading_belongs_to_a_document(suites: ModuleType, tmp_path: Path) -> None:
    known = {name.removeprefix("bench-") for name, *_ in suites.documents()}
    astray = [path.name for path in suites.READINGS.glob("*.md") if path.stem not in known]
    assert astray == [], "shown nowhere"
    assert suites.documents(tmp_path) == []


def test_a_suite_becomes_a_section_with_its_reading(suites: ModuleType, tmp_path: Path) -> None:
    document = suite_document() | {"busy": True}
    (tmp_path / "bench-optimizers.json").write_text(json.dumps(document), encoding="utf-8")
    gpu = {"results": {"pretrain": {"rows": [{"name": "pretrain", "document": suite_document(1)}]}}}
    (tmp_path / "gpu.json").write_text(json.dumps(gpu), encoding="utf-8")
    (tmp_path / "optimizers.md").write_text("Fira ends at {fira.loss|.3f}.", encoding="utf-8")
    page = suites.page(tmp_path, tmp_path)
    fira = next(one for one in document["contestants"] if one["name"] == "fira")
    assert f"Fira ends at {fira['loss']['median']:.3f}." in page
    assert "| torchao:AdamW4bit (missing) | - |" in page
    assert "34.88 +0.024 (0.24G)" in page  # GaLore's own figure at 60M, beside its distance from AdamW's
    assert "](assets/bench-optimizers-memory-loss.svg)" in page
    assert "](assets/gpu-pretrain-loss.svg)" in page
    assert page.count(suites.BUSY) == 2
    assert "Command: `scrimp bench optimizers --seeds 3`, 45 min 10 s" in page
    assert page.count("No result yet") == len(suites.SUITES) - 1


def test_rows_of_one_part_have_a_name_and_a_heading_each(suites: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"name": f"llama-350m {precision}", "document": suite_document(seed)}
        for seed, precision in enumerate(("fp32", "bf16"))
    ]
    gpu = {"results": {"speed": {"rows": [{"name": "warm-up"}, *rows]}}}
    (tmp_path / "gpu.json").write_text(json.dumps(gpu), encoding="utf-8")
    names = ["gpu-speed-llama-350m-fp32", "gpu-speed-llama-350m-bf16"]
    assert [one.name for one in suites.documents(tmp_path)] == names
    (tmp_path / f"{names[1]}.md").write_text("Read the second.", encoding="utf-8")
    page = suites.page(tmp_path, tmp_path)
    headings = [line for line in page.splitlines() if line.startswith("## ") and "llama-350m" in line]
    assert len(headings) == 2
    for name, row, heading in zip(names, rows, headings, strict=True):
        assert f"({row['name']}, Abacus 9000)" in heading
        assert page.count(f"](assets/{name}.html)") == 1
    assert page.index("Read the second.") > page.index(headings[1])
    gpu["results"]["speed"]["rows"].append(rows[0])
    (tmp_path / "gpu.json").write_text(json.dumps(gpu), encoding="utf-8")
    with pytest.raises(ValueError, match="one name"):
        suites.documents(tmp_path)


def test_hostile_text_cannot_break_the_results_page(suites: ModuleType, tmp_path: Path) -> None:
    hostile = "x|y\n\n## z <script>alert(1)</script> `a` [b](c) *d*"
    document = suite_document() | {"title": hostile, "notes": [hostile], "command": ["scrimp", hostile]}
    document["contestants"][1] |= {"name": hostile, "why": hostile, "status": "partial"}
    document["environment"]["device_name"] = document["job"]["data"] = hostile
    (tmp_path / "bench-optimizers.json").write_text(json.dumps(document), encoding="utf-8")
    page = suites.page(tmp_path, tmp_path)
    prose = re.sub(r"`[^`]*`", "", page.replace("\\`", ""))
    assert "\\<script>" in page and not re.search(r"(?<!\\)<script", prose)
    assert not any(line.startswith("## z") for line in page.splitlines())
    assert "](c)" not in re.sub(r"\\\](?=\(c\))", "", prose)
    lines = [line for line in page.splitlines() if line.startswith("| ") and "held-out" in page]
    counts = {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:12]}
    assert len(lines) > 12 and len(counts) == 1


def test_targets_of_a_gpu_are_a_table_where_there_is_a_result(results: ModuleType, tmp_path: Path) -> None:
    text = "<!-- results -->\n<!-- end of results -->"
    assert "On a GPU" not in results.page(text, tmp_path)
    document = {
        "command": ["python", "benchmarks/gpu/run.py"],
        "busy": False,
        "environment": {"device_name": "Abacus 9000", "cpu": "Abax", "versions": {"torch": "2.13.0"}},
        "targets": [
            {"part": "speed", "what": "tokens/s, ours / Trainer", "value": 1.2, "at_least": 0.95, "met": True}
        ],
        "results": {},
    }
    (tmp_path / "gpu.json").write_text(json.dumps(document), encoding="utf-8")
    page = results.page(text, tmp_path)
    assert "## On a GPU" in page
    assert "| tokens/s, ours / Trainer | 1.2 | at least 0.95 | yes |" in page
    assert "Abacus 9000, Abax, torch 2.13.0. Command: `python benchmarks/gpu/run.py`." in page


@pytest.mark.parametrize(
    ("reading", "text"),
    [
        ("{job.tokens} tokens of {job.data}", "307,200 tokens of Python's standard library"),
        ("{galore-torch.reported.60M} against {adamw.reported.60M}", "34.88 against 34.06"),
        ("{galore-torch.reported.60M - adamw.reported.60M|+.2f}", "+0.82"),
        ("{transformers:Adafactor.state_bytes / adamw.state_bytes|percent}", "1.25 %"),
        ("{adamw.state_bytes|bytes}, {seconds|duration}", "6.43 MiB, 45 min 10 s"),
    ],
)
def test_a_placeholder_is_filled_from_the_document(suites: ModuleType, reading: str, text: str) -> None:
    assert suites.filled(reading, suite_document()) == text


@pytest.mark.parametrize(
    "reading",
    [
        "{nobody.loss}",
        "{fira.los}",
        "{torchao:AdamW4bit.loss}",  # not installed, so it has none
        "{fira.loss.all}",
        "{fira.loss - job.data}",
        "{fira.loss - adamw.loss - lion-pytorch.loss}",
        "{fira.loss|__class__}",
        "{galore-torch.reported.2B}",
        "{fira.trials.0}",
        "{}",
    ],
)
def test_a_placeholder_that_names_nothing_is_an_error(suites: ModuleType, reading: str) -> None:
    with pytest.raises(ValueError, match=re.escape("{")):
        suites.filled(reading, suite_document())


def _shown_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield every `scrimp …` of a console block, as the page and its words."""
    for path in PAGES:
        for kind, block in BLOCK.findall(path.read_text(encoding="utf-8")):
            for line in block.splitlines() if kind == "console" else ():
                for part in line.removeprefix("$ ").split("&&"):
                    words = shlex.split(part)
                    if words and Path(words[0]).name == "scrimp":
                        yield path.name, words[1:]


def test_every_command_that_is_shown_parses() -> None:
    shown = list(_shown_commands())
    assert {page for page, _ in shown} >= {"README.md", "tutorial.md", "index.md"}
    for page, (name, *words) in shown:
        assert name in GROUP.commands, f"{page}: {name}"
        GROUP.commands[name].make_context(name, list(words))  # raises where it does not parse


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' Trainer warns of torch's own changes
def test_the_guide_to_the_optimizers_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "guide" / "optimizers.md").read_text(encoding="utf-8")
    blocks = [block for kind, block in BLOCK.findall(page) if kind == "python"]
    names: dict[str, Any] = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, "optimizers.md", "exec"), names)  # noqa: S102
    assert len(blocks) > 10
    shown = next(block for kind, block in BLOCK.findall(page) if kind == "text")
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in shown.splitlines() if line not in ("...", *printed)] == []


def test_every_option_that_is_named_exists() -> None:
    general = {option for parameter in GROUP.params for option in parameter.opts} | {"--help"}
    known = {name: {o for p in c.params for o in p.opts} | general for name, c in GROUP.commands.items()}
    anywhere = set().union(*known.values())
    seen = 0
    for path in PAGES:
        for span in SPAN.findall(BLOCK.sub("", path.read_text(encoding="utf-8"))):
            program, *words = span.split()
            if program == "scrimp" and words:
                name = words[0] if words[0] in known else None
                assert name or words[0] in general, f"{path.name}: {span}"
                wanted, allowed = words[1:], known[name] if name else general
            elif span.startswith("--"):
                wanted, allowed = span.split(), anywhere
            else:
                continue
            options = {word for word in wanted if word.startswith("--")}
            assert options <= allowed, f"{path.name}: {span}"
            seen += 1
    assert seen > 50


def test_every_link_to_a_file_resolves() -> None:
    seen = 0
    for path in PAGES:
        for target in LINK.findall(BLOCK.sub("", path.read_text(encoding="utf-8"))):
            if not target.startswith(("https://", "#")):
                assert (path.parent / target.partition("#")[0]).is_file(), f"{path.name}: {target}"
                seen += 1
    assert seen > 30


def test_architecture_names_every_module() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    modules = {path.name for path in (ROOT / "src" / "scrimp").rglob("*.py") if path.name != "__init__.py"}
    commands = {f"{path.stem}.py" for path in (ROOT / "src" / "scrimp" / "cli").glob("*.py")}
    missing = {name for name in modules - commands if not re.search(rf"\b{re.escape(name)}\b", page)}
    assert missing == set()


def test_reference_describes_every_public_name() -> None:
    import scrimp
    import scrimp.memory
    import scrimp.optim

    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    public = [f"scrimp.{name}" for name in scrimp.__all__ if not name.startswith("__")]
    public += [f"scrimp.optim.{name}" for name in scrimp.optim.__all__]
    public += [f"scrimp.memory.{name}" for name in scrimp.memory.__all__]
    assert [name for name in public if f"\n::: {name}\n" not in page] == []


def test_the_picture_fetches_nothing() -> None:
    text = PICTURE.read_text(encoding="utf-8")
    assert "bits&#160;per&#160;byte" in text  # a finished run
    addresses = re.findall(r"(?:href|src)=|@import|url\((?!#)", text)
    assert addresses == []


@pytest.mark.skipif(sys.platform == "win32", reason="the picture is drawn with a pseudo-terminal")
def test_a_bar_that_was_drawn_over_is_one_line_in_the_picture() -> None:
    screen = _load("terminal_picture").Screen()
    frames = "".join(f"\r\x1b[2Kstep \x1b[1m{n}\x1b[0m/9  loss 1  {9 - n} s left" for n in range(1, 10))
    screen.write(f"plan\r\n{frames}\r\n\x1b[1A\x1b[2Kresult\r\n")
    picture = re.sub(r"\x1b\[[\d;]*m", "", screen.picture())
    assert picture == "plan\nstep 6/9  loss 1  3 s left\nresult"
