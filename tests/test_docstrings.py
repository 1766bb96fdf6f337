"""Every public module, class and function of the package has a docstring."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "cellvim"
MODULES = sorted(p.relative_to(PACKAGE.parent).as_posix() for p in PACKAGE.rglob("*.py"))


def public_without_docstring(tree: ast.Module) -> list[str]:
    missing = [] if ast.get_docstring(tree) else ["the module"]
    queue = [("", node) for node in tree.body]
    while queue:
        prefix, node = queue.pop()
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
            continue
        name = prefix + node.name
        inherited = name.endswith(".forward") or any(
            isinstance(d, ast.Attribute) and d.attr in ("setter", "overload") for d in node.decorator_list
        )
        if not ast.get_docstring(node) and not inherited:
            missing.append(name)
        if isinstance(node, ast.ClassDef):
            queue += [(f"{name}.", child) for child in node.body]
    return missing


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module: str) -> None:
    source = (PACKAGE.parent / module).read_text()
    if not source.strip():
        return  # an empty __init__.py
    assert not public_without_docstring(ast.parse(source))
