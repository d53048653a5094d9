"""Runs a test file's Triton cases in the interpreter, for machines without a GPU.

``TRITON_INTERPRET`` must be set before Triton is imported and changes every kernel of its process, so a child has it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys


def assert_passes_in_the_interpreter(file: str, at_least: int = 1, only: str | None = None) -> None:
    """Run the tests of ``file``, or the test ``only``, in a child process; at least so many must pass."""
    chosen = os.path.abspath(file) + (f"::{only}" if only else "")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", chosen]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    for name in [name for name in env if name.startswith("PYTEST_XDIST")]:
        del env[name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
    # Of a whole file the one that calls this is skipped.
    passed = re.search(r"(\d+) passed" + ("" if only else ", 1 skipped"), done.stdout)
    assert passed and int(passed.group(1)) >= at_least, done.stdout[-500:]
