"""What SGLang assumes of a speculative algorithm and SPARSESPEC does not share: draft pool, start, inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.runtime_context import get_server_args, get_spec

from sglang_sparsespec.algorithm import SparseSpecAlgorithm
from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import is_sparsespec
from sglang_sparsespec.spec_input import SparseSpecVerifyInput
from sglang_sparsespec.start_checks import check_relay, check_row_width
from sglang_sparsespec.worker import SparseSpecWorker


def no_draft_kv_pool(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``kv_cache_builder.get_draft_kv_pool``: SGLang reads the draft worker's own KV pool.

    It is called at every start and dereferences ``draft_worker.draft_worker``. SPARSESPEC has
    none: drafts write into the target's pool, which HiCache already knows.
    """
    if isinstance(kwargs.get("spec_algorithm"), SparseSpecAlgorithm):
        return None
    return original(*args, **kwargs)


def no_kv_move_kernel(original: Callable[..., Any], pool: Any) -> None:
    """``MHATokenToKVPool._init_kv_copy_and_warmup``: SGLang prepares moving accepted KV.

    Tree drafts leave their accepted tokens scattered; a chain's are in place already, so
    nothing is ever moved. The warm-up is a Triton kernel, which does not exist on CPU.
    """
    if is_sparsespec(get_server_args()):
        pool._kv_copy_config = None
        return
    original(pool)


def dummy_verify_input(result: Any, spec_algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """``spec_info.create_dummy_verify_input``: SGLang returns None for unknown algorithms.

    The warm-up forward of the runners needs a verify input of our window.
    """
    if not isinstance(spec_algorithm, SparseSpecAlgorithm):
        return None  # None keeps the original result
    return SparseSpecVerifyInput.for_capture(get_spec().speculative_num_draft_tokens)


def verify_graph_spec_info(result: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """``DecodeCudaGraphRunner.get_spec_info``: SGLang captures unknown algorithms without one.

    The verify graph is captured with our verify input, so that replays are told apart from
    one-token batches by their width.
    """
    if not isinstance(runner.model_runner.spec_algorithm, SparseSpecAlgorithm):
        return None  # None keeps the original result
    return SparseSpecVerifyInput.for_capture(runner.captured_req_width)


def time_rounds(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """``Scheduler.init_model_worker``: SGLang may give the KV pool its final size after its workers have captured.

    Only then are there slots to time rounds in, and SGLang tells the workers nothing.
    """
    worker = scheduler.draft_worker
    if isinstance(worker, SparseSpecWorker):
        check_row_width(worker.model_runner)
        check_relay(worker.model_runner)
        worker.measure_rounds()


def register_hooks() -> None:
    """Register the hooks of this module."""
    add_hook("sglang.srt.mem_cache.kv_cache_builder.get_draft_kv_pool", no_draft_kv_pool, "around")
    add_hook(
        "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup", no_kv_move_kernel, "around"
    )
    add_hook("sglang.srt.speculative.spec_info.create_dummy_verify_input", dummy_verify_input, "after")
    add_hook(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.get_spec_info",
        verify_graph_spec_info,
        "after",
    )
    add_hook("sglang.srt.managers.scheduler.Scheduler.init_model_worker", time_rounds, "after")
