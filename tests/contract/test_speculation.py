"""What SGLang does with an algorithm that it does not know: why some hooks exist, and why rounds are as they are."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention import base_attn_backend
from sglang.srt.model_executor import forward_batch_info
from sglang.srt.speculative import eagle_utils
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo
from sglang_parts import draft_batch, verify_graph_runner

import sglang_sparsespec
from sglang_sparsespec import ALGORITHM

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("plugin")]

MISSING_METHODS = {"create_future_map", "carries_draft_hidden_states", "need_topk"}


@pytest.fixture
def algorithm() -> Any:
    return SpeculativeAlgorithm.from_string(ALGORITHM)


def test_sglang_calls_methods_that_custom_algorithms_lack() -> None:
    assert MISSING_METHODS <= set(vars(SpeculativeAlgorithm))
    assert not MISSING_METHODS & set(dir(CustomSpecAlgo))


@pytest.mark.skipif(hasattr(base_attn_backend, "SharedReadEnds"), reason="the backend says when tables have been read")
def test_sglang_calls_tables_read_when_a_decode_graph_starts(algorithm: Any) -> None:
    """After a draft step, the scheduler could then write to ``req_to_token`` before the verification."""
    runner = verify_graph_runner(9, algorithm)
    events: list[str] = []
    runner.__dict__.update(
        backend=SimpleNamespace(
            replay_session=contextlib.nullcontext, replay=lambda key, batch: pytest.fail("not reached")
        ),
        load_batch=lambda *args: events.append("loaded"),
        attn_backend=SimpleNamespace(use_captured_forward_metadata_for_breakable_cuda_graph=False),
        device_module=SimpleNamespace(
            Event=lambda: SimpleNamespace(record=lambda: events.append("read done"))
        ),
        _replay_graph_key=None,
    )
    with pytest.raises(pytest.fail.Exception, match="not reached"):
        runner.execute(draft_batch(None))
    assert events == ["loaded", "read done"]
    assert runner.model_runner.war_fastpath_read_done_event is not None


def test_sglang_counts_the_current_token_in_decode_lengths() -> None:
    """A DECODE batch of length n works on position n - 1; a TARGET_VERIFY batch of length n begins at n."""
    clamp = getattr(forward_batch_info, "_clamp_position_native", forward_batch_info.clamp_position)
    assert clamp(torch.tensor([5, 1, 0])).tolist() == [4, 0, 0]


def test_sglang_verifies_every_request_greedily_without_a_gpu() -> None:
    """Temperature is ignored by ``eagle_sample`` there, so the plugin accepts by its own rule."""
    if hasattr(eagle_utils, "_verify_uses_greedy"):
        others = dict.fromkeys(("is_all_greedy", "is_hip", "is_xpu", "use_rejection_sampling"), False)
        assert eagle_utils._verify_uses_greedy(is_cpu=True, **others)
    else:
        assert "is_all_greedy or _is_cpu or" in inspect.getsource(eagle_utils.eagle_sample)
    package = Path(sglang_sparsespec.__file__).parent
    sources = [package / "worker.py", *package.glob("rounds/*.py"), *package.glob("sampling/*.py")]
    assert len(sources) > 1 and not any("eagle_sample" in path.read_text() for path in sources)
