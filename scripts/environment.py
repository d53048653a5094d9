"""The virtual environments that quickstart and the tests run in, made from lock files.

That of requirements.lock is in .venv. Tests run with the newer SGLang, too: requirements-0.5.23.lock, .venv-0.5.23.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
LOCK = REPO / "requirements.lock"
NEWER_LOCK = REPO / "requirements-0.5.23.lock"
UV = "uv==0.13.9"
NEEDED_DISK_GB = 12
STAMP = "sparsespec-environment"


class SetupError(RuntimeError):
    """Setting up failed; the message is for the user."""


def say(message: str) -> None:
    """Print one progress line at once."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def run_shown(
    command: Sequence[str | os.PathLike[str]],
    what: str,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run ``command`` with its output in ``log`` (a temporary file if None) and a sign of life on the screen.

    Raises:
        SetupError: the command failed; the message holds the end of its output.
    """
    say(f"{what} ...")
    started = shown = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        path = log or Path(scratch) / "log"
        with path.open("wb") as sink:
            process = subprocess.Popen(
                [os.fspath(part) for part in command],
                stdout=sink,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=REPO,
                env=None if env is None else dict(env),
            )
            try:
                while process.poll() is None:
                    time.sleep(0.2)
                    if time.monotonic() - shown >= 15:
                        shown = time.monotonic()
                        say(f"  {what}: {shown - started:.0f} s, {last_line(path)}")
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if process.returncode:
            tail = "\n".join(path.read_text(errors="replace").splitlines()[-25:])
            raise SetupError(f"{what} failed (exit status {process.returncode}):\n{tail}")
    say(f"  done in {time.monotonic() - started:.0f} s")


def last_line(path: Path, limit: int = 90) -> str:
    """The last line with text in a log file, cut to ``limit`` characters."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        text = file.read().decode(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n")]
    return next((line[:limit] for line in reversed(lines) if line), "no output yet")


def fingerprint(lock: Path) -> str:
    """Changes whenever the environment of ``lock`` has to be installed again."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {REPO}".encode())
    for path in (lock, REPO / "pyproject.toml"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def ensure_environment(lock: Path = LOCK) -> Path:
    """Make (or bring up to date) the virtual environment of ``lock``; return its interpreter.

    ``SPARSESPEC_PYTHON`` names an interpreter to use as it is, with everything installed.
    ``SPARSESPEC_VENV`` puts the environment somewhere else than ``.venv``; the name of another lock file's has its suffix.

    Raises:
        SetupError: something could not be installed.
    """
    given = os.environ.get("SPARSESPEC_PYTHON")
    if given:
        found = shutil.which(given)
        if found is None:
            raise SetupError(f"SPARSESPEC_PYTHON={given} is not an interpreter.")
        say(f"using the interpreter of SPARSESPEC_PYTHON as it is: {found}")
        return Path(found)
    suffix = lock.stem.removeprefix(LOCK.stem)  # "-0.5.23"
    venv = Path(f"{os.environ.get('SPARSESPEC_VENV') or REPO / '.venv'}{suffix}").absolute()
    python = venv / "bin" / "python"
    stamp = venv / STAMP
    wanted = fingerprint(lock)
    if stamp.is_file() and stamp.read_text() == wanted and python.exists():
        say(f"environment is up to date: {venv}")
        return python
    venv.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(venv.parent).free / 1e9
    if not python.exists() and free < NEEDED_DISK_GB:
        raise SetupError(
            f"{venv.parent} has {free:.1f} GB free, the environment needs about {NEEDED_DISK_GB} GB "
            "(PyTorch with CUDA); set SPARSESPEC_VENV to a folder on a larger disk."
        )
    stamp.unlink(missing_ok=True)
    if not (venv / "bin" / "pip").exists():
        run_shown([sys.executable, "-m", "venv", "--clear", venv], f"making a virtual environment in {venv}")
    install_lock(python, lock)
    run_shown(
        [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet", "-e", REPO],
        "installing this project",
    )
    stamp.write_text(wanted)
    return python


def install_lock(python: Path, lock: Path) -> None:
    """Install the packages of ``lock`` with uv, or with pip where uv does not work."""
    packages = sum("==" in line for line in lock.read_text().splitlines())
    interpreter, file = os.fspath(python), os.fspath(lock)
    pip = [interpreter, "-m", "pip", "install", "--disable-pip-version-check"]
    what = f"installing {packages} packages from {lock.name}"
    # --no-deps: the lock file is complete, so there is nothing to resolve.
    try:
        run_shown([*pip, "--quiet", UV], "installing uv")
        uv = [interpreter, "-m", "uv", "pip", "install", "--python", interpreter, "--no-deps", "-r", file]
        run_shown(uv, f"{what} with uv", env={**os.environ, "UV_HTTP_TIMEOUT": "180"})
    except SetupError as error:
        say(f"uv did not work, falling back to pip (slower): {error}")
        run_shown([*pip, "--progress-bar", "off", "--no-deps", "-r", file], f"{what} with pip")


def fetch_model(python: Path, name: str, dtype: str) -> Path:
    """Run fetch_model.py in the environment; return the checkpoint folder of the model ``name``.

    Raises:
        SetupError: the model could not be fetched.
    """
    command = [os.fspath(python), os.fspath(REPO / "scripts" / "fetch_model.py"), name, "--dtype", dtype]
    # A session of its own, so that its downloads can be stopped together with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=child_environment(), start_new_session=True
    )
    assert process.stdout is not None
    line = ""
    try:
        for line in process.stdout:  # progress; the last line is the folder
            if line.startswith("["):
                print(line, end="", flush=True)
        process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    if process.returncode:
        raise SetupError(f"the model {name} could not be fetched (see above).")
    return Path(line.strip())


def child_environment() -> dict[str, str]:
    """Variables for programs started here: no hub, no tokenizer threads before forks, unbuffered output."""
    return {
        # OpenMP's threads spin while they wait for each other. Where another program runs on the
        # same cores, they wait for one that is not running, and small matrix products take 20 times
        # as long.
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
