"""Launch configurations to try: the providers of ``kernels.py --sweep``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from typing import Any

from _kernel_problem import Problem
from _kernel_providers import Provider, pillar_draft, pillar_select, pillar_verify

# (block_n, num_warps, stages, target, min_chunk)
DRAFT = [
    # Fewer programs than multiprocessors: whole lists where there are few.
    (64, 4, 3, 0.5, 64),
    (64, 8, 3, 0.5, 64),
    (128, 8, 2, 0.5, 64),
    (32, 1, 3, 1.0, 64),
    (32, 2, 4, 1.0, 64),
    (64, 2, 2, 1.0, 64),
    (64, 2, 3, 1.0, 64),
    (64, 4, 3, 1.0, 64),
    (64, 4, 4, 1.0, 64),
    (128, 4, 2, 1.0, 64),
    (128, 8, 2, 1.0, 64),
    (64, 4, 3, 2.0, 64),
    (64, 2, 3, 2.0, 64),
    (64, 2, 3, 3.0, 64),
    (32, 1, 3, 4.0, 64),
    (32, 1, 4, 4.0, 64),
    (32, 1, 3, 6.0, 64),
    (32, 1, 2, 10.0, 64),
]
# (block_n, num_warps, stages, programs_per_sm, min_blocks)
VERIFY = [
    (64, 4, 2, 2, 4),
    (64, 4, 3, 1, 4),
    (64, 4, 4, 1, 4),
    (64, 4, 2, 6, 4),
    (64, 4, 3, 4, 4),
    (64, 4, 3, 8, 4),
    (32, 4, 3, 2, 8),
    (32, 4, 4, 2, 8),
    (32, 4, 2, 2, 8),
    (32, 4, 3, 6, 8),
    (128, 4, 2, 1, 2),
    (128, 4, 3, 1, 2),
]
# (block, num_warps, max_regs)
SELECT = [
    (8192, 16, 128),
    (8192, 16, 64),
    (8192, 8, 128),
    (4096, 4, 128),
    (4096, 8, 64),
    (4096, 8, 128),
    (16384, 16, 128),
    (16384, 32, 64),
    (2048, 4, 128),
]


def _config(module: str, name: str, values: tuple[Any, ...]) -> Callable[[], Any]:
    """A launch configuration of one of the kernel modules, made (and its module imported) when it is asked for."""

    def make() -> Any:
        return getattr(import_module(f"sglang_sparsespec.attention_backend.{module}"), name)(*values)

    return make


_draft = partial(_config, "triton_draft", "DraftConfig")
_verify = partial(_config, "triton_verify", "VerifyConfig")
_select = partial(_config, "triton_select", "SelectConfig")


def _label(prefix: str, names: Sequence[str], values: Sequence[Any]) -> str:
    shown = (
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={int(value)}"
        for name, value in zip(names, values, strict=True)
    )
    return f"{prefix} " + " ".join(shown)


def sweep_providers() -> list[Provider]:
    """One provider per configuration; the plugin's defaults are among them as ``pillar``."""
    providers = [
        Provider("draft", "pillar", pillar_draft(), gpu=False),
        Provider("verify", "pillar", pillar_verify(True), gpu=False),
        Provider("select", "pillar", pillar_select(), gpu=False),
    ]
    names: tuple[str, ...] = ("block_n", "warps", "stages", "target", "min_chunk")
    providers += [Provider("draft", _label("pillar", names, v), pillar_draft(_draft(v)), gpu=False) for v in DRAFT]
    names = ("block_n", "warps", "stages", "per_sm", "min_blocks")
    providers += [
        Provider("verify", _label("pillar", names, v), pillar_verify(True, config=_verify(v)), gpu=False) for v in VERIFY
    ]
    names = ("block", "warps", "max_regs")
    providers += [Provider("select", _label("pillar", names, v), pillar_select(_select(v)), gpu=False) for v in SELECT]
    return providers


def precompile(p: Problem, providers: Sequence[Provider], threads: int | None = None) -> dict[str, str]:
    """Compile every provider's Triton kernels for problem ``p`` in parallel; errors by provider key.

    Launches are turned into compilations for the time of this call: Triton compiles without holding Python's global
    lock, so threads run side by side.
    """
    from triton.runtime._async_compile import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    def compile_only(kernel: Any, grid: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: kernel.run(*args, grid=grid, warmup=True, **kwargs)

    failures: dict[str, str] = {}
    # ``select`` needs scores, so the default verification must have run before launches are turned off.
    scored = p.cached("scored", lambda: pillar_verify(True)(p))
    scored.calls[0]()
    original = JITFunction.__getitem__
    executor = ThreadPoolExecutor(threads or os.cpu_count() or 4)
    try:
        with AsyncCompileMode(executor, ignore_errors=True):
            JITFunction.__getitem__ = compile_only
            try:
                for provider in providers:
                    try:
                        provider.make(p).calls[0]()
                    except Exception as error:  # noqa: BLE001 - one configuration that does not compile
                        failures[provider.key] = f"{type(error).__name__}: {str(error)[-300:]}"
            finally:
                JITFunction.__getitem__ = original
    finally:
        executor.shutdown(wait=True)
    return failures
