"""The shape of the package: what may import what, how long things are, and that each file has its test."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_flatness"
# The floors of docs/architecture.md: an import points to a lower one, or stays in its room.
FLOORS = {
    room: int(row.split("|")[1])
    for row in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \d+ \|", row)
    for room in re.findall(r"`(\w+)`", row.split("|")[2])
}
CORE = {"torch", "lightning", "torchmetrics", "jaxtyping"}
# What these may import besides the standard library, in functions as well.
OURS = {"lightning_flatness"}
ALONE = {"rules": OURS, "keys": OURS, "oracle": {"torch"}}
HELPERS = {"conftest.py", "metrics/checks.py"} | {
    f"{name}.py"
    for name in """
        cases fuzz_heads fuzz_inputs fuzz_tails layer_cases lightning_runs networks recorded shape_checker wandb_files
    """.split()
}
WHOLES = """
    architecture cli compilers cuda docs experiments faults fuzz interplay invariances loop multiply_adds nodes
    notebooks old_checkpoints optuna precisions private_names processes restarts sharding threads
""".split()
TESTS_OF_NO_FILE = HELPERS | {f"test_{name}.py" for name in WHOLES}
SOURCES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
each_source = pytest.mark.parametrize("source", SOURCES, ids=str)


def room_of(source: Path) -> str:
    return Path(source.parts[0]).stem


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
    here = room_of(source)
    assert here in FLOORS, f"{source} has no floor: add its room to the table in docs/architecture.md"
    for package, *path in imported(ast.walk(parse(source))):
        if package == PACKAGE.name:
            there = path[0] if path and path[0] in FLOORS else "__init__"
            assert here == there or FLOORS[there] < FLOORS[here], f"{source} imports {there}: not below it"


@each_source
def test_the_core_is_enough_to_import(source: Path) -> None:
    stands_alone = room_of(source) in ALONE
    nodes = ast.walk(parse(source)) if stands_alone else run_on_import(parse(source))
    allowed = ALONE[room_of(source)] if stands_alone else CORE | {PACKAGE.name}
    others = {name[0] for name in imported(nodes)} - sys.stdlib_module_names - allowed
    assert not others, f"{source} imports {others}"


def test_the_import_brings_no_other_package() -> None:
    """Neither matplotlib, tensorboard, jinja2 nor scipy, unless Lightning itself has imported them."""
    code = """
import sys, jaxtyping, lightning.pytorch, torchmetrics
before = set(sys.modules)
import lightning_flatness
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - sys.stdlib_module_names - CORE == {PACKAGE.name}


def code_lines(text: str) -> int:
    """Lines that hold code: no docstring, comment or blank line."""
    documented = (ast.Module, ast.ClassDef, *FUNCTIONS)
    docstrings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented) and ast.get_docstring(node)
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    no_code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    used = {line for t in tokens if t.type not in no_code for line in range(t.start[0], t.end[0] + 1)}
    return len(used - docstrings)


@each_source
def test_files_classes_and_functions_are_short(source: Path) -> None:
    text = (PACKAGE / source).read_text(encoding="utf-8")
    assert code_lines(text) <= 250, f"{source} has {code_lines(text)} lines of code"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            methods = sum(isinstance(item, FUNCTIONS) for item in node.body)
            assert methods <= 15, f"{source}: {node.name} has {methods} methods"
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
