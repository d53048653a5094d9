"""Compiles Triton kernels for an H100 on a machine without a GPU, in a child process.

A test file that uses this has two parts. Its tests call :func:`compile_in_child`, which runs the file as a script. The
script calls :func:`pretend_h100`, launches kernels on CPU tensors, which only compiles them, and ends with :func:`report`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from preloaded import run_to_end

#: Shared memory of an H100's multiprocessor, and what each program reserves beside its own.
SHARED_BYTES, RESERVED_BYTES = 228 << 10, 1 << 10

#: By kernel and variant: TTGIR and bytes of shared memory.
Compiled = dict[str, tuple[str, int]]


def compile_in_child(file: str, what: str, cache: Path) -> Compiled:
    """Run the test file ``file`` as a script with the arguments ``what`` and ``cache``, and return what it reports."""
    # In a process of its own: it replaces Triton's driver.
    path = os.pathsep.join(filter(None, [os.fspath(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, os.path.abspath(file), what, os.fspath(cache)]
    done = run_to_end(command, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def report(found: Compiled) -> None:
    """Print what was compiled for :func:`compile_in_child`."""
    print(json.dumps(found))


def pretend_h100(cache: str) -> Compiled:
    """From now on launches of Triton kernels compile for compute capability 9.0, and run nothing.

    Modules that look for GPUs as they are imported, as SGLang's do, must be imported before.

    Args:
        cache: folder for what Triton compiles.

    Returns:
        Each kernel that is launched afterwards, by its name.
    """
    os.environ["TRITON_CACHE_DIR"] = cache
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.jit import JITFunction

    class Driver(DriverBase):
        """Stands in for the CUDA driver."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    triton.runtime.driver.set_active(Driver())
    found: Compiled = {}

    def compile_only(kernel: Any, grid: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            found[kernel.__name__] = (compiled.asm["ttgir"], compiled.metadata.shared)

        return run

    JITFunction.__getitem__ = compile_only
    return found


def count_compiled(kernels: Iterable[Any]) -> int:
    """How many kernels the JIT functions ``kernels`` have been compiled to so far."""
    return sum(len(kernel.device_caches[0][0]) for kernel in kernels)
