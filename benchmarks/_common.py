"""What the benchmarks share: a stamp of where numbers came from, timing on the GPU, JSON lines, Markdown tables."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

REPO = Path(__file__).resolve().parent.parent
VERSIONED = ("torch", "triton", "flashinfer-python", "sglang", "sglang-kernel", "sglang-sparsespec")
L2_FLUSH_BYTES = 256 << 20


def say(message: str) -> None:
    """Print one progress line at once, on stderr so that stdout keeps the results."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------- stamp


def commit() -> str:
    """The commit of this checkout, with ``+changes`` if files differ; ``SPARSESPEC_COMMIT`` where git is missing."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(REPO), *args], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("SPARSESPEC_COMMIT", "unknown")


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that a measurement depends on."""
    found = {}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def gpu_slug(name: str) -> str:
    """Short name of a GPU for file names: ``NVIDIA H100 80GB HBM3`` is ``h100``."""
    match = re.search(r"\b([A-Z]{1,3}\d{2,4}[A-Z]?)\b", name)
    return (match.group(1) if match else re.sub(r"\W+", "-", name)).lower()


def utc_now() -> str:
    """The time, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def stamp() -> dict[str, Any]:
    """Device, versions, commit, date and command line, as a JSON-ready dict."""
    import torch

    info: dict[str, Any] = {
        "date": utc_now(),
        "commit": commit(),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": package_versions(),
        "cpu_count": os.cpu_count(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        info["gpu"] = {
            "name": properties.name,
            "count_visible": torch.cuda.device_count(),
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mb": round(getattr(properties, "L2_cache_size", 0) / 1e6, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": driver_version(),
        }
    return info


def driver_version() -> str:
    """The NVIDIA driver's version, or ``unknown``."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


# --------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Timing:
    """Times of one call, in milliseconds.

    Attributes:
        ms: median over the repetitions.
        low, high: 10th and 90th percentile.
        repetitions: how often the group of calls was timed.
        calls: calls per timed group; the times are per call.
        method: ``graph`` (CUDA graph replay), ``events`` (eager launches between events), or ``wall`` (host clock,
            no GPU).
    """

    ms: float
    low: float
    high: float
    repetitions: int
    calls: int
    method: str

    def row(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def summarize(times_ms: Sequence[float], calls: int, method: str) -> Timing:
    """Median and percentiles of the group times ``times_ms``, per call."""
    if not times_ms:
        raise ValueError("no repetitions were timed")
    ordered = sorted(t / calls for t in times_ms)
    last = len(ordered) - 1
    return Timing(
        ms=statistics.median(ordered),
        low=ordered[math.floor(0.1 * last)],
        high=ordered[math.ceil(0.9 * last)],
        repetitions=len(ordered),
        calls=calls,
        method=method,
    )


class Timer:
    """Times groups of calls on the current GPU, with the L2 cache flushed before each repetition.

    A group should walk through more data than the L2 holds, or its later calls measure the cache.

    Args:
        budget_s: time to spend on the repetitions of one group.
        min_repetitions, max_repetitions: bounds on them, whatever the budget says.
    """

    def __init__(self, budget_s: float = 0.06, min_repetitions: int = 5, max_repetitions: int = 40) -> None:
        self.budget_s = budget_s
        self.min_repetitions = min_repetitions
        self.max_repetitions = max_repetitions
        self._flush: Any = None

    def _repeat(self, launch: Callable[[], Any], estimate_ms: float) -> list[float]:
        import torch

        if self._flush is None:
            self._flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        wanted = int(self.budget_s * 1e3 / max(estimate_ms, 1e-3))
        repetitions = max(self.min_repetitions, min(self.max_repetitions, wanted))
        events = []
        for _ in range(repetitions):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            begin.record()
            launch()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    def events(self, calls: Sequence[Callable[[], Any]]) -> Timing:
        """Launch ``calls`` one after another between two events."""
        import torch

        def launch() -> None:
            for call in calls:
                call()

        launch()  # compiles, allocates
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        launch()
        end.record()
        torch.cuda.synchronize()
        return summarize(self._repeat(launch, begin.elapsed_time(end)), len(calls), "events")

    def graph(self, calls: Sequence[Callable[[], Any]], least_ms: float = 1.0, most_calls: int = 64) -> Timing:
        """Capture ``calls`` (repeated until they take about ``least_ms``) in one CUDA graph and time its replays."""
        import torch

        for call in calls:
            call()
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        once_ms = max(begin.elapsed_time(end), 1e-3)
        times = max(1, min(math.ceil(least_ms / once_ms), most_calls // len(calls)))
        group = [call for _ in range(times) for call in calls]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in group:
                call()
        graph.replay()
        torch.cuda.synchronize()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        timing = summarize(self._repeat(graph.replay, begin.elapsed_time(end)), len(group), "graph")
        del graph
        return timing

    def wall(self, calls: Sequence[Callable[[], Any]]) -> Timing:
        """One run on the host clock: for runs without a GPU, whose times mean nothing."""
        begin = time.perf_counter()
        for call in calls:
            call()
        return summarize([(time.perf_counter() - begin) * 1e3], len(calls), "wall")


def copy_bandwidth(timer: Timer, bytes_each: int) -> tuple[float, Timing]:
    """Device-to-device copy of ``bytes_each``: (bytes read plus written per second, its timing)."""
    import torch

    source = torch.empty(bytes_each // 2, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    timing = timer.events([lambda: target.copy_(source)])
    return 2 * bytes_each / (timing.ms * 1e-3), timing


def matrix_rate(timer: Timer, size: int = 8192) -> tuple[float, Timing]:
    """bf16 product of two random ``size`` x ``size`` matrices: (floating-point operations per second, timing)."""
    import torch

    a = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
    b = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(a)
    timing = timer.events([lambda: torch.matmul(a, b, out=out)])
    return 2 * size**3 / (timing.ms * 1e-3), timing


# --------------------------------------------------------------------- output


class JsonLines:
    """Results as JSON lines, each on disk as soon as it is written."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: TextIO = path.open("w")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record and flush it."""
        self._file.write(json.dumps(clean(record)) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def append_json_line(path: str | Path | None, record: dict[str, Any]) -> str:
    """``record`` as one JSON line, appended to ``path`` if there is one."""
    line = json.dumps(record)
    if path:
        with open(path, "a") as file:
            file.write(line + "\n")
    return line


def clean(value: Any) -> Any:
    """``value`` with NaN and infinities as None, which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    return value


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int] = ()) -> str:
    """A Markdown table with padded columns; the columns ``right`` are set flush right.

    None is shown as a dash; floats with three significant digits.

    Raises:
        ValueError: a row's length differs from the header's.
    """
    text = [[str(h) for h in headers]]
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(headers)} columns: {row}")
        text.append([format_cell(cell) for cell in row])
    widths = [max(3, *(len(line[i]) for line in text)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (w - 1) + ":" if i in right else "-" * w for i, w in enumerate(widths)]
    return "\n".join([line(text[0]), line(rule), *(line(cells) for cells in text[1:])])


def format_cell(value: Any) -> str:
    """One table cell as text."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "-"
        if value == 0:
            return "0"
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:.{min(digits, 6)}f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def write_reports(folder: Path, name: str, report: dict[str, Any], text: str) -> tuple[Path, Path]:
    """Write ``name``.json and ``name``.md under ``folder``; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    json_path, md_path = folder / f"{name}.json", folder / f"{name}.md"
    json_path.write_text(json.dumps(clean(report), indent=1) + "\n")
    md_path.write_text(text.rstrip() + "\n")
    return json_path, md_path
