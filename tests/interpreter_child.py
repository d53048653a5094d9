"""Runs a test file's Triton cases in the interpreter, for machines without a GPU.

``TRITON_INTERPRET`` must be set before Triton is imported and changes every kernel of its process, so a child has it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from preloaded import run_to_end


def assert_passes_in_the_interpreter(
    file: str,
    at_least: int = 1,
    only: str | None = None,
    together_with: Sequence[Path] = (),
    nightly: bool = False,
) -> None:
    """Run the tests of ``file``, or the test ``only``, in a child process; at least so many must pass.

    Args:
        together_with: other files, whose tests the same child runs.
        nightly: run the tests marked so, instead of all others.
    """
    chosen = [os.path.abspath(file) + (f"::{only}" if only else ""), *map(os.fspath, together_with)]
    marked = "not gpu and " + ("nightly" if nightly else "not nightly")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, *chosen]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""}
    for name in [name for name in env if name.startswith("PYTEST_XDIST")]:
        del env[name]
    done = run_to_end(command, env=env, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
    # Of a whole file the one that calls this is skipped.
    passed = re.search(r"(\d+) passed" + ("" if only else ", 1 skipped"), done.stdout)
    assert passed and int(passed.group(1)) >= at_least, done.stdout[-500:]
