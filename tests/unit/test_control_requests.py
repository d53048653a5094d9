"""A control request that fails is answered; the scheduler goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang.srt.managers import io_struct
from sglang.srt.managers.scheduler import Scheduler

from sglang_sparsespec.scheduler_patch.control_requests import failure_of


class Broken:
    """All methods fail."""

    def __getattr__(self, name: str) -> Any:
        def fail(*args: Any) -> None:
            raise RuntimeError(f"{name} failed")

        return fail


def dispatcher(algorithm: str | None, plugin: None) -> Any:
    """The dispatcher of a scheduler whose handlers all fail."""
    scheduler = object.__new__(Scheduler)
    parts = ("weight_updater", "flush_wrapper", "profiler_manager", "session_controller", "external_corpus_manager")
    scheduler.__dict__.update(dict.fromkeys(parts, Broken()), server_args=SimpleNamespace(speculative_algorithm=algorithm))
    scheduler.init_request_dispatcher()
    return scheduler._request_dispatcher


@pytest.mark.parametrize(
    "name", ["UpdateWeightsFromTensor", "UpdateWeightsFromIPC", "UpdateWeightsFromDistributed", "FlushCache"]
)
def test_a_request_that_fails_is_answered_with_its_error(name: str, plugin: None) -> None:
    kind = getattr(io_struct, f"{name}ReqInput")
    request = kind(**{field.name: None for field in msgspec.structs.fields(kind) if field.required})
    answer = dispatcher("SPARSESPEC", plugin)(request)
    assert type(answer) is getattr(io_struct, f"{name}ReqOutput")
    assert not answer.success and "failed" in answer.message
    with pytest.raises(RuntimeError):
        dispatcher(None, plugin)(request)


def test_requests_for_tokens_are_not_guarded(plugin: None) -> None:
    """An error there is the scheduler's own, and must be seen."""
    for name in ("TokenizedGenerateReqInput", "TokenizedEmbeddingReqInput", "AbortReq"):
        assert failure_of(getattr(io_struct, name), "") is None


def test_every_guarded_request_has_an_answer() -> None:
    names = [name for name in dir(io_struct) if name.endswith("ReqInput")]
    answered = [name for name in names if failure_of(getattr(io_struct, name), "x") is not None]
    assert len(answered) > 12 and "OpenSessionReqInput" in answered and "LoadLoRAAdapterReqInput" in answered
