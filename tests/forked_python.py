"""Stands for this interpreter: what it is asked to run (``-c CODE``) runs in a fork of a process that has imported SGLang.

pytest-xdist starts its workers with it (conftest.py), as importing SGLang is most of what collecting the tests takes.
"""

from __future__ import annotations

import sys

from preloaded import ForkedProcess

if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "-u"]
    worker = ForkedProcess([sys.executable, *arguments], stdin=sys.stdin, stdout=sys.stdout, stderr=sys.stderr)
    sys.exit(worker.wait())
