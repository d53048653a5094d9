"""Make an archive of SGLang, this plugin and what they need, for a GPU host without registry access.

    scripts/offline_bundle build --sglang 0.5.23 --python 3.12 --cuda-arch 9.0 --output DIR --chunk-mb 60
    python3 DIR/unpack.py --target /some/site          (on the host)

uv resolves and installs the wheels for the host's Python into a folder that nothing runs. From there, they go into one
stream of tar and Zstandard, cut into chunks. The archive is small for four reasons. NVIDIA's libraries (cuBLAS, cuDNN and
the rest, but not NCCL) are the host's own. Packages and files that serving text does not need stay behind. Binaries are
stripped. GPU code for other architectures becomes zeros, which take no room once compressed.

Needs uv, zstandard and packaging (``pip install uv zstandard packaging``), and strip and readelf (binutils).
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import tomllib
from environment import REPO, SetupError, say
from offline_unpack import FORMAT, MANIFEST, MAX_WINDOW

UNPACKER = Path(__file__).with_name("offline_unpack.py")

#: Distributions of NVIDIA's libraries that the host has already, under ``nvidia/``. NCCL is not among them: PyTorch calls
#: functions of the very release it was built with.
HOST_LIBRARIES = re.compile(
    r"(cuda-toolkit|nvidia-(cublas|cudnn|cufft|cufile|curand|cusolver|cusparse|cusparselt|nvjitlink|nvshmem|nvtx|nvvm|cuda-.*))"
    r"(-cu\d+)?$"
)

#: Distributions that SGLang names but that serving text on one host does not import. ``--keep NAME`` brings one along.
LEFT_OUT = {
    "anthropic": "client library",
    "blobfile": "tokenizers kept in cloud storage",
    "build": "builds packages",
    "cryptography": "of left-out packages",
    "cuda-tile": "kernels for Blackwell",
    "cython": "of left-out packages",
    "datasets": "benchmark data",
    "deepseek-recipe": "DeepSeek V4 prompts",
    "grpcio": "gRPC server",
    "grpcio-health-checking": "gRPC server",
    "grpcio-reflection": "gRPC server",
    "hf-xet": "downloads",
    "humming-kernels": "kernels of one quantization",
    "llvmlite": "of numba",
    "lxml": "of left-out packages",
    "modelscope": "downloads",
    "modelscope-hub": "downloads",
    "multiprocess": "of datasets",
    "nccl-extensions": "expert parallelism",
    "nccl4py": "expert parallelism",
    "numba": "audio and image models",
    "nvidia-cutlass-dsl-libs-cu12": "CUDA 12",
    "nvidia-mathdx": "expert balancing",
    "nvshmem4py-cu13": "expert parallelism",
    "pandas": "benchmark data",
    "py-spy": "profiler",
    "pyarrow": "of datasets",
    "pycryptodomex": "of blobfile",
    "sgl-deep-ep": "expert parallelism",
    "smg-grpc-proto": "gRPC server",
    "smg-grpc-servicer": "gRPC server",
    "torchcodec": "audio and video",
    "tilelang": "kernels of DeepSeek sparse attention",
    "tml-renderers": "prompts of one model",
    "z3-solver": "of tilelang",
}

#: Files that stay behind, as patterns of paths in site-packages (``*`` crosses folders).
LEFT_OUT_FILES = (
    "*.a",
    "*.pdb",
    "*/__pycache__/*",
    "bin/z3",
    "bin/py-spy",
    "jedi/third_party/django-stubs/*",
    "mistral_common/data/*",
    "pycountry/locales/*",
    "sgl_kernel/infllm_ops*",
    "torch_memory_saver_hook_mode_*_cu12.abi3.so",
    "torch_memory_saver_hook_mode_preload.abi3.so",
    "torch_memory_saver_hook_mode_torch.abi3.so",
    "sglang/multimodal_gen/*",
    "sglang/srt/rust_extensions/_bench.*",
    "sglang/srt/rust_extensions/_grpc.*",
    "sglang/test/*",
    "scipy/*/tests/*",
    "numpy/*/tests/*",
    "sympy/*/tests/*",
    "torch/bin/protoc*",
    "triton/FileCheck",
    "triton/_C/libproton.so",
    "triton/backends/amd/*.bc",
    "triton/backends/nvidia/bin/nvdisasm",
    "triton/backends/nvidia/lib/cupti*",
    "triton/instrumentation/*",
    "triton/plugins/*",
)
#: The same, unless the GPU is Blackwell (compute capability 10.0 and above).
BLACKWELL_FILES = (
    "flashinfer/data/csrc/cake_*",
    "flashinfer/data/csrc/*sm100*",
    "flashinfer/data/csrc/*sm120*",
    "flashinfer/fused_moe/backends/cudnn_frost/artifacts/*",
    "sgl_kernel/sm100/*",
    "triton/backends/nvidia/bin/ptxas-blackwell",
)

#: What the unpacker imports at the end.
IMPORTS = (
    "torch",
    "triton",
    "sgl_kernel",
    "sgl_kernel.flash_attn",
    "flashinfer",
    "transformers",
    "sglang.srt.entrypoints.engine",
    "sglang_sparsespec.worker",
)

# A fat binary: a header, then entries of (header, code), each for one architecture.
_FATBIN = struct.Struct("<IHHQ")  # magic, version, size of this header, bytes of the entries
_ENTRY = struct.Struct("<HHIQ")  # kind, version, size of this header, bytes of the code
_FATBIN_MAGIC = 0xBA55ED50
_ARCH_OFFSET = 28
_PTX, _MACHINE_CODE = 1, 2


def drop_other_architectures(image: bytearray, arch: int) -> int:
    """Take out, in place, the GPU code that a device of another architecture would run.

    Only fat binaries that hold machine code for ``arch`` are touched: others may be needed as they are (PTX that is compiled
    on the device). What is kept moves to the front, as if nothing else had been compiled, and zeros follow: fat binaries
    are found by where they begin.

    Args:
        image: a library or program.
        arch: ten times the compute capability, such as 90.

    Returns:
        How many bytes were taken out.
    """
    magic = struct.pack("<I", _FATBIN_MAGIC)
    dropped = 0
    start = image.find(magic)
    while start >= 0:
        entries = _entries(image, start)
        if not entries:
            start = image.find(magic, start + 4)
            continue
        end = entries[-1].end
        if any(entry.kind == _MACHINE_CODE and entry.arch == arch for entry in entries):
            kept = [e for e in entries if e.kind not in (_PTX, _MACHINE_CODE) or (e.kind, e.arch) == (_MACHINE_CODE, arch)]
            body = b"".join(image[entry.begin : entry.end] for entry in kept)
            begin = start + _FATBIN.size
            image[begin:end] = body.ljust(end - begin, b"\0")
            _FATBIN.pack_into(image, start, _FATBIN_MAGIC, 1, _FATBIN.size, len(body))
            dropped += end - begin - len(body)
        start = image.find(magic, end)
    return dropped


class _Entry(NamedTuple):
    kind: int
    arch: int
    begin: int  # of its header
    end: int


def _entries(image: bytearray, start: int) -> list[_Entry]:
    """The entries of the fat binary at ``start``; none if it is not one."""
    if start + _FATBIN.size > len(image):
        return []
    _, version, header, size = _FATBIN.unpack_from(image, start)
    end = start + header + size
    if version != 1 or header != _FATBIN.size or end > len(image):
        return []
    entries = []
    at = start + header
    while at < end:
        if at + _ARCH_OFFSET + 4 > end:
            return []
        kind, _, entry_header, code = _ENTRY.unpack_from(image, at)
        (arch,) = struct.unpack_from("<I", image, at + _ARCH_OFFSET)
        after = at + entry_header + code
        if entry_header < _ARCH_OFFSET + 4 or after > end:
            return []
        entries.append(_Entry(kind, arch, at, after))
        at = after
    return entries


class Chunks(io.RawIOBase):
    """A stream that is written to files of at most ``limit`` bytes: PREFIX.000, PREFIX.001 and so on."""

    def __init__(self, prefix: Path, limit: int) -> None:
        self.prefix, self.limit = prefix, limit
        self.done: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        total = len(view)
        while view:
            if self._file is None:
                self._file = self.prefix.with_name(f"{self.prefix.name}.{len(self.done):03d}").open("wb")
                self._digest, self._size = hashlib.sha256(), 0
            piece = view[: self.limit - self._size]
            self._file.write(piece)
            self._digest.update(piece)
            self._size += len(piece)
            view = view[len(piece) :]
            if self._size == self.limit:
                self._finish()
        return total

    def _finish(self) -> None:
        if self._file is not None:
            self._file.close()
            name = Path(self._file.name).name
            self.done.append({"name": name, "bytes": self._size, "sha256": self._digest.hexdigest()})
            self._file = None

    def close(self) -> None:
        self._finish()
        super().close()


def tool(name: str) -> str:
    """The path of a program beside this interpreter or on PATH.

    Raises:
        SetupError: it is missing.
    """
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise SetupError(f"{name} is missing: " + ("pip install uv" if name == "uv" else "install binutils"))
    return found


def run_quietly(*command: str | os.PathLike[str]) -> str:
    """What ``command`` prints. Its errors are the SetupError."""
    done = subprocess.run([os.fspath(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"{Path(command[0]).name} {command[1]} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def target_flags(args: argparse.Namespace) -> list[str]:
    """What tells uv of the host and of where wheels come from."""
    wheels = ["--no-index", "--find-links", os.fspath(args.wheels)] if args.wheels else []
    return ["-q", "--python-version", args.python, "--python-platform", args.platform, *wheels]


def resolve(requirements: Sequence[str], flags: Sequence[str]) -> list[str]:
    """What the requirements need on the host, as ``name==version``."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as file:
        file.write("\n".join(requirements))
        file.flush()
        shape = ["--prerelease=allow", "--no-header", "--no-annotate"]
        text = run_quietly(tool("uv"), "pip", "compile", file.name, *flags, *shape)
    return [line for line in text.splitlines() if "==" in line]


def install(pins: Sequence[str], site: Path, flags: Sequence[str]) -> None:
    """Install the pinned wheels into the folder ``site``, for another interpreter."""
    where = ["--target", os.fspath(site), "--no-deps", "--only-binary", ":all:"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins))
        file.flush()
        run_quietly(tool("uv"), "pip", "install", *flags, *where, "-r", file.name)


def plugin_requirements() -> list[str]:
    """What this plugin asks for besides SGLang."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    return [line for line in project["dependencies"] if not line.startswith("sglang")]


def canonical(name: str) -> str:
    """A distribution's name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def host_requirements(site: Path, host: dict[str, str]) -> tuple[set[str], dict[str, str]]:
    """Which distributions the host's own can stand for, and what is asked of them.

    Args:
        site: where all distributions are installed.
        host: names and versions on the host.

    Returns:
        The names to leave out of the bundle, and name and specifier of each.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    asked: dict[str, list[Requirement]] = defaultdict(list)
    bundled = set()
    for distribution in importlib.metadata.distributions(path=[str(site)]):
        bundled.add(canonical(distribution.metadata["Name"]))
        for line in distribution.requires or ():
            try:
                requirement = Requirement(line)
            except InvalidRequirement:
                continue
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                asked[canonical(requirement.name)].append(requirement)
    left_out = {}
    for name, version in host.items():
        if name in bundled and name in asked and all(r.specifier.contains(version, prereleases=True) for r in asked[name]):
            left_out[name] = ",".join(sorted({str(r.specifier) for r in asked[name] if str(r.specifier)}))
    return set(left_out), left_out


def read_host(path: Path | None) -> dict[str, str]:
    """Names and versions in what ``pip freeze`` or ``pip list --format=freeze`` printed on the host."""
    lines = path.read_text().splitlines() if path else []
    pairs = (line.split("==", 1) for line in lines if "==" in line)
    return {canonical(name.strip()): version.strip() for name, version in pairs}


def is_elf(path: Path) -> bool:
    """Whether the file is a library or program."""
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def needed_libraries(path: Path) -> tuple[str | None, list[str]]:
    """The name of a shared library (None if it has none) and the names of those it needs."""
    text = run_quietly(tool("readelf"), "-d", "-W", path)
    names = re.findall(r"\(NEEDED\).*\[(.*)\]", text)
    own = re.search(r"\(SONAME\).*\[(.*)\]", text)
    return (own.group(1) if own else None), names


def loadable(image: bytearray) -> bool:
    """Whether the segments of a 64-bit ELF file lie where the loader takes them.

    strip moves segments of libraries that patchelf has changed to places that the loader refuses.
    """
    (table,) = struct.unpack_from("<Q", image, 32)
    size, count = struct.unpack_from("<HH", image, 54)
    for index in range(count):
        kind, _, offset, address, _, _, _, alignment = struct.unpack_from("<IIQQQQQQ", image, table + index * size)
        if kind == 1 and (offset - address) % max(alignment, 1):
            return False
    return True


def smaller(path: Path, arch: int, scratch: Path) -> tuple[bytearray | None, int]:
    """A library or program as it goes into the bundle (None: as it is), and how many bytes of GPU code were dropped."""
    if path.stat().st_size < 65536:
        return None, 0
    stripped = scratch / "stripped"
    done = subprocess.run([tool("strip"), "--strip-unneeded", "-o", str(stripped), str(path)], capture_output=True)
    image = bytearray(path.read_bytes())
    if done.returncode == 0 and stripped.stat().st_size < path.stat().st_size:
        smaller_image = bytearray(stripped.read_bytes())
        if loadable(smaller_image):
            image = smaller_image
    dropped = drop_other_architectures(image, arch)
    return image, dropped


class Selection:
    """Which files of ``site`` go into the bundle."""

    def __init__(self, site: Path, left_out: set[str], arch: int) -> None:
        self.site = site
        patterns = [*LEFT_OUT_FILES, *(BLACKWELL_FILES if arch < 100 else ())]
        self._pattern = re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns))
        self._dropped: set[str] = set()
        for distribution in importlib.metadata.distributions(path=[str(site)]):
            if canonical(distribution.metadata["Name"]) in left_out:
                self._dropped.update(os.path.normpath(str(file)) for file in distribution.files or ())

    @functools.cached_property
    def files(self) -> list[Path]:
        """The files in the order in which they are packed: similar ones side by side."""
        found = []
        for folder, _, names in os.walk(self.site):
            for name in names:
                path = Path(folder, name)
                relative = path.relative_to(self.site).as_posix()
                if relative not in self._dropped and not self._pattern.match(relative):
                    found.append(path)
        return sorted(found, key=lambda path: (path.suffix == ".py", path.suffix, path))


def wheel_glibc(site: Path) -> str:
    """The newest glibc that the tags of the installed wheels ask for, such as "2.34"."""
    newest = (2, 17)
    for path in site.glob("*.dist-info/WHEEL"):
        tags = re.findall(r"^Tag: .*-manylinux_(\d+)_(\d+)_x86_64", path.read_text(), re.MULTILINE)
        if tags:  # a wheel with several tags runs on the oldest of them
            newest = max(newest, min((int(major), int(minor)) for major, minor in tags))
    return "{}.{}".format(*newest)


def torch_cuda(site: Path) -> str | None:
    """The CUDA release that the bundled PyTorch is built for."""
    version = site / "torch" / "version.py"
    found = re.search(r"^cuda\b.*=\s*'([\d.]+)'", version.read_text(), re.MULTILINE) if version.exists() else None
    return found.group(1) if found else None


def build(args: argparse.Namespace) -> None:
    """Make the bundle that the command line asks for."""
    import zstandard

    started = time.monotonic()
    arch = round(float(args.cuda_arch) * 10)
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    for old in (output / MANIFEST, *output.glob("bundle.tar.zst.*"), *output.glob("zstandard-*.zip")):
        old.unlink(missing_ok=True)

    flags = target_flags(args)
    say("resolving")
    pins = resolve([f"sglang=={args.sglang}", *plugin_requirements(), *args.requirement], flags)
    keep = {canonical(name) for name in args.keep}
    without = {canonical(name) for name in LEFT_OUT} - keep
    without.add("sglang-sparsespec")
    names = {pin: canonical(pin.split("==")[0]) for pin in pins}
    libraries = [pin for pin, name in names.items() if HOST_LIBRARIES.match(name) and name not in keep]
    brought = [pin for pin, name in names.items() if name not in without and pin not in libraries]

    site = args.cache / f"site-{args.sglang}-{args.python}"
    shutil.rmtree(site, ignore_errors=True)
    say(f"installing {len(brought)} of {len(pins)} packages into {site}")
    install(brought, site, flags)
    run_quietly(tool("uv"), "pip", "install", *flags, "--target", site, "--no-deps", args.plugin.resolve())
    on_host, host_specifiers = host_requirements(site, read_host(args.host_packages))
    selection = Selection(site, on_host - keep, arch)

    say(f"packing {len(selection.files)} files")
    chunks = Chunks(output / "bundle.tar.zst", round(args.chunk_mb * 1e6))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        args.level, threads=args.threads, enable_ldm=True, window_log=MAX_WINDOW.bit_length() - 1
    )
    provided: set[str] = set()
    needed: dict[str, set[str]] = defaultdict(set)
    unpacked = dropped_total = 0
    shown = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.cache) as scratch:
        with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(cast(BinaryIO, chunks)) as stream:
            with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive:
                for path in selection.files:
                    relative = path.relative_to(site).as_posix()
                    if path.is_symlink():
                        archive.add(path, relative)
                        continue
                    image = None
                    if is_elf(path):
                        own, asked = needed_libraries(path)
                        provided |= {path.name, *([own] if own else [])}
                        for library in asked:
                            needed[library].add(relative)
                        image, dropped = smaller(path, arch, Path(scratch))
                        dropped_total += dropped
                    member = archive.gettarinfo(path, relative)
                    member.type, member.linkname = tarfile.REGTYPE, ""  # a hard link into uv's cache is a file of its own
                    member.size = path.stat().st_size if image is None else len(image)
                    with path.open("rb") if image is None else io.BytesIO(image) as source:
                        archive.addfile(member, source)
                    unpacked += member.size
                    if time.monotonic() - shown > 15:
                        shown = time.monotonic()
                        say(f"  {unpacked / 1e9:.1f} GB read, {len(chunks.done)} chunks")
    wheel = fetch_zstandard(output, args.python, flags)
    host_needs = {name: sorted(users) for name, users in sorted(needed.items()) if name not in provided}
    manifest = {
        "format": FORMAT,
        "sglang": args.sglang,
        "python": args.python,
        "glibc": wheel_glibc(site),
        "cuda": torch_cuda(site),
        "compute_capability": args.cuda_arch,
        "packages": {canonical(d.metadata["Name"]): d.version for d in importlib.metadata.distributions(path=[str(site)])},
        "host_packages": host_specifiers,
        "host_libraries": host_needs,
        "left_out": sorted(name for name in names.values() if name in without),
        "imports": list(IMPORTS if args.imports is None else args.imports),
        "unpacked_bytes": unpacked,
        "zstandard": wheel.name,
        "chunks": chunks.done,
    }
    for name in on_host - keep:
        manifest["packages"].pop(name, None)
    (output / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.copyfile(UNPACKER, output / "unpack.py")
    (output / "unpack.py").chmod(0o755)
    total = sum(chunk["bytes"] for chunk in chunks.done)
    say(
        f"{len(chunks.done)} chunks, {total / 1e6:.0f} MB, {unpacked / 1e6:.0f} MB unpacked, of which "
        f"{dropped_total / 1e6:.0f} MB of other GPUs' code are zeros; {time.monotonic() - started:.0f} s"
    )
    print(f"on the host: python3 {output.name}/unpack.py --target /some/site")


def fetch_zstandard(output: Path, python: str, flags: Sequence[str]) -> Path:
    """Put the module that decompresses the bundle beside it, for a host that has none; return its archive."""
    import zstandard

    version = zstandard.__version__
    archive = output / f"zstandard-{version}-cp{python.replace('.', '')}.zip"
    with tempfile.TemporaryDirectory() as target:
        where = ["--target", target, "--no-deps", "--only-binary", ":all:", "--link-mode", "copy"]
        run_quietly(tool("uv"), "pip", "install", *flags, *where, f"zstandard=={version}")
        for library in Path(target).rglob("*.so"):
            run_quietly(tool("strip"), "--strip-unneeded", library)  # a copy: uv's cache stays as it is
        shutil.make_archive(os.fspath(archive.with_suffix("")), "zip", target)
    return archive


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and build; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="make a bundle")
    make.add_argument("--sglang", required=True, metavar="VERSION")
    make.add_argument("--python", required=True, metavar="X.Y", help="the host's Python")
    make.add_argument("--cuda-arch", required=True, metavar="X.Y", help="the compute capability of the host's GPUs")
    make.add_argument("--output", required=True, type=Path, metavar="DIR")
    make.add_argument("--chunk-mb", type=float, default=60, metavar="MB", help="most megabytes (10^6 bytes) of a chunk")
    make.add_argument("--host-packages", type=Path, metavar="FILE", help="pip freeze of the host: packages not to bring")
    make.add_argument("--keep", action="append", default=[], metavar="PACKAGE", help="bring a package that is left out")
    make.add_argument("--requirement", action="append", default=[], metavar="SPEC", help="bring one more package")
    make.add_argument("--plugin", type=Path, default=REPO, metavar="PATH", help="source tree or wheel of the plugin")
    make.add_argument("--wheels", type=Path, metavar="DIR", help="take wheels from this folder, not from an index")
    make.add_argument("--import", dest="imports", action="append", metavar="MODULE", help="what the unpacker tries")
    make.add_argument("--platform", default="x86_64-manylinux_2_34", help="the host's platform, as uv names it")
    make.add_argument("--level", type=int, default=10, help="of Zstandard; 19 is smaller and ten times slower")
    make.add_argument("--threads", type=int, default=2)
    make.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "sglang-sparsespec" / "bundle", metavar="DIR")
    args = parser.parse_args(arguments)
    missing = [name for name in ("zstandard", "packaging") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"missing: pip install {' '.join(missing)}")
    args.cache.mkdir(parents=True, exist_ok=True)
    try:
        build(args)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
