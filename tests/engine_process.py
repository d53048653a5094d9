"""An ``sglang.Engine`` in a process of its own, driven over pipes.

An engine whose scheduler fails kills the process that made it; here that is a child, and
the test gets the child's log instead.

Run as a program, it makes an engine from the JSON object in ``argv[1]``, then answers each
line of stdin (JSON, keyword arguments of ``Engine.generate``) with one line of JSON: the
list of outputs, or a string, the message of a refused request.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

#: Precedes each answer, to tell answers from what libraries print.
MARK = "ANSWER "


class EngineProcess:
    """A context manager that starts the engine; ``generate`` waits until it is ready.

    Args:
        env: added to the environment.
        **engine_args: keyword arguments of ``sglang.Engine``, JSON values.
    """

    def __init__(self, env: dict[str, str] | None = None, **engine_args: Any) -> None:
        self._log = tempfile.TemporaryFile(mode="w+")
        # One thread: on tiny tensors the threads of several processes spend their time
        # waiting for each other.
        defaults = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._child = subprocess.Popen(
            # An idle scheduler would keep a core from the engines beside it.
            [sys.executable, str(Path(__file__)), json.dumps({"sleep_on_idle": True, **engine_args})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **defaults, **(env or {})},
        )

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._log.close()

    def generate(self, **kwargs: Any) -> list[dict[str, Any]]:
        """``Engine.generate`` with ``kwargs``; one output per request.

        Raises:
            ValueError: the engine refused a request.
            RuntimeError: the engine failed; with the end of its log.
        """
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(kwargs) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # it died: reported below
        for line in self._child.stdout:
            if line.startswith(MARK):
                answer = json.loads(line.removeprefix(MARK))
                if isinstance(answer, str):
                    raise ValueError(answer)
                return answer if isinstance(answer, list) else [answer]
        time.sleep(1)  # let the dying processes finish their tracebacks
        raise RuntimeError(f"the engine ended; the end of its log:\n{self.log()[-6000:]}")

    def log(self) -> str:
        """What the engine's processes have logged so far."""
        self._log.flush()
        return Path(f"/proc/self/fd/{self._log.fileno()}").read_text()


PLAIN_ROUNDS = """
def register():
    from sglang_sparsespec.round_choice import Speculation

    def begin_round(self, batch):
        self.rounds = getattr(self, "rounds", 0) + 1
        steps = 1 + self.rounds % self._most_steps if self.rounds % EVERY == 0 else 0
        self.plain_rounds += steps > 0
        return steps

    Speculation.begin_round = begin_round
"""


def install_plugin(site: Path, name: str, source: str) -> dict[str, str]:
    """Make ``source``, a module with a function ``register``, an SGLang plugin; the environment that loads it."""
    (site / f"{name}.py").write_text(source)
    info = site / f"{name}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:register\n")
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def plain_rounds_plugin(site: Path, every: int = 3) -> dict[str, str]:
    """A plugin that makes every so many rounds plain ones, of various lengths; the environment that loads it."""
    return install_plugin(site, "zz_plain_rounds", PLAIN_ROUNDS.replace("EVERY", str(every)))


def main() -> None:
    """See the module's docstring."""
    import sglang

    engine = sglang.Engine(**json.loads(sys.argv[1]))
    try:
        for line in sys.stdin:
            try:
                answer: Any = engine.generate(**json.loads(line))
            except ValueError as error:
                answer = str(error)
            print(MARK + json.dumps(answer), flush=True)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
