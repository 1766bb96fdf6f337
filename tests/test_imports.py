"""The order of imports, cycles, private names, and lazy imports of heavy packages; read from the syntax trees."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components

import cellvim

PACKAGE = Path(cellvim.__file__).parent
RANK = {  # a part may import itself and parts of a lower rank
    "__main__": 9,
    "cli": 8,
    "demo": 7,
    "report": 6,
    "attribution": 6,
    "pl": 5,
    "train": 4,
    "evaluate": 4,
    "embedding": 3.5,
    "profiles": 3.2,
    "anndata_io": 3,
    "models": 2,
    "data": 2,
    "ops": 1,
    "channels": 0.5,
    "files": 0.5,
    "errors": 0,
}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "datasets" not in p.relative_to(PACKAGE).parts)


def _name(path: Path) -> str:
    parts = ("cellvim", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _part(name: str) -> str | None:
    """Return the part of the package that a module belongs to; None for the package itself and for other packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "cellvim" and len(parts) > 1 else None


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Return the modules that a file imports, those for type checkers left out."""
    return _imports_of(path.read_text(encoding="utf-8"), path, top_level_only=top_level_only)


def _imports_of(source: str, path: Path, *, top_level_only: bool = False) -> set[str]:
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = _name(path).split(".")
            package = package if path.name == "__init__.py" else package[:-1]
            base = (
                ".".join([*package[: len(package) - node.level + 1], node.module or ""]) if node.level else node.module
            )
            base = base.rstrip(".")
            found.add(base)
            if base == "cellvim" or base.startswith("cellvim."):
                found.update(f"{base}.{alias.name}" for alias in node.names)  # of which some are modules
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if not _is_type_checking(child) and not (top_level_only and is_function):
                visit(child)

    visit(ast.parse(source))
    return found


def _third_party(path: Path, **options) -> set[str]:
    return {name.split(".")[0] for name in _imports(path, **options)} - {"cellvim"}


def test_every_part_has_its_place():
    parts = {_part(_name(p)) for p in MODULES} - {None}
    assert parts <= set(RANK), "give the new part a place in the design, and a rank here"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_go_one_way(path):
    own = _part(_name(path))
    if own is None:
        return  # the package imports its public names on first use
    wrong = {
        name
        for name in _imports(path)
        if (part := _part(name)) in RANK and part != own and RANK[part] >= RANK.get(own, RANK["cli"])
    }
    assert not wrong, f"{_name(path)} imports {sorted(wrong)}"


def _all_imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports anywhere, also for type checkers and inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return found & {_name(p) for p in MODULES} - {_name(path)}


def test_no_import_cycles():
    """Counts imports inside functions and for type checkers. A package's __init__ may import its own modules."""
    graph = {_name(p): _all_imports(p) for p in MODULES if _name(p) != "cellvim"}
    for name, imports in graph.items():
        imports -= {"cellvim", name.rpartition(".")[0]}
    cycles = [sorted(group) for group in _strongly_connected(graph) if len(group) > 1]
    assert not cycles


def _strongly_connected(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected components of a directed graph."""
    names = list(graph)
    matrix = np.array([[other in graph[name] for other in names] for name in names])
    _, labels = connected_components(matrix, connection="strong")
    return [{name for name, label in zip(names, labels, strict=True) if label == i} for i in set(labels)]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_private_names_stay_in_their_module(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules: dict[str, str] = {}  # local name -> module of the package
    private = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cellvim":
            private += [f"{node.module}.{a.name}" for a in node.names if a.name.startswith("_") and a.name[:2] != "__"]
            modules |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            modules |= {a.asname: a.name for a in node.names if a.asname and a.name.startswith("cellvim.")}
    known = {_name(p) for p in MODULES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module in known and node.attr.startswith("_") and node.attr[:2] != "__":
                private.append(f"{module}.{node.attr}")
    assert not private


def test_file_names_are_unique():
    """Except where one module draws what another one computes."""
    names = Counter(p.name for p in MODULES if p.name != "__init__.py")
    repeated = [name for name, count in names.items() if count > 1]
    assert len(repeated) <= 5, repeated
    assert all(names[name] == 2 for name in repeated)
    drawing = {p.name for p in MODULES if _part(_name(p)) in ("pl", "report")}
    assert set(repeated) <= drawing


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        (
            "zarr",
            (
                *("cellvim.data.plate", "cellvim.data.importers"),
                *("cellvim.embedding", "cellvim.anndata_io"),
            ),
        ),
        ("lightning", ("cellvim.train",)),
        ("mamba_ssm", ("cellvim.ops.mamba_ssm",)),
        ("click", ("cellvim.cli",)),
    ],
)
def test_who_may_import(package, allowed):
    users = {_name(p) for p in MODULES if package in _third_party(p)}
    assert not {user for user in users if not user.startswith(allowed)}


def test_nothing_read_from_disk_is_unpickled():
    """Pickles execute code. Worker processes unpickle what their parent process sent them, in memory."""
    forbidden = re.compile(r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|read_pickle|pickle\.load\(|joblib\.load")
    found = {_name(p): forbidden.findall(p.read_text(encoding="utf-8")) for p in MODULES}
    assert not {name: uses for name, uses in found.items() if uses}
    loads = {_name(p) for p in MODULES if "pickle.loads" in p.read_text(encoding="utf-8")}
    assert loads <= {"cellvim.embedding.workers"}


def test_evaluation_sees_tables_and_never_torch():
    for path in MODULES:
        if _part(_name(path)) in ("evaluate", "profiles"):
            assert not {"torch", "lightning"} & _third_party(path), _name(path)
            assert not {"models", "ops", "data"} & {_part(name) for name in _imports(path)}, _name(path)


BRIDGES = {"cellvim.models.checkpoints": "huggingface_hub", "cellvim.models.timm_registration": "timm"}  # optional


def test_kernels_and_models_need_torch_and_numpy_alone():
    allowed = {"torch", "numpy", "safetensors"} | set(sys.stdlib_module_names)
    for path in MODULES:
        if _part(_name(path)) in ("models", "ops"):
            bridged = {BRIDGES.get(_name(path))}
            assert _third_party(path, top_level_only=True) <= allowed | bridged, _name(path)


def test_torchvision_and_timm_are_not_imported_unasked():
    """Their mere presence beside a CPU torch breaks other imports."""
    for path in MODULES:
        unasked = _third_party(path, top_level_only=_name(path) in BRIDGES)
        assert not {"torchvision", "timm"} & unasked, _name(path)


def test_every_form_of_import_is_seen():
    """Else the rules above could not fail."""
    source = """
from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import pandas
import torch.nn as nn
from ..models import blocks
def f():
    from cellvim import report
    import lightning
"""
    found = _imports_of(source, PACKAGE / "data" / "made_up.py")
    assert {"torch.nn", "cellvim.models", "cellvim.models.blocks", "cellvim.report", "lightning"} <= found
    assert "pandas" not in found
    assert "lightning" not in _imports_of(source, PACKAGE / "data" / "made_up.py", top_level_only=True)


@pytest.mark.parametrize("statement", ["import cellvim", "import cellvim; dir(cellvim)", "import cellvim.cli"])
def test_importing_is_light(statement):
    code = f"{statement}; import json, sys; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    heavy = {"torch", "zarr", "anndata", "pandas", "numpy", "scipy", "skimage", "sklearn", "scanpy", "matplotlib"}
    assert not heavy & set(json.loads(result.stdout))


def test_public_names_are_where_the_package_says():
    for name in cellvim.__all__:
        assert getattr(cellvim, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'embd'"):
        _ = cellvim.embd
