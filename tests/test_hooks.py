"""Each trap that SGLang 0.5.17 sets for an algorithm it does not know, shown and avoided.

A test named ``sglang_...`` pins down what SGLang does without the plugin: when it fails
after an update of SGLang, the hook it justifies may have become unnecessary or wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_sparsespec import ALGORITHM, ATTENTION_BACKEND

pytestmark = pytest.mark.usefixtures("plugin")

MISSING_METHODS = {"create_future_map", "carries_draft_hidden_states", "need_topk"}


@pytest.fixture
def algorithm() -> Any:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    return SpeculativeAlgorithm.from_string(ALGORITHM)


@pytest.fixture
def make_args(model_path: str) -> Callable[..., Any]:
    """Resolved ``ServerArgs`` of a CPU server with SPARSESPEC; keyword arguments are added."""
    from sglang.srt.server_args import ServerArgs

    return lambda **kwargs: ServerArgs(
        **{"model_path": model_path, "device": "cpu", "speculative_algorithm": ALGORITHM, **kwargs}
    )


@pytest.fixture
def serving(serving_args: Callable[[Any], None], make_args: Callable[..., Any]) -> Any:
    """This process serves SPARSESPEC on CPU; returns the arguments."""
    args = make_args()
    serving_args(args)
    return args


# ------------------------------------------------------------ 1. the algorithm's interface


def test_sglang_calls_methods_that_custom_algorithms_lack() -> None:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang.srt.speculative.spec_registry import CustomSpecAlgo

    assert MISSING_METHODS <= set(vars(SpeculativeAlgorithm))
    assert not MISSING_METHODS & set(dir(CustomSpecAlgo))


def test_the_algorithm_has_every_method_of_sglangs_own() -> None:
    """So that no call site meets an AttributeError, whatever the method's name begins with."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from sglang_sparsespec.algorithm import SparseSpecAlgorithm

    methods = {
        name
        for name, value in vars(SpeculativeAlgorithm).items()
        if callable(value) and not name.startswith("_") and not isinstance(value, SpeculativeAlgorithm)
    }
    methods -= {"from_string", "register"}  # class methods of the enum
    assert MISSING_METHODS < methods
    assert methods <= set(dir(SparseSpecAlgorithm))


def test_the_algorithm_passes_for_no_other(algorithm: Any) -> None:
    true = {name for name in dir(algorithm) if name.startswith("is_") and getattr(algorithm, name)()}
    assert true == {"is_some", "is_speculative"}


def test_the_algorithm_relays_only_tokens_and_lengths(algorithm: Any) -> None:
    assert not algorithm.need_topk() and not algorithm.carries_draft_hidden_states()


def relay_a_round(relay: Any) -> tuple[Any, Any]:
    """Publish rows 3, 5, 2 as a round does, read rows 2, 3 as the next one does: batch, draft input."""
    from sglang.srt.managers.overlap_utils import RelayPayload

    from sglang_sparsespec.spec_input import SparseSpecDraftInput

    rows = torch.tensor([3, 5, 2])
    written = SparseSpecDraftInput(torch.tensor([30, 50, 20]), torch.tensor([13, 15, 12]))
    relay.publish(rows, written.new_seq_lens)
    relay.stash(rows, RelayPayload.from_draft_input(written))
    following = SparseSpecDraftInput(torch.tensor([-1, -1]), torch.tensor([-1, -1]))
    following.future_indices = torch.tensor([2, 3])
    batch = SimpleNamespace(spec_info=following, req_pool_indices_cpu=torch.tensor([2, 3]))
    relay.resolve_seq_lens_cpu(batch)
    relay._resolve_spec_extras(batch)
    return batch, following


@pytest.fixture
def pool() -> Any:
    return SimpleNamespace(req_to_token=torch.zeros(8, 4))


def test_sglang_cannot_relay_drafts_on_cpu(algorithm: Any, pool: Any, serving: Any) -> None:
    """It calls ``record_stream`` with a CPU stream, which is none."""
    from sglang.srt.managers.overlap_utils import FutureMap

    with pytest.raises(RuntimeError):
        relay_a_round(FutureMap("cpu", algorithm, pool, True, False))


def test_tokens_and_lengths_are_relayed_on_cpu(algorithm: Any, pool: Any, serving: Any) -> None:
    batch, following = relay_a_round(algorithm.create_future_map("cpu", pool, True, False))
    assert batch.seq_lens.tolist() == [12, 13] and batch.seq_lens_cpu.tolist() == [12, 13]
    assert following.bonus_tokens.tolist() == [20, 30]


# ---------------------------------------------------------- 2. no draft worker, no draft pool


def test_sglang_looks_for_a_draft_kv_pool_in_an_absent_draft_worker(algorithm: Any) -> None:
    from sglang.srt.mem_cache.kv_cache_builder import get_draft_kv_pool

    worker: Any = SimpleNamespace(draft_worker=None)
    args: Any = SimpleNamespace(enable_multi_layer_eagle=False)
    asked = {"draft_worker": worker, "spec_algorithm": algorithm, "server_args": args}
    with pytest.raises(AttributeError, match="draft_runner"):
        get_draft_kv_pool.__wrapped__(**asked)
    assert get_draft_kv_pool(**asked) is None


def test_sglang_warms_up_a_kernel_that_moves_accepted_kv(serving: Any) -> None:
    """A chain's accepted tokens are in place; the kernel is Triton, which a CPU lacks."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    pool = SimpleNamespace(layer_num=1)
    with pytest.raises(AttributeError):
        MHATokenToKVPool._init_kv_copy_and_warmup.__wrapped__(pool)
    MHATokenToKVPool._init_kv_copy_and_warmup(pool)
    assert pool._kv_copy_config is None


# ----------------------------------------------------- 4./5. draft batches and the verify graph


def verify_graph_runner(width: int, algorithm: Any = None) -> Any:
    """``DecodeCudaGraphRunner`` as far as its decisions need it."""
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

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
        model_runner=SimpleNamespace(
            spec_algorithm=algorithm,
            device_timer=None,
            is_draft_worker=False,
            war_fastpath_read_done_event=None,
        ),
    )
    return runner


def draft_batch(spec_info: Any, batch_size: int = 2) -> Any:
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode

    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=batch_size,
        spec_info=spec_info,
        replace_embeds=None,
        input_ids=torch.zeros(batch_size, dtype=torch.int64),
        lora_ids=None,
        capture_hidden_mode=CaptureHiddenMode.NULL,
    )


def test_sglang_replays_the_verify_graph_for_one_token_batches(algorithm: Any) -> None:
    """Unless their spec info says how wide they are, and ours does."""
    from sglang_sparsespec.spec_input import SparseSpecDraftInput, SparseSpecVerifyInput

    runner = verify_graph_runner(9, algorithm)
    unmarked = SparseSpecDraftInput(torch.zeros(2), torch.zeros(2))
    unmarked.num_tokens_per_req = -1
    assert runner.can_run_graph(draft_batch(unmarked))
    assert runner.can_run_graph(draft_batch(None))
    assert runner.can_run_graph(draft_batch(SparseSpecVerifyInput(9, None)))
    assert not runner.can_run_graph(draft_batch(SparseSpecDraftInput(torch.zeros(2), torch.zeros(2))))


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


# ----------------------------------------- 6./12. lengths, slots and results of a round

#: Tokens of the toy model. Draft and target continue n with n + 1, but after 4 the target says 20.
BRANCH, TARGET_BRANCH = 4, 20
VOCAB = 32


class ToyRunner:
    """A model runner whose model is a rule; it records the batches it was given."""

    def __init__(self, draft_length: int) -> None:
        self.drafts: list[dict[str, Any]] = []
        self.verified: list[dict[str, Any]] = []
        self.war_fastpath_read_done_event = None
        self.dtype = torch.float32
        self.model_config = SimpleNamespace(hf_text_config=SimpleNamespace())
        self.server_args = SimpleNamespace(enable_fp32_lm_head=False)
        self.attn_backend = SimpleNamespace(
            store_lse_hint=lambda batch_size, step: None,
            fill_lse_hint=lambda batch_size, steps: None,
            set_draft_length=lambda steps: None,
            policy=SimpleNamespace(next_draft_length=lambda: draft_length),
        )
        self.model = SimpleNamespace(forward=self._draft)

    @staticmethod
    def _logits(tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(tokens, VOCAB).float()

    def forward(self, *args: Any, **kwargs: Any) -> None:
        pytest.fail("draft steps must not go through ModelRunner.forward, which replays the verify graph")

    def _draft(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> Any:
        from sglang.srt.model_executor.forward_context import get_attn_backend

        assert get_attn_backend() is self.attn_backend
        self.drafts.append(
            {
                "mode": forward_batch.forward_mode,
                "width": forward_batch.spec_info.num_tokens_per_req,
                "tokens": input_ids.tolist(),
                "positions": positions.tolist(),
                "lengths": forward_batch.seq_lens.tolist(),
                "slots": forward_batch.out_cache_loc.tolist(),
            }
        )
        return SimpleNamespace(next_token_logits=self._logits(input_ids + 1))

    def verify(self, batch: Any, is_verify: bool = False) -> Any:
        assert is_verify
        self.verified.append(
            {
                "mode": batch.forward_mode,
                "width": batch.spec_info.num_tokens_per_req,
                "tokens": batch.input_ids.tolist(),
                "positions": batch.spec_info.positions.tolist(),
                "lengths": batch.seq_lens.tolist(),
                "slots": batch.out_cache_loc.tolist(),
            }
        )
        target = torch.where(batch.input_ids == BRANCH, TARGET_BRANCH, batch.input_ids + 1)
        logits = SimpleNamespace(next_token_logits=self._logits(target))
        return SimpleNamespace(logits_output=logits, can_run_cuda_graph=False)


@pytest.fixture
def toy_round(run_toy_round: Callable[[int], Any]) -> Any:
    """A round that drafts all k = 3 tokens."""
    return run_toy_round(3)


@pytest.fixture
def run_toy_round(monkeypatch: pytest.MonkeyPatch, algorithm: Any) -> Callable[[int], Any]:
    """A round of the given draft length."""
    return lambda draft_length: make_toy_round(monkeypatch, algorithm, draft_length)


def make_toy_round(monkeypatch: pytest.MonkeyPatch, algorithm: Any, draft_length: int) -> Any:
    """One greedy round of two requests: k = 3, committed 10 and 7 tokens, last tokens 1 and 3."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from sglang_sparsespec.config import SparseSpecConfig
    from sglang_sparsespec.spec_input import SparseSpecDraftInput
    from sglang_sparsespec.worker import SparseSpecWorker

    monkeypatch.setattr("sglang.srt.distributed.get_tp_group", lambda: SimpleNamespace(world_size=1))
    runner = ToyRunner(draft_length)
    target: Any = SimpleNamespace(model_runner=runner, forward_batch_generation=runner.verify)
    args: Any = SimpleNamespace(device="cpu", speculative_num_steps=3, speculative_num_draft_tokens=4)
    args.sparsespec_config = SparseSpecConfig(speculate="always")
    worker = SparseSpecWorker(args, 0, SimpleNamespace(tp_rank=0, dp_rank=None), 0, target)
    req_to_token = torch.arange(100, 400, dtype=torch.int32).view(3, 100)
    worker.alloc_memory_pool(req_to_token_pool=SimpleNamespace(req_to_token=req_to_token))
    lengths = torch.tensor([10, 7])
    batch: Any = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        reqs=[],
        seq_lens=lengths,
        req_pool_indices=torch.tensor([2, 1]),
        input_ids=None,
        out_cache_loc=None,
        spec_algorithm=algorithm,
        spec_info=SparseSpecDraftInput(torch.tensor([1, 3]), lengths),
        has_grammar=False,
        return_logprob=False,
        sampling_info=SimpleNamespace(
            is_all_greedy=True,
            logit_bias=None,
            temperatures=None,
            top_ks=None,
            top_ps=None,
            min_ps=None,
            sampling_seed=None,
            need_top_k_sampling=False,
            need_top_p_sampling=False,
            need_min_p_sampling=False,
        ),
    )
    published: list[list[int]] = []
    result = worker.forward_batch_generation(batch, on_publish=lambda lens: published.append(lens.tolist()))
    return SimpleNamespace(runner=runner, result=result, published=published)


def test_sglang_counts_the_current_token_in_decode_lengths() -> None:
    """A DECODE batch of length n works on position n - 1; a TARGET_VERIFY batch of length n begins at n."""
    from sglang.srt.model_executor.forward_batch_info import _clamp_position_native

    assert _clamp_position_native(torch.tensor([5, 1, 0])).tolist() == [4, 0, 0]


def test_draft_steps_count_their_own_token(toy_round: Any) -> None:
    assert [step["lengths"] for step in toy_round.runner.drafts] == [[11, 8], [12, 9], [13, 10]]
    assert [step["positions"] for step in toy_round.runner.drafts] == [[10, 7], [11, 8], [12, 9]]
    assert all(step["mode"].is_decode() for step in toy_round.runner.drafts)


def test_draft_steps_write_to_the_slots_of_their_positions(toy_round: Any) -> None:
    assert [step["slots"] for step in toy_round.runner.drafts] == [[310, 207], [311, 208], [312, 209]]


def test_draft_steps_go_around_the_graph_runner(toy_round: Any) -> None:
    """Checked by ``ToyRunner.forward`` too; and no event is left for the scheduler's barrier."""
    assert [step["width"] for step in toy_round.runner.drafts] == [1, 1, 1]
    assert toy_round.runner.war_fastpath_read_done_event is None


def test_the_verification_covers_all_slots_the_drafts_wrote(toy_round: Any) -> None:
    """Lengths exclude the window, and every draft's KV is written again by the target."""
    (verified,) = toy_round.runner.verified
    assert verified["mode"].is_target_verify() and verified["width"] == 4
    assert verified["lengths"] == [10, 7]
    assert verified["positions"] == [10, 11, 12, 13, 7, 8, 9, 10]
    assert verified["slots"] == [310, 311, 312, 313, 207, 208, 209, 210]
    assert verified["tokens"] == [1, 2, 3, 4, 3, 4, 5, 6]


def test_accept_lens_count_drafts_and_the_bonus_token(toy_round: Any) -> None:
    """Request 0 accepts all 3 drafts (2, 3, 4), request 1 only the first (4); then the target's 20."""
    result = toy_round.result
    assert result.accept_lens.tolist() == [4, 2]
    tokens = result.next_token_ids.view(2, result.speculative_num_draft_tokens)
    assert tokens[0].tolist() == [2, 3, 4, TARGET_BRANCH]
    assert tokens[1, :2].tolist() == [4, TARGET_BRANCH]


class LoggedEvent:
    """Stands in for an event of the device; notes where in the round's forwards it is recorded."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def record(self) -> None:
        self._log.append("mark")

    def query(self) -> bool:
        return False


def test_the_progress_of_a_round_has_a_mark_before_each_forward_and_at_its_end(
    monkeypatch: pytest.MonkeyPatch, run_toy_round: Callable[[int], Any]
) -> None:
    from sglang_sparsespec import round_progress
    from sglang_sparsespec.round_progress import RoundProgress

    log: list[str] = []
    progress = RoundProgress(4, lambda: LoggedEvent(log))
    monkeypatch.setattr(RoundProgress, "on_device", lambda device, window: progress)
    monkeypatch.setattr(round_progress, "_current", None)
    for name, entry in (("_draft", "draft"), ("verify", "verification")):
        forward = getattr(ToyRunner, name)

        def logged(self: Any, *args: Any, entry: str = entry, forward: Any = forward, **kwargs: Any) -> Any:
            log.append(entry)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(ToyRunner, name, logged)
    run_toy_round(3)
    assert log == ["mark", "draft"] * 3 + ["mark", "verification", "mark"]
    assert round_progress.current() is progress and progress.take_moment() is not None


def test_the_next_round_begins_after_the_accepted_tokens(toy_round: Any) -> None:
    result = toy_round.result
    assert result.new_seq_lens.tolist() == [14, 9] and toy_round.published == [[14, 9]]
    assert result.next_draft_input.bonus_tokens.tolist() == [TARGET_BRANCH, TARGET_BRANCH]


def test_a_shorter_draft_fills_the_window_and_is_accepted_no_further(run_toy_round: Callable[[int], Any]) -> None:
    """Drafting one of k = 3: the filling (2 again, then 4) is verified and not accepted."""
    done = run_toy_round(1)
    assert len(done.runner.drafts) == 1
    assert done.runner.verified[0]["tokens"] == [1, 2, 2, 2, 3, 4, 4, 4]
    result = done.result
    assert result.num_drafted == 1 and result.speculative_num_draft_tokens == 4
    assert result.accept_lens.tolist() == [2, 2] and result.new_seq_lens.tolist() == [12, 9]
    assert result.next_token_ids.view(2, 4)[:, :2].tolist() == [[2, 3], [4, TARGET_BRANCH]]
    assert result.next_draft_input.bonus_tokens.tolist() == [3, TARGET_BRANCH]


# ------------------------------------------------------------------ 7. reserved slots


@pytest.mark.parametrize("steps", [1, 3, 8, 16])
def test_two_windows_are_reserved_per_request(steps: int, make_args: Callable[..., Any]) -> None:
    """One for the round being launched, one because the CPU commits the last round's tokens late."""
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode

    assert get_alloc_reserve_per_decode(make_args(speculative_num_steps=steps)) == 2 * (steps + 1)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 8, 16])
def test_a_staggered_round_stays_within_its_reserve(
    steps: int, overlap: bool, make_args: Callable[..., Any]
) -> None:
    """All phases and accept lengths: the last position written is C + 3W - 2 if the CPU lags a round behind."""
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode

    from sglang_sparsespec.scheduler_patch.unified_schedule import UnifiedSchedule

    window = steps + 1
    reserve = get_alloc_reserve_per_decode(make_args(speculative_num_steps=steps, sparsespec_schedule="unified"))
    assert reserve == 3 * window
    schedule = UnifiedSchedule(window)
    requests = [(row, row) for row in range(1, 2 * window + 1)]
    schedule.plan_round(requests)
    last = 0
    for accepted in range(1, window + 1):
        # Committed on the CPU: 0. On the device: the round in flight has accepted as many.
        lengths = dict.fromkeys(dict(requests), accepted if overlap else 0)
        for forward in schedule.plan_round(requests):
            for row, offset in forward.drafts:
                last = max(last, lengths[row] + offset)
            for row, _ in forward.verifications:
                last = max(last, lengths[row] + window - 1)
                lengths[row] += accepted
    assert last == (3 * window - 2 if overlap else 2 * window - 2) < reserve


@pytest.mark.parametrize("schedule", ["lockstep", "unified"])
@pytest.mark.parametrize("steps", [1, 3, 8, 16])
def test_a_request_at_the_context_limit_has_room_for_its_reserve(
    steps: int, schedule: str, make_args: Callable[..., Any]
) -> None:
    """SGLang widens the rows of ``req_to_token`` by W + 4 entries, but a decode fills up to 2W, or 3W."""
    from sglang.srt.mem_cache.allocation_sizing import (
        get_alloc_reserve_per_decode,
        get_req_to_token_extra_context_len,
    )

    args = make_args(speculative_num_steps=steps, sparsespec_schedule=schedule)
    # A running request has committed at most the context length less 4: one token for the
    # request limit, one for the scheduler's own, one for the output still to come, and one
    # because the last token's KV is not written yet.
    assert get_req_to_token_extra_context_len(args) >= get_alloc_reserve_per_decode(args) - 4


def test_slots_are_written_to_the_rows_on_cpu(serving: Any) -> None:
    """SGLang's own function needs Triton or AMX."""
    from sglang.srt.mem_cache.allocation import assign_req_to_token_pool_func

    req_to_token = torch.zeros(4, 6, dtype=torch.int32)
    assign_req_to_token_pool_func(
        torch.tensor([3, 1, 2]), req_to_token, torch.tensor([0, 2, 4]), torch.tensor([2, 2, 6]),
        torch.tensor([11, 12, 13, 14]), 3,
    )  # fmt: skip
    assert req_to_token.tolist() == [[0] * 6, [0] * 6, [0, 0, 0, 0, 13, 14], [11, 12, 0, 0, 0, 0]]


def test_sglang_takes_the_backend_for_one_with_triton(serving: Any) -> None:
    from sglang.srt.utils.common import support_triton

    assert support_triton.__wrapped__(ATTENTION_BACKEND) is True
    assert support_triton(ATTENTION_BACKEND) is False


def test_triton_is_used_on_cuda(serving_args: Callable[[Any], None], make_args: Callable[..., Any]) -> None:
    from sglang.srt.utils.common import support_triton

    serving_args(make_args(device="cuda", mem_fraction_static=0.8))
    assert support_triton(ATTENTION_BACKEND) is True


# ---------------------------------------------------------------- 10. graph capture inputs


def test_sglang_captures_unknown_algorithms_without_a_verify_input(algorithm: Any) -> None:
    from sglang.srt.speculative.spec_info import create_dummy_verify_input

    from sglang_sparsespec.spec_input import SparseSpecVerifyInput

    args: Any = SimpleNamespace(speculative_num_draft_tokens=9)
    mask = torch.ones(1, dtype=torch.bool)
    assert create_dummy_verify_input.__wrapped__(algorithm, args, mask, 9, False) is None
    captured = create_dummy_verify_input(algorithm, args, mask, 9, False)
    assert isinstance(captured, SparseSpecVerifyInput)
    assert captured.draft_token_num == captured.num_tokens_per_req == 9 and captured.custom_mask is None
    assert captured.is_verify_input() and not captured.is_draft_input()


def test_sglang_captures_the_verify_graph_of_unknown_algorithms_without_one(algorithm: Any) -> None:
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

    from sglang_sparsespec.spec_input import SparseSpecVerifyInput

    runner = verify_graph_runner(9, algorithm)
    assert DecodeCudaGraphRunner.get_spec_info.__wrapped__(runner, 18) is None
    captured = runner.get_spec_info(18)
    assert isinstance(captured, SparseSpecVerifyInput) and captured.num_tokens_per_req == 9


# -------------------------------------------------- 11. selections and the life of their row


@pytest.mark.parametrize("policy", ["pillar", "window", "streaming"])
def test_a_row_that_is_used_again_forgets_its_last_requests_selection(policy: str) -> None:
    """Finished, aborted or retracted: the next request of the row begins with a prefill of its own."""
    from small_backend import NUM_KV_HEADS, NUM_LAYERS, WINDOW, SmallServer

    server = SmallServer(draft_policy=policy)
    server.prefill([2, 3], [60, 50], [60, 50])
    assert len(server.selected(2)) == 8 - WINDOW
    neighbour = [
        server.selected(3, layer, head) for layer in range(NUM_LAYERS) for head in range(NUM_KV_HEADS)
    ]

    server.prefill([2], [9], [9])  # a new request of 9 tokens, 6 of them before the last window
    assert int(server.backend.table.tail_start[2]) == 9 - WINDOW
    for layer in range(NUM_LAYERS):
        for head in range(NUM_KV_HEADS):
            assert server.selected(2, layer, head) == [0, 1, 2, 3, 4, 5]
    assert neighbour == [
        server.selected(3, layer, head) for layer in range(NUM_LAYERS) for head in range(NUM_KV_HEADS)
    ]


def test_a_cached_prompt_of_one_new_token_begins_with_a_selection() -> None:
    """With the radix cache the prefill may have a single query."""
    from small_backend import WINDOW, SmallServer

    server = SmallServer()
    server.prefill([1], [40], [1])
    selected = server.selected(1)
    assert len(selected) == 8 - WINDOW and selected == sorted(set(selected)) and selected[-1] < 39
    assert int(server.backend.table.tail_start[1]) == 39


def test_each_chunk_of_a_prompt_replaces_the_selection() -> None:
    from small_backend import WINDOW, SmallServer

    server = SmallServer()
    server.prefill([1], [30], [30])
    server.prefill([1], [60], [30])
    assert int(server.backend.table.tail_start[1]) == 60 - WINDOW
    assert server.selected(1)[-1] < 60 - WINDOW


@pytest.mark.parametrize("policy", ["pillar", "window", "streaming"])
def test_a_verification_renews_the_selection_whatever_was_accepted(policy: str) -> None:
    from small_backend import WINDOW, SmallServer

    server = SmallServer(draft_policy=policy)
    server.prefill([1], [40], [40])
    before = server.selected(1)
    server.verify([1], [40])
    assert int(server.backend.table.tail_start[1]) == 40
    selected = server.selected(1)
    assert len(selected) == 8 - WINDOW and selected == sorted(set(selected)) and selected[-1] < 40
    if policy == "window":
        assert selected == [35, 36, 37, 38, 39]
    if policy == "streaming":
        assert selected == [0, 1, 2, 3, 39]
    if policy == "pillar":
        assert selected != before


def test_drafts_equal_the_verification_while_the_budget_covers_the_request() -> None:
    from small_backend import HEAD_DIM, NUM_Q_HEADS, WINDOW, SmallServer

    server = SmallServer(min_budget=64)
    server.prefill([1, 4], [30, 5], [30, 5])
    q = torch.randn(2, WINDOW, NUM_Q_HEADS * HEAD_DIM, generator=server.generator)
    steps = [server.draft([1, 4], [31 + i, 6 + i], q[:, i]) for i in range(WINDOW)]
    # The same KV for the verification: it is stored by position, and random per call.
    stored_k, stored_v = server.pool.k.clone(), server.pool.v.clone()
    server.pool.set_kv_buffer = lambda *args: None  # type: ignore[method-assign]
    verified = server.verify([1, 4], [30, 5], q.reshape(2 * WINDOW, -1)).view(2, WINDOW, -1)
    assert torch.equal(stored_k, server.pool.k) and torch.equal(stored_v, server.pool.v)
    torch.testing.assert_close(torch.stack(steps, dim=1), verified, rtol=1e-5, atol=1e-6)


def test_kv_read_counts_what_draft_steps_attend_to() -> None:
    """Per round of k = 2: step j of a request of L tokens sees L + j, or the selected ones and the tail."""
    from small_backend import WINDOW, SmallServer

    server = SmallServer()
    server.prefill([1, 2], [40, 6], [40, 6])
    read = full = 0
    for row, length in ((1, 40), (2, 6)):
        for step in range(1, WINDOW):
            read += len(server.selected(row)) + length + step - (length - WINDOW)
            full += length + step
    server.verify([1, 2], [40, 6])
    assert server.backend.kv_read.tolist() == [read, full]
    server.verify([0], [0])  # a padding row
    assert server.backend.kv_read.tolist() == [read, full]


@pytest.mark.parametrize("policy", ["pillar", "window"])
def test_a_mixed_forward_does_what_a_draft_step_and_a_verification_do(policy: str) -> None:
    """Requests 1 and 4 draft, request 2 verifies: outputs, KV, selections and counters are those of two forwards."""
    from small_backend import HEAD_DIM, NUM_Q_HEADS, WINDOW, SmallServer

    together, apart = SmallServer(draft_policy=policy), SmallServer(draft_policy=policy)
    for server in (together, apart):
        server.prefill([1, 2, 4], [40, 30, 20], [40, 30, 20])
        server.pool.set_kv_buffer = lambda *args: None  # type: ignore[method-assign]
    q = torch.randn(2 + WINDOW, NUM_Q_HEADS * HEAD_DIM, generator=together.generator)
    drafted = apart.draft([1, 4], [41, 21], q[:2])
    verified = apart.verify([2], [30], q[2:])
    mixed = together.mixed([(1, 41), (4, 21)], [(2, 30)], q)
    torch.testing.assert_close(mixed, torch.cat([drafted, verified]), rtol=1e-5, atol=1e-6)
    tables = together.backend.table, apart.backend.table
    for name in ("positions", "num_selected", "tail_start"):
        assert torch.equal(*(getattr(table, name) for table in tables)), name


def test_a_mixed_forward_writes_the_kv_of_all_its_tokens() -> None:
    from small_backend import NUM_LAYERS, WINDOW, SmallServer

    server = SmallServer()
    server.prefill([1, 2], [40, 30], [40, 30])
    before = server.pool.k.clone()
    server.mixed([(1, 41)], [(2, 30)])
    changed = (server.pool.k != before).flatten(2).any(-1)
    written = [*server.req_to_token[2, 30 : 30 + WINDOW].tolist(), int(server.req_to_token[1, 40])]
    for layer in range(NUM_LAYERS):
        assert sorted(changed[layer].nonzero().flatten().tolist()) == sorted(written)


def test_padding_of_a_mixed_forward_changes_nothing() -> None:
    from small_backend import HEAD_DIM, NUM_Q_HEADS, WINDOW, SmallServer

    plain, padded = SmallServer(), SmallServer()
    for server in (plain, padded):
        server.req_to_token[0] = int(server.req_to_token[0, 0])
        server.prefill([1, 2], [40, 30], [40, 30])
        server.pool.set_kv_buffer = lambda *args: None  # type: ignore[method-assign]
    q = torch.randn(1 + WINDOW, NUM_Q_HEADS * HEAD_DIM, generator=plain.generator)
    expected = plain.mixed([(1, 41)], [(2, 30)], q)
    padding = torch.zeros(WINDOW, NUM_Q_HEADS * HEAD_DIM)
    found = padded.mixed([(1, 41), (0, 0)], [(2, 30), (0, 0)], torch.cat([q[:1], padding[:1], q[1:], padding]))
    torch.testing.assert_close(torch.cat([found[:1], found[2 : 2 + WINDOW]]), expected)
    assert torch.equal(plain.backend.table.positions, padded.backend.table.positions)
    assert torch.equal(plain.backend.kv_read, padded.backend.kv_read)


def test_kv_read_of_mixed_forwards_adds_up_to_that_of_a_round() -> None:
    """The same drafts, each counted in its own forward."""
    from small_backend import WINDOW, SmallServer

    lockstep, staggered = SmallServer(), SmallServer()
    for server in (lockstep, staggered):
        server.prefill([1, 2], [40, 6], [40, 6])
    for step in range(1, WINDOW):
        staggered.mixed([(1, 40 + step), (2, 6 + step)], [])
    staggered.mixed([], [(1, 40), (2, 6)])
    lockstep.verify([1, 2], [40, 6])
    assert staggered.backend.kv_read.tolist() == lockstep.backend.kv_read.tolist()


def test_log_sum_exps_of_drafts_reach_their_window_by_row() -> None:
    """Also those of an earlier round; tokens after the last draft get its own, padding stays finite."""
    from small_backend import NUM_LAYERS, NUM_Q_HEADS, ROWS, WINDOW, SmallServer

    server = SmallServer()
    backend = server.backend
    backend.lse_hint = torch.zeros(NUM_LAYERS, ROWS, WINDOW, NUM_Q_HEADS)
    backend.lse_step = torch.zeros(NUM_LAYERS, ROWS, NUM_Q_HEADS)
    server.prefill([1, 2, 4], [40, 30, 20], [40, 30, 20])
    server.mixed([(1, 41), (0, 0)], [])
    step = backend.lse_step[:, 0].clone()
    assert torch.equal(backend.lse_hint[:, 1, 0], step) and torch.isfinite(backend.lse_hint).all()
    hints: list[torch.Tensor] = []
    verify = backend.kernels.verify_attention
    backend.kernels.verify_attention = lambda *args: (hints.append(args[-2]), verify(*args))[1]  # type: ignore
    from sglang_sparsespec.attention_backend.backend import MixedRows

    rows, none = torch.tensor([2, 1]), torch.zeros(0, dtype=torch.int64)
    backend.begin_mixed(MixedRows(none, none, none, rows, torch.tensor([30, 40]), torch.tensor([0, 1])))
    assert backend._hints is not None
    expected = backend.lse_hint[:, rows, :1].expand(-1, -1, WINDOW, -1)  # the only draft's, for all tokens of a window
    assert torch.equal(backend._hints, expected)
    backend.end_mixed()
    server.mixed([(1, 42)], [(4, 20), (1, 40)])
    assert [hint.shape for hint in hints] == [(2, WINDOW, NUM_Q_HEADS)] * NUM_LAYERS
    for layer, hint in enumerate(hints):
        assert torch.equal(hint[1, 0], step[layer])


# -------------------------------------------------------------------- 13. sampling on CPU


def test_sglang_verifies_every_request_greedily_without_a_gpu() -> None:
    """Temperature is ignored by ``eagle_sample`` there, so the plugin accepts by its own rule."""
    import inspect

    from sglang.srt.speculative import eagle_utils

    from sglang_sparsespec import worker

    assert "is_all_greedy or _is_cpu or" in inspect.getsource(eagle_utils.eagle_sample)
    assert "eagle_sample" not in inspect.getsource(worker)


# ------------------------------------------------------------------- batches between rounds


def draft_input(tokens: list[int], rows: list[int] | None = None) -> Any:
    from sglang_sparsespec.spec_input import SparseSpecDraftInput

    made = SparseSpecDraftInput(torch.tensor(tokens), torch.tensor([10 * t for t in tokens]))
    made.future_indices = None if rows is None else torch.tensor(rows)
    return made


def test_a_filtered_batch_keeps_its_rows_tokens() -> None:
    kept = draft_input([1, 2, 3])
    kept.filter_batch(torch.tensor([2, 0]))
    assert kept.bonus_tokens.tolist() == [3, 1] and kept.new_seq_lens.tolist() == [30, 10]
    assert kept.future_indices is None


def test_merged_batches_keep_their_order() -> None:
    merged = draft_input([1, 2])
    merged.merge_batch(draft_input([3]))
    assert merged.bonus_tokens.tolist() == [1, 2, 3] and merged.new_seq_lens.tolist() == [10, 20, 30]


def test_relayed_batches_are_filtered_and_merged_by_row_only() -> None:
    """Under overlap scheduling the tokens are not known yet; stale ones must not be indexed."""
    batch = draft_input([1, 2, 3], rows=[5, 6, 7])
    batch.filter_batch(torch.tensor([0, 2]))
    assert batch.future_indices.tolist() == [5, 7]
    assert batch.bonus_tokens.tolist() == [1, 2, 3], "replaced by the relay before use"
    batch.merge_batch(draft_input([9], rows=[4]))
    assert batch.future_indices.tolist() == [5, 7, 4]


def test_a_draft_input_is_one() -> None:
    made = draft_input([1])
    assert made.is_draft_input() and not made.is_verify_input()
    assert (made.num_tokens_per_req, made.num_tokens_for_logprob_per_req) == (1, 1)
    assert made.topk_p is None and made.topk_index is None and made.hidden_states is None


# -------------------------------------------------------------------------- requests


def validate(
    request: dict[str, Any], preferred: dict[str, Any] | None = None, algorithm: str | None = ALGORITHM
) -> None:
    """Pass a request through SGLang's own check, as the tokenizer process does."""
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    manager = object.__new__(TokenizerManager)
    args = SimpleNamespace(
        speculative_algorithm=algorithm,
        return_hidden_states_mode=None,
        enable_return_hidden_states=False,
        enable_custom_logit_processor=True,
        preferred_sampling_params=preferred,
    )
    manager.__dict__.update(
        server_args=args,
        context_len=100,
        num_reserved_tokens=0,
        allow_auto_truncate=False,
        validate_total_tokens=True,
        is_generation=True,
        preferred_sampling_params=preferred,
        model_config=SimpleNamespace(vocab_size=VOCAB),
    )
    obj = GenerateReqInput(input_ids=[1, 2], **request)
    obj.normalize_batch_and_arguments()
    manager._validate_one_request(obj, [1, 2])


PENALTIES = [
    {"frequency_penalty": 0.5},
    {"presence_penalty": -0.5},
    {"repetition_penalty": 1.1},
    {"min_new_tokens": 3},
]


@pytest.mark.parametrize("params", PENALTIES, ids=lambda p: next(iter(p)))
def test_penalties_are_refused(params: dict[str, float]) -> None:
    """SGLang adds one round's penalties to all its positions, which changes the distribution."""
    name = next(iter(params))
    with pytest.raises(
        ValueError, match=f"{name}.*not supported with --speculative-algorithm SPARSESPEC.*leave it at"
    ):
        validate({"sampling_params": {"temperature": 0.5, **params}})
    validate({"sampling_params": params}, algorithm=None)


@pytest.mark.parametrize("params", PENALTIES, ids=lambda p: next(iter(p)))
def test_penalties_of_the_servers_preferred_parameters_are_refused(params: dict[str, float]) -> None:
    """SGLang adds ``--preferred-sampling-params`` to a request after it was checked."""
    with pytest.raises(ValueError, match=next(iter(params))):
        validate({"sampling_params": {}}, preferred=params)


def test_a_request_may_turn_a_preferred_penalty_off() -> None:
    validate({"sampling_params": {"repetition_penalty": 1.0}}, preferred={"repetition_penalty": 1.1})


def test_a_custom_logit_processor_is_refused() -> None:
    with pytest.raises(ValueError, match="custom_logit_processor is not supported.*remove it"):
        validate({"sampling_params": {}, "custom_logit_processor": "x"})


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_new_tokens": 9},
        {"frequency_penalty": 0.0, "presence_penalty": 0, "repetition_penalty": 1.0, "min_new_tokens": 0},
        {"frequency_penalty": None},
        {"logit_bias": {"3": 1.0}, "regex": "a+", "stop": ["x"]},
    ],
)
def test_other_parameters_are_accepted(params: dict[str, Any]) -> None:
    validate({"sampling_params": params})


def test_sglangs_own_checks_still_run() -> None:
    with pytest.raises(ValueError, match="context length"):
        validate({"sampling_params": {"max_new_tokens": 99}})
