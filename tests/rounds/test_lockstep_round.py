"""One lock-step round of the worker on a model that is a rule: lengths, slots and results, as SGLang wants them."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers import sampler as sglang_sampler
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_sparsespec import ALGORITHM
from sglang_sparsespec.rounds import base, planner
from sglang_sparsespec.rounds.planner import RoundChoice
from sglang_sparsespec.settings import Settings, attach_settings
from sglang_sparsespec.spec_input import SparseSpecDraftInput
from sglang_sparsespec.worker import SparseSpecWorker

pytestmark = pytest.mark.usefixtures("plugin")

#: Tokens of the toy model. Draft and target continue n with n + 1, but after 4 the target says 20.
BRANCH, TARGET_BRANCH = 4, 20
VOCAB = 32


class ToyBackend:
    """Stands in for the attention backend, of 3 rows of 100 slots: slot 100 * (row + 1) + position."""

    def __init__(self) -> None:
        req_to_token = torch.arange(100, 400, dtype=torch.int32).view(3, 100)
        self.req_to_token_pool = SimpleNamespace(req_to_token=req_to_token)
        self.device = torch.device("cpu")
        self.hints = None
        self.num_rows = 3
        self.kv_read = torch.zeros(2, dtype=torch.int64)
        self.policy = SimpleNamespace(facts=SimpleNamespace(num_proposals=0))
        self.table = SimpleNamespace(positions=torch.zeros(1, 3, 1, 100))
        self.told: list[int] = []

    def begin_lockstep_round(self, num_drafted: int, least_budget: int | None = None) -> None:
        self.told.append(num_drafted)

    def warm_up(self) -> None:
        pass

    def plan_draft(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> str:
        return "draft"

    def begin(self, plan: str) -> None:
        assert plan == "draft"

    def end(self) -> None:
        """Nothing runs beside the layers."""


class ToyRunner:
    """A model runner whose model is a rule; it records the batches it was given."""

    def __init__(self) -> None:
        self.drafts: list[dict[str, Any]] = []
        self.verified: list[dict[str, Any]] = []
        self.war_fastpath_read_done_event = None
        self.dtype = torch.float32
        self.model_config = SimpleNamespace(hf_text_config=SimpleNamespace(), vocab_size=VOCAB)
        self.server_args = SimpleNamespace(enable_fp32_lm_head=False, enable_lora=False)
        self.attn_backend = ToyBackend()
        self.decode_cuda_graph_runner = None
        self.spec_algorithm = SpeculativeAlgorithm.from_string(ALGORITHM)
        self.model = SimpleNamespace(forward=self._draft)

    @staticmethod
    def _logits(tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(tokens, VOCAB).float()

    def forward(self, *args: Any, **kwargs: Any) -> None:
        pytest.fail("draft steps must not go through ModelRunner.forward, which replays the verify graph")

    def _draft(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> Any:
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


def run_round(monkeypatch: pytest.MonkeyPatch, drafts: int = 3, **batch_args: Any) -> Any:
    """One greedy round of two requests: k = 3, committed 10 and 7 tokens, last tokens 1 and 3."""
    for module in (base, planner):
        monkeypatch.setattr(module, "get_tp_group", lambda: SimpleNamespace(world_size=1, rank_in_group=0))
    runner = ToyRunner()
    target: Any = SimpleNamespace(model_runner=runner, forward_batch_generation=runner.verify)
    args: Any = SimpleNamespace(device="cpu", speculative_num_steps=3, speculative_num_draft_tokens=4)
    attach_settings(args, Settings(speculate="always"))
    worker = SparseSpecWorker(server_args=args, target_worker=target)
    worker.alloc_memory_pool(req_to_token_pool=runner.attn_backend.req_to_token_pool)
    worker.init_attention_backends()
    worker.init_cuda_graphs()
    if drafts != 3:
        worker.planner.next_round = lambda batch: RoundChoice(drafts)  # type: ignore[method-assign]
    lengths = torch.tensor([10, 7])
    batch: Any = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        reqs=[],
        seq_lens=lengths,
        req_pool_indices=torch.tensor([2, 1]),
        input_ids=None,
        out_cache_loc=None,
        spec_algorithm=runner.spec_algorithm,
        spec_info=SparseSpecDraftInput(torch.tensor([1, 3]), lengths),
        has_grammar=False,
        return_logprob=False,
        return_hidden_states=False,
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
    batch.sampling_info.has_custom_logit_processor = batch_args.pop("has_processor", False)
    batch.__dict__.update(batch_args)
    published: list[list[int]] = []
    result = worker.forward_batch_generation(batch, on_publish=lambda lens: published.append(lens.tolist()))
    return SimpleNamespace(runner=runner, result=result, published=published, metrics=worker.metrics)


@pytest.fixture
def toy_round(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A round that drafts k tokens."""
    return run_round(monkeypatch)


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


def test_the_next_round_begins_after_the_accepted_tokens(toy_round: Any) -> None:
    result = toy_round.result
    assert result.new_seq_lens.tolist() == [14, 9] and toy_round.published == [[14, 9]]
    assert result.next_draft_input.bonus_tokens.tolist() == [TARGET_BRANCH, TARGET_BRANCH]


def test_the_outcome_is_kept_for_the_metrics(toy_round: Any) -> None:
    outcome = toy_round.result.outcome
    assert (outcome.kind, outcome.drafted, outcome.plain_steps) == ("lockstep", 3, 0)
    assert toy_round.metrics.draft_lengths == [0, 0, 0, 1]


# ------------------------------------------------------------------------- fewer drafts than k


@pytest.mark.parametrize("drafts", [1, 2])
def test_a_round_of_fewer_drafts_runs_as_many_steps_and_accepts_no_padding(
    drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Request 0 would accept 2, 3 and 4; its windows end with the target's own token."""
    found = run_round(monkeypatch, drafts)
    assert [step["lengths"] for step in found.runner.drafts] == [[11 + i, 8 + i] for i in range(drafts)]
    (verified,) = found.runner.verified
    assert verified["width"] == 4, "the window of SGLang's captured verification"
    assert verified["tokens"] == {1: [1, 2, 2, 2, 3, 4, 4, 4], 2: [1, 2, 3, 3, 3, 4, 5, 5]}[drafts]
    assert found.runner.attn_backend.told == [drafts]
    assert found.result.accept_lens.tolist() == [drafts + 1, 2]
    tokens = found.result.next_token_ids.view(2, 4)
    assert tokens[0, : drafts + 1].tolist() == [2, 3, 4][: drafts + 1]
    assert tokens[1, :2].tolist() == [4, TARGET_BRANCH]
    assert found.published == [[11 + drafts, 9]]
    assert found.result.outcome.drafted == drafts
    assert found.metrics.draft_lengths[drafts] == 1


def test_padding_is_not_accepted_where_the_target_would_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The padding repeats the last draft. Here the target continues 2 with 2, as if the padding had been drafted."""
    monkeypatch.setattr(
        ToyRunner, "_logits", staticmethod(lambda tokens: torch.nn.functional.one_hot(tokens.clamp(max=2), VOCAB).float())
    )
    assert run_round(monkeypatch, 1).result.accept_lens.tolist()[0] == 2
    assert run_round(monkeypatch, 3).result.accept_lens.tolist()[0] == 4


def test_simulated_acceptance_accepts_no_more_drafts_than_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_SIMULATE_ACC_LEN", "4")  # all of k = 3
    assert run_round(monkeypatch, 3).result.accept_lens.tolist() == [4, 4]
    assert run_round(monkeypatch, 2).result.accept_lens.tolist() == [3, 3]


def test_a_custom_logit_processor_is_called_for_the_next_token_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch that must be verified: without drafts, and by the first row of each window."""
    called: list[torch.Tensor] = []

    @functools.wraps(sglang_sampler.apply_custom_logit_processor)  # whose parameters are looked at
    def favour_7(logits: torch.Tensor, info: Any) -> None:
        called.append(logits.argmax(-1))
        logits[:, 7] = 2

    monkeypatch.setattr(sglang_sampler, "apply_custom_logit_processor", favour_7)
    found = run_round(monkeypatch, has_processor=True, return_hidden_states=True)
    assert not found.runner.drafts
    (verified,) = found.runner.verified
    assert verified["tokens"] == [1, 1, 1, 1, 3, 3, 3, 3]
    assert [tokens.tolist() for tokens in called] == [[2, 4]]
    assert found.result.accept_lens.tolist() == [1, 1] and found.published == [[11, 8]]
    assert found.result.next_token_ids.view(2, 4)[:, 0].tolist() == [7, 7]
    outcome = found.result.outcome
    assert (outcome.drafted, outcome.plain_steps) == (0, 1)
    assert found.metrics.as_dict()["sparsespec_single_steps"] == 1
