"""Staggered rounds on a model that is a rule: what is fed, drafted, accepted and carried over.

Captured forwards run here too, replayed as plain calls: with their padding, static plans and counter.
Sampled rounds by the Triton kernels run in Triton's interpreter, in a child process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter_child import assert_passes_in_the_interpreter
from penalty_checks import ENDS, request
from scipy.stats import chi2
from sglang_parts import request_in

from sglang_sparsespec import ALGORITHM
from sglang_sparsespec.attention_backend.forward_plan import Mixed
from sglang_sparsespec.rounds.base import RoundContext
from sglang_sparsespec.rounds.unified import UnifiedRounds
from sglang_sparsespec.sampling import reference, triton_sampling
from sglang_sparsespec.sampling.parameters import RowParameters
from sglang_sparsespec.sampling.penalties import Penalties
from sglang_sparsespec.sampling.sampler import Sampler

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.usefixtures("plugin")

VOCAB = 64
WINDOW = 4
ROWS = 20
CONTEXT = 200


def target_after(token: int, position: int) -> int:
    return (5 * token + position + 1) % VOCAB


def draft_after(token: int, position: int) -> int:
    """Wrong at every fifth position."""
    return (target_after(token, position) + (position % 5 == 0)) % VOCAB


class RuleBackend:
    """Stands in for the attention backend; keeps what the forwards were given."""

    def __init__(self) -> None:
        req_to_token = torch.arange(ROWS * CONTEXT, dtype=torch.int32).view(ROWS, CONTEXT)
        req_to_token[0] = 0
        generation = torch.zeros(ROWS, dtype=torch.int64)
        self.req_to_token_pool = SimpleNamespace(req_to_token=req_to_token, req_generation=generation)
        self.device = torch.device("cpu")
        self.hints = None
        self.num_rows = ROWS
        self.plan = Mixed(None, None)
        self.counted: list[int] = []
        self.ended = 0
        self.forwards: list[tuple[int, int]] = []

    def count_draft_queries(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> None:
        self.counted.append(int((seq_lens > 0).sum()))

    def plan_mixed(
        self,
        draft_rows: torch.Tensor,
        draft_lens: torch.Tensor,
        verify_rows: torch.Tensor,
        verify_lens: torch.Tensor,
        num_drafted: torch.Tensor,
    ) -> Any:
        assert draft_lens.is_contiguous() and verify_lens.is_contiguous()
        draft: Any = SimpleNamespace(rows=draft_rows, seq_lens=draft_lens)
        verify: Any = SimpleNamespace(rows=verify_rows, lengths=verify_lens, num_drafted=num_drafted)
        return Mixed(draft if len(draft_rows) else None, verify if len(verify_rows) else None)

    def end(self) -> None:
        self.ended += 1

    def begin(self, plan: Mixed) -> None:
        self.plan = plan
        draft: Any = plan.draft
        verify: Any = plan.verify
        drafts = int((draft.seq_lens > 0).sum()) if draft is not None else 0
        assert self.counted.pop() == drafts
        self.forwards.append((drafts, int((verify.lengths > 0).sum()) if verify is not None else 0))


class RuleModel:
    """Draft tokens continue by ``draft_after``, windows by ``target_after``; inputs are checked."""

    def __init__(self, backend: RuleBackend) -> None:
        self.backend = backend

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> Any:
        from sglang.srt.model_executor.forward_context import get_attn_backend

        assert get_attn_backend() is self.backend and forward_batch.forward_mode.is_decode()
        none = torch.zeros(0, dtype=torch.int64)
        draft: Any = self.backend.plan.draft or SimpleNamespace(rows=none, seq_lens=none)
        verify: Any = self.backend.plan.verify or SimpleNamespace(rows=none, lengths=none)
        drafts = len(draft.rows)
        assert len(input_ids) == drafts + WINDOW * len(verify.rows)
        slots = self.backend.req_to_token_pool.req_to_token[forward_batch.req_pool_indices, positions]
        assert torch.equal(forward_batch.out_cache_loc, slots.long())
        live = draft.seq_lens > 0
        assert torch.equal(draft.seq_lens[live], positions[:drafts][live] + 1)
        windows = positions[drafts:].view(-1, WINDOW)
        assert torch.equal(windows, verify.lengths.unsqueeze(1) + torch.arange(WINDOW))
        logits = self.logits(drafts, input_ids, positions)
        buffer = forward_batch.next_token_logits_buffer
        if buffer is not None:  # as SGLang's LogitsProcessor does
            assert buffer.shape == logits.shape
            logits = buffer.copy_(logits)
        return SimpleNamespace(next_token_logits=logits)

    def logits(self, drafts: int, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[tokens, VOCAB], the drafts' first."""
        rules = [draft_after] * drafts + [target_after] * (len(input_ids) - drafts)
        pairs = zip(rules, input_ids.tolist(), positions.tolist(), strict=True)
        following = torch.tensor([rule(token, position) for rule, token, position in pairs], dtype=torch.int64)
        return torch.nn.functional.one_hot(following, VOCAB).float()


class GraphCalls:
    """Stands in for SGLang's ``FullCudaGraphBackend``: a replay calls what was captured."""

    def __init__(self, runner: Any) -> None:
        self.steps: dict[Any, Callable[[], torch.Tensor]] = {}

    def capture_session(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def capture_one(self, key: Any, step: Callable[[], torch.Tensor]) -> None:
        for _ in range(3):  # two warm-ups and the capture
            step()
        self.steps[key] = step

    def replay(self, key: Any, batch: Any) -> torch.Tensor:
        return self.steps[key]()


@pytest.fixture
def rule_server(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], RuleServer]:
    group = SimpleNamespace(world_size=1, rank_in_group=0)
    for module in ("base", "graphs", "unified"):
        monkeypatch.setattr(f"sglang_sparsespec.rounds.{module}.get_tp_group", lambda: group)
    monkeypatch.setattr("sglang_sparsespec.rounds.unified.record_stream_for_v2_verify", lambda *args: None)
    monkeypatch.setattr("sglang_sparsespec.rounds.graphs.FullCudaGraphBackend", GraphCalls)
    monkeypatch.setattr("sglang_sparsespec.rounds.graphs.model_capture_mode", contextlib.nullcontext)
    stream: Any = contextlib.nullcontext(SimpleNamespace(stream=None))
    monkeypatch.setattr("sglang_sparsespec.rounds.graphs.graph_capture", lambda: stream)
    monkeypatch.setattr("sglang_sparsespec.rounds.graphs.get_available_gpu_memory", lambda *args, **kwargs: 1.0)
    monkeypatch.setattr(
        "sglang_sparsespec.rounds.graphs.get_batch_sizes_to_capture", lambda runner, width: ([2, 8, 16], [])
    )
    return RuleServer


@dataclass(frozen=True)
class RuleContext(RoundContext):
    """A context on the CPU; ``triton``: whether to sample by the Triton kernels, in Triton's interpreter or replaced."""

    triton: bool = False

    @property
    def use_triton(self) -> bool:
        return self.triton

    @property
    def stream(self) -> Any:
        return None

    def compute_logprobs(self, batch: Any, logits_output: Any, tokens: torch.Tensor) -> None:
        """SGLang's part; the logits that it is given are what the tests look at."""


class RuleServer:
    """Requests of the rule model, served by staggered rounds.

    Attributes:
        sequences: all tokens of each request, by row: the prompt, then what was committed.
    """

    def __init__(self, graphs: bool, use_triton: bool = False) -> None:
        from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        self.backend = RuleBackend()
        self.runner: Any = SimpleNamespace(
            model=RuleModel(self.backend),
            spec_algorithm=SpeculativeAlgorithm.from_string(ALGORITHM),
            model_config=SimpleNamespace(vocab_size=VOCAB),
            device="cpu",
            gpu_id=0,
            graph_shared_output=GraphSharedOutput(device=torch.device("cpu"), max_rows=16 * WINDOW),
        )
        self.counted: list[tuple[int, int]] = []
        backend: Any = self.backend
        metrics: Any = SimpleNamespace(
            note_forward=lambda draft_tokens, verify_tokens: self.counted.append((draft_tokens, verify_tokens))
        )
        target_worker: Any = None
        self.penalties = Penalties(ROWS, VOCAB, "cpu", use_triton=False)
        context = RuleContext(
            target_worker, self.runner, backend, WINDOW, metrics, None, torch.float32, self.penalties, capture=graphs,
            triton=use_triton,
        )  # fmt: skip
        self.rounds = UnifiedRounds(context)
        self.sequences: dict[int, list[int]] = {}

    def admit(self, row: int, length: int) -> None:
        """A request of ``length`` prompt tokens, with the token that its prefill gives."""
        prompt = [(row + i) % VOCAB for i in range(length)]
        self.sequences[row] = [*prompt, target_after(prompt[-1], length - 1)]
        self.rounds.schedule.forget([row])

    def round(self, rows: list[int], **batch_args: Any) -> Any:
        """One round of ``rows``; commits what was accepted. Returns its result."""
        sequences = [self.sequences[row] for row in rows]
        info = {"is_all_greedy": True, "logit_bias": None, "sampling_seed": None, **batch_args.pop("info", {})}
        names = ("temperatures", "top_ks", "top_ps", "min_ps")
        needs = ("need_top_k_sampling", "need_top_p_sampling", "need_min_p_sampling")
        sampling_info = SimpleNamespace(**{**dict.fromkeys(names), **dict.fromkeys(needs, False), **info})
        batch: Any = SimpleNamespace(
            reqs=[request_in(row, rid=f"request {row}") for row in rows],
            req_pool_indices=torch.tensor(rows),
            seq_lens=torch.tensor([len(sequence) - 1 for sequence in sequences]),
            sampling_info=sampling_info,
            has_grammar=False,
            return_hidden_states=False,
            return_logprob=False,
            top_logprobs_nums=None,
            token_ids_logprobs=None,
        )
        batch.__dict__.update(batch_args)
        bonus_tokens = torch.tensor([sequence[-1] for sequence in sequences])
        batch.spec_info = SimpleNamespace(bonus_tokens=bonus_tokens)
        published: list[torch.Tensor] = []
        result = self.rounds.run(batch, published.append)
        accepted = zip(rows, result.tokens.tolist(), result.accept_lens.tolist(), strict=True)
        for row, tokens, count in accepted:
            self.sequences[row] += tokens[:count]
        assert result.new_seq_lens.tolist() == [len(self.sequences[row]) - 1 for row in rows]
        assert [lens.tolist() for lens in published] == [result.new_seq_lens.tolist()]
        assert result.bonus_tokens.tolist() == [self.sequences[row][-1] for row in rows]
        assert int(self.rounds.windows.lens[0]) == 0, "the padding row stays empty"
        return result

    def assert_targets_output(self, row: int) -> None:
        tokens = self.sequences[row]
        prompt = next(i for i, (a, b) in enumerate(zip(tokens, tokens[1:], strict=False)) if b != a + 1)
        for position in range(prompt, len(tokens) - 1):
            assert tokens[position + 1] == target_after(tokens[position], position)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_requests_that_come_and_go_get_the_targets_tokens(
    rule_server: Callable[[bool], RuleServer], graphs: bool, by_hand: bool
) -> None:
    """With log-probabilities wanted, tokens are chosen outside of the (captured) step."""
    server = rule_server(graphs)
    running: list[int] = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        running = [row for row in running if torch.rand((), generator=generator) > 0.15]
        for row in range(1, 14):
            if row not in running and torch.rand((), generator=generator) < 0.3:
                server.admit(row, 3 + row)
                running.append(row)
        result = server.round(running, return_logprob=by_hand)
        assert result.used_graph == graphs
        if by_hand:
            logits = result.logits_output.next_token_logits.view(len(running), WINDOW, VOCAB)
            assert torch.equal(logits.argmax(-1), result.tokens)
    for row in running:
        server.assert_targets_output(row)


def penalised_target(prompt: list[int], length: int, presence: float, min_new_tokens: int) -> list[int]:
    """A request's tokens, one by one."""
    tokens = [*prompt, target_after(prompt[-1], len(prompt) - 1)]
    while len(tokens) < length:
        logits = torch.nn.functional.one_hot(torch.tensor(target_after(tokens[-1], len(tokens) - 1)), VOCAB).float()
        logits[sorted(set(tokens[len(prompt) :]))] -= presence
        if len(tokens) - len(prompt) < min_new_tokens:
            logits[[*ENDS]] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens


@pytest.mark.parametrize("graphs", [False, True])
def test_each_token_is_penalised_by_the_output_before_it(
    rule_server: Callable[[bool], RuleServer], graphs: bool
) -> None:
    """Beside requests without penalties; windows are drafted in two rounds, and rejected drafts leave no trace."""
    server = rule_server(graphs)
    params = {row: {"presence_penalty": 2.0 * (row % 2), "min_new_tokens": 30 * (row % 3 == 0)} for row in range(1, 10)}
    reqs: list[Any] = []
    for row, own in params.items():
        server.admit(row, 3 + row)
        req = request(row, own, server.sequences[row][-1:])
        req.origin_input_ids = server.sequences[row][:-1]
        reqs.append(req)
    server.penalties.begin_prefill(reqs)
    for _ in range(12):
        server.penalties.begin_round(reqs)
        assert server.round(list(params)).used_graph == graphs
    for req in reqs:
        own, found = params[req.req_pool_idx], server.sequences[req.req_pool_idx]
        assert found == penalised_target(req.origin_input_ids, len(found), own["presence_penalty"], own["min_new_tokens"])
    assert sum(len(server.sequences[row]) for row in params) > 9 * 12 * 1.5, "drafts were accepted"


@pytest.mark.parametrize("graphs", [False, True])
def test_the_sampler_gets_the_positions_of_the_verified_windows(
    rule_server: Callable[[bool], RuleServer], graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeded sampling depends on them; a replayed step has moved the lengths on already."""
    server = rule_server(graphs)
    rows = [2, 3, 5, 7, 11]
    for row in rows:
        server.admit(row, 4 + row)
    original = Sampler.accept
    seen: list[tuple[int, list[int]]] = []

    def accept(
        sampler: Sampler, candidates: Any, logits: Any, positions: Any, slots: Any, requests: Any, num_drafted: Any
    ) -> Any:
        seen.extend(zip(requests.tolist(), positions.view(-1, WINDOW).tolist(), strict=True))
        return original(sampler, candidates, logits, positions, slots, requests, num_drafted)

    monkeypatch.setattr(Sampler, "accept", accept)
    for _ in range(2):
        lengths = [len(server.sequences[row]) - 1 for row in rows]
        server.round(rows, return_logprob=True)
        assert sorted(seen) == [(i, list(range(n, n + WINDOW))) for i, n in enumerate(lengths)]
        seen.clear()


@pytest.mark.parametrize("graphs", [False, True])
def test_a_steady_batch_accepts_as_in_lockstep(rule_server: Callable[[bool], RuleServer], graphs: bool) -> None:
    """Windows are whole from the second round on: drafts fail at every fifth position only."""
    server = rule_server(graphs)
    rows = list(range(1, 9))
    for row in rows:
        server.admit(row, 10)
    server.round(rows)
    for _ in range(4):
        before = [len(server.sequences[row]) for row in rows]
        result = server.round(rows)
        for length, count in zip(before, result.accept_lens.tolist(), strict=True):
            # The last committed token is at position length - 1; the draft after position p fails if 5 divides p.
            wrong = next((i for i in range(WINDOW - 1) if (length - 1 + i) % 5 == 0), WINDOW - 1)
            assert count == wrong + 1
    assert server.counted[-WINDOW:] == [(6, 2 * WINDOW)] * WINDOW
    assert server.backend.forwards[-WINDOW:] == [(6, 2)] * WINDOW


def test_a_first_window_accepts_no_more_than_was_drafted(rule_server: Callable[[bool], RuleServer]) -> None:
    """Old tokens in the rest of the window may be right by chance, but are no drafts."""
    server = rule_server(False)
    rows = list(range(1, 5))
    for row in rows:
        server.admit(row, 6)
        tokens = [server.sequences[row][-1]]
        for position in range(6, 6 + WINDOW - 1):
            tokens.append(target_after(tokens[-1], position))
        server.rounds.windows.candidates[row] = torch.tensor(tokens)
    result = server.round(rows)
    phases = [server.rounds.schedule.phase(row) for row in rows]
    assert sorted(phases) == [0, 1, 2, 3]
    assert all(count <= phase + 1 for count, phase in zip(result.accept_lens.tolist(), phases, strict=True))


def test_a_logit_bias_changes_what_is_accepted_of_its_request_only(
    rule_server: Callable[[bool], RuleServer],
) -> None:
    server = rule_server(False)
    for row in (3, 5):
        server.admit(row, 6)
    bias = torch.zeros(2, VOCAB)
    bias[1, 7] = 100.0
    server.round([3, 5], info={"logit_bias": bias})
    server.assert_targets_output(3)
    assert server.sequences[5][7:] and set(server.sequences[5][7:]) == {7}


def test_a_plan_is_uploaded_once_while_nothing_changes(rule_server: Callable[[bool], RuleServer]) -> None:
    server = rule_server(False)
    for row in (1, 2, 3):
        server.admit(row, 5)
    server.round([1, 2, 3])
    server.round([1, 2, 3])
    uploaded = server.rounds._uploaded
    server.round([1, 2, 3])
    assert server.rounds._uploaded is uploaded


@pytest.mark.parametrize("feature", ["has_grammar", "return_hidden_states"])
def test_batches_that_cannot_be_staggered_say_why(rule_server: Callable[[bool], RuleServer], feature: str) -> None:
    batch: Any = SimpleNamespace(has_grammar=False, return_hidden_states=False, reqs=[SimpleNamespace(lora_id=None)])
    rounds = rule_server(False).rounds
    assert rounds.lockstep_reason(batch) is None
    setattr(batch, feature, True)
    assert feature.split("_")[-1] in (rounds.lockstep_reason(batch) or "").replace(" ", "_")


def test_batches_with_an_adapter_are_not_staggered(rule_server: Callable[[bool], RuleServer]) -> None:
    batch: Any = SimpleNamespace(has_grammar=False, return_hidden_states=False)
    batch.reqs = [SimpleNamespace(lora_id=None), SimpleNamespace(lora_id="adapter")]
    assert "LoRA" in (rule_server(False).rounds.lockstep_reason(batch) or "")


def test_requests_whose_round_ran_in_lockstep_begin_new_windows(rule_server: Callable[[bool], RuleServer]) -> None:
    server = rule_server(False)
    for row in (1, 2):
        server.admit(row, 5)
    server.round([1, 2])
    reqs: Any = [request_in(row) for row in (1, 2)]
    server.rounds.lose_drafts(reqs)
    server.round([1, 2])
    phases = [server.rounds.schedule.phase(row) for row in (1, 2)]
    assert phases == [3, 2]
    server.assert_targets_output(1)
    server.assert_targets_output(2)


@pytest.mark.parametrize("moved", [False, True])
def test_a_request_whose_kv_was_moved_verifies_new_drafts_only(
    rule_server: Callable[[bool], RuleServer], moved: bool
) -> None:
    server = rule_server(False)
    for row in (1, 2):
        server.admit(row, 5)
    server.round([1, 2])
    phase = server.rounds.schedule.phase(2)
    assert phase == 2 and len(server.sequences[2]) == 7
    if moved:
        req: Any = request_in(2)
        server.rounds.lose_drafts([req])
    server.round([1])  # without it
    count = server.round([1, 2]).accept_lens.tolist()[1]
    # All drafts are right here; what was drafted two rounds ago would make the window whole.
    assert count == (phase + 1 if moved else WINDOW)
    server.assert_targets_output(2)


def test_a_sampled_window_of_fewer_drafts_ends_with_a_token_of_the_target() -> None:
    """Neither an old token nor what is left of the target beside it."""
    torch.manual_seed(0)
    batch, width, vocab = 4000, 3, 4
    target = torch.tensor([0.1, 0.2, 0.3, 0.4])
    info: Any = SimpleNamespace(
        is_all_greedy=False,
        temperatures=torch.ones(batch, 1),
        top_ks=torch.full((batch,), vocab),
        top_ps=torch.ones(batch),
        min_ps=torch.zeros(batch),
        sampling_seed=None,
        need_top_k_sampling=False,
        need_top_p_sampling=False,
        need_min_p_sampling=False,
    )
    candidates = torch.full((batch, width), 3)
    draft_probs = torch.zeros(batch, width - 1, vocab)
    draft_probs[..., 3] = 1.0
    tokens, accept_lens = reference.accept(
        candidates,
        target.log().expand(batch * width, vocab),
        info,
        torch.zeros(batch * width, dtype=torch.int64),
        draft_probs,
        requests=torch.arange(batch),
        num_drafted=torch.zeros(batch, dtype=torch.int64),
    )
    assert accept_lens.tolist() == [1] * batch
    found = torch.bincount(tokens[:, 0], minlength=vocab) / batch
    torch.testing.assert_close(found, target, rtol=0, atol=0.04)


# ---------------------------------------------------------------------- sampled rounds

POSSIBLE = 5  # tokens that a ChainModel gives


class ChainModel(RuleModel):
    """Next tokens depend on the last one at random, those of drafts on the position, too."""

    def __init__(self, backend: RuleBackend) -> None:
        super().__init__(backend)
        generator = torch.Generator().manual_seed(11)
        self.target = 1.5 * torch.randn(POSSIBLE, POSSIBLE, generator=generator)
        self.draft = 3.0 * torch.randn(4, POSSIBLE, POSSIBLE, generator=generator)

    def logits(self, drafts: int, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(input_ids), VOCAB), -torch.inf)
        last = input_ids % POSSIBLE
        logits[:, :POSSIBLE] = self.target[last]
        logits[:drafts, :POSSIBLE] = self.draft[positions[:drafts] % 4, last[:drafts]]
        return logits


#: Temperature (0: greedy), top-k (0: none) and min-p by row.
SAMPLED = {
    **dict.fromkeys((1, 2, 3), (0.8, 0, 0.0)),
    **dict.fromkeys((4, 5), (1.7, 0, 0.0)),
    **dict.fromkeys((6, 7, 8), (1.2, 3, 0.0)),
    **dict.fromkeys((9, 10), (0.0, 0, 0.0)),
    **dict.fromkeys((11, 12, 13), (1.2, 0, 0.2)),
}


def sampled_round(server: RuleServer, rows: list[int]) -> Any:
    """One round of ``rows`` with the parameters of ``SAMPLED``."""
    from sglang.srt.sampling.sampling_params import TOP_K_ALL

    given = [SAMPLED[row] for row in rows]
    top_ks = [1 if temperature == 0 else top_k or TOP_K_ALL for temperature, top_k, _ in given]
    info = {
        "is_all_greedy": all(k == 1 for k in top_ks),
        "temperatures": torch.tensor([[temperature or 1.0] for temperature, *_ in given]),
        "top_ks": torch.tensor(top_ks, dtype=torch.int32),
        "top_ps": torch.ones(len(rows)),
        "min_ps": torch.tensor([min_p for *_, min_p in given]),
        "need_top_k_sampling": any(k != TOP_K_ALL for k in top_ks),
        "need_min_p_sampling": any(min_p > 0 for *_, min_p in given),
    }
    reqs = [
        request_in(
            row,
            rid=f"request {row}",
            sampling_params=SimpleNamespace(top_k=k, top_p=1.0, min_p=SAMPLED[row][2]),
        )
        for row, k in zip(rows, top_ks, strict=True)
    ]
    return server.round(rows, info=info, reqs=reqs)


def surprise(transitions: torch.Tensor, probs: torch.Tensor) -> float:
    """Chi-square p-value of counted transitions under ``probs`` (both [last, next]); none may be impossible."""
    assert (transitions[probs == 0] == 0).all()
    expected = probs * transitions.sum(1, keepdim=True)
    # Rare ones of a last token together.
    rare = (expected < 5) & (probs > 0)
    statistic, freedom = 0.0, 0
    for found, wanted, together in zip(transitions, expected, rare, strict=True):
        cells = [(float(found[i]), float(wanted[i])) for i in range(POSSIBLE) if wanted[i] > 0 and not together[i]]
        cells.append((float(found[together].sum()), float(wanted[together].sum())))
        cells = [(f, w) for f, w in cells if w > 1]
        statistic += sum((f - w) ** 2 / w for f, w in cells)
        freedom += max(len(cells) - 1, 0)
    return float(chi2.sf(statistic, freedom))


def assert_sampled_rounds_follow_the_target(server: RuleServer, rounds: int) -> None:
    """Requests come, idle, go and are replaced in random order; each is drawn with what is its own."""
    model = server.runner.model = ChainModel(server.backend)
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(3)
    kinds: dict[tuple[float, int, float], torch.Tensor] = {}
    lengths = []
    for row in SAMPLED:
        server.admit(row, 3 + row)
    for number in range(rounds):
        order = [row for row in SAMPLED if torch.rand((), generator=generator) < (0.9 if row < 9 else 0.5)]
        order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
        if number % 3 == 0:
            order = [row for row in order if SAMPLED[row][1:] == (0, 0.0)]  # no filters in the batch
        for row in order:
            ended = len(server.sequences[row]) > CONTEXT - 4 * WINDOW or torch.rand((), generator=generator) < 0.1
            if ended:
                server.admit(row, 3 + row)
                server.rounds.windows.candidates[row, 1:] = 0  # left by another: they are no drafts
        before = {row: len(server.sequences[row]) for row in order}
        lengths += sampled_round(server, order).accept_lens.tolist()
        for row, length in before.items():
            counts = kinds.setdefault(SAMPLED[row], torch.zeros(POSSIBLE, POSSIBLE))
            tokens = server.sequences[row][length - 1 :]
            for last, token in zip(tokens, tokens[1:], strict=False):
                counts[last % POSSIBLE, token] += 1
    assert set(lengths) == set(range(1, WINDOW + 1))
    for (temperature, top_k, min_p), counts in kinds.items():
        probs = torch.softmax(model.target / (temperature or 1e-4), -1)
        kept = probs >= probs.amax(-1, keepdim=True) * min_p
        if top_k:
            kept &= probs >= probs.topk(top_k, -1).values[:, -1:]
        probs = torch.where(kept, probs, 0.0) / torch.where(kept, probs, 0.0).sum(-1, keepdim=True)
        if temperature:
            assert surprise(counts, probs) > 1e-3, (temperature, top_k, min_p)
        else:
            assert torch.equal(counts.sum(1), counts.gather(1, probs.argmax(-1, keepdim=True)).squeeze(1))


def filtered(logits: torch.Tensor, rows: RowParameters) -> torch.Tensor:
    """Logits [rows, vocab], -inf where a top-k or a min-p removes them; greedy ones as they are."""
    if rows.top_ps is None or rows.min_ps is None:
        return logits
    assert (rows.top_ps == 1).all()
    likelier = (logits.unsqueeze(1) > logits.unsqueeze(2)).sum(-1)
    floor = logits.amax(-1, keepdim=True) + rows.temperatures * rows.min_ps.log().unsqueeze(1)
    removed = (likelier >= rows.top_ks.unsqueeze(1)) | (logits < floor)
    return logits.masked_fill(removed & (rows.top_ks != 1).unsqueeze(1), -torch.inf)


def draft_in_torch(
    logits: torch.Tensor, rows: RowParameters, seeds: torch.Tensor, number: int, kept: torch.Tensor, lse: torch.Tensor,
    entries: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """What ``triton_sampling.draft`` does."""
    logits = filtered(logits, rows)
    kept[entries] = logits
    drawn = torch.multinomial(torch.softmax(logits / rows.temperatures, -1), 1).squeeze(1)
    return torch.where(rows.top_ks == 1, logits.argmax(-1), drawn)


def accept_in_torch(
    candidates: torch.Tensor, logits: torch.Tensor, rows: RowParameters, seeds: torch.Tensor, number: int,
    kept: torch.Tensor, lse: torch.Tensor, places: int, slots: torch.Tensor, num_drafted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What ``triton_sampling.accept`` does; nothing that is kept of greedy requests counts."""
    batch, width = candidates.shape

    def repeated(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.repeat_interleave(width, 0)

    temperatures, top_ks = repeated(rows.temperatures), repeated(rows.top_ks)
    assert temperatures is not None and top_ks is not None
    every_row = RowParameters(temperatures, top_ks, repeated(rows.top_ps), repeated(rows.min_ps))
    info: Any = SimpleNamespace(
        is_all_greedy=False, temperatures=rows.temperatures, top_ks=rows.top_ks, top_ps=None, min_ps=None,
        sampling_seed=None, need_top_k_sampling=False, need_top_p_sampling=False, need_min_p_sampling=False,
    )  # fmt: skip
    by_slot = kept.view(-1, places, kept.shape[1])[slots]
    probs = torch.softmax(by_slot / rows.temperatures.unsqueeze(1), -1)
    positions = torch.zeros(batch * width, dtype=torch.int64)
    return reference.accept(candidates, filtered(logits, every_row), info, positions, probs, num_drafted=num_drafted)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("from_logits", [False, True])
def test_sampled_rounds_follow_the_target(
    rule_server: Callable[..., RuleServer], graphs: bool, from_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From logits, too, with the kernels' definitions in their place."""
    monkeypatch.setattr(triton_sampling, "draft", draft_in_torch)
    monkeypatch.setattr(triton_sampling, "accept", accept_in_torch)
    server = rule_server(graphs, from_logits)
    assert_sampled_rounds_follow_the_target(server, rounds=400)


@pytest.mark.skipif(not INTERPRETED, reason="test_sampled_rounds_from_logits_in_the_interpreter runs it in a child process")
def test_sampled_rounds_from_logits_follow_the_target(rule_server: Callable[..., RuleServer]) -> None:
    server = rule_server(graphs=True, use_triton=True)
    assert_sampled_rounds_follow_the_target(server, rounds=24)


@pytest.mark.skipif(INTERPRETED, reason="the other tests of this file run in this process")
def test_sampled_rounds_from_logits_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__, only=test_sampled_rounds_from_logits_follow_the_target.__name__)


class FirstRank:
    """The tensor-parallel group of two ranks that run one after the other: the second one is given what the first sent."""

    world_size = 2

    def __init__(self) -> None:
        self.rank_in_group = 0
        self.sent: list[torch.Tensor] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        assert src == 0 and tensor.is_contiguous()
        if self.rank_in_group == 0:
            self.sent.append(tensor.clone())
            return tensor
        sent = self.sent.pop(0)
        assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)
        return sent


@pytest.mark.parametrize("graphs", [False, True])
def test_staggered_rounds_of_all_ranks_draw_what_the_first_one_drew(
    rule_server: Callable[[bool], RuleServer], graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = FirstRank()
    monkeypatch.setattr("sglang_sparsespec.rounds.base.get_tp_group", lambda: group)
    rows = [1, 4, 6, 9, 11]
    outputs = []
    for rank in range(group.world_size):
        group.rank_in_group = rank
        torch.manual_seed(rank)
        server = rule_server(graphs)
        server.runner.model = ChainModel(server.backend)
        for row in rows:
            server.admit(row, 3 + row)
        lengths = [sampled_round(server, rows).accept_lens.tolist() for _ in range(8)]
        outputs.append((server.sequences, lengths, server.rounds.windows.candidates[rows].tolist()))
    assert not group.sent
    assert outputs[0] == outputs[1]
