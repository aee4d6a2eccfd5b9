"""The shape of the house: what may import what, how long things are, and that each room has its test."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_flatness"
# An import points to an earlier line of this list, or to a neighbour in the same folder.
ORDER = [
    "functional",
    "losses",
    "factors",
    "metrics operation eager oracle detectors alerts",
    "tape watch batch",
    "conditions",
    "rules",
    "tail",
    "replay",
    "certificate",
    "tap",
    "evaluation",
    "measure",
    "probe figures sinks",
    "actions",
    "alarm",
    "callback",
    "examples",
    "demo",
    "__main__",
    "__init__",
]
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms.split()}
CORE = {"torch", "lightning", "torchmetrics", "jaxtyping"}
# What these may import besides the standard library, in functions as well.
OURS = {"lightning_flatness"}
ALONE = {f"{room}.py": OURS for room in ("detectors", "alerts", "watch", "conditions", "rules")} | {
    "oracle.py": {"torch"}
}
HELPERS = {"conftest.py", "cases.py", "fuzz_inputs.py", "fuzz_tails.py", "metrics/checks.py", "networks.py"}
WHOLES = "architecture multiply_adds cli compilers cuda faults fuzz interplay loop nodes optuna precision processes sharding".split()
TESTS_OF_NO_FILE = HELPERS | {f"test_{name}.py" for name in WHOLES}
SOURCES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
each_source = pytest.mark.parametrize("source", SOURCES, ids=str)


def parse(source: Path) -> ast.Module:
    return ast.parse((PACKAGE / source).read_text(encoding="utf-8"))


def imported(nodes: Iterator[ast.AST]) -> Iterator[list[str]]:
    """Dotted names, split: `from a.b import c` gives a, b, c."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not getattr(node, "level", 0), f"line {node.lineno}: write the import absolute"
            above = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from (f"{above}{alias.name}".split(".") for alias in node.names)


def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """Without the bodies of functions, and without what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not (typing_only or isinstance(child, FUNCTIONS)):
            yield child
            yield from run_on_import(child)


@each_source
def test_imports_point_down(source: Path) -> None:
    here = Path(source.parts[0]).stem
    assert here in LEVELS, f"{source} has no level: add it to ORDER"
    for package, *path in imported(ast.walk(parse(source))):
        if package == PACKAGE.name:
            there = path[0] if path and path[0] in LEVELS else "__init__"
            neighbours = here == there and len(source.parts) > 1
            assert neighbours or LEVELS[there] < LEVELS[here], f"{source} imports {there}: not below it"


@each_source
def test_the_core_is_enough_to_import(source: Path) -> None:
    stands_alone = str(source) in ALONE
    nodes = ast.walk(parse(source)) if stands_alone else run_on_import(parse(source))
    allowed = ALONE[str(source)] if stands_alone else CORE | {PACKAGE.name}
    others = {name[0] for name in imported(nodes)} - sys.stdlib_module_names - allowed
    assert not others, f"{source} imports {others}"


@each_source
def test_files_and_functions_are_short(source: Path) -> None:
    length = len((PACKAGE / source).read_text(encoding="utf-8").splitlines())
    assert length <= 300, f"{source} has {length} lines"
    for node in ast.walk(parse(source)):
        if isinstance(node, FUNCTIONS):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 40, f"{source}: the body of {node.name} has {length} lines"


def test_each_source_has_its_test_and_each_test_its_source() -> None:
    wanted = {str(s.with_name(f"test_{s.name}")) for s in SOURCES if not s.name.startswith("__")}
    found = {str(path.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("*.py")}
    assert not wanted - found, f"sources without a test: {sorted(wanted - found)}"
    stray = found - wanted - TESTS_OF_NO_FILE
    assert not stray, f"tests without a source: {sorted(stray)}"
