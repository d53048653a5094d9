"""A hook that does nothing ends the start-up: each check, and the change of SGLang that it finds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.overlap_utils import FutureMap
from sglang.srt.mem_cache import allocation_sizing
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang_parts import resolved

from sglang_sparsespec import ALGORITHM, flags, hook_registry
from sglang_sparsespec.scheduler_patch import cpu, draft_weights, slots
from sglang_sparsespec.sglang_compat import DECLARES_RESOLUTION, SUPPORTED, VERSION, in_force
from sglang_sparsespec.start_checks import check_relay, check_row_width, check_settings_arrive

pytestmark = pytest.mark.usefixtures("plugin")

UNFIT = f"does not fit this sglang {VERSION}"
CONTEXT = 64


# ------------------------------------------------------------------------------- hooks


def test_the_hooked_functions_are_as_recorded() -> None:
    assert set(hook_registry.recorded_targets()) == set(SUPPORTED)
    hook_registry.assert_hooks_applied()


@pytest.mark.parametrize("recorded", [{}, {"sglang.srt.models.llama.LlamaAttention.forward": "(self, other)"}])
def test_a_function_with_other_parameters_is_named(recorded: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    target = "sglang.srt.models.llama.LlamaAttention.forward"
    monkeypatch.setattr(hook_registry, "_TARGETS", [target])
    monkeypatch.setattr(hook_registry, "recorded_targets", lambda: {VERSION: recorded})
    with pytest.raises(RuntimeError, match=f"{UNFIT}.*{target}.*reinstall sglang=={VERSION}"):
        hook_registry.assert_hooks_applied()


def test_parameters_are_those_of_sglangs_own_function() -> None:
    assert hook_registry.parameters_of("sglang.srt.models.llama.LlamaAttention.forward") == (
        "(self, positions, hidden_states, forward_batch)"
    )


# ---------------------------------------------------------------------------- settings


def test_settings_that_do_not_arrive_end_the_start_up(
    monkeypatch: pytest.MonkeyPatch, resolve: Callable[..., Any]
) -> None:
    """As with a hook on a constructor that SGLang does not call."""
    check_settings_arrive()
    monkeypatch.setattr(flags, "attach_settings", lambda server_args, settings: None)
    with pytest.raises(RuntimeError, match=f"{UNFIT}: its flags of the command line have no effect"):
        check_settings_arrive()
    with pytest.raises(RuntimeError, match=UNFIT):
        resolve()


def test_keywords_that_do_not_arrive_end_the_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

    def without_settings(**kwargs: Any) -> Any:
        return ServerArgs(**{name: value for name, value in kwargs.items() if not name.startswith("sparsespec_")})

    monkeypatch.setattr(Engine, "server_args_class", staticmethod(without_settings))
    with pytest.raises(RuntimeError, match=f"{UNFIT}: its keywords of sglang.Engine have no effect"):
        check_settings_arrive()


def test_another_attention_backend_ends_the_start_up(resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "claim_attention_backend", lambda asked_for, settings: ({}, settings))
    with pytest.raises(RuntimeError, match=f"{UNFIT}: the attention backend is "):
        resolve()


def test_values_that_nobody_gave_are_read_as_resolved(
    serving_args: Callable[[Any], None], resolve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer SGLang keeps what was asked for in ``ServerArgs``: no device, no draft length."""
    module = "arg_groups.serving_hook" if DECLARES_RESOLUTION else "server_args"
    monkeypatch.setattr(f"sglang.srt.{module}.get_device", lambda: "cpu")
    args = resolve(device=None)
    assert in_force(args).device == "cpu" and in_force(args).speculative_num_steps == 8
    assert (args.device is None) is DECLARES_RESOLUTION
    serving_args(args)
    assert cpu.serving_sparsespec_on_cpu()


def test_an_argument_of_a_server_can_be_resolved_but_once(resolve: Callable[..., Any]) -> None:
    args = resolve(attention_backend="triton")
    assert in_force(resolved(args)).attention_backend == "sparsespec"


# -------------------------------------------------------------------------------- pools


@pytest.fixture
def runner(serving_args: Callable[[Any], None], resolve: Callable[..., Any]) -> Any:
    """A model runner with rows as long as SGLang makes them, while it serves SPARSESPEC."""
    args = resolve()
    serving_args(args)
    given = () if DECLARES_RESOLUTION else (args,)
    width = CONTEXT + allocation_sizing.get_req_to_token_extra_context_len(*given)
    return SimpleNamespace(
        device="cpu",
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(8, width, dtype=torch.int32)),
        model_config=SimpleNamespace(context_len=CONTEXT),
        spec_algorithm=SpeculativeAlgorithm.from_string(ALGORITHM),
    )


def test_rows_are_long_enough(runner: Any) -> None:
    check_row_width(runner)


def test_rows_that_sglang_did_not_widen_end_the_start_up(runner: Any) -> None:
    """SGLang adds W + 4 tokens to a row."""
    rows = runner.req_to_token_pool
    rows.req_to_token = rows.req_to_token[:, : CONTEXT + 9 + 4]
    with pytest.raises(RuntimeError, match=f"{UNFIT}: rows of req_to_token have 77 entries, and rounds may need 82"):
        check_row_width(runner)


def test_rows_are_widened_whether_sglang_hands_over_its_arguments_or_not(runner: Any) -> None:
    """A hook that waits for arguments that no longer come would leave them as they are."""
    if DECLARES_RESOLUTION:
        assert slots.row_room_for_reserve(13) == 18


def test_a_round_is_handed_on(runner: Any) -> None:
    check_relay(runner)


def test_a_relay_that_loses_tokens_ends_the_start_up(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FutureMap, "stash_bonus_tokens", lambda *args: None, raising=False)
    monkeypatch.setattr(FutureMap, "stash", lambda relay, rows, payload: None)
    with pytest.raises(RuntimeError, match=f"{UNFIT}: a round is not handed on"):
        check_relay(runner)


# -------------------------------------------------------------------------- linear layers


def test_parameters_that_a_newer_sglang_adds_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """``_compute_lm_head(out=)`` and ``RMSNorm.forward_cuda(quant_linear=)``."""
    monkeypatch.setattr(draft_weights, "weights_in_use", lambda: None)
    calls: list[Any] = []

    def original(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))

    draft_weights.use_copy_of_head(original, "processor", "hidden", "head", None, out="buffer")  # type: ignore[arg-type]
    draft_weights.quantise_norm(original, "norm", "x", quant_linear="layer")  # type: ignore[arg-type]
    assert calls == [
        (("processor", "hidden", "head", None), {"out": "buffer"}),
        (("norm", "x", None, None), {"quant_linear": "layer"}),
    ]
