"""The two commands of the README, against a stand-in for the environment's interpreter.

The stand-in answers what the scripts ask of Python, SGLang and PyTorch (``STUB``), so nothing is installed,
no model is loaded and each test takes a second or two. What it stands for is run for real by
``scripts/quickstart`` itself and by the server tests.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import environment
import pytest
import quickstart
import run_tests

from sglang_sparsespec.sglang_compat import SUPPORTED

REPO = Path(__file__).resolve().parents[2]

STUB = r'''
"""The interpreter of the environment: `-c` finds a GPU or not, `-m sglang.launch_server` serves."""
import http.server, json, os, signal, subprocess, sys, time

mode = os.environ.get("STUB_MODE", "")
if sys.argv[1] == "-c":
    print(os.environ.get("STUB_GPU", ""))
    sys.exit()
if sys.argv[1].endswith("fetch_model.py"):
    print("[00:00:00] fetching", flush=True)
    if mode == "fetch_hangs":
        time.sleep(600)
    if mode == "fetch_fails":
        sys.exit("error: no network")
    print("/models/" + "-".join((sys.argv[2], sys.argv[4])))
    sys.exit()
assert sys.argv[1:3] == ["-m", "sglang.launch_server"], sys.argv
child = subprocess.Popen(["sleep", "600"])
print("[2026-01-01 00:00:00] started", child.pid, *sys.argv[3:], flush=True)
if mode == "dies":
    print("ValueError: --page-size 16 is not supported", flush=True)
    sys.exit(3)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    def stop(*_):
        child.terminate()
        child.wait()
        os._exit(0)
    signal.signal(signal.SIGTERM, stop)
if mode == "never_ready":
    time.sleep(600)
state = {"sparsespec_accept_histogram": [1, 0, 0], "sparsespec_kv_read_share": 1.0, "sparsespec_speculate": "always"}


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status, content):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def do_GET(self):
        if self.path == "/health":
            return self.reply(200, {})
        self.reply(200, {"internal_states": [{} if mode == "plain" else state]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/set_internal_state":
            print(body, flush=True)
            if mode != "always_speculates":
                state.update(body["server_args"])
            return self.reply(200, [mode != "always_speculates"])
        if mode == "refuses":
            return self.reply(400, {"message": "The input is longer than the context"})
        assert body["stream"] and body["stream_options"] == {"include_usage": True}, body
        self.send_response(200)
        self.end_headers()
        plain = state["sparsespec_speculate"] == "never"
        for word in ("It ", "differs." if plain and mode == "is_lossy" else "follows."):
            self.event({"choices": [{"delta": {"content": word}, "finish_reason": None}]})
            time.sleep(0.05)
        if mode == "stream_breaks":
            os._exit(7)
        if mode == "answers_forever":
            time.sleep(600)
        self.event({"choices": [{"delta": {}, "finish_reason": "length"}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 2400, "completion_tokens": body["max_tokens"]}})
        self.wfile.write(b"data: [DONE]\n\n")
        state["sparsespec_accept_histogram"] = [2, 1, 2]
        state["sparsespec_kv_read_share"] = 0.0625

    def event(self, content):
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
        self.wfile.flush()


port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
'''


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the scripts whose environment is the stand-in; logs go to the copy too."""
    folder = tmp_path / "project"
    shutil.copytree(REPO / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPO / "benchmarks" / "data", folder / "benchmarks" / "data")
    (tmp_path / "stub.py").write_text(STUB)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/stub.py" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("SPARSESPEC_PYTHON", str(python))
    monkeypatch.delenv("STUB_MODE", raising=False)
    monkeypatch.delenv(run_tests.MODEL_VARIABLE, raising=False)
    return folder


class Quickstart:
    """A running copy of quickstart with a local model on CPU; its output goes to files."""

    def __init__(self, project: Path, *arguments: str) -> None:
        self.log = project / ".quickstart" / "server.log"
        self._stub = str(project.parent / "stub.py")
        self._output, self._errors = project / "output", project / "errors"
        command = [sys.executable, str(project / "scripts" / "quickstart.py")]
        command += ["--device", "cpu", "--model-path", str(project), *arguments]
        with self._output.open("w") as output, self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=errors,
                # Whatever started the tests may ignore it (nohup), and that is inherited.
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def wait(self) -> int:
        return self.process.wait(timeout=60)

    def server_started(self) -> bool:
        return self.log.exists() and "started" in self.log.read_text()

    def server_processes(self) -> list[int]:
        """Living processes of the stand-in server and of its child."""
        words = self.log.read_text().split()
        child = int(words[words.index("started") + 1])
        running = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in running if is_alive(pid) and (pid == child or self._stub in command_line(pid))]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.05)


# ------------------------------------------------------------------- quickstart, whole


def test_quickstart_streams_the_answer_reports_and_stops_the_server(project: Path) -> None:
    run = Quickstart(project, "--max-tokens", "11", "--", "--sparsespec-min-budget", "64")
    assert run.wait() == 0, run.errors
    assert run.output.count("It follows.") == 2
    assert "2400 tokens" in run.output and "11 tokens (ended by: length)" in run.output
    # Of the counters, only what the answer added: 1, 1 and 2 verifications with 0, 1 and 2 accepted.
    assert "mean accept length  2.25 tokens per verification (k = 2: 3 at most)" in run.output
    assert "KV read by drafts   6.25%" in run.output
    assert run.output.rstrip().endswith("server stopped, no process of it is left")
    assert "--sparsespec-min-budget 64" in run.log.read_text()
    assert run.server_processes() == []


def test_quickstart_compares_greedy_answers_with_and_without_speculation(project: Path) -> None:
    run = Quickstart(project, "--max-tokens", "11", "--temperature", "0.7")
    assert run.wait() == 0, run.errors
    assert run.output.count("It follows.") == 3  # the first one was sampled
    report = run.output[run.output.index("lossless") :]
    assert "both answers are equal: 11 tokens" in report
    assert len(re.findall(r"(speculating|switched off) +[0-9.]+ tokens/s", report)) == 2
    # Afterwards the server is as it was.
    assert re.findall(r"'sparsespec_speculate': '(\w+)'", run.log.read_text()) == ["never", "always"]


def test_quickstart_fails_where_speculation_changes_the_answer(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_MODE", "is_lossy")
    run = Quickstart(project)
    assert run.wait() == 1
    assert "with and without speculation differ after 3 characters: this is a bug" in run.errors
    assert run.server_processes() == []


def test_answers_may_differ_by_ties_in_16_bits(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_MODE", "is_lossy")
    run = Quickstart(project, "--dtype", "bfloat16")
    assert run.wait() == 0, run.errors
    assert "lossless" not in run.output
    assert "differ after 3 characters:" in run.output and "in bfloat16 likely tokens can tie" in run.output


def test_quickstart_says_that_there_is_nothing_to_compare(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_MODE", "always_speculates")
    run = Quickstart(project)
    assert run.wait() == 0, run.errors
    assert "does not let speculation be switched off" in run.output and "lossless" not in run.output


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("refuses", 'status 400: {"message": "The input is longer than the context"}'),
        ("stream_breaks", "/v1/chat/completions"),
        ("plain", "the server does not run SPARSESPEC"),
    ],
)
def test_quickstart_fails_with_the_reason_and_leaves_no_process(
    project: Path, monkeypatch: pytest.MonkeyPatch, mode: str, message: str
) -> None:
    monkeypatch.setenv("STUB_MODE", mode)
    run = Quickstart(project)
    assert run.wait() == 1
    assert run.errors.startswith("error: ") and message in run.errors
    assert "Traceback" not in run.errors
    assert run.server_processes() == []


def test_quickstart_shows_the_end_of_the_log_of_a_server_that_dies(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_MODE", "dies")
    run = Quickstart(project)
    assert run.wait() == 1
    assert run.errors.startswith("error: the server ended (exit status 3)") and "Traceback" not in run.errors
    assert "ValueError: --page-size 16 is not supported" in run.errors
    assert str(run.log) in run.errors
    assert run.server_processes() == []


def test_quickstart_gives_up_on_a_server_that_does_not_become_ready(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_MODE", "never_ready")
    run = Quickstart(project, "--start-timeout", "3")
    assert run.wait() == 1
    assert "the server is not ready after 3 s" in run.errors
    assert run.server_processes() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("mode", ["never_ready", "answers_forever"])
def test_quickstart_stops_the_server_when_it_is_interrupted(
    project: Path, monkeypatch: pytest.MonkeyPatch, mode: str, number: signal.Signals
) -> None:
    monkeypatch.setenv("STUB_MODE", mode)
    run = Quickstart(project)
    wait_for(run.server_started, "the server's start")
    if mode == "answers_forever":
        wait_for(lambda: "It follows." in run.output, "the answer's start")
    run.process.send_signal(number)
    assert run.wait() == 130, run.errors
    assert "no process of it is left" in run.output and "Traceback" not in run.errors
    assert run.server_processes() == []


def test_quickstart_keeps_serving_until_it_is_interrupted(project: Path) -> None:
    run = Quickstart(project, "--keep")
    wait_for(lambda: "until Ctrl-C" in run.output, "the end of the answer")
    time.sleep(1)
    assert run.process.poll() is None and run.server_processes()
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 0
    assert "no process of it is left" in run.output
    assert run.server_processes() == []


def test_server_ends_when_quickstart_is_killed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_MODE", "answers_forever")
    run = Quickstart(project)
    wait_for(lambda: "It follows." in run.output, "the answer's start")
    run.process.kill()
    run.process.wait()
    wait_for(lambda: not run.server_processes(), "the server's end")


# ------------------------------------------------------------------ quickstart, parts


def test_server_that_ignores_sigterm_is_killed_with_its_children(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "GENTLE_STOP_S", 0.5)
    env = {**os.environ, "STUB_MODE": "stubborn"}
    port = quickstart.choose_port(0)
    command = [os.environ["SPARSESPEC_PYTHON"], "-m", "sglang.launch_server", "--port", str(port)]
    with quickstart.Server(command, port, project / "log", env) as server:
        server.wait_until_ready(30)
        session = server.process.pid
        assert len(quickstart.session_members(session)) == 2
    assert quickstart.session_members(session) == []
    assert server.process.returncode == -signal.SIGKILL
    assert "2 of its processes had to be killed" in capsys.readouterr().out


def test_arguments_after_two_dashes_come_last_on_the_server_command() -> None:
    args = quickstart.parse_arguments(["--k", "4", "--", "--port", "1", "--k"])
    assert args.server_args == ["--port", "1", "--k"]
    command = quickstart.server_command(Path("py"), "m", "cpu", "float32", 7, args.k, args.server_args)
    assert command[-3:] == args.server_args
    assert command[command.index("--speculative-num-steps") + 1] == "4"
    assert command[command.index("--speculative-algorithm") + 1] == "SPARSESPEC"


def test_k_and_cpu_limits_are_left_to_the_server_unless_they_apply() -> None:
    command = quickstart.server_command(Path("py"), "m", "cuda", "bfloat16", 7, None, [])
    assert "--speculative-num-steps" not in command and "--max-total-tokens" not in command


@pytest.mark.parametrize(
    "arguments",
    [
        ["--k", "0"],
        ["--max-tokens", "1"],
        ["--port", "-1"],
        ["--prompt", " "],
        ["--prompt", "a", "--prompt-file", "b"],
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        quickstart.parse_arguments(arguments)
    assert exit_info.value.code == 2
    assert arguments[-2] in capsys.readouterr().err


def test_default_prompt_is_long_and_ends_with_the_question() -> None:
    prompt = quickstart.read_prompt(quickstart.parse_arguments([]))
    # At 2 to 4 characters a token this is far more than the minimal budget of 128 tokens.
    assert len(prompt) > 6000
    assert prompt.endswith(quickstart.QUESTION)


def test_prompt_comes_from_the_argument_or_the_file(tmp_path: Path) -> None:
    (tmp_path / "question").write_text("Why?")
    for arguments in (["--prompt", "Why?"], ["--prompt-file", str(tmp_path / "question")]):
        assert quickstart.read_prompt(quickstart.parse_arguments(arguments)) == "Why?"
    args = quickstart.parse_arguments(["--prompt-file", str(tmp_path / "missing")])
    with pytest.raises(environment.SetupError, match="--prompt-file .*missing"):
        quickstart.read_prompt(args)
    (tmp_path / "missing").write_text("\n")
    with pytest.raises(environment.SetupError, match="--prompt-file .*missing is empty"):
        quickstart.read_prompt(args)


def test_port_that_something_listens_on_is_refused() -> None:
    with socket.socket() as listener:
        listener.bind((quickstart.HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(environment.SetupError, match=f"--port {port}"):
            quickstart.choose_port(port)
    assert quickstart.choose_port(port) == port


@pytest.mark.parametrize(("gpu", "device"), [("Some GPU", "cuda"), ("", "cpu")])
def test_device_is_what_pytorch_finds(
    project: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, device: str
) -> None:
    monkeypatch.setattr(quickstart, "WORK", project / ".quickstart")
    monkeypatch.setenv("STUB_GPU", gpu)
    assert quickstart.find_device(Path(os.environ["SPARSESPEC_PYTHON"])) == device


def test_server_talks_to_itself_without_a_proxy_and_asks_the_hub_only_for_its_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    env = quickstart.server_environment(model_is_local=True)
    assert env["no_proxy"] == "example.org,127.0.0.1,localhost" and env["NO_PROXY"] == "127.0.0.1,localhost"
    assert env["HF_HUB_OFFLINE"] == "1"
    assert quickstart.server_environment(model_is_local=False)["HF_HUB_OFFLINE"] == "0"


def test_report_of_an_answer_without_verification_says_so() -> None:
    state = quickstart.DraftState([3, 4], [1.0])
    report = quickstart.report(quickstart.Answer("a", 5, 1, "stop", 0.5, 0.0), state, state)
    assert "nothing was drafted" in report and "0.00 tokens/s" in report


# ------------------------------------------------------------- environment, shell, tests


def test_model_folder_is_the_last_line_of_the_fetching_program(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = Path(os.environ["SPARSESPEC_PYTHON"])
    assert environment.fetch_model(python, "smollm2-135m", "float32") == Path("/models/smollm2-135m-float32")
    assert capsys.readouterr().out == "[00:00:00] fetching\n"


def test_model_that_cannot_be_fetched_is_an_error(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_MODE", "fetch_fails")
    with pytest.raises(environment.SetupError, match="smollm2-135m could not be fetched"):
        environment.fetch_model(Path(os.environ["SPARSESPEC_PYTHON"]), "smollm2-135m", "float32")


def test_interrupted_fetch_is_stopped(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_MODE", "fetch_hangs")
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def remember(*args: object, **kwargs: object) -> subprocess.Popen[str]:
        started.append(popen(*args, **kwargs))  # type: ignore[call-overload]
        return started[-1]

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", remember)
    monkeypatch.setattr("builtins.print", interrupt)  # at its first line of progress
    with pytest.raises(KeyboardInterrupt):
        environment.fetch_model(Path(os.environ["SPARSESPEC_PYTHON"]), "smollm2-135m", "float32")
    assert started[0].returncode == -signal.SIGTERM


@pytest.mark.parametrize("command", ["quickstart", "test"])
def test_command_explains_itself(project: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("SPARSESPEC_BASE_PYTHON", sys.executable)
    script = project / "scripts" / command
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: scripts/{command}")


def test_command_without_a_fitting_python_names_the_remedy(project: Path) -> None:
    programs = project / "programs"
    programs.mkdir()
    dirname, bash = shutil.which("dirname"), shutil.which("bash")
    assert dirname and bash
    (programs / "dirname").symlink_to(dirname)  # the only program in reach
    env = {"PATH": str(programs), "SPARSESPEC_BASE_PYTHON": "false"}
    script = project / "scripts" / "quickstart"
    done = subprocess.run([bash, script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "SPARSESPEC_BASE_PYTHON" in done.stderr


@pytest.mark.parametrize(
    ("ruff", "mypy", "pytest_status", "status"),
    [("", "", 0, 0), ("E501", "", 0, 1), ("", "wrong type", 0, 1), ("", "", 1, 1), ("", "", 5, 5)],
)
def test_tests_pass_only_if_every_check_and_pytest_does(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ruff: str,
    mypy: str,
    pytest_status: int,
    status: int,
) -> None:
    ran = []

    def pytest_stand_in(python: Path, model: Path, arguments: list[str], everything: bool) -> int:
        ran.append((str(model), arguments))
        return pytest_status

    monkeypatch.setattr(run_tests, "check_style", lambda python: ruff)
    monkeypatch.setattr(run_tests, "check_types", lambda python: mypy)
    monkeypatch.setattr(run_tests, "run_pytest", pytest_stand_in)
    assert run_tests.main(["tests/test_x.py", "-k", "name"]) == status
    assert ran == [("/models/smollm2-135m-float32", ["tests/test_x.py", "-k", "name"])]
    output, errors = capsys.readouterr()
    assert ("ruff" in errors, "mypy" in errors) == (bool(ruff), bool(mypy))
    assert ruff in output and mypy in output


def test_tests_without_lint_run_pytest_only(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(python: Path) -> str:
        raise AssertionError("a check ran")

    monkeypatch.setattr(run_tests, "check_style", unexpected)
    monkeypatch.setattr(run_tests, "check_types", unexpected)
    monkeypatch.setattr(run_tests, "run_pytest", lambda *args: 0)
    assert run_tests.main(["--no-lint", "tests/test_x.py"]) == 0


def test_a_check_that_finds_nothing_is_silent_and_one_that_fails_is_not(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "Success: no issues"\nexit $STUB_STATUS\n')
    python.chmod(0o755)
    for status, found in (("0", ""), ("1", "Success: no issues")):
        os.environ["STUB_STATUS"] = status
        try:
            assert run_tests.check_style(python) == run_tests.check_types(python) == found
        finally:
            del os.environ["STUB_STATUS"]


@pytest.mark.parametrize(
    ("arguments", "status", "stamped"),
    [([], 0, True), (["--all"], 0, True), (["-k", "x"], 0, False), ([], 1, False), (["--all"], 1, False)],
)
def test_a_whole_run_that_passes_is_stamped_with_its_lock_file(
    project: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int, stamped: bool
) -> None:
    everything = []
    monkeypatch.setattr(run_tests, "run_pytest", lambda *args: everything.append(args[3]) or status)
    stamp = project / "stamp"
    monkeypatch.setattr(run_tests, "CONTRACT_STAMP", stamp)
    stamp.write_text("of another lock file")
    run_tests.main(["--no-lint", *arguments])
    assert run_tests.contract_is_verified() is stamped
    assert everything == ["--all" in arguments]


@pytest.mark.parametrize(
    ("arguments", "statuses", "status"),
    [
        ([], (0, 0), 0),
        ([], (0, 1), 1),
        ([], (1, 0), 1),
        (["--all"], (0, 0), 0),
        (["--one-release"], (0,), 0),
        (["-x"], (0,), 0),
    ],
)
def test_a_whole_run_tests_the_newer_sglang_too(
    project: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], statuses: tuple[int, ...], status: int
) -> None:
    ran: list[tuple[str, list[str]]] = []

    def pytest_stand_in(python: Path, model: Path, tests: Sequence[str], everything: bool = False) -> int:
        ran.append((python.name, list(tests)))
        assert everything == ("--all" in arguments and len(ran) == 1)
        return statuses[len(ran) - 1]

    monkeypatch.delenv("SPARSESPEC_PYTHON")
    monkeypatch.setattr(run_tests, "CONTRACT_STAMP", project / "stamp")
    monkeypatch.setattr(run_tests, "ensure_environment", lambda lock=environment.LOCK: Path(lock.name))
    monkeypatch.setattr(run_tests, "ensure_test_model", lambda python: Path("/models/m"))
    monkeypatch.setattr(run_tests, "run_pytest", pytest_stand_in)
    assert run_tests.main(["--no-lint", *arguments]) == status
    given = [argument for argument in arguments if argument == "-x"]
    newer = (environment.NEWER_LOCK.name, list(run_tests.NEWER_TESTS))
    assert ran == [(environment.LOCK.name, given), newer][: len(statuses)]


def test_the_lock_files_hold_the_supported_releases() -> None:
    """And the same versions of what checks the project."""
    older, newer = (
        dict(line.split("==") for line in lock.read_text().splitlines() if "==" in line and not line.startswith("#"))
        for lock in (environment.LOCK, environment.NEWER_LOCK)
    )
    assert (older["sglang"], newer["sglang"]) == SUPPORTED
    assert environment.NEWER_LOCK.stem.endswith(SUPPORTED[1])
    assert all((REPO / test.partition("::")[0]).exists() for test in run_tests.NEWER_TESTS)
    assert all(older[name] == newer[name] for name in ("pytest", "pytest-timeout", "pytest-xdist", "ruff", "scipy"))


def test_pytest_is_told_where_the_model_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "${run_tests.MODEL_VARIABLE} $@"\nexit 6\n')
    python.chmod(0o755)
    assert run_tests.run_pytest(python, Path("/models/m"), ["-k", "name"]) == 6
    shown = capfd.readouterr().out
    assert "/models/m -m pytest -v --durations=10" in shown
    assert "-n 2 --dist loadfile --no-loadscope-reorder -k name" in shown
    assert "--all" not in shown
    run_tests.run_pytest(python, Path("/models/m"), [], everything=True)
    assert "--durations=10 --all -n 2" in capfd.readouterr().out
    run_tests.run_pytest(python, Path("/models/m"), ["-n0"])
    assert "--dist" not in capfd.readouterr().out


def test_given_test_model_is_used_and_must_be_a_checkpoint(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(run_tests.MODEL_VARIABLE, str(tmp_path))
    with pytest.raises(environment.SetupError, match=run_tests.MODEL_VARIABLE):
        run_tests.ensure_test_model(Path("unused"))
    (tmp_path / "config.json").write_text("{}")
    assert run_tests.ensure_test_model(Path("unused")) == tmp_path


def test_environment_setup_that_fails_ends_the_tests(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSESPEC_PYTHON", "/missing/python")
    assert run_tests.main([]) == 1
    assert "error: SPARSESPEC_PYTHON=/missing/python" in capsys.readouterr().err
