"""What SGLang assumes of a speculative algorithm, shown and avoided.

A test named ``sglang_...`` shows what SGLang does without the hook: when it fails after an update of SGLang, the hook may
have become unnecessary or wrong.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache import kv_cache_builder
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.speculative import spec_info
from sglang.srt.speculative.ngram_info import NgramVerifyInput
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang_parts import draft_batch, dummy_verify_input, needs_hook, verify_graph_runner

from sglang_sparsespec import ALGORITHM
from sglang_sparsespec.algorithm import SparseSpecAlgorithm
from sglang_sparsespec.scheduler_patch import hooks
from sglang_sparsespec.scheduler_patch.hooks import no_kv_move_kernel, time_rounds, verify_graph_spec_info
from sglang_sparsespec.spec_input import SparseSpecDraftInput, SparseSpecVerifyInput
from sglang_sparsespec.worker import SparseSpecWorker

pytestmark = pytest.mark.usefixtures("plugin")

VOCAB = 32


@pytest.fixture
def algorithm() -> Any:
    return SpeculativeAlgorithm.from_string(ALGORITHM)


@pytest.fixture
def serving(serving_args: Callable[[Any], None], resolve: Callable[..., Any]) -> None:
    """This process serves SPARSESPEC on CPU."""
    serving_args(resolve())


# ------------------------------------------------------------- the algorithm's interface


def test_the_algorithm_has_every_method_of_sglangs_own() -> None:
    """So that no call site meets an AttributeError, whatever the method's name begins with."""
    methods = {
        name
        for name, value in vars(SpeculativeAlgorithm).items()
        if callable(value) and not name.startswith("_") and not isinstance(value, SpeculativeAlgorithm)
    }
    methods -= {"from_string", "register"}  # class methods of the enum
    methods -= {"get_platform_worker_cls"}  # of workers that SGLang has itself
    assert {"create_future_map", "carries_draft_hidden_states", "need_topk"} < methods
    assert methods <= set(dir(SparseSpecAlgorithm))


def test_the_algorithm_passes_for_no_other(algorithm: Any) -> None:
    true = {name for name in dir(algorithm) if name.startswith("is_") and getattr(algorithm, name)()}
    assert true == {"is_some", "is_speculative"}


def test_the_algorithm_relays_only_tokens_and_lengths(algorithm: Any) -> None:
    assert not algorithm.need_topk() and not algorithm.carries_draft_hidden_states()


# ------------------------------------------------------------------------------ start-up


def test_sglang_sizes_the_kv_pool_after_capture_and_tells_no_worker() -> None:
    """``SGLANG_ENABLE_POST_CAPTURE_KV_SIZING``: when workers capture, slots have no memory behind them yet."""
    source = inspect.getsource(inspect.unwrap(Scheduler.init_model_worker))
    capture, resize = source.index("self.init_all_cuda_graphs()"), source.index("post_capture_resize_kv_pool(")
    told = source[resize:].replace("self.draft_worker._draft_model_runners()", "")  # a draft model's pool is resized too
    assert capture < resize and "self.draft_worker." not in told


def test_rounds_are_timed_when_the_workers_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    class Worker:
        measured = 0
        model_runner = "runner"

        def measure_rounds(self) -> None:
            self.measured += 1

    monkeypatch.setattr(hooks, "SparseSpecWorker", Worker)
    checked: list[tuple[str, Any]] = []
    for check in ("check_row_width", "check_relay"):
        monkeypatch.setattr(hooks, check, lambda runner, check=check: checked.append((check, runner)))
    worker = Worker()
    time_rounds(None, SimpleNamespace(draft_worker=worker))
    time_rounds(None, SimpleNamespace(draft_worker=None))
    time_rounds(None, SimpleNamespace(draft_worker=SimpleNamespace()))
    assert worker.measured == 1
    assert checked == [("check_row_width", "runner"), ("check_relay", "runner")]


# ------------------------------------------------------------ no draft worker, no draft pool


@needs_hook("no_draft_kv_pool")
def test_sglang_looks_for_a_draft_kv_pool_in_an_absent_draft_worker(algorithm: Any) -> None:
    worker: Any = SimpleNamespace(draft_worker=None)
    args: Any = SimpleNamespace(enable_multi_layer_eagle=False)
    asked = {"draft_worker": worker, "spec_algorithm": algorithm, "server_args": args}
    with pytest.raises(AttributeError, match="draft_runner"):
        kv_cache_builder.get_draft_kv_pool.__wrapped__(**asked)
    assert kv_cache_builder.get_draft_kv_pool(**asked) is None


@needs_hook("no_draft_kv_pool")
def test_other_algorithms_draft_kv_pool_is_found() -> None:
    pool = object()
    runner = SimpleNamespace(token_to_kv_pool=pool)
    worker: Any = SimpleNamespace(draft_worker=SimpleNamespace(draft_runner=runner))
    args: Any = SimpleNamespace(enable_multi_layer_eagle=False)
    eagle, none = SpeculativeAlgorithm.EAGLE, SpeculativeAlgorithm.NONE
    assert kv_cache_builder.get_draft_kv_pool(draft_worker=worker, spec_algorithm=eagle, server_args=args) is pool
    assert kv_cache_builder.get_draft_kv_pool(draft_worker=None, spec_algorithm=none, server_args=args) is None


@pytest.mark.usefixtures("serving")
def test_sglang_warms_up_a_kernel_that_moves_accepted_kv() -> None:
    """A chain's accepted tokens are in place; the kernel is Triton, which a CPU lacks."""
    pool = SimpleNamespace(layer_num=1)
    with pytest.raises(AttributeError):
        MHATokenToKVPool._init_kv_copy_and_warmup.__wrapped__(pool)
    MHATokenToKVPool._init_kv_copy_and_warmup(pool)
    assert pool._kv_copy_config is None


@pytest.mark.usefixtures("serving_plain")
def test_kv_pools_prepare_to_move_tokens_without_the_algorithm() -> None:
    prepared: list[object] = []
    pool = object()
    no_kv_move_kernel(prepared.append, pool)
    assert prepared == [pool]


# ----------------------------------------------------------------------- the verify graph


def test_sglang_replays_the_verify_graph_for_one_token_batches(algorithm: Any) -> None:
    """Unless their spec info says how wide they are, and ours does."""
    runner = verify_graph_runner(9, algorithm)
    unmarked = SparseSpecDraftInput(torch.zeros(2), torch.zeros(2))
    unmarked.num_tokens_per_req = -1
    assert runner.can_run_graph(draft_batch(unmarked))
    assert runner.can_run_graph(draft_batch(None))
    assert runner.can_run_graph(draft_batch(SparseSpecVerifyInput(9, None)))
    assert not runner.can_run_graph(draft_batch(SparseSpecDraftInput(torch.zeros(2), torch.zeros(2))))


@pytest.mark.usefixtures("serving")
def test_sglang_captures_unknown_algorithms_without_a_verify_input(algorithm: Any) -> None:
    mask = torch.ones(1, dtype=torch.bool)
    assert dummy_verify_input(spec_info.create_dummy_verify_input.__wrapped__, algorithm, mask, 9) is None
    captured = dummy_verify_input(spec_info.create_dummy_verify_input, algorithm, mask, 9)
    assert isinstance(captured, SparseSpecVerifyInput)
    assert captured.draft_token_num == captured.num_tokens_per_req == 9 and captured.custom_mask is None
    assert captured.is_verify_input() and not captured.is_draft_input()


def test_sglang_captures_the_verify_graph_of_unknown_algorithms_without_one(algorithm: Any) -> None:
    runner = verify_graph_runner(9, algorithm)
    assert DecodeCudaGraphRunner.get_spec_info.__wrapped__(runner, 18) is None
    captured = runner.get_spec_info(18)
    assert isinstance(captured, SparseSpecVerifyInput) and captured.num_tokens_per_req == 9


@pytest.mark.usefixtures("serving")
def test_other_algorithms_capture_their_own_verify_input() -> None:
    mask = torch.ones(1, dtype=torch.bool)
    create = spec_info.create_dummy_verify_input
    assert dummy_verify_input(create, SpeculativeAlgorithm.NONE, mask, 9) is None
    ngram = dummy_verify_input(create, SpeculativeAlgorithm.NGRAM, mask, 9)
    assert isinstance(ngram, NgramVerifyInput) and ngram.custom_mask is mask


def test_other_algorithms_capture_graphs_with_their_own_input() -> None:
    runner = SimpleNamespace(model_runner=SimpleNamespace(spec_algorithm=SpeculativeAlgorithm.NGRAM))
    assert verify_graph_spec_info("original", runner) is None, "None keeps the original"


# ---------------------------------------------------------------------------- the worker


@pytest.mark.parametrize("name", ["__init__", "forward_batch_generation"])
def test_the_worker_takes_what_sglang_passes_to_its_own(name: str) -> None:
    """SGLang's n-gram worker, as its source has it (it needs a GPU to be imported), has no draft model either."""
    found = importlib.util.find_spec("sglang.srt.speculative.ngram_worker")
    assert found is not None and found.origin is not None
    functions = [node for node in ast.walk(ast.parse(Path(found.origin).read_text())) if isinstance(node, ast.FunctionDef)]
    (theirs,) = (node for node in functions if node.name == name and node.args.args[-1].arg != "self")
    names = [argument.arg for argument in theirs.args.args]
    inspect.signature(getattr(SparseSpecWorker, name)).bind(**dict.fromkeys(names))
    assert names[-1] in ("target_worker", "on_publish", "pp_proxy_tensors")
