"""What start-up refuses, and what it fills in."""

from __future__ import annotations

import pickle
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from model_configs import write_config
from sglang_parts import check_lora

from sglang_sparsespec import ALGORITHM, ATTENTION_BACKEND
from sglang_sparsespec.settings import Settings, settings_of
from sglang_sparsespec.sglang_compat import DECLARES_RESOLUTION, in_force
from sglang_sparsespec.support import MODEL_REFUSALS, REFUSALS

pytestmark = pytest.mark.usefixtures("plugin")

MLA_DIMS = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}

GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "head_dim": 64,
    "sliding_window": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

#: What is wrong with each model, and its config.json as changes to a Llama's.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": (
        "multi-head latent attention",
        {
            **MLA_DIMS,
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
        },
    ),
    "cohere2_with_chunks": (
        "attend within chunks",
        {"architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "layer_types": ["chunked_attention"] * 4},
    ),
    "whisper": (
        "encoder-decoder",
        {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        },
    ),
    "qwen2_vl": (
        "multimodal",
        {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        },
    ),
    "lfm2": (
        "recurrent",
        {
            "architectures": ["Lfm2ForCausalLM"],
            "model_type": "lfm2",
            "layer_types": ["conv", "full_attention"] * 2,
            "conv_L_cache": 3,
        },
    ),
    "nemotron_h": (
        "recurrent",
        {
            "architectures": ["NemotronHForCausalLM"],
            "model_type": "nemotron_h",
            "hybrid_override_pattern": "M-*M",
        },
    ),
    "qwen3_next": (
        "recurrent",
        {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "head_dim": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "full_attention_interval": 4,
        },
    ),
    "bert": ("do not generate", {"architectures": ["BertModel"], "model_type": "bert"}),
    "jet_nemotron": (
        "recurrent",
        {"architectures": ["JetNemotronForCausalLM"], "model_type": "jet_nemotron"},
    ),
}


# ------------------------------------------------------------------------ defaults


def test_defaults(resolve: Callable[..., Any]) -> None:
    args = in_force(resolve())
    assert (args.speculative_num_steps, args.speculative_num_draft_tokens, args.speculative_eagle_topk) == (
        8,
        9,
        1,
    )
    assert settings_of(args) == Settings(0.05, 128, "pillar", 4, "torch_native", draft_weights="model")
    assert args.attention_backend == ATTENTION_BACKEND
    assert args.disable_overlap_schedule is False
    assert args.page_size == 1


@pytest.mark.parametrize(
    ("given", "is_hopper", "backend"),
    [
        ({"device": "cuda", "dtype": "bfloat16"}, True, "fa3"),
        ({"device": "cuda", "dtype": "bfloat16", "kv_cache_dtype": "fp8_e4m3"}, True, "fa3"),
        ({"device": "cuda", "dtype": "bfloat16", "kv_cache_dtype": "fp8_e5m2"}, True, "triton"),
        ({"device": "cuda", "dtype": "float16"}, True, "fa3"),
        ({"device": "cuda", "dtype": "float16", "kv_cache_dtype": "fp8_e4m3"}, True, "triton"),
        ({"device": "cuda", "dtype": "float16", "kv_cache_dtype": "bfloat16"}, True, "triton"),
        ({"device": "cuda", "dtype": "float32"}, True, "triton"),
        ({"device": "cuda", "dtype": "bfloat16"}, False, "triton"),
        ({"device": "cpu"}, True, "torch_native"),
    ],
)
def test_prefill_runs_on_flash_attention_3_where_that_can_compute_it(
    given: dict[str, Any], is_hopper: bool, backend: str, resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang.srt.utils.common.is_hopper_with_cuda_12_3", lambda: is_hopper)
    assert settings_of(resolve(mem_fraction_static=0.8, **given)).base_attention_backend == backend


@pytest.mark.parametrize(
    ("given", "has_fp8", "weights"),
    [
        ({"device": "cuda"}, True, "fp8"),
        ({"device": "cuda"}, False, "model"),
        ({"device": "cuda", "sparsespec_draft_weights": "model"}, True, "model"),
        ({"device": "cuda", "sparsespec_schedule": "unified"}, True, "model"),
        ({"device": "cuda", "sparsespec_draft_policy": "full"}, True, "model"),
        ({"device": "cpu"}, True, "model"),
        ({"device": "cpu", "sparsespec_draft_weights": "fp8"}, False, "fp8"),
    ],
)
def test_drafts_use_fp8_weights_where_that_is_faster(
    given: dict[str, Any], has_fp8: bool, weights: str, resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_sparsespec.support.has_fp8", lambda: has_fp8)
    assert settings_of(resolve(mem_fraction_static=0.8, **given)).draft_weights == weights


@pytest.mark.parametrize("given", [{"speculative_num_steps": 3}, {"speculative_num_draft_tokens": 4}])
def test_either_flag_of_the_draft_length_sets_the_other(given: dict[str, int], resolve: Callable[..., Any]) -> None:
    args = in_force(resolve(**given))
    assert (args.speculative_num_steps, args.speculative_num_draft_tokens) == (3, 4)


@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "given", "steps"),
    [
        (64, 8, {}, 7),  # eight of them for each KV head: 72 rows, or 64
        (64, 4, {}, 7),  # 144 rows, or 128
        (64, 8, {"speculative_num_steps": 8}, 8),
        (64, 8, {"speculative_num_draft_tokens": 9}, 8),
        (64, 8, {"sparsespec_draft_policy": "vegas"}, 6),
        (28, 4, {}, 8),  # 63 rows
        (16, 8, {}, 8),  # 18 rows, or 16: both are fast
        (96, 8, {}, 8),  # 108 rows, or 96: one tile
    ],
)
def test_a_window_needs_no_wider_tile_for_its_last_draft(
    query_heads: int, kv_heads: int, given: dict[str, Any], steps: int, resolve: Callable[..., Any], tmp_path: Path
) -> None:
    heads = {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads, "hidden_size": 16 * query_heads}
    args = in_force(resolve(model_path=write_config(tmp_path / "model", heads), **given))
    assert (args.speculative_num_steps, args.speculative_num_draft_tokens) == (steps, steps + 1)


def test_the_algorithms_name_is_case_insensitive(resolve: Callable[..., Any]) -> None:
    args = in_force(resolve(speculative_algorithm="SparseSpec"))
    assert args.speculative_algorithm == ALGORITHM and args.attention_backend == ATTENTION_BACKEND


def test_the_users_attention_backend_runs_prefill(resolve: Callable[..., Any]) -> None:
    args = in_force(resolve(attention_backend="triton"))
    assert args.attention_backend == ATTENTION_BACKEND
    assert settings_of(args).base_attention_backend == "triton"


def test_graphs_are_off_on_cpu_and_overlap_scheduling_stays(resolve: Callable[..., Any]) -> None:
    from sglang.srt.model_executor.cuda_graph_config import Backend

    args = in_force(resolve())
    assert args.disable_cuda_graph
    assert args.cuda_graph_config.decode.backend == args.cuda_graph_config.prefill.backend == Backend.DISABLED


@pytest.mark.parametrize(("asked", "kept"), [("full", "disabled"), ("breakable", "breakable")])
def test_prefill_graphs_that_would_capture_attention_are_off(asked: str, kept: str, resolve: Callable[..., Any]) -> None:
    from sglang.srt.model_executor.cuda_graph_config import Backend

    args = in_force(resolve(device="cuda", mem_fraction_static=0.8, cuda_graph_backend_prefill=asked))
    assert args.cuda_graph_config.prefill.backend == kept
    assert args.cuda_graph_config.decode.backend != Backend.DISABLED


def test_the_users_request_limit_is_kept(resolve: Callable[..., Any]) -> None:
    assert in_force(resolve(max_running_requests=5)).max_running_requests == 5


def test_mixed_chunks_become_rounds_between_chunks(
    resolve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        args = in_force(resolve(enable_mixed_chunk=True))
    assert args.enable_mixed_chunk is False  # SGLang asserts so
    assert settings_of(args).prefill_beside_decoding
    assert "--enable-mixed-chunk" in caplog.text and "take turns" in caplog.text
    assert not settings_of(resolve()).prefill_beside_decoding


def test_rounds_between_chunks_travel_to_another_process(resolve: Callable[..., Any]) -> None:
    args = pickle.loads(pickle.dumps(resolve(enable_mixed_chunk=True, sparsespec_schedule="unified")))
    assert settings_of(args).prefill_beside_decoding and settings_of(args).schedule == "unified"


# ------------------------------------------------------------------------ refusals

#: Arguments ("LLAMA" stands for a model folder), and what the message must name: flag and remedy.
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "FP8 drafts in unified batches": (
        {"sparsespec_draft_weights": "fp8", "sparsespec_schedule": "unified"},
        "--sparsespec-draft-weights fp8 together with --sparsespec-schedule unified",
        "--sparsespec-draft-weights model",
    ),
    "FP8 drafts on an old GPU": (
        {"sparsespec_draft_weights": "fp8", "device": "cuda", "mem_fraction_static": 0.8},
        "--sparsespec-draft-weights fp8 is not supported",
        "--sparsespec-draft-weights model",
    ),
    "budget ratio 0": ({"sparsespec_budget_ratio": 0.0}, "--sparsespec-budget-ratio", "0.05 is the default"),
    "budget ratio 2": ({"sparsespec_budget_ratio": 2.0}, "--sparsespec-budget-ratio", r"in \(0, 1\]"),
    "min budget 0": ({"sparsespec_min_budget": 0}, "--sparsespec-min-budget", "128 is the default"),
    "min budget below the window": (
        {"sparsespec_min_budget": 8},
        "--sparsespec-min-budget 8",
        "verify window of 9 tokens; use --sparsespec-min-budget 128",
    ),
    "window above the min budget": (
        {"sparsespec_min_budget": 64, "speculative_num_steps": 200},
        "--sparsespec-min-budget 64",
        "use --sparsespec-min-budget 201 or fewer --speculative-num-steps",
    ),
    "draft policy": (
        {"sparsespec_draft_policy": "x"},
        "--sparsespec-draft-policy",
        "pillar, window, streaming",
    ),
    "n-gram proposals in staggered rounds": (
        {"sparsespec_draft_policy": "triforce", "sparsespec_schedule": "unified"},
        "--sparsespec-schedule unified together with --sparsespec-draft-policy triforce",
        "use --sparsespec-schedule lockstep",
    ),
    "num sinks": ({"sparsespec_num_sinks": -1}, "--sparsespec-num-sinks", "must not be negative"),
    "kernels": ({"sparsespec_kernels": "x"}, "--sparsespec-kernels", "auto, torch, triton, flashinfer"),
    "speculate": ({"sparsespec_speculate": "x"}, "--sparsespec-speculate", "always, auto, never"),
    "plain rounds under a policy for study": (
        {"sparsespec_speculate": "auto", "sparsespec_draft_policy": "triforce"},
        "--sparsespec-speculate auto together with --sparsespec-draft-policy triforce",
        "use --sparsespec-speculate always",
    ),
    "schedule": ({"sparsespec_schedule": "x"}, "--sparsespec-schedule", "lockstep, unified"),
    "triton kernels on cpu": (
        {"sparsespec_kernels": "triton"},
        "--sparsespec-kernels triton",
        "the device is not CUDA; use --sparsespec-kernels auto",
    ),
    "flashinfer kernels on cpu": (
        {"sparsespec_kernels": "flashinfer"},
        "--sparsespec-kernels flashinfer",
        "the device is not CUDA; use --sparsespec-kernels auto",
    ),
    "negative host tier": ({"sparsespec_host_kv_gb": -1.0}, "--sparsespec-host-kv-gb", "0 for no host tier"),
    "host tier by name": ({"sparsespec_host_kv_gb": "all"}, "--sparsespec-host-kv-gb", "'auto'"),
    "draft model": ({"speculative_draft_model_path": "LLAMA"}, "--speculative-draft-model-path", "remove it"),
    "eagle topk": ({"speculative_eagle_topk": 2}, "--speculative-eagle-topk", "remove it"),
    "adaptive": ({"speculative_adaptive": True}, "--speculative-adaptive", "remove it"),
    "threshold single": (
        {"speculative_accept_threshold_single": 0.5},
        "--speculative-accept-threshold-single",
        "output distribution; remove it",
    ),
    "threshold acc": (
        {"speculative_accept_threshold_acc": 0.5},
        "--speculative-accept-threshold-single/-acc",
        "output distribution; remove it",
    ),
    "prefill server": (
        {"disaggregation_mode": "prefill"},
        "--disaggregation-mode prefill",
        "without disaggregation",
    ),
    "decode server": (
        {"disaggregation_mode": "decode"},
        "--disaggregation-mode decode",
        "without disaggregation",
    ),
    "dp attention": (
        {"enable_dp_attention": True, "dp_size": 2, "tp_size": 2},
        "--enable-dp-attention",
        "use --dp-size replicas",
    ),
    "all-to-all between experts": (
        {"moe_a2a_backend": "deepep", "tp_size": 2},
        "--moe-a2a-backend deepep",
        "use --ep-size without it",
    ),
    "dense layers on one rank": ({"moe_dense_tp_size": 1, "tp_size": 2}, "--moe-dense-tp-size 1", "remove it"),
    "pipeline": ({"pp_size": 2}, "--pp-size", "use --tp-size"),
    "decode context parallelism": ({"dcp_size": 2, "tp_size": 2}, "--dcp-size", "use --tp-size"),
    "attention context parallelism": ({"attn_cp_size": 2, "tp_size": 2}, "--attn-cp-size", "use --tp-size"),
    "lora backend": (
        {"enable_lora": True, "lora_backend": "triton", "device": "cuda", "mem_fraction_static": 0.8},
        "--lora-backend triton",
        "use --lora-backend csgmv",
    ),
    "lora backend with paths": (
        {"lora_paths": ["a=x"], "lora_backend": "torch_native", "device": "cuda", "mem_fraction_static": 0.8},
        "--lora-backend torch_native",
        "use --lora-backend csgmv",
    ),
    "two batch overlap": ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap", "remove it"),
    "pdmux": ({"enable_pdmux": True}, "--enable-pdmux", "remove it"),
    "hisparse": ({"enable_hisparse": True}, "--enable-hisparse", "remove one of them"),
    "diffusion": ({"dllm_algorithm": "LowConfidence"}, "--dllm-algorithm", "remove it"),
    "torch compile": ({"enable_torch_compile": True}, "--enable-torch-compile", "remove it"),
    "embedding": ({"is_embedding": True}, "--is-embedding", "remove --speculative-algorithm"),
    "fp8 cache on CPU": ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2", "use --kv-cache-dtype auto"),
    "cache of another type": (
        {"kv_cache_dtype": "fp4_e2m1"},
        "--kv-cache-dtype fp4_e2m1",
        "use --kv-cache-dtype auto or fp8_e4m3",
    ),
    "page size": ({"page_size": 16}, "--page-size 16", "use --page-size 1"),
    "tokenizer workers of HTTP/2": (
        {"tokenizer_worker_num": 2, "enable_http2": True},
        "--tokenizer-worker-num above 1 with --enable-http2",
        "remove one of the two",
    ),
    "no steps": ({"speculative_num_steps": 0}, "--speculative-num-steps", "8 is the default"),
    "one draft token": (
        {"speculative_num_draft_tokens": 1},
        "--speculative-num-draft-tokens",
        "9 is the default",
    ),
    "steps and tokens equal": (
        {"speculative_num_steps": 3, "speculative_num_draft_tokens": 3},
        "--speculative-num-draft-tokens 3",
        "--speculative-num-steps 3 plus 1.*give one of the two",
    ),
    "more tokens than steps": (
        {"speculative_num_steps": 3, "speculative_num_draft_tokens": 8},
        "--speculative-num-draft-tokens 8",
        "give one of the two",
    ),
    "prefill backend": (
        {"prefill_attention_backend": "triton"},
        "--prefill-attention-backend triton",
        "use --sparsespec-base-attention-backend triton",
    ),
    "decode backend": (
        {"decode_attention_backend": "triton"},
        "--decode-attention-backend triton",
        "use --sparsespec-base-attention-backend triton",
    ),
    "two prefill backends": (
        {"attention_backend": "torch_native", "sparsespec_base_attention_backend": "triton"},
        "--attention-backend torch_native and --sparsespec-base-attention-backend triton",
        "give one of them",
    ),
    "unified memory": ({"enable_unified_memory": True}, "--enable-unified-memory", "remove it"),
    "host tier without radix cache": (
        {"sparsespec_host_kv_gb": 1.0, "disable_radix_cache": True},
        "--disable-radix-cache with --sparsespec-host-kv-gb",
        "--sparsespec-host-kv-gb 0",
    ),
    "two host tiers": (
        {"sparsespec_host_kv_gb": 1.0, "enable_hierarchical_cache": True},
        "--enable-hierarchical-cache with --sparsespec-host-kv-gb",
        "remove it",
    ),
    "SGLang's own host tier on a CPU": (
        {"enable_hierarchical_cache": True},
        "--enable-hierarchical-cache with --device cpu",
        "--sparsespec-host-kv-gb",
    ),
    "host tier and stripped thinking": (
        {"sparsespec_host_kv_gb": 1.0, "strip_thinking_cache": True},
        "--strip-thinking-cache with --sparsespec-host-kv-gb",
        "remove it",
    ),
    "host tiers of several nodes by their free memory": (
        {"sparsespec_host_kv_gb": "auto", "nnodes": 2, "tp_size": 2, "dist_init_addr": "127.0.0.1:1"},
        "--sparsespec-host-kv-gb auto with --nnodes 2",
        "give a size in GB",
    ),
}
if DECLARES_RESOLUTION:
    REFUSED |= {
        "groups of dp attention": ({"attn_dp_size": 2, "tp_size": 2}, "--enable-dp-attention", "use --dp-size replicas"),
        "watermark": ({"enable_watermark": True, "watermark_key": "a"}, "--enable-watermark", "remove it"),
    }


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsupported_combination_is_refused_with_flag_and_remedy(
    case: str, llama: str, resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # SGLang asks for the package of its HTTP/2 server first.
    monkeypatch.setitem(sys.modules, "granian", types.ModuleType("granian"))
    arguments, named, remedy = REFUSED[case]
    arguments = {name: llama if value == "LLAMA" else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=f"{re.escape(named)}.*{remedy}"):
        resolve(**arguments)


def test_every_refusal_is_tested() -> None:
    """Each entry of the two tables is named by a case; the device has a test of its own."""
    cases = [named for _, named, _ in REFUSED.values()]
    for refusal in REFUSALS[1:]:
        flag = refusal.flag.partition("{")[0].strip()
        assert any(flag in named or named in flag for named in cases), refusal.flag
    for _, what in MODEL_REFUSALS:
        assert any(named in what for named, _ in MODELS.values()), what


def test_another_device_is_refused(resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # SGLang asks the missing device for its memory before anything is validated.
    where = "arg_groups.memory_hook" if DECLARES_RESOLUTION else "server_args"
    monkeypatch.setattr(f"sglang.srt.{where}.get_device_memory_capacity", lambda device: None)
    with pytest.raises(ValueError, match="--device musa.*use --device cuda or cpu"):
        resolve(device="musa")


@pytest.mark.parametrize("model", MODELS)
def test_a_model_without_plain_grouped_query_attention_is_refused(
    model: str, tmp_path: Path, resolve: Callable[..., Any]
) -> None:
    what, changes = MODELS[model]
    path = write_config(tmp_path / model, changes)
    with pytest.raises(
        ValueError, match=rf"--model-path {path}: .*{what}.*serve it without --speculative-algorithm"
    ):
        # SGLang stops hybrid models earlier, on a machine without a GPU, unless the cache is off.
        resolve(model_path=path, disable_radix_cache=True)


#: As in MODELS.
SERVED: dict[str, dict[str, Any]] = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen2_with_sliding_window": {  # SGLang serves it without
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 64,
        "max_window_layers": 2,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "sliding_window": 64,
        "head_dim": 16,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "sliding_window": 64,
        "head_dim": 16,
    },
    "olmo3": {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "sliding_window": 64},
    "gpt_oss": GPT_OSS,
}


@pytest.mark.parametrize("model", SERVED)
def test_models_with_grouped_query_attention_are_accepted(
    resolve: Callable[..., Any], tmp_path: Path, model: str
) -> None:
    resolve(model_path=write_config(tmp_path / model, SERVED[model]))


def test_the_host_tier_is_refused_where_windows_have_a_pool_of_their_own(
    resolve: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="--sparsespec-host-kv-gb 1 .*sliding window"):
        resolve(model_path=write_config(tmp_path / "gpt_oss", GPT_OSS), sparsespec_host_kv_gb=1)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"use_irope": True}, "attention within chunks"),
        ({"num_heads": 8}, "other heads than layer 0"),
        ({"logit_cap": 50.0, "logit_capping_method": "fixed"}, "a logit cap by fixed"),
        ({"is_cross_attention": True}, "cross attention"),
        ({"attn_type": "encoder_only"}, "cross attention"),
        ({"v_head_dim": 8}, "head dims 16 and 8"),
        ({"num_kv_heads": 3}, "4 query heads for 3 KV heads"),
    ],
)
def test_a_layer_that_is_not_plain_grouped_query_attention_is_refused(
    change: dict[str, Any], what: str
) -> None:
    """The last check, on the loaded model itself."""
    import torch
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    from sglang_sparsespec.attention_backend.layers import attention_layers, window_reach

    def layer(layer_id: int, **changes: Any) -> RadixAttention:
        if "attn_type" in changes:
            changes["attn_type"] = AttentionType(changes["attn_type"])
        values = {
            "num_heads": 4,
            "head_dim": 16,
            "scaling": 1.0,
            "num_kv_heads": 2,
            "layer_id": layer_id,
            **changes,
        }
        return RadixAttention(**values)

    plain = torch.nn.ModuleList([layer(1), layer(0)])
    assert [found.layer_id for found in attention_layers(plain)] == [0, 1]
    wrapper = torch.nn.Module()  # as SGLang's of transformers' models
    wrapper.attention_instances = {0: layer(0), 1: layer(1)}
    assert attention_layers(torch.nn.ModuleList([wrapper])) == list(wrapper.attention_instances.values())
    with pytest.raises(
        ValueError, match=f"Layer 1 of this model has .*{what}.*without --speculative-algorithm"
    ):
        attention_layers(torch.nn.ModuleList([layer(0), layer(1, **change)]))
    with pytest.raises(ValueError, match="no attention layers"):
        attention_layers(torch.nn.Linear(2, 2))
    windows = [layer(0), layer(1, sliding_window_size=63), layer(2, sliding_window_size=63)]
    assert [window_reach(found) for found in attention_layers(torch.nn.ModuleList(windows))] == [None, 63, 63]
    with pytest.raises(ValueError, match="Layer 3 of this model has a sliding window of 31 tokens beside one of 63"):
        attention_layers(torch.nn.ModuleList([*windows, layer(3, sliding_window_size=31)]))
    with pytest.raises(ValueError, match="All layers of this model have a sliding window"):
        attention_layers(torch.nn.ModuleList(windows[1:]))


def test_sinks_are_found_beside_their_layers_and_nowhere_else() -> None:
    import torch
    from sglang.srt.layers.radix_attention import RadixAttention

    from sglang_sparsespec.attention_backend.layers import attention_sinks, check_sinks

    def block(layer_id: int) -> torch.nn.Module:
        module = torch.nn.Module()
        module.attn = RadixAttention(num_heads=4, head_dim=16, scaling=1.0, num_kv_heads=2, layer_id=layer_id)
        return module

    model = torch.nn.ModuleList([block(0), block(1)])
    model[1].sinks = torch.nn.Parameter(torch.zeros(4))
    found = attention_sinks(model)
    assert list(found) == [1] and found[1] is model[1].sinks
    check_sinks(None, found.get(0), 0)
    check_sinks(model[1].sinks, found.get(1), 1)
    check_sinks(model[1].sinks.detach(), found.get(1), 1)  # another tensor over the same memory
    for sinks, layer_id in ((torch.zeros(4), 0), (torch.zeros(4), 1), (None, 1)):
        with pytest.raises(ValueError, match=f"Layer {layer_id} of this model has attention sinks"):
            check_sinks(sinks, found.get(layer_id), layer_id)


@pytest.fixture
def create_backend() -> Callable[..., Any]:
    """SGLang's factory of the backend ``sparsespec``, given a model runner's algorithm and arguments."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    def create(spec_algorithm: Any, server_args: Any) -> Any:
        runner = SimpleNamespace(spec_algorithm=spec_algorithm, server_args=server_args)
        return ATTENTION_BACKENDS[ATTENTION_BACKEND](runner)

    return create


def test_the_attention_backend_alone_is_refused(
    create_backend: Callable[..., Any], resolve: Callable[..., Any]
) -> None:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    args = resolve(speculative_algorithm=None, attention_backend=ATTENTION_BACKEND)
    with pytest.raises(ValueError, match=f"--attention-backend {ATTENTION_BACKEND}.*give both or neither"):
        create_backend(SpeculativeAlgorithm.NONE, args)


@pytest.mark.parametrize("name", ["nonsense", ATTENTION_BACKEND])
def test_an_unknown_prefill_backend_is_refused(name: str, resolve: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=f"--sparsespec-base-attention-backend {name}.*leave it out"):
        resolve(sparsespec_base_attention_backend=name)


def test_the_host_tier_is_sglangs_hierarchical_cache(llama: str, resolve: Callable[..., Any]) -> None:
    args = in_force(resolve(model_path=llama, sparsespec_host_kv_gb=3.0, tp_size=2))
    assert args.enable_hierarchical_cache and args.hicache_size == 1.5
    # write_back copies while it evicts, in the way of the next round.
    assert args.hicache_write_policy == "write_through_selective"
    # The layout and the kernels that copy all tokens of a node at once.
    assert (args.hicache_mem_layout, args.hicache_io_backend) == ("layer_first", "kernel")
    assert not in_force(resolve(model_path=llama)).enable_hierarchical_cache


def test_an_automatic_host_tier_takes_half_of_the_free_memory(
    llama: str, resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil
    from sglang.srt.mem_cache.pool_host.base import HICACHE_HOST_MEMORY_RESERVE_BYTES as RESERVE

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=RESERVE + 8e9, total=64e9))
    assert in_force(resolve(model_path=llama, sparsespec_host_kv_gb="auto")).hicache_size == pytest.approx(4.0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=RESERVE - 1, total=64e9))
    with pytest.raises(ValueError, match="--sparsespec-host-kv-gb auto: no host memory"):
        resolve(model_path=llama, sparsespec_host_kv_gb="auto")


# ------------------------------------------------------------------------ LoRA


@pytest.mark.parametrize(("device", "backend"), [("cpu", "torch_native"), ("cuda", "csgmv")])
def test_adapters_are_served_by_the_backend_that_knows_verifications(
    device: str, backend: str, resolve: Callable[..., Any]
) -> None:
    made = resolve(device=device, mem_fraction_static=0.8, lora_paths=["a=x"])
    check_lora(made)
    args = in_force(made)
    assert args.enable_lora and args.lora_backend == backend
    assert args.speculative_algorithm == ALGORITHM
    assert [ref.lora_name for ref in args.lora_paths] == ["a"]


def test_sglang_refuses_adapters_under_other_algorithms(llama: str) -> None:
    from sglang.srt.server_args import ServerArgs

    with pytest.raises(ValueError, match="NGRAM"):
        check_lora(ServerArgs(model_path=llama, device="cpu"), speculative_algorithm="STANDALONE", enable_lora=True)


def test_arguments_that_sglang_refuses_leave_the_algorithm_in_place(resolve: Callable[..., Any]) -> None:
    args = resolve()
    with pytest.raises(AssertionError, match="lora-paths"):
        check_lora(args, enable_lora=True)
    assert args.speculative_algorithm == ALGORITHM
