"""Greedy outputs under SPARSESPEC equal plain SGLang's, token for token (float32, CPU).

A small part of what ``benchmarks/parity.py`` runs in full; its results are kept under ``benchmarks/results/``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parent.parent
PROGRAM = REPO / "benchmarks" / "parity.py"
SIZE = ["--short", "6", "--problems", "5", "--long", "1", "--long-chars", "2600", "--max-new-tokens", "48"]

#: Schedule, k, concurrency, radix cache, overlap scheduling, chunked prefill size (0: SGLang's default).
CONFIGURATIONS = [
    ("lockstep", 8, 16, "on", "on", 64),
    ("lockstep", 1, 1, "off", "off", 0),
    ("unified", 8, 5, "on", "on", 64),
]


def run(model_path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *arguments, "--model-path", model_path, *SIZE]
    command += ["--max-total-tokens", "12000"]
    return subprocess.run(command, capture_output=True, text=True, timeout=800)


@pytest.fixture(scope="module")
def baseline(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity") / "plain.json"
    done = run(model_path, "baseline", "--output", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.mark.parametrize(("schedule", "k", "concurrency", "radix", "overlap", "chunk"), CONFIGURATIONS)
def test_every_token_is_plain_sglangs(
    model_path: str,
    baseline: Path,
    schedule: str,
    k: int,
    concurrency: int,
    radix: str,
    overlap: str,
    chunk: int,
) -> None:
    # One by one takes longest: half of the prompts then, the long one among them.
    shards, prompts = ("1/2", 6) if concurrency == 1 else ("0/1", 12)
    done = run(
        model_path, "compare", "--shard", shards, "--baseline", str(baseline), "--schedule", schedule, "--k", str(k),
        "--concurrency", str(concurrency), "--radix", radix, "--overlap", overlap, "--chunked-prefill-size", str(chunk),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    record = json.loads(done.stdout.strip().splitlines()[-1])
    assert record["equal_prompts"] == record["prompts"] == prompts
    # Drafts were made and accepted: this is not plain decoding.
    assert record["accept_length"] > 1.2
    assert record["kv_read_share"] < 1


def test_a_single_wrong_token_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    from parity import first_difference, margin_at

    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2
    row = {"output_ids": [5, 7], "top_logprobs": [[[-0.1, 5, None]], [[-0.5, 7, None], [-0.75, 8, None]]]}
    assert margin_at(row, 1, 8) == pytest.approx(0.25)
    assert margin_at(row, 1, 9) is None
