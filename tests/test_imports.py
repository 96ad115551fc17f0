"""Imports go one way (DESIGN.md): a module imports from rooms below its own, and no cycle arises.

widths → slicing → families → elastic → {costs, checkpoint} → data → dense → evaluation → training → tasks; export
builds on elastic, data, dense and evaluation; runtime on what export builds on, and its artefacts; serving on runtime;
cli on all.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "slicevit"

# room -> the rooms it may import from, besides itself
LEAVES = {"version", "files", "reasons"}
CORE = ["widths", "slicing", "families", "elastic"]
TRUNK = [*CORE, "costs", "checkpoint", "data", "dense", "evaluation", "training", "tasks"]
ALLOWED: dict[str, set[str]] = {room: set(TRUNK[:i]) for i, room in enumerate(TRUNK)}
ALLOWED |= {leaf: set() for leaf in LEAVES}
ALLOWED["export"] = {*CORE, "costs", "checkpoint", "data", "dense", "evaluation"}
ALLOWED["runtime"] = {*CORE, "costs", "checkpoint", "data", "dense", "evaluation", "export"}
ALLOWED["serving"] = {*ALLOWED["runtime"], "runtime"}
ALLOWED["cli"] = set(ALLOWED) | {"published"}
ALLOWED["models"] = set()  # which timm's registry hands out: nobody but the front door need know of them
ALLOWED["slicevit"] = set(CORE) | {"checkpoint", "published", "costs", "models"}

# modules that belong to a room of another name
ROOM_OF = {
    "fusing": "families",
    "architectures": "families",
    "calibration": "elastic",
    "constructors": "elastic",
    "exactness": "elastic",
    "registry": "elastic",
    "rewiring": "costs",
    "skeletons": "elastic",
    "subnet": "elastic",
    "merging": "elastic",
    "aligned": "elastic",
    "compiling": "elastic",
    "model_card": "checkpoint",
    "saved_statistics": "checkpoint",
    "published": "checkpoint",
    "__main__": "cli",
}

# the only imports against the direction, each inside a function: (module, function, imported)
EXCEPTIONS = {
    ("slicevit.elastic", "save_pretrained", "slicevit.checkpoint"),
    ("slicevit.elastic", "push_to_hub", "slicevit.checkpoint"),
}


def module_name(path: Path) -> str:
    parts = ["slicevit", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def room_of(module: str) -> str:
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "slicevit"
    return ROOM_OF.get(name, name)


def imports_of(module: str) -> list[tuple[str, str | None, bool]]:
    """(imported slicevit module, enclosing function or None, for type checkers alone) of every import."""
    found: list[tuple[str, str | None, bool]] = []
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, function: str | None, typing_only: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                visit(child, function, True)
            for child in node.orelse:
                visit(child, function, typing_only)
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, function, typing_only) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append((inner if inner in MODULES else base, function, typing_only))
        for child in ast.iter_child_nodes(node):
            visit(child, function, typing_only)

    visit(ast.parse(MODULES[module].read_text(encoding="utf-8")), None, False)
    return [entry for entry in found if entry[0].split(".")[0] == "slicevit"]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_rooms_below(module: str) -> None:
    room = room_of(module)
    assert room in ALLOWED, f"{module}: DESIGN.md knows no room {room}"
    for imported, function, _ in imports_of(module):
        if (module, function, imported) in EXCEPTIONS:
            continue
        theirs = room_of(imported)
        if theirs == "slicevit":
            assert room == "cli", f"{module} imports the package's front door"
            continue
        assert theirs == room or theirs in LEAVES or theirs in ALLOWED[room], f"{module} imports {imported}"


def test_the_exceptions_are_still_needed() -> None:
    used = {(module, function, imported) for module in MODULES for imported, function, _ in imports_of(module)}
    assert used >= EXCEPTIONS


def test_leaves_import_nothing_of_ours() -> None:
    for leaf in LEAVES:
        assert imports_of(f"slicevit.{leaf}") == []


def test_there_is_no_cycle_among_imports_at_load_time() -> None:
    edges = {
        module: {name for name, function, typing_only in imports_of(module) if function is None and not typing_only}
        for module in MODULES
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for name in edges.get(module, ()):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_slicing_knows_no_timm_and_no_modules() -> None:
    tree = ast.parse(MODULES["slicevit.slicing"].read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert not {name for name in names if name.startswith(("timm", "torch.nn"))}


def test_optional_and_heavy_parts_are_not_loaded_by_the_front_door() -> None:
    """`import slicevit` is for a server too: no plotting, no command line, no training."""
    code = "import sys, slicevit; print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"matplotlib", "plotly", "tyro", "onnx", "openvino", "fastapi", "ray", "torchmetrics"}
    assert not heavy & {name.split(".")[0] for name in loaded}
    assert not {name for name in loaded if name.startswith(("slicevit.training", "slicevit.evaluation"))}
