"""An ``sglang.Engine`` in a process of its own, driven over pipes.

An engine whose scheduler fails kills the process that made it; here that is a child, and the test gets the child's log
instead. It is forked from a process that has imported SGLang (preloaded.py).

Run as a program, it makes an engine from the JSON object in ``argv[1]``, then answers each line of stdin, the name of
a call and its keyword arguments, with one line of JSON: the result, or a string, the message of a refused request.
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

from preloaded import start_program

#: Precedes each answer, to tell answers from what libraries print.
MARK = "ANSWER "
#: Plain SGLang on CPU: the reference of what SPARSESPEC serves. Its environment has ``PLAIN_ENV``.
PLAIN: dict[str, Any] = {"disable_cuda_graph": True, "attention_backend": "torch_native"}
PLAIN_ENV = {"SPARSESPEC_CPU_BRIDGE": "1"}
#: A plugin that lets plain SGLang sample by seeds (``--enable-deterministic-inference``) with PyTorch's attention.
ALLOW_TORCH = """
def register():
    from sglang.srt import server_args
    server_args.add_deterministic_attention_backend_choices(["torch_native"])
    server_args.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
"""


class EngineProcess:
    """A context manager that starts the engine; ``generate`` waits until it is ready.

    Args:
        env: added to the environment.
        **engine_args: keyword arguments of ``sglang.Engine``, JSON values.
    """

    def __init__(self, env: dict[str, str] | None = None, **engine_args: Any) -> None:
        self._log = tempfile.TemporaryFile(mode="w+")
        # One thread: on tiny tensors the threads of several processes spend their time waiting for each other.
        defaults = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._child = start_program(
            # An idle scheduler would keep a core from the engines beside it.
            [sys.executable, str(Path(__file__)), json.dumps({"sleep_on_idle": True, **engine_args})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
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
        answer = self._call("generate", **kwargs)
        return answer if isinstance(answer, list) else [answer]

    def state(self) -> dict[str, Any]:
        """The scheduler's internal state, as in ``/server_info``."""
        return self._call("state")

    def set_speculate(self, value: str) -> None:
        """Set ``sparsespec_speculate``, as ``/set_internal_state`` does."""
        from sglang_sparsespec.settings import SPECULATE

        assert self._call("set_state", sparsespec_speculate=SPECULATE.index(value)) == [True]

    def update_weights(self, folder: Path) -> None:
        """Load the weights of the checkpoint in ``folder``."""
        success, message, *_ = self._call("update_weights", model_path=str(folder))
        assert success, message

    def _call(self, name: str, **kwargs: Any) -> Any:
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps([name, kwargs]) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # it died: reported below
        for line in self._child.stdout:
            if line.startswith(MARK):
                answer = json.loads(line.removeprefix(MARK))
                if isinstance(answer, str):
                    raise ValueError(answer)
                return answer
        time.sleep(1)  # let the dying processes finish their tracebacks
        raise RuntimeError(f"the engine ended; the end of its log:\n{self.log()[-6000:]}")

    def log(self) -> str:
        """What the engine's processes have logged so far."""
        self._log.flush()
        return Path(f"/proc/self/fd/{self._log.fileno()}").read_text()


PLAIN_ROUNDS = """
def register():
    from sglang_sparsespec.rounds.planner import Planner, RoundChoice, needs_verification

    def next_round(self, batch):
        self.rounds = getattr(self, "rounds", 0) + 1
        number, k = self.rounds // EVERY, self._num_steps
        if self.rounds % EVERY == 0 and not needs_verification(batch):
            return RoundChoice(0, 1 + number % k)
        # Every other one drafts as many as it can; budgets are all that the planner may choose.
        budgets = (None, 24, 64, 1000)
        return RoundChoice(1 + number // 2 % k if number % 2 else k, least_budget=budgets[number % len(budgets)])

    Planner.next_round = next_round
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
    """A plugin that makes every so many rounds plain ones, and drafts of various lengths; the environment that loads it."""
    return install_plugin(site, "zz_plain_rounds", PLAIN_ROUNDS.replace("EVERY", str(every)))


RETRACTIONS = """
def register():
    from sglang.srt.managers import scheduler

    # The environment says so too, but is read when the module is imported, which is before programs are forked.
    scheduler.TEST_RETRACT, scheduler.TEST_RETRACT_INTERVAL = True, 50
"""


def retract_plugin(site: Path) -> dict[str, str]:
    """The environment of an engine that retracts requests every so many iterations, as if its KV pool were full.

    Whether a small pool is ever full depends on how fast requests come; and a newer SGLang lets them wait for memory.
    """
    return install_plugin(site, "zz_retractions", RETRACTIONS)


def main() -> None:
    """See the module's docstring."""
    import sglang
    from fastapi import HTTPException
    from sglang.srt.managers.io_struct import SetInternalStateReq

    engine = sglang.Engine(**json.loads(sys.argv[1]))

    def state() -> Any:
        # What is no JSON value is not looked at.
        return json.loads(json.dumps(engine.get_server_info()["internal_states"][0], default=str))

    def set_state(**server_args: Any) -> Any:
        request = SetInternalStateReq(server_args=server_args)
        return engine.loop.run_until_complete(engine.tokenizer_manager.set_internal_state(request))

    update_weights = engine.update_weights_from_disk
    calls = {"generate": engine.generate, "state": state, "set_state": set_state, "update_weights": update_weights}
    try:
        for line in sys.stdin:
            name, kwargs = json.loads(line)
            try:
                answer: Any = calls[name](**kwargs)
            except (ValueError, HTTPException) as error:
                answer = getattr(error, "detail", str(error))
            print(MARK + json.dumps(answer), flush=True)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
