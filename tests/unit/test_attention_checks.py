"""Where SGLang's list of attention backends with sinks is gone round: for gpt-oss, while SGLang looks into it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_sparsespec import ALGORITHM, ATTENTION_BACKEND
from sglang_sparsespec.scheduler_patch import attention_checks, cpu
from sglang_sparsespec.scheduler_patch.attention_checks import attention_has_sinks, model_checks

OURS = (ATTENTION_BACKEND, ATTENTION_BACKEND)


def found_by_sglang(monkeypatch: pytest.MonkeyPatch, architecture: str, backends: tuple[str, str], **args: Any) -> Any:
    """What SGLang's checks of a model get; None: the backends as they are."""
    config = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
    monkeypatch.setattr(attention_checks, "model_config_of", lambda server_args: config)
    found = []
    server_args = SimpleNamespace(**{"speculative_algorithm": ALGORITHM, **args})
    model_checks(lambda checked: found.append(attention_has_sinks(backends, checked)), server_args)
    return found[0]


def test_gpt_oss_has_a_listed_backend_while_it_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found_by_sglang(monkeypatch, "GptOssForCausalLM", OURS) == ("triton", "triton")
    assert found_by_sglang(monkeypatch, "GptOssForCausalLM", ("fa3", ATTENTION_BACKEND)) == ("fa3", "triton")
    # Asked from elsewhere, with whatever SGLang passes there.
    assert attention_has_sinks(OURS, object()) is None


def test_all_else_is_as_sglang_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found_by_sglang(monkeypatch, "LlamaForCausalLM", OURS) is None
    assert found_by_sglang(monkeypatch, "GptOssForCausalLM", ("torch_native", "torch_native")) is None
    plain = {"speculative_algorithm": None}
    assert found_by_sglang(monkeypatch, "GptOssForCausalLM", OURS, **plain) is None
    monkeypatch.setenv(cpu.CPU_BRIDGE_ENV, "1")
    found = found_by_sglang(monkeypatch, "GptOssForCausalLM", ("torch_native", "torch_native"), **plain)
    assert found == ("triton", "triton"), "plain SGLang on a CPU, as a baseline"


def test_a_model_with_another_list_of_backends_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(hf_config=SimpleNamespace(architectures=["Exaone4ForCausalLM"]))
    monkeypatch.setattr(attention_checks, "model_config_of", lambda server_args: config)
    server_args = SimpleNamespace(speculative_algorithm=ALGORITHM, model_path="exaone")

    def check(found: str) -> None:
        def original(checked: Any) -> None:
            raise AssertionError(f"one of ['fa3'] is required, but got {found}")

        model_checks(original, server_args)

    with pytest.raises(ValueError, match="--model-path exaone: .* serve it without --speculative-algorithm"):
        check(ATTENTION_BACKEND)
    with pytest.raises(AssertionError, match="flashinfer"):
        check("flashinfer")
