"""Starts programs that use SGLang by forking a process that has imported it.

Importing SGLang takes each process some 10 s of processor time, and an engine has three processes. Here one, the parent,
imports it once for the whole test run; pytest's workers, engines and servers are forked from it, and their own processes
from them. From there on they do what they do otherwise: load plugins, read arguments and the environment, start. Programs
that run in Triton's interpreter have a parent of their own, because it replaces functions as Triton is imported.

A parent runs no thread of Python or OpenMP, so a child finds no lock held and no thread missing. With a GPU, and with
``SPARSESPEC_TEST_FRESH=1``, every program is a new interpreter (CUDA does not survive a fork).

Run as a program: ``preloaded.py ADDRESS PID`` is the parent; it listens at ADDRESS until the process PID has ended.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import functools
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import IO, Any

#: Folder of this test run, the same for all pytest workers; conftest.py sets it.
FOLDER_ENV = "SPARSESPEC_TEST_FOLDER"
FRESH_ENV = "SPARSESPEC_TEST_FRESH"
INTERPRET_ENV = "TRITON_INTERPRET"
#: The checkpoint folder of the test model (run_tests.py).
MODEL_ENV = "SPARSESPEC_TEST_MODEL"
PR_SET_PDEATHSIG = 1
LONGEST_REQUEST = 1 << 20

# ------------------------------------------------------------------------------ the parent


def preload() -> None:
    """Import what engines and servers import."""
    import multiprocessing

    import setproctitle
    import sglang.launch_server
    import sglang.srt.constrained.xgrammar_backend
    import sglang.srt.entrypoints.http_server
    import sglang.srt.layers.attention.torch_native_backend
    import sglang.srt.lora.backend.chunked_backend
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler
    import sglang.srt.model_executor.model_runner
    import sglang.srt.models.llama
    import sglang.srt.models.registry  # noqa: F401
    import torch.multiprocessing

    # It learns where its title is as long as the environment is the one that it was started with.
    setproctitle.setproctitle("preloaded SGLang")
    # SGLang asks for "spawn", which would import everything anew.
    multiprocessing.set_start_method("fork", force=True)
    for module in (multiprocessing, torch.multiprocessing):
        module.set_start_method = lambda method, force=False: None  # type: ignore[attr-defined]
    # What is run as __main__, and what reads hooks as it is imported.
    for name in ("sglang.launch_server", "sglang.srt.entrypoints.http_server"):
        del sys.modules[name]
    if os.environ.get(MODEL_ENV) and os.environ.get(INTERPRET_ENV) != "1":
        share_tokenizer(os.environ[MODEL_ENV])
    index_what_hooks_replace()


def share_tokenizer(folder: str) -> None:
    """Load the test model's tokenizer once: the processes of an engine load it five times, for some 10 s."""
    from sglang.srt.plugins import hook_registry
    from sglang.srt.utils.hf_transformers import tokenizer

    load = tokenizer.get_tokenizer
    asked = {"tokenizer_mode": "auto", "trust_remote_code": False, "revision": None, "tokenizer_backend": "huggingface"}
    shared = load(folder, **asked)

    def get_tokenizer(name: str, *args: Any, **kwargs: Any) -> Any:
        return shared if name == folder and not args and kwargs == asked else load(name, *args, **kwargs)

    tokenizer.get_tokenizer = get_tokenizer
    hook_registry._propagate_patch(load, get_tokenizer, tokenizer)


def index_what_hooks_replace() -> None:
    """Let SGLang find what a hook replaces in an index of the imported modules.

    For each hook SGLang walks through all of them, which is four fifths of the start of a small engine.
    """
    from sglang.srt.plugins import hook_registry

    walk = hook_registry._propagate_patch
    indexed = {"__main__"}
    places: dict[int, list[tuple[ModuleType, str]]] = {}

    def index_imported() -> None:
        new = sys.modules.keys() - indexed
        indexed.update(new)
        for module in [module for name in new if isinstance(module := sys.modules[name], ModuleType)]:
            for name, value in list(vars(module).items()):
                if isinstance(value, FunctionType | type):
                    places.setdefault(id(value), []).append((module, name))

    def propagate(original: Any, wrapped: Any, source: Any) -> int:
        index_imported()
        # What is not as it was imported, because another hook or a plugin put it there, may be in no index.
        is_own = isinstance(original, FunctionType | MethodType | type) and original.__module__ in indexed
        if not is_own or hasattr(original, "__wrapped__"):
            return walk(original, wrapped, source)
        found = [place for place in places.get(id(original), ()) if place[0] is not source]
        found = [(module, name) for module, name in found if vars(module).get(name) is original]
        for module, name in found:
            setattr(module, name, wrapped)
        return len(found)

    index_imported()
    hook_registry._propagate_patch = propagate


def run_program(request: dict[str, Any], streams: Sequence[int]) -> None:
    """In a new child: become the program of ``request``, as a new interpreter would."""
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
    os.closerange(3, 256)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    if request["start_new_session"]:
        os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[:0] = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
    arguments = request["arguments"]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


def exit_status(request: dict[str, Any], streams: Sequence[int]) -> int:
    """Run the program to its end, as an interpreter does; its exit status."""
    status = 0
    try:
        run_program(request, streams)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return status


def fork_program(connection: socket.socket) -> int:
    """Read a request from ``connection`` and start it; the child's process id."""
    message, streams, _, _ = socket.recv_fds(connection, LONGEST_REQUEST, 3)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            status = exit_status(json.loads(message), streams)
        finally:
            os._exit(status)
    for fd in streams:
        os.close(fd)
    connection.sendall(f"{pid}\n".encode())
    return pid


def serve(listener: socket.socket, client: int) -> None:
    """Fork a child for each request, send its process id and at its end its exit status, until ``client`` has ended.

    A child whose connection is closed is asked to end.
    """
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    children: dict[int, socket.socket] = {}
    while os.path.exists(f"/proc/{client}"):
        for key, _ in selector.select(timeout=1):
            if key.fileobj is woken:
                woken.recv(4096)
            elif key.fileobj is listener:
                connection, _ = listener.accept()
                pid = fork_program(connection)
                children[pid] = connection
                selector.register(connection, selectors.EVENT_READ, pid)
            else:
                selector.unregister(key.fileobj)
                os.kill(key.data, signal.SIGTERM)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            with children.pop(pid) as connection:
                if connection.fileno() in selector.get_map():
                    selector.unregister(connection)
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def main() -> None:
    """See the module's docstring."""
    address, client = sys.argv[1:]
    preload()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen()
        os.rename(f"{address}.new", address)  # from here on it is found
        serve(listener, int(client))


# ------------------------------------------------------------------------------ its clients


@functools.cache
def forks_programs() -> bool:
    """Whether programs of this test run are forked."""
    if os.environ.get(FRESH_ENV, "0") != "0":
        return False
    if not os.path.exists("/dev/nvidiactl"):
        return True
    import torch

    return not torch.cuda.is_available()


@functools.cache
def address_of_parent(interpret: str) -> str:
    """Where the parent with ``TRITON_INTERPRET=interpret`` listens; the first of the pytest workers that asks starts it."""
    folder = Path(os.environ[FOLDER_ENV])
    address = folder / f"preloaded-{interpret}"
    with address.with_suffix(".lock").open("w") as lock, address.with_suffix(".log").open("a") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not address.exists():
            one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
            session = os.environ.get("PYTEST_XDIST_WORKER") and os.getppid() or os.getpid()
            parent = subprocess.Popen(
                [sys.executable, __file__, str(address), str(session)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **one_thread, INTERPRET_ENV: interpret},
                start_new_session=True,
            )
            while not address.exists():
                if parent.poll() is not None:
                    raise RuntimeError(f"SGLang could not be imported; see {log.name}")
                time.sleep(0.05)
    return str(address)


class ForkedProcess:
    """Stands for ``subprocess.Popen(command, ...)`` with text pipes; ``command[0]`` is this interpreter."""

    def __init__(
        self,
        command: Sequence[str],
        stdin: int | IO[Any] = subprocess.DEVNULL,
        stdout: int | IO[Any] = subprocess.DEVNULL,
        stderr: int | IO[Any] = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] = ".",
        start_new_session: bool = False,
    ) -> None:
        assert command[0] == sys.executable
        self.args = list(command)
        self.returncode: int | None = None
        pipes: list[IO[str] | None] = [None, None, None]
        streams: list[int] = []
        to_close: list[int] = []
        for number, stream in enumerate((stdin, stdout, stderr)):
            if stream == subprocess.STDOUT:
                streams.append(streams[1])
            elif isinstance(stream, int):
                read, write = os.pipe() if stream == subprocess.PIPE else (os.open(os.devnull, os.O_RDWR), -1)
                theirs, ours = (read, write) if number == 0 or write < 0 else (write, read)
                if ours >= 0:
                    pipes[number] = os.fdopen(ours, "w" if number == 0 else "r")
                streams.append(theirs)
                to_close.append(theirs)
            else:
                streams.append(stream.fileno())
        self.stdin, self.stdout, self.stderr = pipes
        request = {
            "arguments": self.args[1:],
            "env": dict(os.environ if env is None else env),
            "cwd": os.path.abspath(cwd),
            "start_new_session": start_new_session,
        }
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address_of_parent(request["env"].get(INTERPRET_ENV, "0")))
        socket.send_fds(self._connection, [json.dumps(request).encode()], streams)
        for fd in to_close:
            os.close(fd)
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_program(command: Sequence[str], **popen: Any) -> subprocess.Popen[str]:
    """A Python program: forked, or a new interpreter; ``popen`` are arguments of ``subprocess.Popen``."""
    if forks_programs():
        return ForkedProcess(command, **popen)  # type: ignore[return-value]
    return subprocess.Popen(command, text=True, **popen)


def run_to_end(command: Sequence[str], timeout: float, **popen: Any) -> subprocess.CompletedProcess[str]:
    """What ``subprocess.run`` does with captured text: run a Python program, which is killed after ``timeout`` seconds."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = start_program(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, **popen)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        for file in (output, errors):
            file.seek(0)
        return subprocess.CompletedProcess(list(command), status, output.read(), errors.read())


if __name__ == "__main__":
    main()
