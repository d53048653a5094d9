"""What every kind of round is given, and what it yields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.dp_attention import set_is_extend_in_batch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from sglang_sparsespec.attention_backend.backend import SparseSpecAttnBackend
from sglang_sparsespec.attention_backend.forward_plan import ForwardPlan
from sglang_sparsespec.metrics import DraftMetrics
from sglang_sparsespec.rounds.adapters import Adapters
from sglang_sparsespec.sampling.penalties import Penalties
from sglang_sparsespec.sampling.simulated import SimulatedAcceptance
from sglang_sparsespec.spec_input import SparseSpecDraftInput

if TYPE_CHECKING:
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

#: Takes the new committed lengths (int64 [batch]) as soon as they exist on the device (overlap scheduling).
Publish = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class RoundOutcome:
    """What one round yields, by request of the batch.

    Attributes:
        kind: "lockstep", "ngram", "plain" or "unified".
        tokens: int64 [batch, W], of which the first ``accept_lens`` (int32 [batch]) are the output.
        new_seq_lens: int64 [batch], committed KV lengths.
        bonus_tokens: int64 [batch], the last committed tokens, whose KV is not written yet.
        logits_output: for log-probabilities, with logits [batch * W, vocab] where the round has them.
        used_graph: whether CUDA graphs were replayed.
        drafted: drafts per request, 0 for a plain round; where requests differ, the most that one could have.
        plain_steps: steps of a plain round, else 0.
    """

    kind: str
    tokens: torch.Tensor
    accept_lens: torch.Tensor
    new_seq_lens: torch.Tensor
    bonus_tokens: torch.Tensor
    logits_output: LogitsProcessorOutput
    used_graph: bool
    drafted: int = 0
    plain_steps: int = 0


@dataclass
class SparseSpecResult(GenerationBatchResult):
    """What SGLang is told of a round.

    Attributes:
        outcome: read when the round's acceptance is known on the host, one scheduler iteration later.
    """

    outcome: RoundOutcome | None = field(default=None)

    @classmethod
    def of(cls, outcome: RoundOutcome) -> SparseSpecResult:
        """The result that SGLang's scheduler takes."""
        return cls(
            logits_output=outcome.logits_output,
            next_token_ids=outcome.tokens.flatten(),
            can_run_cuda_graph=outcome.used_graph,
            accept_lens=outcome.accept_lens,
            new_seq_lens=outcome.new_seq_lens,
            next_draft_input=SparseSpecDraftInput(outcome.bonus_tokens, outcome.new_seq_lens),
            speculative_num_draft_tokens=outcome.tokens.shape[1],
            outcome=outcome,
        )


@dataclass(frozen=True)
class RoundContext:
    """What all rounds of a worker work with.

    Attributes:
        window: W = k + 1.
        simulated: SIMULATED acceptance, None to accept by the target's logits.
        logits_dtype: of kept draft logits, see ``sampling.sampler.draft_logits_dtype``.
        penalties: of the requests.
        capture: whether steps are captured as CUDA graphs.
        adapters: LoRA adapters of steps, None without LoRA.
        note_step: called with the number of each step of lock-step and plain rounds, before it is launched.
    """

    target_worker: TpModelWorker
    model_runner: ModelRunner
    backend: SparseSpecAttnBackend
    window: int
    metrics: DraftMetrics
    simulated: SimulatedAcceptance | None
    logits_dtype: torch.dtype
    penalties: Penalties
    capture: bool
    adapters: Adapters | None = None
    note_step: Callable[[int], None] = lambda step: None

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.backend.device

    @property
    def use_triton(self) -> bool:
        """Whether sampling runs in Triton."""
        return self.device.type == "cuda"

    @property
    def stream(self) -> Any:
        """The stream that rounds are launched on."""
        return torch.get_device_module(self.device).current_stream()

    def forward(self, plan: ForwardPlan, forward_batch: ForwardBatch) -> torch.Tensor:
        """Run the model on a decode batch that attends by ``plan``: logits [tokens, vocab]. Recordable.

        The model is called directly: ``ModelRunner.forward`` would replay the verify graph for a DECODE batch, and leave
        an event that lets the scheduler write to ``req_to_token`` before verification has read it
        (``war_fastpath_read_done_event``).
        """
        set_is_extend_in_batch(False)
        self.backend.begin(plan)
        with forward_context(ForwardContext(attn_backend=self.backend)):
            output = self.model_runner.model.forward(forward_batch.input_ids, forward_batch.positions, forward_batch)
        self.backend.end()
        return output.next_token_logits

    def from_first_rank(self, is_all_greedy: bool, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors of tensor-parallel rank 0: what was drawn at random must not differ between ranks."""
        group = get_tp_group()
        if group.world_size == 1 or (is_all_greedy and self.simulated is None):
            return tensors
        return tuple(group.broadcast(tensor.contiguous(), src=0) for tensor in tensors)


def pad_window(tokens: torch.Tensor, window: int) -> torch.Tensor:
    """``tokens`` (int64 [batch, n]) with the last one repeated: int64 [batch, W]."""
    missing = window - tokens.shape[1]
    if missing == 0:
        return tokens
    return torch.cat([tokens, tokens[:, -1:].expand(-1, missing)], dim=1)
