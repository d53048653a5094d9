"""scripts/offline_bundle and the unpacker it leaves beside the chunks, with small wheels made here and no network."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import offline_bundle
import offline_unpack
import pytest
import zstandard

PYTHON = "{}.{}".format(*sys.version_info[:2])
CHUNK = 100_000
NOISE = os.urandom(350_000)

needs_uv = pytest.mark.skipif(
    shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}") is None,
    reason="needs uv",
)


def make_wheel(folder: Path, name: str, version: str, files: dict[str, bytes | str], requires: tuple[str, ...] = ()) -> None:
    """Write a wheel for any platform."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {line}\n" for line in requires)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", f"[console_scripts]\n{name}-main = {name}:main\n")
        lines = [f"{path},," for path in [*files, f"{info}/METADATA", f"{info}/WHEEL", f"{info}/entry_points.txt"]]
        archive.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a made-up SGLang, its plugin, and a package that the host has."""
    wheels = tmp_path_factory.mktemp("wheels")
    program = Path(shutil.which("bash") or "/bin/sh").read_bytes()
    files: dict[str, bytes | str] = {
        "sglang/__init__.py": "def main():\n    print('served')\n",
        "sglang/noise.bin": NOISE,
        "sglang/zeros.bin": bytes(3 << 20),
        "sglang/program.so": program,
        "sglang/test/test_all.py": "",
    }
    requires = ("numba", "hostpackage>=2", "nvidia-cublas==13.0", "nvidia-nccl-cu13==2.30.7")
    make_wheel(wheels, "sglang", "0.5.23", files, requires)
    make_wheel(wheels, "numba", "1.0", {"numba/__init__.py": ""})
    make_wheel(wheels, "hostpackage", "2.1", {"hostpackage/__init__.py": ""})
    make_wheel(wheels, "nvidia_cublas", "13.0", {"nvidia/cu13/lib/libcublas.so.13": ""})
    make_wheel(wheels, "nvidia_nccl_cu13", "2.30.7", {"nvidia/nccl/lib/libnccl.so.2": ""})
    make_wheel(wheels, "sglang_sparsespec", "0.1.0", {"sglang_sparsespec/__init__.py": ""})
    make_wheel(wheels, "zstandard", zstandard.__version__, {"zstandard/__init__.py": "CARRIED = True\n"})
    for requirement in offline_bundle.plugin_requirements():
        make_wheel(wheels, requirement, "1.0", {f"{requirement}/__init__.py": ""})
    scratch = tmp_path_factory.mktemp("bundle")
    (scratch / "freeze.txt").write_text("hostpackage==2.0\nsglang==0.0\n")
    output = scratch / "out"
    command = ["build", "--sglang", "0.5.23", "--python", PYTHON, "--cuda-arch", "9.0", "--output", str(output)]
    command += ["--chunk-mb", str(CHUNK / 1e6), "--cache", str(scratch), "--level", "1", "--import", "sglang"]
    command += ["--plugin", str(wheels / "sglang_sparsespec-0.1.0-py3-none-any.whl")]
    command += ["--host-packages", str(scratch / "freeze.txt")]
    command += ["--wheels", str(wheels)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UV_CACHE_DIR", str(scratch / "uv"))
        assert offline_bundle.main(command) == 0
    return output


def changed(bundle: Path, folder: Path, **fields: object) -> Path:
    """A copy of the bundle with another manifest."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((bundle / offline_unpack.MANIFEST).read_text()) | fields
    (folder / offline_unpack.MANIFEST).write_text(json.dumps(manifest))
    return folder


def unpack(bundle: Path, target: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(bundle / "unpack.py"), "--target", str(target), *flags]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})


def lines_of(done: subprocess.CompletedProcess[str], prefix: str) -> list[str]:
    return [line.removeprefix(prefix) for line in (done.stdout + done.stderr).splitlines() if line.startswith(prefix)]


@needs_uv
def test_chunks_are_no_larger_than_asked_and_hold_what_the_manifest_says(bundle):
    manifest = json.loads((bundle / offline_unpack.MANIFEST).read_text())
    files = sorted(bundle.glob("bundle.tar.zst.*"))
    assert [chunk["name"] for chunk in manifest["chunks"]] == [file.name for file in files]
    assert len(files) > 3
    assert {file.stat().st_size for file in files[:-1]} == {CHUNK} and files[-1].stat().st_size <= CHUNK
    assert manifest["packages"].keys() >= {"sglang", "sglang-sparsespec", "nvidia-nccl-cu13"}
    assert not manifest["packages"].keys() & {"numba", "nvidia-cublas", "hostpackage"}
    assert manifest["left_out"] == ["numba"]
    assert manifest["host_packages"] == {"hostpackage": ">=2"}
    assert "libc.so.6" in manifest["host_libraries"]


@needs_uv
def test_the_target_holds_the_packages_and_runs_them(bundle, tmp_path):
    manifest = json.loads((bundle / offline_unpack.MANIFEST).read_text())
    source = changed(bundle, tmp_path / "in", host_packages={"pytest": ">=1"})
    done = unpack(source, tmp_path / "site")
    assert done.returncode == 0, done
    site = tmp_path / "site" / "lib" / f"python{PYTHON}" / "site-packages"
    assert (site / "sglang/noise.bin").read_bytes() == NOISE
    assert (site / "sglang/zeros.bin").read_bytes() == bytes(3 << 20)
    assert (site / "sglang/zeros.bin").stat().st_blocks * 512 < 1 << 20
    assert (site / "nvidia/nccl/lib/libnccl.so.2").exists()
    for absent in ("sglang/test", "numba", "hostpackage", "bin"):
        assert not (site / absent).exists()
    program = site / "sglang/program.so"
    program.chmod(0o755)
    assert subprocess.run([program, "-c", "echo runs"], capture_output=True, text=True).stdout == "runs\n"
    shell = f". {tmp_path}/site/activate && sglang-main && python3 -c 'import sys, pytest; print(sys.prefix)'"
    ran = subprocess.run(["sh", "-eu", "-c", shell], capture_output=True, text=True)
    assert ran.stdout.split() == ["served", str(tmp_path / "site")], ran
    assert manifest["unpacked_bytes"] >= len(NOISE) + (3 << 20)
    assert "is not empty" in unpack(source, tmp_path / "site").stderr


@needs_uv
def test_following_waits_for_chunks_that_are_still_being_written(bundle, tmp_path):
    names = sorted(path.name for path in bundle.glob("bundle.tar.zst.*"))
    source = changed(bundle, tmp_path / "in", host_packages={})
    for name in names:
        (source / name).unlink()
    command = [sys.executable, str(source / "unpack.py"), "--target", str(tmp_path / "site"), "--follow", "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for name in names:
        data = (bundle / name).read_bytes()
        with (source / name).open("wb") as file:
            file.write(data[:1000])
            file.flush()
            time.sleep(0.01)
            assert process.poll() is None
            file.write(data[1000:])
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    site = tmp_path / "site" / "lib" / f"python{PYTHON}" / "site-packages"
    assert (site / "sglang/noise.bin").read_bytes() == NOISE


@needs_uv
@pytest.mark.parametrize("harm", ["cut", "changed", "lost"])
def test_a_damaged_chunk_is_named(bundle, tmp_path, harm):
    source = changed(bundle, tmp_path / "in")
    chunk = source / "bundle.tar.zst.001"
    data = bytearray(chunk.read_bytes())
    if harm == "lost":
        chunk.unlink()
    elif harm == "cut":
        chunk.write_bytes(data[:-1])
    else:
        data[5000] ^= 1
        chunk.write_bytes(data)
    done = unpack(source, tmp_path / "site")
    assert done.returncode == 1
    (line,) = lines_of(done, "error: ")
    assert str(chunk) in line
    assert {"cut": "bytes instead of", "changed": "SHA-256", "lost": "not there"}[harm] in line


@needs_uv
def test_a_host_that_cannot_use_the_bundle_is_told_why_in_one_line_each(bundle, tmp_path):
    source = changed(bundle, tmp_path / "in", python="3.99", glibc="9.0", unpacked_bytes=10**18)
    done = unpack(source, tmp_path / "site")
    assert done.returncode == 1
    python, glibc, disk = lines_of(done, "error: ")
    assert "3.99" in python and "9.0" in glibc and "GB free" in disk
    assert not (tmp_path / "site").exists()


@needs_uv
def test_what_the_host_lacks_is_said_in_one_line_each(bundle, tmp_path):
    source = changed(
        bundle,
        tmp_path / "in",
        host_packages={"hostpackage": ">=2", "pytest": ">=999"},
        host_libraries={"libc.so.6": ["a.so"], "libnowhere.so.7": ["torch/a.so", "torch/b.so"]},
        imports=["sglang", "sglang.nowhere"],
    )
    done = unpack(source, tmp_path / "site")
    assert done.returncode == 2
    assert lines_of(done, "missing: ") == [
        "package hostpackage>=2 of the host",
        f"package pytest>=999 of the host (it has {pytest.__version__})",
        "library libnowhere.so.7, which torch/a.so and 1 more needs",
        "import sglang.nowhere: ModuleNotFoundError: No module named 'sglang.nowhere'",
    ]


@needs_uv
def test_the_bundle_carries_a_decompressor_for_hosts_without_one(bundle, tmp_path):
    manifest = json.loads((bundle / offline_unpack.MANIFEST).read_text())
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import unpack, json\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "manifest = json.loads((folder / 'manifest.json').read_text())\n"
        "print(unpack.decompressor(folder, manifest, pathlib.Path(sys.argv[2])).CARRIED)\n"
    )
    # -S: without site-packages there is no zstandard.
    done = subprocess.run([sys.executable, "-S", "-E", "-c", code, bundle, tmp_path], capture_output=True, text=True)
    assert done.stdout == "True\n", done
    assert (bundle / manifest["zstandard"]).exists()


def test_the_nvidia_folders_of_the_host_are_linked_beside_the_bundles_own(tmp_path, monkeypatch):
    host, site = tmp_path / "host", tmp_path / "site"
    for part in ("cu13", "cudnn", "nccl"):
        (host / "nvidia" / part / "lib").mkdir(parents=True)
    (site / "nvidia" / "nccl").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(host)])
    assert offline_unpack.link_nvidia(site) == ["cu13", "cudnn"]
    assert (site / "nvidia/cu13").resolve() == host / "nvidia/cu13"
    assert not (site / "nvidia/nccl").is_symlink()


def fat_binary(*entries: tuple[int, int, bytes]) -> bytes:
    """A fat binary of (kind, architecture, code)."""
    body = b""
    for kind, arch, code in entries:
        header = bytearray(64)
        struct.pack_into("<HHIQ", header, 0, kind, 0x101, 64, len(code))
        struct.pack_into("<I", header, 28, arch)
        body += bytes(header) + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_gpu_code_of_other_architectures_becomes_zeros_and_nothing_else_changes():
    other, own, ptx = b"other" * 8, b"own" * 8, b"ptx" * 8
    both = fat_binary((2, 80, other), (2, 90, own), (2, 90, own), (1, 120, ptx), (64, 80, other))
    kept = fat_binary((2, 90, own), (2, 90, own), (64, 80, other))
    only_ptx = fat_binary((2, 80, other), (1, 80, ptx))
    magic = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 40) + b"no entries here, but a constant of a program"
    image = bytearray(b"head" + both + only_ptx + magic + b"tail")
    assert offline_bundle.drop_other_architectures(image, 90) == len(both) - len(kept)
    assert bytes(image) == b"head" + kept.ljust(len(both), b"\0") + only_ptx + magic + b"tail"
    assert offline_bundle.drop_other_architectures(image, 90) == 0


def test_a_library_whose_segments_strip_has_moved_is_not_taken():
    image = bytearray(64 + 56)
    struct.pack_into("<Q", image, 32, 64)
    struct.pack_into("<HH", image, 54, 56, 1)
    for offset, good in ((0x2000, True), (0x2008, False)):
        struct.pack_into("<IIQQQQQQ", image, 64, 1, 5, offset, 0x5000, 0, 0, 0, 0x1000)
        assert offline_bundle.loadable(image) is good
