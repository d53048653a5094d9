"""Measuring the table of times: what is run, on which KV slots, and that nothing of it is left (CPU, without a model)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_backend import CONTEXT, HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, NUM_Q_HEADS, ROWS, WINDOW, SmallServer

from sglang_sparsespec.attention_backend.forward_plan import Draft, Plain, Verify
from sglang_sparsespec.rounds import forward_batch, measurement
from sglang_sparsespec.rounds.base import RoundContext
from sglang_sparsespec.rounds.decode_steps import DecodeSteps
from sglang_sparsespec.rounds.measurement import measure_rounds
from sglang_sparsespec.sampling.penalties import Penalties
from sglang_sparsespec.sampling.sampler import Sampler

VOCAB = 16
KINDS = {Draft: "draft", Plain: "plain", Verify: "verify"}


class LayersModel:
    """Attention layers with random projections; the next token does not depend on them. Records the forwards."""

    def __init__(self, server: SmallServer) -> None:
        self.server = server
        self.forwards: list[SimpleNamespace] = []

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, batch: Any) -> Any:
        backend, rows = self.server.backend, batch.req_pool_indices
        self.forwards.append(
            SimpleNamespace(
                kind=KINDS[type(backend._plan)],
                batch=batch.batch_size,
                positions=positions.tolist(),
                slots=batch.out_cache_loc.tolist(),
                selected=backend.table.num_selected[rows].tolist(),
                tail_start=backend.table.tail_start[rows].tolist(),
                drafted=backend._all_drafted[:1].tolist(),
            )
        )
        for layer in self.server.layers:
            shapes = ((len(input_ids), heads * HEAD_DIM) for heads in (NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
            q, k, v = (torch.randn(shape) for shape in shapes)
            run = backend.forward_decode if batch.forward_mode.is_decode() else backend.forward_extend
            run(q, k, v, layer, batch)
        return SimpleNamespace(next_token_logits=torch.nn.functional.one_hot(input_ids, VOCAB).float())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The table of a pool of 399 slots, whose first rows are free."""
    group = SimpleNamespace(world_size=1, rank_in_group=0)
    monkeypatch.setattr(measurement, "get_tp_group", lambda: group)
    monkeypatch.setattr(measurement, "CPU_SECONDS", 1e9)
    monkeypatch.setattr(forward_batch, "enable_num_token_non_padded", lambda: False)  # it asks for SGLang's groups
    server = SmallServer()
    server.req_to_token.zero_()
    before = server.pool.k.clone(), server.pool.v.clone()
    model = LayersModel(server)

    def forward(batch: Any) -> None:
        assert batch.forward_mode.is_target_verify() and batch.spec_info.num_tokens_per_req == WINDOW
        server.backend.init_forward_metadata(batch)
        model.forward(batch.input_ids, batch.positions, batch)

    runner: Any = SimpleNamespace(
        model=model,
        forward=forward,
        spec_algorithm=None,
        max_total_num_tokens=ROWS * CONTEXT - 1,
        model_config=SimpleNamespace(context_len=CONTEXT, vocab_size=VOCAB),
    )
    nobody: Any = None
    penalties = Penalties(ROWS, VOCAB, "cpu", use_triton=False)
    context = RoundContext(nobody, runner, server.backend, WINDOW, nobody, None, torch.float32, penalties, capture=False)
    sampler = Sampler(WINDOW - 1, torch.float32, "cpu", use_triton=False)
    steps = [DecodeSteps(context, sampler, plain=plain) for plain in (False, True)]
    times = measure_rounds(context, *steps)
    assert times is not None
    return SimpleNamespace(server=server, times=times, forwards=model.forwards, before=before, context=context)


def test_every_point_of_the_grid_is_timed(measured: SimpleNamespace) -> None:
    longest = CONTEXT - WINDOW
    assert [(p.batch, p.context) for p in measured.times.points] == [(1, 64), (1, longest), (ROWS - 1, 64)]
    assert all(min(p.draft, p.verify, p.plain) > 0 for p in measured.times.points)


def test_each_sort_of_forward_is_run_once_before_it_is_timed(measured: SimpleNamespace) -> None:
    of_a_point = ["verify"] * 2 + ["draft"] * 2 + ["plain"] * 2
    assert [forward.kind for forward in measured.forwards] == 3 * of_a_point
    assert [forward.batch for forward in measured.forwards] == [1] * 12 + [ROWS - 1] * 6
    assert all(forward.drafted == [WINDOW - 1] for forward in measured.forwards)


def test_drafts_attend_to_a_selection_of_their_context_and_steps_go_on(measured: SimpleNamespace) -> None:
    drafts = measured.forwards[14:16]
    assert [forward.positions for forward in drafts] == [[64] * 4, [65] * 4]
    for forward in drafts:
        assert forward.selected == [8 - WINDOW] * 4 and forward.tail_start == [64] * 4


def test_requests_have_slots_of_their_own_and_never_sglangs_padding(measured: SimpleNamespace) -> None:
    for forward in measured.forwards:
        assert len(set(forward.slots)) == len(forward.slots) and min(forward.slots) >= 1
    assert max(slot for forward in measured.forwards for slot in forward.slots) < ROWS * CONTEXT


def test_nothing_is_left_of_it(measured: SimpleNamespace) -> None:
    server, backend = measured.server, measured.server.backend
    assert not server.req_to_token.any()
    assert not backend.kv_read.any() and not backend.table.num_selected.any() and not backend.table.tail_start.any()
    written = sorted({slot for forward in measured.forwards for slot in forward.slots})
    for now, before in zip((server.pool.k, server.pool.v), measured.before, strict=True):
        untouched = torch.ones(ROWS * CONTEXT, dtype=torch.bool)
        untouched[written] = False
        assert torch.equal(now[:, untouched], before[:, untouched])
        assert not now[:, written].any() and now.shape[0] == NUM_LAYERS


def test_the_global_random_state_is_left_alone(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Seeded runs are the same with and without measuring: the toy model alone draws from it here."""
    monkeypatch.setattr(torch, "randn", lambda *shape, **given: torch.ones(*shape))
    before = torch.get_rng_state()
    request.getfixturevalue("measured")
    assert torch.equal(torch.get_rng_state(), before)


def test_time_that_is_up_ends_it_on_all_ranks_together(monkeypatch: pytest.MonkeyPatch, measured: SimpleNamespace) -> None:
    """The second rank would go on; the first says that one point is all. It has the first rank's table."""
    said = iter([True, False, [*measured.times.points[:1]]])
    group = SimpleNamespace(world_size=2, rank_in_group=1, broadcast_object=lambda mine, src: next(said))
    monkeypatch.setattr(measurement, "get_tp_group", lambda: group)
    measured.forwards.clear()
    steps = [DecodeSteps(measured.context, Sampler(2, torch.float32, "cpu", False), plain) for plain in (False, True)]
    times = measure_rounds(measured.context, *steps)
    assert times is not None and times.points == measured.times.points[:1]
    assert len(measured.forwards) == 6
