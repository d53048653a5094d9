#!/usr/bin/env python3
"""Unpack a bundle of scripts/offline_bundle on a host without registry access, and say what the host lacks.

    python3 DIR/unpack.py --target /some/site [--follow] [DIR]
    . /some/site/activate

The target becomes a virtual environment on top of the interpreter that runs this: what the bundle holds comes first, then
the interpreter's own packages. NVIDIA's libraries are links to the host's. With ``--follow``, the chunks may still be on
their way: each is unpacked as soon as it is there.

Exit status: 0 if all is there, 1 if nothing could be unpacked, 2 if something is missing (one line each).

Needs the standard library alone: a decompressor comes with the bundle.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "manifest.json"
FORMAT = 1
MAX_WINDOW = 1 << 27  # bytes of memory that decompression may look back
BLOCK = 1 << 20
ZEROS = bytes(BLOCK)


class CannotUnpack(Exception):
    """The bundle does not fit this host or is damaged; the message is for the user."""


def refusals(manifest: dict[str, Any], target: Path) -> list[str]:
    """Why the bundle cannot be used on this host at all, one line each."""
    found = []
    if manifest["format"] != FORMAT:
        found.append(f"the bundle has format {manifest['format']}, this unpack.py reads {FORMAT}")
    here = "{}.{}".format(*sys.version_info[:2])
    if here != manifest["python"]:
        found.append(f"this is Python {here}, the bundle is for {manifest['python']}: run python{manifest['python']}")
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        found.append(f"this is {sys.platform} on {platform.machine()}, the bundle is for Linux on x86_64")
    glibc = platform.libc_ver()[1]
    if glibc and numbers(glibc) < numbers(manifest["glibc"]):
        found.append(f"glibc is {glibc}, the bundle needs {manifest['glibc']}")
    folder = target.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < manifest["unpacked_bytes"]:
        found.append(f"{folder} has {free / 1e9:.1f} GB free, the bundle needs {manifest['unpacked_bytes'] / 1e9:.1f} GB")
    return found


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, to compare."""
    parts = []
    for part in version.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def missing_gpu(manifest: dict[str, Any]) -> Iterator[str]:
    """What the GPU and its driver lack, one line each."""
    if manifest["cuda"] is None:
        return
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        yield "no NVIDIA driver: libcuda.so.1 was not found"
        return
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    supported = (version.value // 1000, version.value % 1000 // 10)
    if supported[0] < numbers(manifest["cuda"])[0]:
        yield "the driver is for CUDA {}.{}, the bundle for {}".format(*supported, manifest["cuda"])
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        yield "the driver finds no GPU"
        return
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # compute capability, major and minor
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        if f"{major.value}.{minor.value}" != manifest["compute_capability"]:
            yield f"GPU {index} is sm_{major.value}{minor.value}, the bundle is for {manifest['compute_capability']}"


def missing_compiler(manifest: dict[str, Any]) -> Iterator[str]:
    """What is needed to compile kernels at the first start and is not there."""
    if manifest["cuda"] is None:
        return
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    if shutil.which("nvcc") is None and not os.access(f"{home}/bin/nvcc", os.X_OK):
        yield "nvcc was not found on PATH or in CUDA_HOME: kernels that are compiled at the first start will fail"
    if shutil.which("c++") is None and shutil.which("g++") is None:
        yield "no C++ compiler was found: kernels that are compiled at the first start will fail"


def missing_packages(manifest: dict[str, Any]) -> Iterator[str]:
    """Distributions that the bundle leaves to the host and that are not there. Versions are compared if packaging is."""
    for name, specifier in manifest["host_packages"].items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield f"package {name}{specifier} of the host"
            continue
        try:
            from packaging.specifiers import SpecifierSet
        except ImportError:
            continue
        if not SpecifierSet(specifier).contains(version, prereleases=True):
            yield f"package {name}{specifier} of the host (it has {version})"


def host_nvidia_folders() -> list[Path]:
    """The ``nvidia`` folders of the interpreter's own packages."""
    return [Path(entry, "nvidia") for entry in sys.path if entry and Path(entry, "nvidia").is_dir()]


def link_nvidia(site: Path) -> list[str]:
    """Link each part of the host's ``nvidia`` that the bundle does not bring; return their names."""
    ours = site / "nvidia"
    ours.mkdir(parents=True, exist_ok=True)
    linked = []
    for folder in host_nvidia_folders():
        for part in sorted(folder.iterdir()):
            link = ours / part.name
            if part.is_dir() and part.name != "__pycache__" and not os.path.lexists(link):
                link.symlink_to(part.resolve())
                linked.append(part.name)
    return linked


def missing_libraries(manifest: dict[str, Any], site: Path) -> Iterator[str]:
    """Shared libraries that the bundle's own need and that neither ``nvidia`` nor the system has."""
    folders = [*glob.glob(f"{glob.escape(str(site))}/nvidia/*/lib"), "/usr/local/cuda/lib64"]
    for name, users in manifest["host_libraries"].items():
        if name == "libcuda.so.1" or any(os.path.exists(os.path.join(folder, name)) for folder in folders):
            continue
        try:
            ctypes.CDLL(name)
        except OSError as error:
            if "No such file" in str(error) or "cannot open" in str(error):
                others = f" and {len(users) - 1} more" if len(users) > 1 else ""
                yield f"library {name}, which {users[0]}{others} needs"


class Chunks(io.RawIOBase):
    """The chunks as one stream. Each is checked before any of it is read.

    Args:
        folder: where the chunks are, or will be.
        chunks: their names, sizes and SHA-256, in order.
        patience: seconds to wait for each; 0: all must be there.
    """

    def __init__(self, folder: Path, chunks: list[dict[str, Any]], patience: float) -> None:
        self._folder, self._left, self._patience = folder, list(chunks), patience
        self._file: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._file is None:
                if not self._left:
                    return 0
                self._file = self._open(self._left.pop(0))
            size = self._file.readinto(buffer)  # type: ignore[attr-defined]
            if size:
                return size
            self._file.close()
            self._file = None

    def _open(self, chunk: dict[str, Any]) -> BinaryIO:
        path = self._folder / chunk["name"]
        deadline = time.monotonic() + self._patience
        while True:
            problem = damage(path, chunk)
            if problem is None:
                return path.open("rb")
            if time.monotonic() >= deadline:
                raise CannotUnpack(f"{path}: {problem}")
            time.sleep(0.2)


def damage(path: Path, chunk: dict[str, Any]) -> str | None:
    """What is wrong with a chunk; None if nothing is."""
    if not path.exists():
        return "not there"
    size = path.stat().st_size
    if size != chunk["bytes"]:
        return f"has {size:,} bytes instead of {chunk['bytes']:,}"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return None if digest.hexdigest() == chunk["sha256"] else "is damaged: its SHA-256 is another"


def decompressor(folder: Path, manifest: dict[str, Any], scratch: Path) -> Any:
    """The module zstandard: the host's, or the bundle's."""
    try:
        import zstandard
    except ImportError:
        with zipfile.ZipFile(folder / manifest["zstandard"]) as archive:
            archive.extractall(scratch)
        sys.path.insert(0, str(scratch))
        import zstandard
    return zstandard


def extract(stream: Any, site: Path) -> int:
    """Write the files of a tar stream below ``site``; return how many. Blocks of zeros become holes, which take no disk."""
    count = 0
    buffer = bytearray(BLOCK)
    view = memoryview(buffer)
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if not member.isreg():
                archive.extract(member, site, filter="data")
                continue
            member = tarfile.data_filter(member, str(site))
            path = site / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            source = archive.extractfile(member)
            assert source is not None
            with path.open("wb") as file:
                while size := source.readinto(buffer):  # type: ignore[attr-defined]
                    if view[:size] == ZEROS[:size]:
                        file.seek(size, os.SEEK_CUR)
                    else:
                        file.write(view[:size])
                file.truncate(member.size)
            os.chmod(path, 0o755 if (member.mode or 0) & 0o100 else 0o644)
            os.utime(path, (member.mtime, member.mtime))
            count += 1
    return count


def make_environment(target: Path) -> Path:
    """Make the target a virtual environment on top of this interpreter; return its folder of packages."""
    venv.EnvBuilder(system_site_packages=True, symlinks=True).create(target)
    site = target / "lib" / "python{}.{}".format(*sys.version_info[:2]) / "site-packages"
    # An environment made from an environment sees the packages of the interpreter underneath only. These lines, read after
    # the target's own packages, add those of this interpreter, with their .pth files.
    own = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    lines = [f"import site; site.addsitedir({entry!r})" for entry in own]
    (site / "zz_host.pth").write_text("".join(f"{line}\n" for line in lines))
    return site


def write_activate(target: Path, site: Path) -> Path:
    """Write the file to source; return its path."""
    quoted = shlex.quote(str(target))
    path = target / "activate"
    path.write_text(
        f"# Source this:  . {quoted}/activate\n"
        f"export VIRTUAL_ENV={quoted}\n"
        f"export PATH={quoted}/bin:$PATH\n"
        # For programs that call the host's interpreter by its full path.
        f"export PYTHONPATH={shlex.quote(str(site))}${{PYTHONPATH:+:$PYTHONPATH}}\n"
        "export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false\n"
        '[ -n "${CUDA_HOME:-}" ] || [ ! -d /usr/local/cuda ] || export CUDA_HOME=/usr/local/cuda\n'
        "hash -r 2>/dev/null || true\n"
    )
    return path


def failed_imports(manifest: dict[str, Any], target: Path) -> Iterator[str]:
    """Modules that cannot be imported in the target, each with the reason."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except BaseException as error:\n"
        "        text = ' '.join(str(error).split())\n"
        "        print('FAILED', f'import {name}: {type(error).__name__}: {text}'[:500], flush=True)\n"
    )
    command = [str(target / "bin" / "python"), "-c", code, *manifest["imports"]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    yield from (line[7:] for line in done.stdout.splitlines() if line.startswith("FAILED "))
    if done.returncode:
        yield f"the imports ended with status {done.returncode}: {done.stderr[-300:]}"


def unpack(folder: Path, target: Path, patience: float, force: bool, imports: bool) -> list[str]:
    """Unpack the bundle in ``folder`` into ``target``; return what is missing, one line each.

    Raises:
        CannotUnpack: the bundle does not fit this host, is damaged, or the target is in use.
    """
    deadline = time.monotonic() + patience
    while not (folder / MANIFEST).exists():
        if time.monotonic() >= deadline:
            raise CannotUnpack(f"{folder / MANIFEST} is not there")
        time.sleep(0.2)
    manifest = json.loads((folder / MANIFEST).read_text())
    found = refusals(manifest, target)
    if found and not force:
        raise CannotUnpack("\n".join(found))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CannotUnpack(f"{target} is not empty: remove it, or name another folder")
    missing = [*missing_gpu(manifest), *missing_compiler(manifest), *missing_packages(manifest)]
    print_missing(missing)

    started = time.monotonic()
    site = make_environment(target)
    with tempfile.TemporaryDirectory() as scratch:
        zstandard = decompressor(folder, manifest, Path(scratch))
        source = io.BufferedReader(Chunks(folder, manifest["chunks"], patience), BLOCK)
        with zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(source) as stream:
            count = extract(stream, site)
    add_scripts(target, site)
    linked = link_nvidia(site)
    print(f"unpacked {count} files in {time.monotonic() - started:.1f} s")
    print(f"linked from the host's nvidia: {' '.join(linked) or 'nothing'}")
    late = list(missing_libraries(manifest, site))
    if imports:
        late += failed_imports(manifest, target)
    print_missing(late)
    activate = write_activate(target, site)
    print(f"SGLang {manifest['sglang']} is in {target}: . {activate}")
    return [*missing, *late]


def add_scripts(target: Path, site: Path) -> None:
    """Move the packages' programs into the target's ``bin``, for its interpreter."""
    for path in sorted((site / "bin").glob("*")):
        destination = target / "bin" / path.name
        if destination.exists() or not path.is_file():
            continue
        content = path.read_bytes()
        first, newline, rest = content.partition(b"\n")
        if first.startswith(b"#!") and b"python" in first:
            content = b"#!" + os.fsencode(target / "bin" / "python") + newline + rest
        destination.write_bytes(content)
        destination.chmod(0o755)
    shutil.rmtree(site / "bin", ignore_errors=True)


def print_missing(lines: list[str]) -> None:
    """Print one line for each."""
    for line in lines:
        print(f"missing: {line}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and unpack; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent, metavar="DIR")
    parser.add_argument("--target", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument(
        "--follow", nargs="?", type=float, const=600.0, default=0.0, metavar="SECONDS", help="wait for each chunk to appear"
    )
    parser.add_argument("--force", action="store_true", help="unpack although the bundle is for another host")
    parser.add_argument("--no-imports", action="store_true", help="do not try the imports at the end")
    args = parser.parse_args(arguments)
    try:
        missing = unpack(args.folder, args.target.absolute(), args.follow, args.force, not args.no_imports)
    except CannotUnpack as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 1
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
