"""Parts of SGLang as far as tests of hooks need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.overlap_utils import RelayPayload
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.runtime_context import get_server_args
from sglang.srt.sampling import sampling_batch_info

from sglang_sparsespec.sglang_compat import DECLARES_RESOLUTION, UNNECESSARY_HOOKS
from sglang_sparsespec.spec_input import SparseSpecDraftInput


def resolved(server_args: Any) -> Any:
    """``server_args``, resolved as at the start of a server."""
    if DECLARES_RESOLUTION:
        server_args.resolve_once()
    return server_args


def check_lora(server_args: Any, **values: Any) -> None:
    """What SGLang checks of LoRA at start-up, of ``server_args`` with other ``values``."""
    if DECLARES_RESOLUTION:
        from sglang.srt.arg_groups.lora_hook import check_lora_server_args
        from sglang.srt.arg_groups.overrides import declare_resolution

        declare_resolution(server_args, "a test", **values)
        check_lora_server_args(server_args)
    else:
        for name, value in values.items():
            object.__setattr__(server_args, name, value)
        server_args.check_lora_server_args()


@contextmanager
def publishing() -> Iterator[Callable[[Any], Any]]:
    """A function that resolves ``ServerArgs`` and makes them the process's, until the end of the block."""
    from sglang.srt import runtime_context

    if not DECLARES_RESOLUTION:
        context = runtime_context.get_context()
        with context.preserve_config():
            yield context.set_server_args
        return
    before = runtime_context.snapshot_context()
    try:
        yield lambda server_args: runtime_context.publish(resolved(server_args), role="scheduler")
    finally:
        runtime_context.restore_context(before)


def request_in(row: int, **values: Any) -> Any:
    """A request in ``row`` of ``req_to_token``, wherever SGLang keeps that."""
    return SimpleNamespace(req_pool_idx=row, kv=SimpleNamespace(req_pool_idx=row), **values)


def processor_entry(processor: Any, mask: list[bool]) -> Any:
    """A custom logit processor of the requests of a batch in ``mask``, as ``SamplingBatchInfo`` keeps it."""
    if hasattr(sampling_batch_info, "ProcessorEntry"):
        rows = [row for row, chosen in enumerate(mask) if chosen]
        return sampling_batch_info.ProcessorEntry(processor, rows, torch.tensor(rows))
    return processor, torch.tensor(mask)


def needs_hook(name: str) -> pytest.MarkDecorator:
    """Skips a test of a hook that this SGLang does without."""
    return pytest.mark.skipif(name in UNNECESSARY_HOOKS, reason="SGLang does by itself what this hook is for")


def dummy_verify_input(create: Callable[..., Any], algorithm: Any, mask: torch.Tensor, width: int) -> Any:
    """What ``spec_info.create_dummy_verify_input`` (or its original) makes of the published arguments."""
    given = () if DECLARES_RESOLUTION else (get_server_args(),)
    return create(algorithm, *given, mask, width, False)


def verify_graph_runner(width: int, algorithm: Any = None) -> Any:
    """``DecodeCudaGraphRunner`` as far as its decisions need it."""
    runner = object.__new__(DecodeCudaGraphRunner)
    runner.__dict__.update(
        ragged_verify_mode=None,
        captured_req_width=width,
        require_mlp_tp_gather=False,
        require_mlp_sync=False,
        enable_pdmux=False,
        disable_padding=False,
        is_encoder_decoder=False,
        enable_two_batch_overlap=False,
        is_dllm=False,
        max_bs=8,
        capture_hidden_mode=None,
        record_nolora_graph=False,
        model_runner=SimpleNamespace(
            spec_algorithm=algorithm,
            device_timer=None,
            is_draft_worker=False,
            war_fastpath_read_done_event=None,
        ),
    )
    return runner


def draft_batch(spec_info: Any, batch_size: int = 2) -> Any:
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=batch_size,
        spec_info=spec_info,
        replace_embeds=None,
        input_ids=torch.zeros(batch_size, dtype=torch.int64),
        lora_ids=None,
        capture_hidden_mode=CaptureHiddenMode.NULL,
    )


def relay_a_round(relay: Any, resolve: Callable[[Any, Any], None]) -> tuple[Any, Any]:
    """Publish rows 3, 5, 2 as a round does, read rows 2, 3 as the next one does: batch, draft input.

    Args:
        resolve: ``FutureMap._resolve_spec_extras`` or what stands in for it.
    """
    rows = torch.tensor([3, 5, 2])
    written = SparseSpecDraftInput(torch.tensor([30, 50, 20]), torch.tensor([13, 15, 12]))
    relay.publish(rows, written.new_seq_lens)
    relay.stash(rows, RelayPayload.from_draft_input(written))
    following = SparseSpecDraftInput(torch.tensor([-1, -1]), torch.tensor([-1, -1]))
    following.future_indices = torch.tensor([2, 3])
    batch = SimpleNamespace(spec_info=following, req_pool_indices_cpu=torch.tensor([2, 3]))
    relay.resolve_seq_lens_cpu(batch)
    resolve(relay, batch)
    return batch, following
