"""The SGLang releases that the plugin works with, and all that differs between them.

No other file asks for a version: the others use what is named here. Importing this module imports no SGLang, so that a
release that is not supported can be reported in one sentence.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

#: The releases that the plugin is written for and tested with, the newest last. The hooks in ``scheduler_patch/`` name
#: internals that change between releases.
SUPPORTED = ("0.5.17", "0.5.23")
try:
    VERSION = version("sglang")
except PackageNotFoundError:
    VERSION = "unknown"  # a source tree without metadata
IS_SUPPORTED = VERSION in SUPPORTED
_IS_0_5_17 = VERSION == "0.5.17"

#: The FlashInfer that this SGLang requires.
FLASHINFER = "0.6.15.post1" if _IS_0_5_17 else "0.7.2"
#: ``ServerArgs`` is a record of what was asked for: it has no ``__init__`` to hook, and is resolved later, by declarations.
#: Otherwise making ``ServerArgs`` resolves it in place.
DECLARES_RESOLUTION = not _IS_0_5_17
#: The log's acceptance rate comes from a counter of correct drafts, not from those of tokens and verifications.
COUNTS_CORRECT_DRAFTS = not _IS_0_5_17
#: The radix cache is a ``UnifiedRadixCache``. Otherwise, with a host pool, it is a ``HiRadixCache``.
HAS_UNIFIED_TREE = not _IS_0_5_17
#: ``LoRAManager``'s backend: what makes the static tensors of captured decode batches.
INIT_STATIC_ADAPTERS = "init_cuda_graph_batch_info" if _IS_0_5_17 else "init_decode_cuda_graph_batch_info"

#: Hooks that are left out, because this SGLang does by itself what they are for.
UNNECESSARY_HOOKS = frozenset(
    {"keep_room_for_growth_only"}  # requests of a fixed length are counted like others
    if _IS_0_5_17
    else {
        "apply_grammar_on_cpu",  # XGrammar's kernel for CPUs
        "chunk_size_of_verification",  # a verification's tokens are counted
        "grammar_mask_on_cpu",  # masks are pinned where there is a GPU
        "no_logprob_is_sent_of_no_token",  # a retracted request has sent what it has output
        "no_draft_kv_pool",  # a worker without a draft worker is asked for no pool
        "no_tokens_are_an_empty_tensor",  # so they are
        "relay_on_cpu",  # a CPU's tokens are read without a stream
        "top_logprobs_of_each_token",  # each token of a streamed chunk has its own list
    }
)
#: ``ForwardBatch``'s fields for the number of tokens without padding, with "_cpu" or without.
NUM_TOKENS = "num_token_non_padded" if _IS_0_5_17 else "global_num_token_non_padded"
#: ``WeightUpdater``'s methods that replace weights.
_LOADS_RECEIVED = "update_weights_from_distributed" if _IS_0_5_17 else "load_weights_from_distributed"
WEIGHT_UPDATES = ("update_weights_from_disk", _LOADS_RECEIVED, "update_weights_from_tensor", "update_weights_from_ipc")


# ---------------------------------------------------------------------- server arguments


def record_of(server_args: Any) -> Any:
    """The ``ServerArgs`` itself, of what SGLang hands to an algorithm's callbacks: it may be a view."""
    if _IS_0_5_17:
        return server_args
    from sglang.srt.arg_groups import model_override_base, overrides

    if isinstance(server_args, overrides._ForeignDefaults):
        server_args = object.__getattribute__(server_args, "_cfg")
    if isinstance(server_args, model_override_base.ResolvingConfig):
        server_args = model_override_base.record_of(server_args)
    return server_args


def in_force(server_args: Any) -> Any:
    """``server_args`` with the values that SGLang has resolved: the record of a newer SGLang holds what was asked for."""
    if _IS_0_5_17:
        return server_args
    from sglang.srt.arg_groups.model_override_base import resolving_view

    return resolving_view(server_args)


def model_config_of(server_args: Any) -> ModelConfig:
    """The configuration of the server's model."""
    if _IS_0_5_17:
        return server_args.get_model_config()
    from sglang.srt.arg_groups.model_override_base import model_config_of

    return model_config_of(record_of(server_args))


# ------------------------------------------------------------------------------ requests


def kv_of(req: Req) -> Any:
    """What holds a request's ``req_pool_idx`` and ``kv_committed_len``."""
    return req if _IS_0_5_17 else req.kv


def prefix_len(req: Req) -> int:
    """Tokens of a request in prefill that have their KV."""
    return len(req.prefix_indices) if _IS_0_5_17 else req.prefix_len


def end_tokens_of(req: Req) -> set[int]:
    """What ``BatchedMinNewTokensPenalizer`` masks for a request until it has ``min_new_tokens``."""
    tokenizer: Any = req.tokenizer
    of_model = () if _IS_0_5_17 else req.eos_token_ids or ()
    own, added = req.sampling_params.stop_token_ids or (), tokenizer.additional_stop_token_ids or ()
    return {*own, *of_model, *added, tokenizer.eos_token_id} - {None}


def processor_and_rows(entry: Any) -> tuple[Any, torch.Tensor]:
    """The processor of a ``SamplingBatchInfo.custom_logit_processor``, and its rows: bool [batch] or int64 [rows]."""
    return entry if _IS_0_5_17 else (entry.processor, entry.indices)


def release(req: Req, tree: Any) -> None:
    """Free a request's row and KV, but for what the radix cache ``tree`` holds of it already."""
    from sglang.srt.mem_cache.common import release_kv_cache

    if _IS_0_5_17:
        release_kv_cache(req, tree, is_insert=False)
    else:
        release_kv_cache(req, tree, checkpoint=False)


def compute_logprobs(batch: ScheduleBatch, logits_output: Any, tokens: torch.Tensor) -> None:
    """Add log-probabilities of ``tokens`` (int64 [batch, W]) to ``logits_output``, whose logits are [batch * W, vocab]."""
    from sglang.srt.layers import logprob_processor

    if _IS_0_5_17:
        import torch

        # A chain's accepted tokens are its first ones, so every row is its own index.
        index = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)
        logprob_processor.compute_spec_v2_logprobs(batch, logits_output, tokens.flatten(), index, tokens.shape[1] - 1)
    else:
        logprob_processor.compute_spec_logprobs(batch, logits_output, tokens.flatten(), chain_stride=tokens.shape[1])
