"""Where SGLang imports vLLM's rotary embedding; ``scheduler_patch.cpu`` stands in for it there and nowhere else."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import sglang.srt.layers.rotary_embedding
from sglang.srt.layers.rotary_embedding import base

pytestmark = pytest.mark.contract

FOLDER = Path(next(iter(sglang.srt.layers.rotary_embedding.__path__)))


def vllm_imports(tree: ast.AST, where: str = "") -> list[str]:
    """The definitions around each import of vLLM, joined by dots."""
    found = []
    for node in ast.iter_child_nodes(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [where for name in names if name.split(".")[0] == "vllm"]
        inner = f"{where}.{node.name}" if isinstance(node, ast.ClassDef | ast.FunctionDef) else where
        found += vllm_imports(node, inner)
    return found


def test_sglang_imports_vllms_kernel_in_one_constructor_only() -> None:
    imports = {path.name: vllm_imports(ast.parse(path.read_text())) for path in FOLDER.glob("*.py")}
    assert {name: where for name, where in imports.items() if where} == {"base.py": [".RotaryEmbedding.__init__"]}


def test_every_constructor_of_a_subclass_calls_it() -> None:
    def subclasses(cls: type) -> set[type]:
        return {cls}.union(*(subclasses(sub) for sub in cls.__subclasses__()))

    for cls in subclasses(base.RotaryEmbedding) - {base.RotaryEmbedding}:
        constructor = cls.__dict__.get("__init__")
        assert constructor is None or "super().__init__" in inspect.getsource(constructor), cls
