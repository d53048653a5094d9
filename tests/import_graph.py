"""Which modules of the project import which, and what the project's layers say about it.

All imports count: those of functions and of ``if TYPE_CHECKING`` too. An import of ``a.b`` is taken as one of ``a.b`` alone,
although Python runs ``a/__init__.py`` before.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "sglang_sparsespec"
#: Where each package lies (``package-dir`` of pyproject.toml).
FOLDERS = {
    PACKAGE: PACKAGE,
    f"{PACKAGE}.attention_backend": "attention_backend",
    f"{PACKAGE}.scheduler_patch": "scheduler_patch",
}
#: From the top to the bottom: a module may import those of its own layer and of lower ones. A module named here stands for
#: its submodules too, unless these are named themselves; "" is the package's own ``__init__.py``.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("plugin", "worker_app"),
    ("scheduler_patch",),
    ("algorithm", "flags", "support"),
    ("worker",),
    ("start_checks",),
    ("rounds",),
    ("sampling", "attention_backend"),
    ("draft_weights",),
    ("attention_backend.kernels",),
    ("attention_backend.page_table", "attention_backend.sliding_window"),
    ("settings", "hook_registry", "spec_input", "metrics", "detokenizer"),
    ("sglang_compat",),
    ("",),
)
#: These of one layer must not import each other.
APART = {"sampling", "attention_backend"}
#: The one function that may import the project's modules: after it has checked the environment.
MAY_IMPORT_LATE = (f"{PACKAGE}.plugin", "register")
_VERSION_NUMBER = re.compile(r"\d+\.\d+(\.\d+\S*)?")
_VERSION_SOURCES = {"importlib.metadata", "importlib_metadata", "packaging", "packaging.version", "sglang.version"}


@dataclass(frozen=True)
class Import:
    """``importer`` imports ``imported`` in ``line``, in the function ``function`` ("": at the top level)."""

    importer: str
    imported: str
    line: int
    function: str


def modules_of(root: Path) -> dict[str, Path]:
    """Name and file of every module of the three folders below ``root``; links to folders are not followed."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            inner = path.relative_to(root / folder)
            if any((root / folder / parent).is_symlink() for parent in inner.parents):
                continue
            parts = [*package.split("."), *inner.with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path, modules: dict[str, Path]) -> Iterator[Import]:
    """The imports of the project's own modules in one file."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, function: str) -> Iterator[Import]:
        for name in _imported_names(node, package, modules):
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                yield Import(module, name, getattr(node, "lineno", 0), function)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            function = getattr(node, "name", "a lambda")
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), "")


def _imported_names(node: ast.AST, package: str, modules: dict[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        source = node.module or ""
        if node.level:
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*base, *filter(None, [node.module])])
        submodules = [f"{source}.{alias.name}" for alias in node.names]
        return [name if name in modules else source for name in submodules]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        name = node.args[0].value
        if called in ("import_module", "__import__") and isinstance(name, str):
            return [name]
    return []


def group_of(module: str) -> tuple[int, str]:
    """The module's layer (0 is the lowest, -1: it has none) and the name in ``LAYERS`` that it belongs to."""
    inner = module.removeprefix(PACKAGE).removeprefix(".")
    names = [(name, layer) for layer, group in enumerate(reversed(LAYERS)) for name in group]
    fitting = [(name, layer) for name, layer in names if inner == name or (name and inner.startswith(f"{name}."))]
    name, layer = max(fitting, key=lambda found: len(found[0]), default=("", -1))
    return layer, name


def violations(root: Path) -> list[str]:
    """What is wrong with the imports of the project below ``root``, a line each."""
    modules = modules_of(root)
    imports = list(dict.fromkeys(found for module, path in modules.items() for found in imports_of(module, path, modules)))
    wrong = [f"{module} has no layer: add it to LAYERS" for module in modules if group_of(module)[0] < 0]
    for found in imports:
        where = f"{found.importer}:{found.line} imports {found.imported}"
        if found.imported not in modules:
            wrong.append(f"{where}, which does not exist")
            continue
        (layer, group), (lower, other) = group_of(found.importer), group_of(found.imported)
        if lower > layer or (group != other and {group, other} <= APART):
            wrong.append(f"{where}, upwards")
        if found.function and (found.importer, found.function) != MAY_IMPORT_LATE:
            wrong.append(f"{where}, in the function {found.function}")
    edges: dict[str, set[str]] = {module: set() for module in modules}
    for found in imports:
        if found.imported in modules:
            edges[found.importer].add(found.imported)
    return wrong + [f"a circle: {' -> '.join(circle)}" for circle in circles(edges)]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """One circle for each edge that closes one in a depth-first search; none if the graph has none."""
    found: list[list[str]] = []
    done: set[str] = set()

    def search(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
        elif node not in done:
            for other in sorted(edges[node]):
                search(other, [*path, node])
            done.add(node)

    for node in sorted(edges):
        search(node, [])
    return found


def version_questions(root: Path) -> list[str]:
    """Where the project below ``root`` asks for SGLang's version outside of ``sglang_compat``, a line each.

    It may name the version in a message, and look something up by it.
    """
    wrong = []
    for module, path in modules_of(root).items():
        if module == f"{PACKAGE}.sglang_compat":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            said = ""
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _VERSION_NUMBER.fullmatch(node.value):
                said = node.value if module != PACKAGE else ""  # its own version
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                said = next((name for name in names if name in _VERSION_SOURCES), "")
            elif isinstance(node, ast.Attribute) and node.attr == "__version__":
                said = node.attr
            elif isinstance(node, ast.Compare):
                parts = [ast.unparse(part).rpartition(".")[2] for part in (node.left, *node.comparators)]
                said = "VERSION" if "VERSION" in parts else ""
            if said:
                wrong.append(f"{module}:{getattr(node, 'lineno', 0)} asks for a version: {said}")
    return wrong
