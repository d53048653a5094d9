"""The KV manager on a GPU: what a scheduler leaves behind that is killed while KV is copied to pinned host memory."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests
import torch
from quickstart import Server, choose_port, server_environment
from run_tests import MODEL_VARIABLE
from server_client import Client

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: test_kv_manager.py kills a server on the CPU"),
    pytest.mark.skipif(MODEL_VARIABLE not in os.environ, reason=f"set {MODEL_VARIABLE} to a checkpoint folder"),
]

GIB = 1 << 30
#: Large, so that it is found if it is left behind, whatever other programs take meanwhile.
HOST_GB = 16
HOST_SLACK = HOST_GB * GIB // 2
GPU_SLACK = GIB
KV_TOKENS = 30_000
NEW_TOKENS = 2_000
FLAGS = {
    "dtype": "bfloat16",
    "skip_tokenizer_init": True,
    "attention_backend": "triton",
    "cuda_graph_bs_decode": [1, 8, 16],
    "cuda_graph_backend_prefill": "disabled",
    "max_total_tokens": KV_TOKENS,
    "max_running_requests": 16,
    "speculative_algorithm": "SPARSESPEC",
    "sparsespec_speculate": "always",
    "sparsespec_host_kv_gb": HOST_GB,
}


@contextmanager
def start(log: Path, **environment: str) -> Iterator[tuple[Server, Client]]:
    port = choose_port(0)
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", os.environ[MODEL_VARIABLE], "--port", str(port)]
    for name, value in FLAGS.items():
        command.append(f"--{name.replace('_', '-')}")
        if value is not True:
            command += map(str, value if isinstance(value, list) else [value])
    with Server(command, port, log, {**server_environment(True), **environment}) as server:
        server.wait_until_ready(300)
        yield server, Client(port)


def ask(client: Client, count: int = 16) -> list[int]:
    """Requests that need twice the KV pool; lengths of the outputs."""
    rng = random.Random(0)
    prompts = [[rng.randrange(1000, 20000) for _ in range(rng.randrange(1000, 3000))] for _ in range(count)]
    answers = client.generate_all([{"prompt": prompt, "max_new_tokens": NEW_TOKENS} for prompt in prompts])
    return [len(answer["output_ids"]) for answer in answers]


def free_gpu_memory() -> int:
    return torch.cuda.mem_get_info()[0]


def free_host_memory() -> int:
    return psutil.virtual_memory().available


def test_a_kill_in_mid_transfer_leaves_no_memory_behind_and_a_new_server_works(tmp_path: Path) -> None:
    gpu_before, host_before = free_gpu_memory(), free_host_memory()
    with start(tmp_path / "killed.log", SPARSESPEC_TEST_OFFLOAD_INTERVAL="2") as (server, client):
        # Or the comparison below could not find anything.
        assert free_host_memory() < host_before - HOST_SLACK
        thread = threading.Thread(target=lambda: swallow(client))
        thread.start()
        copied = kill_while_bytes_move(server, client)
        thread.join(timeout=60)
        assert not thread.is_alive()
    print(f"killed after {copied[0]} bytes to the host and {copied[1]} back")
    wait_until(lambda: free_gpu_memory() > gpu_before - GPU_SLACK, "the GPU's memory is back")
    wait_until(lambda: free_host_memory() > host_before - HOST_SLACK, "the pinned memory is back")
    with start(tmp_path / "next.log") as (server, client):
        assert ask(client) == [NEW_TOKENS] * 16
        state = client.state()
        assert state["sparsespec_kv_requests_restored"] > 0 and state["sparsespec_kv_tokens_recomputed"] == 0
        client.assert_pool_empties()
        state = client.state()
        assert state["host_kv_tokens_free"] == state["host_kv_tokens_total"]
        server.check_alive()


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.5)


def swallow(client: Client) -> None:
    """Requests that the kill cuts off."""
    with contextlib.suppress(requests.RequestException, AssertionError):
        ask(client)


def kill_while_bytes_move(server: Server, client: Client) -> tuple[int, int]:
    """SIGKILL the scheduler while requests are on the way in both directions; bytes copied until then, each way."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    (scheduler,) = [child for child in children if "scheduler" in "".join(child.cmdline())]
    deadline = time.monotonic() + 60
    before = (0, 0)
    while True:
        state = client.state()
        copied = (state["sparsespec_kv_bytes_to_host"], state["sparsespec_kv_bytes_from_host"])
        # Both grew since the last look, a few milliseconds ago: copies follow one another without a pause.
        if before[0] and all(now > then for now, then in zip(copied, before, strict=True)):
            break
        before = copied
        assert time.monotonic() < deadline, f"copied so far: {copied}"
    scheduler.kill()
    server.stop()
    return copied
