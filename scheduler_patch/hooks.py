"""The hooks, named, with the SGLang behaviour each one changes and why.

SGLang logs a hook that cannot be applied and goes on (``HookRegistry.apply_hooks``);
:func:`assert_hooks_applied` turns that into an error where SPARSESPEC is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from sglang_sparsespec import ALGORITHM, ATTENTION_BACKEND

logger = logging.getLogger(__name__)

#: Request parameters whose effect on a token depends on the tokens just before it, with the
#: value that turns them off.
INEXACT_SAMPLING_PARAMS = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
}

_TARGETS: list[str] = []


def add_hook(target: str, hook: Callable[..., Any], kind: str) -> None:
    """Register ``hook`` on the dotted path ``target`` and remember it for the self-check.

    Args:
        target: module path, class and attribute, as ``HookRegistry.register`` wants it.
        hook: see ``HookRegistry.register`` for its signature by kind.
        kind: ``before``, ``after``, ``around`` or ``replace``.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(target, hook, HookType(kind))
    _TARGETS.append(target)


def assert_hooks_applied() -> None:
    """Raise ``RuntimeError`` if a hook of this plugin is not in force in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [target for target in _TARGETS if target not in HookRegistry._patched]
    if not _TARGETS or missing:
        raise RuntimeError(
            f"sglang-sparsespec is only partly loaded (hooks not applied: {missing or 'all'}); "
            "see the plugin errors logged above, and reinstall sglang==0.5.17 if its files were changed."
        )


def _is_sparsespec(spec_algorithm: Any) -> bool:
    from sglang_sparsespec.algorithm import SparseSpecAlgorithm

    return isinstance(spec_algorithm, SparseSpecAlgorithm)


def no_draft_kv_pool(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``kv_cache_builder.get_draft_kv_pool``: SGLang reads the draft worker's own KV pool.

    Called at every start and dereferences ``draft_worker.draft_worker``. SPARSESPEC has
    none: drafts write into the target's pool, which HiCache already knows.
    """
    if _is_sparsespec(kwargs.get("spec_algorithm")):
        return None
    return original(*args, **kwargs)


def no_kv_move_kernel(original: Callable[..., Any], pool: Any) -> None:
    """``MHATokenToKVPool._init_kv_copy_and_warmup``: SGLang prepares moving accepted KV.

    Tree drafts leave their accepted tokens scattered; a chain's are in place already, so
    nothing is ever moved. The warm-up is a Triton kernel, which does not exist on CPU.
    """
    from sglang.srt.runtime_context import get_server_args

    if str(get_server_args().speculative_algorithm).upper() == ALGORITHM:
        pool._kv_copy_config = None
        return
    original(pool)


def reserve_for_staggered_rounds(result: int, server_args: Any = None, *args: Any, **kwargs: Any) -> int | None:
    """``allocation_sizing.get_alloc_reserve_per_decode``: SGLang reserves 2W slots per request.

    They are counted from the committed length C that the CPU knows, which under overlap scheduling
    lacks the tokens of the round in flight, at most W: on the device the length is L <= C + W. A
    lock-step round writes the window [L, L + W), so 2W are enough. A staggered round drafts on after
    its verification: from L' <= L + W it writes up to k drafts' inputs, [L', L' + k). The last
    position is C + 2W + k - 1, so C + 3W - 1 is the end: 3W covers it.
    """
    from sglang.srt.runtime_context import get_server_args

    from sglang_sparsespec.config import get_config

    server_args = server_args if server_args is not None else get_server_args()
    if str(server_args.speculative_algorithm).upper() != ALGORITHM or get_config(server_args).schedule != "unified":
        return None  # None keeps the original result
    return result // 2 * 3


def row_room_for_reserve(result: int, server_args: Any = None, *args: Any, **kwargs: Any) -> int | None:
    """``allocation_sizing.get_req_to_token_extra_context_len``: SGLang widens rows by W + 4 tokens.

    A decoding request is given slots for up to 2W tokens past its committed ones (3W in staggered
    rounds, see above). At page size 1 SGLang does not count that in; with W above 4, a request near
    the context limit would write its slots into the row of another.
    """
    if server_args is None or str(server_args.speculative_algorithm).upper() != ALGORITHM:
        return None  # None keeps the original result
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode

    return max(result, get_alloc_reserve_per_decode(server_args))


def _serving_sparsespec_on_cpu() -> bool:
    from sglang.srt.runtime_context import get_server_args

    args = get_server_args()
    return args is not None and args.device == "cpu" and str(args.speculative_algorithm).upper() == ALGORITHM


def no_triton_on_cpu(result: bool, backend: str) -> bool | None:
    """``utils.common.support_triton``: SGLang knows CPU backends by name.

    It launches Triton kernels for any other name; ours runs on CPU too.
    """
    if backend == ATTENTION_BACKEND and _serving_sparsespec_on_cpu():
        return False
    return None


def assign_slots_on_cpu(
    original: Callable[..., None],
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """``allocation.assign_req_to_token_pool_func``: SGLang writes a round's slots by Triton or AMX.

    On other CPUs neither exists; the same ragged copy in torch.
    """
    if not _serving_sparsespec_on_cpu():
        return original(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, batch_size)
    taken = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start].to(req_to_token.dtype)
        taken += end - start
    return None


def dummy_verify_input(result: Any, spec_algorithm: Any, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """``spec_info.create_dummy_verify_input``: SGLang returns None for unknown algorithms.

    The warm-up forward of the runners needs a verify input of our window.
    """
    if not _is_sparsespec(spec_algorithm):
        return None  # None keeps the original result
    from sglang_sparsespec.spec_input import SparseSpecVerifyInput

    return SparseSpecVerifyInput.for_capture(server_args.speculative_num_draft_tokens)


def verify_graph_spec_info(result: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """``DecodeCudaGraphRunner.get_spec_info``: SGLang captures unknown algorithms without one.

    The verify graph is captured with our verify input, so that replays are told apart from
    one-token batches by their width.
    """
    if not _is_sparsespec(runner.model_runner.spec_algorithm):
        return None
    from sglang_sparsespec.spec_input import SparseSpecVerifyInput

    return SparseSpecVerifyInput.for_capture(runner.captured_req_width)


def refuse_inexact_request(result: Any, tokenizer_manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """``TokenizerManager._validate_one_request``: SGLang approximates penalties under speculation.

    It adds the penalties known before a round to all positions of the round, which changes
    the output distribution (``eagle_sample``: "a relaxed version of penalties"). SPARSESPEC
    answers such a request with an error (HTTP 400) instead.
    """
    if str(tokenizer_manager.server_args.speculative_algorithm).upper() != ALGORITHM:
        return
    # SGLang merges the server's preferred parameters into the request's after this check.
    params = {**(tokenizer_manager.preferred_sampling_params or {}), **(obj.sampling_params or {})}
    for name, neutral in INEXACT_SAMPLING_PARAMS.items():
        value = params.get(name, neutral)
        if value is not None and value != neutral:
            raise ValueError(
                f"Sampling parameter {name}={value} is not supported with --speculative-algorithm "
                f"{ALGORITHM}: it depends on the tokens of the same round; leave it at {neutral}, or use a "
                "server without speculation. (If the request did not set it, the model's "
                "generation_config.json did: start the server with --sampling-defaults openai.)"
            )
    if getattr(obj, "custom_logit_processor", None):
        raise ValueError(
            f"custom_logit_processor is not supported with --speculative-algorithm {ALGORITHM}: it is not "
            "applied while verifying; remove it, or use a server without speculation."
        )


def register_hooks() -> None:
    """Register all hooks of this module."""
    from sglang_sparsespec.cpu_bridge import install_cpu_bridge_if_asked

    install_cpu_bridge_if_asked()
    add_hook("sglang.srt.mem_cache.kv_cache_builder.get_draft_kv_pool", no_draft_kv_pool, "around")
    add_hook(
        "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup",
        no_kv_move_kernel,
        "around",
    )
    add_hook(
        "sglang.srt.mem_cache.allocation_sizing.get_alloc_reserve_per_decode",
        reserve_for_staggered_rounds,
        "after",
    )
    add_hook(
        "sglang.srt.mem_cache.allocation_sizing.get_req_to_token_extra_context_len",
        row_room_for_reserve,
        "after",
    )
    add_hook("sglang.srt.utils.common.support_triton", no_triton_on_cpu, "after")
    add_hook("sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func", assign_slots_on_cpu, "around")
    add_hook("sglang.srt.speculative.spec_info.create_dummy_verify_input", dummy_verify_input, "after")
    add_hook(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.get_spec_info",
        verify_graph_spec_info,
        "after",
    )
    add_hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        refuse_inexact_request,
        "after",
    )
