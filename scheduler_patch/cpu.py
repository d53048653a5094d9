"""What SGLang lacks to serve SPARSESPEC without a GPU, on any processor.

SGLang's own CPU support needs AMX. Here are plain torch versions of the few functions that it
runs in Triton, CUDA or AMX otherwise. They are for tests and for trying the plugin out.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import xgrammar
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.pool_host import base
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.runtime_context import get_server_args
from torch.overrides import TorchFunctionMode

from sglang_sparsespec import ATTENTION_BACKEND
from sglang_sparsespec.attention_backend.kernels.reference import softmax_probabilities, weighted_values
from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import is_sparsespec
from sglang_sparsespec.sglang_compat import in_force

#: Set to "1" to let plain SGLang run a model on a CPU without AMX too, as a baseline.
CPU_BRIDGE_ENV = "SPARSESPEC_CPU_BRIDGE"


def serving_sparsespec_on_cpu() -> bool:
    """Whether this process serves SPARSESPEC without a GPU."""
    args = get_server_args()
    return is_sparsespec(args) and in_force(args).device == "cpu"


def bridges_plain() -> bool:
    """Whether plain SGLang is to run on any processor, as a baseline."""
    return os.environ.get(CPU_BRIDGE_ENV) == "1"


def runs_on_bridge() -> bool:
    """Whether this process serves without a GPU, SPARSESPEC or a plain baseline."""
    return bridges_plain() or serving_sparsespec_on_cpu()


# ------------------------------------------------------------------- rotary embeddings


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> None:
    """Rotate ``query`` and ``key`` in place (signature of ``vllm._custom_ops``).

    Args:
        positions: int [tokens].
        query: float [tokens, heads * head_size].
        key: float [tokens, kv_heads * head_size], or None.
        head_size: elements per head.
        cos_sin_cache: float [max_position, rotary_dim], cosines then sines.
        is_neox: halves are rotated against each other; otherwise neighbours are.
    """
    cos, sin = cos_sin_cache[positions.flatten()].to(query.dtype).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotary_dim = cos_sin_cache.shape[-1]
    for tensor in (query, key):
        if tensor is None:
            continue
        rotated = tensor.view(tensor.shape[0], -1, head_size)[..., :rotary_dim]
        if is_neox:
            first, second = rotated.chunk(2, dim=-1)
        else:
            first, second = rotated[..., ::2], rotated[..., 1::2]
        new_first = first * cos - second * sin
        new_second = second * cos + first * sin
        first.copy_(new_first)
        second.copy_(new_second)


@contextmanager
def stand_in_for_vllm() -> Iterator[None]:
    """``vllm._custom_ops`` with the one function above can be imported inside, and nowhere else."""
    package = types.ModuleType("vllm")
    package.__path__ = []  # type: ignore[attr-defined]
    ops = types.ModuleType("vllm._custom_ops")
    ops.rotary_embedding = rotary_embedding  # type: ignore[attr-defined]
    package._custom_ops = ops  # type: ignore[attr-defined]
    sys.modules.update({"vllm": package, "vllm._custom_ops": ops})
    try:
        yield
    finally:
        del sys.modules["vllm"], sys.modules["vllm._custom_ops"]


def rotary_embedding_on_cpu(original: Callable[..., None], module: Any, *args: Any, **kwargs: Any) -> None:
    """``RotaryEmbedding.__init__``: SGLang imports vLLM's kernel where there is neither CUDA nor AMX.

    vLLM is not needed otherwise. A real one is left alone.
    """
    if not runs_on_bridge() or "vllm" in sys.modules or importlib.util.find_spec("vllm") is not None:
        return original(module, *args, **kwargs)
    with stand_in_for_vllm():
        return original(module, *args, **kwargs)


# ---------------------------------------------------------------------- Triton kernels


def no_triton_on_cpu(result: bool, backend: str) -> bool | None:
    """``utils.common.support_triton``: SGLang knows CPU backends by name.

    It launches Triton kernels for any other name; ours runs on CPU too.
    """
    if backend == ATTENTION_BACKEND and serving_sparsespec_on_cpu():
        return False
    return None  # None keeps the original result


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

    On other CPUs neither exists. This is the same ragged copy in torch.
    """
    if not serving_sparsespec_on_cpu():
        return original(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, batch_size)
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start].to(req_to_token.dtype)
        taken += end - start
    return None


# ------------------------------------------------------------ attention sinks and windows


def attention_on_cpu(
    original: Callable[..., torch.Tensor],
    backend: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    forward_batch: Any,
    save_kv_cache: bool = True,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """``TorchNativeAttnBackend.forward_extend`` and ``forward_decode``: SGLang's attention in torch lacks three things.

    It has no sinks and no soft caps, and in a pool of the layers with a sliding window it reads the slots of the other pool.

    Args:
        q: [tokens, Hq * D]; k, v: [tokens, Hkv, D].
        sinks: [Hq]; None for models without.
    """
    windowed = layer.sliding_window_size is not None and layer.sliding_window_size >= 0
    has_own_pool = windowed and backend.swa_out_cache_loc is not None
    if not runs_on_bridge() or not (sinks is not None or has_own_pool or layer.logit_cap):
        given = {} if sinks is None else {"sinks": sinks}
        return original(backend, q, k, v, layer, forward_batch, save_kv_cache, **given)
    pool = backend.token_to_kv_pool
    if save_kv_cache:
        pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, backend.swa_out_cache_loc), k, v)
    keys, values = pool.get_kv_buffer(layer.layer_id)
    queries = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
    lengths = forward_batch.seq_lens.tolist()
    decodes = forward_batch.forward_mode.is_decode()
    new = [1] * len(lengths) if decodes else forward_batch.extend_seq_lens.tolist()
    outputs, first = [], 0
    for row, length, extend in zip(forward_batch.req_pool_indices.tolist(), lengths, new, strict=True):
        slots = backend.req_to_token_pool.req_to_token[row, :length].long()
        if has_own_pool:
            slots = pool.translate_loc_from_full_to_swa(slots)
        query_position = torch.arange(length - extend, length).unsqueeze(1)
        position = torch.arange(length).unsqueeze(0)
        visible = position <= query_position
        if windowed:
            visible &= position >= query_position - layer.sliding_window_size
        part = queries[first : first + extend]
        softmax = (keys[slots], layer.scaling, visible, sinks, layer.logit_cap or 0.0)
        probabilities, _ = softmax_probabilities(part, *softmax)
        outputs.append(weighted_values(probabilities, values[slots]).to(q.dtype))
        first += extend
    return torch.cat(outputs).flatten(1)


# ------------------------------------------------------------------------------ streams


def relay_on_cpu(original: Callable[..., None], relay: Any, batch: Any) -> None:
    """``FutureMap._resolve_spec_extras``: SGLang relays a round's last tokens to the next round.

    It calls ``Tensor.record_stream``, which CPU tensors lack. On CPU everything runs in program
    order, so that the tokens can just be read.
    """
    if not serving_sparsespec_on_cpu():
        return original(relay, batch)
    draft_input = batch.spec_info
    if draft_input is not None and draft_input.future_indices.shape[0]:
        draft_input.bonus_tokens = relay.output_tokens_buf[draft_input.future_indices]
    return None


# ----------------------------------------------------------------------------- grammars


def grammar_mask_on_cpu(original: Callable[..., torch.Tensor], vocab_size: int, batch_size: int) -> torch.Tensor:
    """``xgrammar_backend._allocate_token_bitmask``: SGLang allocates every mask in pinned memory, which needs CUDA.

    The mask is int32 [batch, words of 32 tokens] with all bits set: every token is allowed.
    """
    if not serving_sparsespec_on_cpu():
        return original(vocab_size, batch_size)
    return torch.full(xgrammar.get_bitmask_shape(batch_size, vocab_size), -1, dtype=xgrammar.bitmask_dtype)


def apply_grammar_on_cpu(
    original: Callable[..., None], grammar: Any, logits: torch.Tensor, vocab_mask: torch.Tensor
) -> None:
    """``XGrammarGrammar.apply_vocab_mask``: SGLang has kernels for GPUs only. XGrammar has one for CPUs."""
    if not serving_sparsespec_on_cpu():
        return original(grammar, logits, vocab_mask)
    return xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)


def apply_backend_grammar_on_cpu(original: Callable[..., None], logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """``XGrammarGrammarBackend.apply_vocab_mask``: as :func:`apply_grammar_on_cpu`, for grammars behind reasoning."""
    if not serving_sparsespec_on_cpu():
        return original(logits, vocab_mask)
    return xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)


# ----------------------------------------------------------------------- seeded sampling


def _rotate_left(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & 0xFFFFFFFF


def murmur_hash(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (x86, 32 bits) of the 16 bytes of a seed (64 bits), a position and a column: uint32 [rows, columns].

    Args:
        seed, positions: int [rows].
        col_indices: int [columns].
    """
    seed = seed.to(torch.int64)
    words = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, positions.to(torch.int64) & 0xFFFFFFFF)
    hashed = torch.zeros((len(seed), 1), dtype=torch.int64)
    for word in (*(word.unsqueeze(1) for word in words), col_indices.to(torch.int64).unsqueeze(0)):
        # Products wrap around at 64 bits, which leaves their low 32 as they are.
        mixed = _rotate_left((word * 0xCC9E2D51) & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF
        hashed = (_rotate_left(hashed ^ mixed, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    hashed = hashed ^ 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashed = ((hashed ^ (hashed >> shift)) * factor) & 0xFFFFFFFF
    return (hashed ^ (hashed >> 16)).to(torch.uint32)


def murmur_hash_on_cpu(original: Callable[..., torch.Tensor], seed: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``murmur_hash.murmur_hash32``: SGLang makes the noise of seeded sampling in Triton."""
    return (original if seed.is_cuda else murmur_hash)(seed, *args, **kwargs)


def seeded_draw_on_cpu(
    original: Callable[..., torch.Tensor], logprobs: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """``sampler.multinomial_with_seed``: SGLang compiles it, which needs a C++ compiler on a CPU."""
    if logprobs.is_cuda:
        return original(logprobs, *args, **kwargs)
    with torch.compiler.set_stance("force_eager"):
        return original(logprobs, *args, **kwargs)


def no_invariant_kernels_on_cpu(original: Callable[..., None], model_runner: Any) -> None:
    """``ModelRunner.maybe_enable_batch_invariant_mode``: SGLang puts Triton kernels in place of PyTorch's products.

    They exist for GPUs only. On a CPU a product's last bits depend on how many rows it has.
    """
    if not runs_on_bridge():
        original(model_runner)


def nothing_compiled_on_cpu(original: Callable[..., None], model_runner: Any, *args: Any, **kwargs: Any) -> None:
    """``ModelRunner.__init__``: SGLang compiles parts of some models (Gemma's, gpt-oss's), with a C++ compiler on a CPU.

    That takes longer than they run, and a machine without a GPU may have no compiler.
    """
    original(model_runner, *args, **kwargs)
    if runs_on_bridge() and not in_force(model_runner.server_args).enable_torch_compile:
        torch.compiler.set_stance("force_eager")


# ---------------------------------------------------------------------------------- LoRA


class UnpinnedMemory(TorchFunctionMode):
    """Inside, memory that is asked for as pinned is ordinary memory: to pin needs CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` without ``pin_memory``."""
        if func is torch.Tensor.pin_memory:
            return args[0]
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return func(*args, **kwargs)


def adapters_on_cpu(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """``LoRAManager``'s methods that make tensors: SGLang pins adapters and what it tells its kernels of a batch."""
    if not runs_on_bridge():
        return original(manager, *args, **kwargs)
    with UnpinnedMemory():
        return original(manager, *args, **kwargs)


# -------------------------------------------------------------------------- host KV tier


class CpuHostPool(MHATokenToKVPoolHost):
    """HiCache's host pool of layout ``layer_first`` where the "device" is the CPU.

    Copies are synchronous and in torch, and nothing is pinned.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # SGLang leaves 10 GB to others, since pinned memory cannot be swapped out. This is not pinned, and a
        # laptop may have less than that free.
        reserve, base.HICACHE_HOST_MEMORY_RESERVE_BYTES = base.HICACHE_HOST_MEMORY_RESERVE_BYTES, 0
        try:
            super().__init__(*args, pin_memory=False, **kwargs)
        finally:
            base.HICACHE_HOST_MEMORY_RESERVE_BYTES = reserve

    def load_to_device_per_layer(
        self,
        device_pool: Any,
        host_indices: torch.Tensor,
        device_indices: torch.Tensor,
        layer_id: int,
        io_backend: str,
        *,
        is_draft: bool = False,
    ) -> None:
        """Copy tokens ``host_indices`` of one layer to slots ``device_indices`` (int64 [tokens])."""
        device_pool.k_buffer[layer_id][device_indices] = self.k_buffer[layer_id][host_indices]
        device_pool.v_buffer[layer_id][device_indices] = self.v_buffer[layer_id][host_indices]

    def backup_from_device_all_layer(
        self, device_pool: Any, host_indices: torch.Tensor, device_indices: torch.Tensor, io_backend: str
    ) -> None:
        """Copy slots ``device_indices`` of all layers to tokens ``host_indices`` (int64 [tokens])."""
        for layer in range(self.layer_num):
            self.k_buffer[layer][host_indices] = device_pool.k_buffer[layer][device_indices]
            self.v_buffer[layer][host_indices] = device_pool.v_buffer[layer][device_indices]


def host_pool_on_cpu(original: Callable[..., type], device: Any) -> type:
    """``pool_host.mha.get_mha_host_pool_cls``: SGLang's host pool needs CUDA: pinned memory and copy kernels."""
    return CpuHostPool if serving_sparsespec_on_cpu() else original(device)


def register_hooks() -> None:
    """Register the hooks of this module."""
    add_hook("sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.__init__", rotary_embedding_on_cpu, "around")
    add_hook("sglang.srt.utils.common.support_triton", no_triton_on_cpu, "after")
    for name in ("forward_extend", "forward_decode"):
        target = f"sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.{name}"
        add_hook(target, attention_on_cpu, "around")
    add_hook("sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func", assign_slots_on_cpu, "around")
    add_hook("sglang.srt.managers.overlap_utils.FutureMap._resolve_spec_extras", relay_on_cpu, "around")
    grammars = "sglang.srt.constrained.xgrammar_backend."
    add_hook(grammars + "_allocate_token_bitmask", grammar_mask_on_cpu, "around")
    add_hook(grammars + "XGrammarGrammar.apply_vocab_mask", apply_grammar_on_cpu, "around")
    add_hook(grammars + "XGrammarGrammarBackend.apply_vocab_mask", apply_backend_grammar_on_cpu, "around")
    add_hook("sglang.kernels.ops.sampling.murmur_hash.murmur_hash32", murmur_hash_on_cpu, "around")
    add_hook("sglang.srt.layers.sampler.multinomial_with_seed", seeded_draw_on_cpu, "around")
    add_hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode",
        no_invariant_kernels_on_cpu,
        "around",
    )
    add_hook("sglang.srt.model_executor.model_runner.ModelRunner.__init__", nothing_compiled_on_cpu, "around")
    loading = ("__init__", "load_lora_adapter", "load_lora_adapter_from_tensors", "fetch_new_loras")
    for name in (*loading, "prepare_lora_batch"):
        add_hook(f"sglang.srt.lora.lora_manager.LoRAManager.{name}", adapters_on_cpu, "around")
    add_hook("sglang.srt.mem_cache.pool_host.mha.get_mha_host_pool_cls", host_pool_on_cpu, "around")
