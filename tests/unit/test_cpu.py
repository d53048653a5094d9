"""What stands in for GPU code where SPARSESPEC is served on CPU, and that nothing else sees it."""

from __future__ import annotations

import importlib.util
import inspect
import struct
import sys
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xgrammar
from sglang.srt.constrained import xgrammar_backend
from sglang.srt.constrained.base_grammar_backend import GrammarMask
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import Llama3RotaryEmbedding
from sglang.srt.managers.overlap_utils import FutureMap
from sglang.srt.mem_cache import allocation
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask
from sglang.srt.utils import common
from sglang_parts import needs_hook, relay_a_round

from sglang_sparsespec import ALGORITHM, ATTENTION_BACKEND
from sglang_sparsespec.scheduler_patch.cpu import (
    CPU_BRIDGE_ENV,
    CpuHostPool,
    UnpinnedMemory,
    apply_backend_grammar_on_cpu,
    apply_grammar_on_cpu,
    assign_slots_on_cpu,
    grammar_mask_on_cpu,
    host_pool_on_cpu,
    murmur_hash,
    relay_on_cpu,
    rotary_embedding,
)

pytestmark = pytest.mark.usefixtures("plugin")


@pytest.fixture
def serving(serving_args: Callable[[Any], None], resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """This process serves SPARSESPEC on CPU."""
    monkeypatch.delenv(CPU_BRIDGE_ENV, raising=False)
    serving_args(resolve())


@pytest.fixture
def serving_plain(serving_args: Callable[[Any], None], llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process serves on CPU without speculation."""
    monkeypatch.delenv(CPU_BRIDGE_ENV, raising=False)
    serving_args(ServerArgs(model_path=llama, device="cpu"))


# ------------------------------------------------------------------- rotary embeddings

#: Arguments of ``RotaryEmbedding``: heads of 8 elements, 16 positions.
SHAPE: tuple[Any, ...] = (8, 8, 16, 10000)
POSITIONS = torch.tensor([0, 3, 15])


def rope(is_neox: bool = True) -> RotaryEmbedding:
    return RotaryEmbedding(*SHAPE, is_neox, torch.float32)


@pytest.mark.usefixtures("serving")
def test_rotary_embeddings_are_made_where_sparsespec_is_served() -> None:
    assert rope().fallback_rotary_embedding is rotary_embedding
    scaled = Llama3RotaryEmbedding(*SHAPE, True, torch.float32, 8.0, 1.0, 4.0, 8192)
    assert scaled.fallback_rotary_embedding is rotary_embedding
    assert_vllm_is_absent()


@pytest.mark.usefixtures("serving_plain")
def test_rotary_embeddings_of_a_plain_baseline_are_made_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_BRIDGE_ENV, "1")
    assert rope().fallback_rotary_embedding is rotary_embedding
    assert_vllm_is_absent()


@pytest.mark.usefixtures("serving_plain")
@pytest.mark.parametrize("value", [None, "0"])
def test_sglang_needs_vllm_on_this_processor(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv(CPU_BRIDGE_ENV, value)
    with pytest.raises(ModuleNotFoundError, match="vllm"):
        rope()


@pytest.mark.usefixtures("serving")
def test_a_real_vllm_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = types.ModuleType("vllm._custom_ops")
    real.rotary_embedding = object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", real)
    assert rope().fallback_rotary_embedding is real.rotary_embedding
    assert sys.modules["vllm._custom_ops"] is real


@pytest.mark.usefixtures("serving")
def test_a_constructor_that_fails_leaves_no_vllm() -> None:
    with pytest.raises(TypeError):
        RotaryEmbedding(8, 8)  # type: ignore[call-arg]
    assert_vllm_is_absent()


def assert_vllm_is_absent() -> None:
    assert not [name for name in sys.modules if name.split(".")[0] == "vllm"]
    assert importlib.util.find_spec("vllm") is None


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("is_neox", [False, True])
def test_positions_are_rotated_as_in_sglangs_reference(is_neox: bool) -> None:
    module = rope(is_neox)
    query, key = torch.randn(3, 2 * 8), torch.randn(3, 8)
    expected = module.forward_native(POSITIONS, query.clone(), key.clone())
    rotary_embedding(POSITIONS, query, key, 8, module.cos_sin_cache, is_neox)
    torch.testing.assert_close((query, key), expected)


# ---------------------------------------------------------------------- Triton kernels


def let_triton_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang believes that it runs on a platform with Triton, as on a host with a GPU."""
    platform = SimpleNamespace(capabilities=SimpleNamespace(supports_triton=True))
    monkeypatch.setattr(common, "current_platform", platform, raising=False)


@pytest.mark.usefixtures("serving")
def test_sglang_takes_the_backend_for_one_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    let_triton_work(monkeypatch)
    assert common.support_triton.__wrapped__(ATTENTION_BACKEND) is True
    assert common.support_triton(ATTENTION_BACKEND) is False


def test_triton_is_used_on_cuda(
    serving_args: Callable[[Any], None], resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving_args(resolve(device="cuda", mem_fraction_static=0.8))
    let_triton_work(monkeypatch)
    assert common.support_triton(ATTENTION_BACKEND) is True


@pytest.mark.usefixtures("serving_plain")
@pytest.mark.parametrize("backend", ["torch_native", "intel_amx", "triton", "flashinfer"])
def test_triton_support_of_other_backends_is_unchanged(backend: str) -> None:
    assert common.support_triton(backend) is common.support_triton.__wrapped__(backend)


@pytest.mark.usefixtures("serving")
def test_slots_are_written_to_the_rows_on_cpu() -> None:
    """SGLang's own function needs Triton or AMX."""
    req_to_token = torch.zeros(4, 6, dtype=torch.int32)
    allocation.assign_req_to_token_pool_func(
        torch.tensor([3, 1, 2]), req_to_token, torch.tensor([0, 2, 4]), torch.tensor([2, 2, 6]),
        torch.tensor([11, 12, 13, 14]), 3,
    )  # fmt: skip
    assert req_to_token.tolist() == [[0] * 6, [0] * 6, [0, 0, 0, 0, 13, 14], [11, 12, 0, 0, 0, 0]]


@pytest.mark.usefixtures("serving_plain")
def test_slots_are_assigned_by_sglang_without_the_algorithm() -> None:
    calls: list[tuple[object, ...]] = []
    a, b, c, d, e = (torch.tensor([i]) for i in range(5))
    assign_slots_on_cpu(lambda *args: calls.append(args), a, b, c, d, e, 1)
    assert calls == [(a, b, c, d, e, 1)]


# ------------------------------------------------------------------------------ streams


@pytest.fixture
def relay() -> FutureMap:
    """SGLang's relay for SPARSESPEC."""
    pool = SimpleNamespace(req_to_token=torch.zeros(8, 4))
    return SpeculativeAlgorithm.from_string(ALGORITHM).create_future_map("cpu", pool, True, False)


@pytest.mark.usefixtures("serving")
@needs_hook("relay_on_cpu")
def test_sglang_cannot_relay_drafts_on_cpu(relay: FutureMap) -> None:
    """It calls ``record_stream`` with a CPU stream, which is none."""
    with pytest.raises(RuntimeError):
        relay_a_round(relay, FutureMap._resolve_spec_extras.__wrapped__)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("serving")
def test_tokens_and_lengths_are_relayed_on_cpu(relay: FutureMap) -> None:
    batch, following = relay_a_round(relay, FutureMap._resolve_spec_extras)
    assert batch.seq_lens.tolist() == [12, 13] and batch.seq_lens_cpu.tolist() == [12, 13]
    assert following.bonus_tokens.tolist() == [20, 30]


@pytest.mark.usefixtures("serving")
def test_a_batch_without_drafts_relays_nothing(relay: FutureMap) -> None:
    relay._resolve_spec_extras(SimpleNamespace(spec_info=None))  # type: ignore[arg-type]
    empty = SimpleNamespace(future_indices=torch.zeros(0, dtype=torch.int64), bonus_tokens=None)
    relay._resolve_spec_extras(SimpleNamespace(spec_info=empty))  # type: ignore[arg-type]
    assert empty.bonus_tokens is None


@pytest.mark.usefixtures("serving_plain")
def test_other_algorithms_relay_as_before() -> None:
    calls: list[tuple[object, ...]] = []
    relay, batch = object(), object()
    relay_on_cpu(lambda *args: calls.append(args), relay, batch)
    assert calls == [(relay, batch)]


# ----------------------------------------------------------------------------- grammars

#: Tokens 0 to 9 are digits, then come a letter and the end of the text; the rest of the mask's words is padding.
TOKENS = [*map(str, range(10)), "a", "</s>"]


@pytest.fixture
def grammar() -> Any:
    """SGLang's grammar of one to three digits over ``TOKENS``."""
    info = xgrammar.TokenizerInfo(TOKENS, stop_token_ids=[len(TOKENS) - 1])
    compiled = xgrammar.GrammarCompiler(info).compile_regex("[0-9]{1,3}")
    matcher = xgrammar.GrammarMatcher(compiled, max_rollback_tokens=xgrammar_backend.MAX_ROLLBACK_TOKENS)
    return xgrammar_backend.XGrammarGrammar(matcher, len(TOKENS), compiled, None)


DIGITS = [True] * 10 + [False, False]
DIGITS_OR_END = [True] * 10 + [False, True]
END = [False] * 11 + [True]
ANY = [True] * 12


@needs_hook("apply_grammar_on_cpu")
@pytest.mark.usefixtures("serving")
def test_sglang_applies_grammar_masks_on_gpus_only(grammar: Any) -> None:
    with pytest.raises(RuntimeError, match="Unsupported device"):
        inspect.unwrap(type(grammar).apply_vocab_mask)(grammar, torch.zeros(1, 12), torch.zeros(1, 1, dtype=torch.int32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="pinned memory can be had")
@needs_hook("grammar_mask_on_cpu")
@pytest.mark.usefixtures("serving")
def test_sglang_pins_grammar_masks_everywhere() -> None:
    with pytest.raises(RuntimeError):
        inspect.unwrap(xgrammar_backend._allocate_token_bitmask)(len(TOKENS), 1)


@pytest.mark.usefixtures("serving")
def test_a_grammar_masks_the_tokens_after_a_prompt_on_cpu(grammar: Any) -> None:
    mask = grammar.allocate_vocab_mask(vocab_size=len(TOKENS), batch_size=2, device="cpu")
    grammar.fill_vocab_mask(mask, 0)
    logits = torch.zeros(2, len(TOKENS))
    GrammarMask(grammar, grammar.move_vocab_mask(mask, "cpu")).apply(logits)
    assert logits.isfinite().tolist() == [DIGITS, ANY]


@pytest.mark.usefixtures("serving")
def test_a_grammar_masks_every_position_of_a_window_on_cpu(grammar: Any) -> None:
    """A position is masked by the drafts before it, if the grammar accepts them."""
    grammar.accept_token(1)
    tree = GrammarTree.from_linear_chain(torch.tensor([[1, 2, 3, 11], [7, 7, 7, 7], [1, 10, 3, 4]]))
    reqs: Any = [SimpleNamespace(grammar=grammar), SimpleNamespace(grammar=None), SimpleNamespace(grammar=grammar.copy())]
    reqs[2].grammar.accept_token(1)
    info: Any = SimpleNamespace(vocab_size=len(TOKENS), grammar_mask=None)
    mask = build_grammar_vocab_mask(reqs=reqs, tree=tree, sampling_info=info, device="cpu", barrier=None)
    assert mask is not None
    logits = torch.zeros(12, len(TOKENS))
    mask.apply(logits)
    first, second, third = logits.isfinite().view(3, 4, -1).tolist()
    assert first[:3] == [DIGITS_OR_END, DIGITS_OR_END, END]
    assert second == [ANY] * 4
    assert third[0] == DIGITS_OR_END


@pytest.mark.usefixtures("serving")
def test_a_row_that_allows_nothing_is_left_unmasked(grammar: Any) -> None:
    mask = torch.tensor([[0], [1 << 3]], dtype=torch.int32)
    for apply in (grammar.apply_vocab_mask, xgrammar_backend.XGrammarGrammarBackend.apply_vocab_mask):
        logits = torch.zeros(2, len(TOKENS))
        apply(logits=logits, vocab_mask=mask.clone())
        assert logits.isfinite().tolist() == [ANY, [token == 3 for token in range(12)]]


@pytest.mark.usefixtures("serving")
def test_grammars_behind_reasoning_are_applied_on_cpu(grammar: Any) -> None:
    """``ReasonerGrammarObject`` calls the backend's function."""
    mask = grammar.allocate_vocab_mask(vocab_size=len(TOKENS), batch_size=1, device="cpu")
    grammar.fill_vocab_mask(mask, 0)
    logits = torch.zeros(1, len(TOKENS))
    xgrammar_backend.XGrammarGrammarBackend.apply_vocab_mask(logits, mask)
    assert logits.isfinite().tolist() == [DIGITS]


@pytest.mark.usefixtures("serving_plain")
def test_other_servers_apply_grammars_as_before() -> None:
    calls: list[tuple[object, ...]] = []
    logits, mask = torch.zeros(1, 12), torch.zeros(1, 1, dtype=torch.int32)
    grammar_mask_on_cpu(lambda *args: calls.append(args), 12, 1)  # type: ignore[arg-type, func-returns-value]
    apply_grammar_on_cpu(lambda *args: calls.append(args), "grammar", logits, mask)
    apply_backend_grammar_on_cpu(lambda *args: calls.append(args), logits, mask)
    assert [call[0] for call in calls] == [12, "grammar", logits]


# ------------------------------------------------------------------------------ host pool


@pytest.mark.usefixtures("serving")
def test_the_host_pool_needs_no_pinned_memory() -> None:
    assert host_pool_on_cpu(lambda device_pool: object, None) is CpuHostPool


@pytest.mark.usefixtures("serving_plain")
def test_other_servers_have_sglangs_host_pool() -> None:
    assert host_pool_on_cpu(lambda device_pool: object, None) is object


# ---------------------------------------------------------------------- seeded sampling


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0, of whole words, from its definition."""

    def rotate(x: int, bits: int) -> int:
        return ((x << bits) | (x >> (32 - bits))) % 2**32

    state = 0
    for (word,) in struct.iter_unpack("<I", data):
        state ^= rotate(word * 0xCC9E2D51 % 2**32, 15) * 0x1B873593 % 2**32
        state = (rotate(state, 13) * 5 + 0xE6546B64) % 2**32
    state ^= len(data)
    state = (state ^ (state >> 16)) * 0x85EBCA6B % 2**32
    state = (state ^ (state >> 13)) * 0xC2B2AE35 % 2**32
    return state ^ (state >> 16)


def test_the_noise_of_seeds_is_murmur_hash() -> None:
    seeds, positions, columns = [0, 42, 2**63 - 1, -5], [0, 7, 131071, 3], [0, 1, 1023, 151935]
    found = murmur_hash(torch.tensor(seeds).to(torch.uint64), torch.tensor(positions), torch.tensor(columns))
    expected = [
        [murmur3(struct.pack("<QII", seed % 2**64, position, column)) for column in columns]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert found.dtype == torch.uint32 and found.to(torch.int64).tolist() == expected


# ---------------------------------------------------------------------------------- LoRA


def test_pinned_memory_is_ordinary_memory_inside() -> None:
    with UnpinnedMemory():
        made = [torch.tensor([1.0], pin_memory=True), torch.zeros(1, pin_memory=True), torch.ones(1).pin_memory()]
    assert torch.cat(made).tolist() == [1.0, 0.0, 1.0]
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError):
            torch.zeros(1, pin_memory=True)
