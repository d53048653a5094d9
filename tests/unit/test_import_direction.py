"""Imports of the project run downwards, from ``plugin`` to the package's constants."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from import_graph import FOLDERS, circles, imports_of, modules_of, version_questions, violations

ROOT = Path(__file__).resolve().parents[2]


def test_imports_run_downwards_without_circles_and_at_the_top_of_files() -> None:
    assert violations(ROOT) == []


def test_the_three_folders_are_read_as_they_are_imported() -> None:
    modules = modules_of(ROOT)
    for module in ("plugin", "attention_backend.backend", "attention_backend.kernels", "scheduler_patch.kv_manager.manager"):
        assert f"sglang_sparsespec.{module}" in modules
    assert len(set(modules.values())) == len(modules)
    assert {path.relative_to(ROOT).parts[0] for path in modules.values()} == set(FOLDERS.values())


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the three folders, links between them included."""
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


#: A file, what is added to it, and what the checker says of that.
PLANTED = {
    "upward": (
        "sglang_sparsespec/settings.py",
        "from sglang_sparsespec.worker import SparseSpecWorker",
        "sglang_sparsespec.settings:{line} imports sglang_sparsespec.worker, upwards",
    ),
    "upward, for types only": (
        "attention_backend/page_table.py",
        "if TYPE_CHECKING:\n    from sglang_sparsespec.attention_backend import policy",
        "sglang_sparsespec.attention_backend.page_table:{line} imports sglang_sparsespec.attention_backend.policy, upwards",
    ),
    "upward, in relative words": (
        "attention_backend/policy.py",
        "from ..scheduler_patch import slots",
        "sglang_sparsespec.attention_backend.policy:{line} imports sglang_sparsespec.scheduler_patch.slots, upwards",
    ),
    "beside": (
        "attention_backend/policy.py",
        "import sglang_sparsespec.sampling",
        "sglang_sparsespec.attention_backend.policy:{line} imports sglang_sparsespec.sampling, upwards",
    ),
    "in a function": (
        "sglang_sparsespec/worker.py",
        "def late():\n    from sglang_sparsespec import metrics",
        "sglang_sparsespec.worker:{line} imports sglang_sparsespec.metrics, in the function late",
    ),
    "in a method": (
        "scheduler_patch/slots.py",
        "class Late:\n    def late(self):\n        import sglang_sparsespec.settings",
        "sglang_sparsespec.scheduler_patch.slots:{line} imports sglang_sparsespec.settings, in the function late",
    ),
    "by name": (
        "sglang_sparsespec/settings.py",
        'importlib.import_module("sglang_sparsespec.flags")',
        "sglang_sparsespec.settings:{line} imports sglang_sparsespec.flags, upwards",
    ),
    "late in the plugin, outside of its entry point": (
        "sglang_sparsespec/plugin.py",
        "def late():\n    from sglang_sparsespec import flags",
        "sglang_sparsespec.plugin:{line} imports sglang_sparsespec.flags, in the function late",
    ),
    "of what is not there": (
        "sglang_sparsespec/worker.py",
        "from sglang_sparsespec.late_launch import LateLaunch",
        "sglang_sparsespec.worker:{line} imports sglang_sparsespec.late_launch, which does not exist",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_import_is_found(case: str, project: Path) -> None:
    file, text, said = PLANTED[case]
    path = project / file
    path.write_text(f"{path.read_text()}\n{text}\n")
    line = len(path.read_text().splitlines())
    assert said.format(line=line) in violations(project), "the project itself has none, see above"


def test_a_planted_circle_is_found(project: Path) -> None:
    """Within one layer, where neither import runs upwards."""
    before = violations(project)
    for module, other in (("slots", "hooks"), ("hooks", "slots")):
        path = project / "scheduler_patch" / f"{module}.py"
        path.write_text(f"from sglang_sparsespec.scheduler_patch import {other}\n{path.read_text()}")
    (circle,) = set(violations(project)) - set(before)
    hooks, slots = (f"sglang_sparsespec.scheduler_patch.{name}" for name in ("hooks", "slots"))
    assert circle == f"a circle: {hooks} -> {slots} -> {hooks}"


def test_a_new_module_needs_a_layer(project: Path) -> None:
    (project / "sglang_sparsespec" / "helpers.py").write_text("")
    assert "sglang_sparsespec.helpers has no layer: add it to LAYERS" in violations(project)


def test_a_link_to_a_folder_is_not_read_twice(project: Path) -> None:
    before = modules_of(project)
    link = project / "sglang_sparsespec" / "attention_backend"
    if not link.is_symlink():
        link.symlink_to(Path("..") / "attention_backend")
    assert modules_of(project) == before


def test_a_circle_of_any_length_is_found() -> None:
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
    assert circles({"a": {"a"}}) == [["a", "a"]]
    assert circles({"a": {"b"}, "b": {"d"}, "c": {"d"}, "d": {"c"}}) == [["d", "c", "d"]]


def test_every_way_of_importing_is_read(tmp_path: Path) -> None:
    package = tmp_path / "sglang_sparsespec"
    package.mkdir()
    for name in ("a", "b"):
        (package / f"{name}.py").write_text("")
    (package / "__init__.py").write_text("from . import a\nfrom .b import thing\nimport sglang_sparsespec.a as x, torch\n")
    (package / "c.py").write_text("from sglang_sparsespec import a, ABC\nf = lambda: __import__('sglang_sparsespec.b')\n")
    modules = modules_of(tmp_path)
    found = {
        (found.importer.rpartition(".")[2], found.imported, found.line, found.function)
        for module, path in modules.items()
        for found in imports_of(module, path, modules)
    }
    assert found == {
        ("sglang_sparsespec", "sglang_sparsespec.a", 1, ""),
        ("sglang_sparsespec", "sglang_sparsespec.b", 2, ""),
        ("sglang_sparsespec", "sglang_sparsespec.a", 3, ""),
        ("c", "sglang_sparsespec.a", 1, ""),
        ("c", "sglang_sparsespec", 1, ""),
        ("c", "sglang_sparsespec.b", 2, "a lambda"),
    }


def test_one_file_knows_sglangs_releases() -> None:
    assert version_questions(ROOT) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('if VERSION == "0.5.17":\n    pass', "VERSION"),
        ("if sglang_compat.VERSION in SUPPORTED:\n    pass", "VERSION"),
        ('OLD = ("0.5.17", None)', "0.5.17"),
        ("import sglang\nsglang.__version__", "__version__"),
        ("from importlib.metadata import version", "importlib.metadata"),
        ("def late():\n    from packaging import version", "packaging"),
    ],
)
def test_a_planted_question_for_a_version_is_found(text: str, said: str, project: Path) -> None:
    path = project / "scheduler_patch" / "slots.py"
    path.write_text(f"{path.read_text()}\n{text}\n")
    found = version_questions(project)
    assert found and all(line.startswith("sglang_sparsespec.scheduler_patch.slots:") for line in found)
    assert any(line.endswith(f"asks for a version: {said}") for line in found)
