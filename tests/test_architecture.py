"""The layout is the architecture: dependencies point one way, files stay readable, start-up stays fast.

    cli → bench → report, training, memory → build → {the six choices, data} → base

Imports are read from the syntax tree, those inside functions too: a late import is a dependency all
the same. Three laws need a fresh interpreter and start one: what `import scrimp`, `scrimp --help` and
`import scrimp.optim` load cannot be seen in a process that has loaded everything.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
FILES = sorted((SOURCE / "scrimp").rglob("*.py"))

CHOICES = frozenset({"weights", "tuning", "gradient", "optim", "activations", "placement"})
RECIPE = frozenset({"methods", "reported", "shapes", "laws", "schedules", "recipe", "recipe_file"})
MODEL = frozenset({"models", "adapted", "own_adapter", "defaults"})
BASE = frozenset({"base"})
PIECES = BASE | RECIPE | CHOICES | MODEL | {"data", "checks"}

# What each part may import, besides itself. The six choices and the data see only base, and so never
# each other; `build` is the one place that sees them all.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "base": frozenset(),
    "methods": BASE,
    "reported": BASE,
    "shapes": BASE,
    "laws": BASE,
    "schedules": BASE | {"laws", "recipe"},
    "recipe": BASE | {"methods"},
    "recipe_file": BASE | RECIPE,
    **dict.fromkeys(CHOICES | {"data"}, BASE),
    "own_adapter": BASE | RECIPE | {"tuning"},
    "adapted": BASE | RECIPE | {"tuning", "weights", "own_adapter"},
    "models": BASE | RECIPE | {"adapted"},
    "defaults": BASE | RECIPE | {"models"},
    "checks": BASE | RECIPE | {"assembly", "activations"},
    "assembly": PIECES,
    "build": PIECES | {"assembly"},
    "memory": PIECES | {"assembly", "build"},
    "merged": PIECES,
    "resolve": PIECES | {"assembly", "build", "memory"},
    "training": PIECES | {"assembly", "build", "memory", "resolve"},
    "report": PIECES | {"assembly", "build", "memory", "resolve", "training"},
    "bench": PIECES | {"assembly", "build", "memory", "resolve", "training", "report", "reported"},
    "api": PIECES | {"assembly", "build", "memory", "resolve", "training", "report"},
    "cli": PIECES | {"assembly", "build", "memory", "resolve", "training", "report", "bench", "merged"},
    "__main__": frozenset({"cli"}),
}

# Where a user's mistake must be found before torch is imported, and where base draws its line.
FREE_OF_TORCH = RECIPE
HEAVY = frozenset(
    {"torch", "transformers", "peft", "pyarrow", "datasets", "tokenizers", "safetensors", "numpy"}
)

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def _part(path: Path) -> str:
    """Return the part of the package that a file belongs to: its folder or, at the top, its own name."""
    return path.relative_to(SOURCE / "scrimp").with_suffix("").parts[0]


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _imports(path: Path) -> Iterator[str]:
    """Yield the dotted name of every module that a file imports, at the top or late."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _files_of(*parts: str) -> list[Path]:
    found = [path for path in FILES if _part(path) in parts]
    assert found, f"no file in {parts}"
    return found


def test_every_file_belongs_to_a_part_of_the_design() -> None:
    assert len(FILES) > 20
    assert {_part(path) for path in FILES} - {"__init__"} <= MAY_IMPORT.keys()


def test_dependencies_point_one_way() -> None:
    wrong, seen = [], 0
    for path in FILES:
        part = _part(path)
        if part == "__init__":  # the public names come from everywhere
            continue
        for name in _imports(path):
            if not name.startswith("scrimp."):
                continue
            seen += 1
            target = name.split(".")[1]
            if target not in MAY_IMPORT[part] | {part, "__version__"}:
                wrong.append(f"{path.relative_to(SOURCE)} imports {name}")
    assert seen > 50
    assert wrong == []


def test_base_needs_torch_at_the_most() -> None:
    allowed = {*sys.stdlib_module_names, "scrimp", "torch", "filelock"}  # torch itself needs filelock
    allowed_in = {"platform.py": {"psutil"}}  # it asks the machine; `scrimp.optim` does without (below)
    wrong = [
        f"{path.name}: {name}"
        for path in _files_of("base")
        for name in _imports(path)
        if name.split(".")[0] not in allowed | allowed_in.get(path.name, set())
    ]
    assert wrong == []


def test_recipe_and_catalogue_import_neither_torch_nor_pieces() -> None:
    files = _files_of(*FREE_OF_TORCH)
    assert {_part(path) for path in files} == FREE_OF_TORCH
    wrong = [
        f"{path.name}: {name}" for path in files for name in _imports(path) if name.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_no_file_is_longer_than_a_reader_s_patience() -> None:
    lengths = {
        str(path.relative_to(SOURCE)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES
    }
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many lines a function has besides its docstring."""
    lines = (node.end_lineno or 0) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is None:
        return lines
    return lines - ((first.end_lineno or 0) - first.lineno + 1)


def test_no_function_is_longer_than_a_screen() -> None:
    lengths = {
        f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}": _lines(node)
        for path in FILES
        for node in _functions(path)
    }
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_public_functions_name_their_arguments() -> None:
    found = [
        (path, node)
        for path in FILES
        for scope in (_tree(path), *(node for node in _tree(path).body if isinstance(node, ast.ClassDef)))
        for node in scope.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_")
    ]
    assert len(found) > 50
    # `forward` of a module passes on what others hand it, and an unpacked TypedDict names all.
    wrong = [
        f"{path.name}:{node.lineno}"
        for path, node in found
        if node.args.kwarg
        and node.name != "forward"
        and "Unpack[" not in ast.unparse(node.args.kwarg.annotation or ast.Constant(""))
    ]
    assert wrong == []


def test_nothing_is_unpickled_or_executed() -> None:
    forbidden = {"torch.load", "torch.save", "pickle.load", "pickle.loads", "yaml.load", "eval", "exec"}
    calls = [
        (f"{path.relative_to(SOURCE)}:{node.lineno}", ast.unparse(node.func))
        for path in FILES
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Call)
    ]
    assert len(calls) > 100
    assert [where for where, name in calls if name in forbidden] == []


def _run(code: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _cpu_seconds(*command: str) -> float:
    """Return the CPU time of a command, the best of three: wall time would measure the neighbours too."""

    def once() -> float:
        before = os.times()
        subprocess.run([sys.executable, *command], capture_output=True, check=True, timeout=120)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    return min(once() for _ in range(3))


def _heavy_modules(code: str) -> str:
    return _run(f"{code}\nimport sys\nprint(*sorted({set(HEAVY)!r} & sys.modules.keys()))").strip()


def test_importing_scrimp_is_quick_and_leaves_torch_alone() -> None:
    assert _heavy_modules("import scrimp") == ""
    assert _cpu_seconds("-c", "import scrimp") < 1.5


def test_help_is_quick_and_leaves_torch_alone() -> None:
    code = "import contextlib, io, sys\nsys.argv = ['scrimp', '--help']\nfrom scrimp.cli import main\n"
    code += "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    main()"
    assert _heavy_modules(code) == ""
    assert _cpu_seconds("-m", "scrimp", "--help") < 0.6


@pytest.mark.parametrize("module", ["scrimp.optim", "scrimp.base.seeds"])
def test_optim_and_base_need_torch_alone(module: str) -> None:
    """The other packages are hidden, as if they were not installed."""
    hidden = {*HEAVY, "accelerate", "huggingface_hub", "psutil", "pydantic", "rich", "typer", "yaml"}
    hidden -= {"torch"}
    code = f"""
import importlib.abc, sys, warnings
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"hidden: {{name}}", name=name)
sys.meta_path.insert(0, Hide())
warnings.filterwarnings("ignore")  # torch says that it misses NumPy
import {module}
print("loaded:", *({hidden!r} & sys.modules.keys()))
"""
    loaded = _run(code).split()[1:]
    assert loaded == []
