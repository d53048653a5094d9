"""Time of sampling in a round: k draws of drafts and the acceptance, by implementation, on the current GPU.

    python benchmarks/sampling.py --batches 32 128 224 --results sampling/

Implementations:

- ``triton``: ``sglang_sparsespec.triton_sampling``, from logits; with top-k 20 and top-p 0.95 also through its floors.
- ``probabilities``: float32 distributions by torch, SGLang's chain kernel; with the same filters by FlashInfer.
- ``flashinfer``: the draw alone, ``sampling_from_logits`` (Gumbel-max) of logits / T and ``torch.logsumexp`` of them,
  with the copy of the logits that acceptance needs; and ``chain_speculative_sampling`` on ``softmax``.
- ``argmax``: what a greedy batch does instead.

``GB`` is what has to be moved: the draft's logits read once and kept, the verification's read once, both of one row per
request read again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import Timer, gpu_slug, markdown_table, say, stamp, write_reports

from sglang_sparsespec import sampling, triton_sampling

Call = Callable[[], Any]
#: Filters of the rows that have some.
TOP_K, TOP_P = 20, 0.95
#: Likely tokens of a row.
LIKELY = 64


class Problem:
    """Random logits of one round; the draft's are the target's with some noise."""

    def __init__(self, batch: int, vocab: int, k: int, temperature: float, kept_dtype: torch.dtype) -> None:
        self.batch, self.vocab, self.k = batch, vocab, k
        self.temperatures = torch.full((batch, 1), temperature, device="cuda")
        self.top_ks = torch.full((batch,), 1 << 30, dtype=torch.int32, device="cuda")
        self.top_ps = torch.full((batch,), TOP_P, device="cuda")
        self.rows = self.parameters(1)
        # Of language models' kind: a few dozen likely tokens far above the rest.
        logits = 2.5 * torch.randn(batch * (k + 1), vocab, device="cuda")
        likely = torch.randint(vocab, (len(logits), LIKELY), device="cuda")
        logits.scatter_add_(1, likely, 10 + 3 * torch.randn(len(logits), LIKELY, device="cuda"))
        self.target = logits.to(kept_dtype).float()
        self.draft = self.target.view(batch, k + 1, vocab)[:, 0] + torch.randn(batch, vocab, device="cuda") / 4
        self.draft = self.draft.to(kept_dtype).float()
        self.positions = torch.zeros(batch, dtype=torch.int64, device="cuda")
        self.kept = torch.empty((batch, k, vocab), dtype=kept_dtype, device="cuda")
        self.lse = torch.empty((batch, k), device="cuda")
        self.seeds = triton_sampling.round_seeds(k + 1, "cuda")
        self.candidates = torch.zeros((batch, k + 1), dtype=torch.int64, device="cuda")
        for step in range(k):
            self.candidates[:, step + 1] = self.draft_triton(step)

    def parameters(self, repeats: int, filters: bool = False) -> sampling.SamplingRows:
        """``repeats`` rows per request."""
        temperatures = self.temperatures.repeat_interleave(repeats, dim=0)
        top_ks = (torch.full_like(self.top_ks, TOP_K) if filters else self.top_ks).repeat_interleave(repeats, dim=0)
        top_ps = self.top_ps.repeat_interleave(repeats, dim=0)
        return sampling.SamplingRows(temperatures, top_ks, top_ps, top_ps, None, False, filters, filters, False)

    def draft_triton(self, step: int, block: int = triton_sampling.BLOCK, filters: bool = False) -> torch.Tensor:
        """One draw; tokens int64 [batch]."""
        rows = self.parameters(1, filters)
        return triton_sampling.draft(
            self.draft, self.temperatures, rows.top_ks, self.seeds, step, self.kept, self.lse, block,
            top_ps=rows.top_ps if filters else None,
        )  # fmt: skip

    def accept_triton(self, block: int = triton_sampling.BLOCK, filters: bool = False) -> Any:
        """Acceptance of ``candidates``."""
        rows = self.parameters(1, filters)
        return triton_sampling.accept(
            self.candidates, self.target, self.temperatures, rows.top_ks, self.kept, self.lse, self.seeds[-1:], block,
            top_ps=rows.top_ps if filters else None,
        )  # fmt: skip

    def accept_probabilities(self, draft_probs: list[torch.Tensor], filters: bool = False) -> Any:
        """As ``sampling.accept`` for a batch that needs distributions."""
        rows = self.parameters(self.k + 1, filters)
        probs = sampling.target_probabilities(self.target, rows)
        sampling.make_greedy_rows_exact(probs, self.target, rows)
        coins, final = torch.rand((self.batch, self.k), device="cuda"), torch.rand(self.batch, device="cuda")
        shaped = probs.view(self.batch, self.k + 1, -1)
        return sampling.accept_by_rejection_sglang(self.candidates, shaped, torch.stack(draft_probs, 1), coins, final)

    def draft_flashinfer(self, step: int) -> Any:
        """One draw, the sums and the copy."""
        from flashinfer.sampling import sampling_from_logits

        self.kept[:, step].copy_(self.draft)
        scaled = self.draft / self.temperatures
        return sampling_from_logits(scaled), torch.logsumexp(scaled, dim=-1)

    def accept_flashinfer(self, draft_probs: list[torch.Tensor]) -> Any:
        """FlashInfer's softmax and chain sampling."""
        from flashinfer.sampling import chain_speculative_sampling, softmax

        probs = softmax(self.target, self.temperatures.repeat_interleave(self.k + 1, 0).flatten())
        shaped = probs.view(self.batch, self.k + 1, -1)
        drafts = self.candidates[:, 1:].to(torch.int32).contiguous()
        return chain_speculative_sampling(torch.stack(draft_probs, 1), drafts, shaped)

    def gigabytes(self) -> tuple[float, float]:
        """Least traffic of the k draws and of the acceptance."""
        row = self.batch * self.vocab
        kept = self.kept.element_size()
        return self.k * row * (4 + kept) / 1e9, row * (4 * (self.k + 1) + 4 + kept) / 1e9


def implementations(problem: Problem, blocks: list[int]) -> dict[str, tuple[Call, Call]]:
    """One draw and one acceptance of each."""
    probs = sampling.sample_draft(problem.draft, problem.rows, problem.positions)[1]
    assert probs is not None
    draft_probs = [probs] * problem.k
    found: dict[str, tuple[Call, Call]] = {
        f"triton, blocks of {block}": (
            lambda block=block: problem.draft_triton(0, block),  # type: ignore[misc]
            lambda block=block: problem.accept_triton(block),  # type: ignore[misc]
        )
        for block in blocks
    }
    found["probabilities"] = (
        lambda: sampling.sample_draft(problem.draft, problem.rows, problem.positions),
        lambda: problem.accept_probabilities(draft_probs),
    )
    found["triton, top-k and top-p"] = (
        lambda: problem.draft_triton(0, filters=True),
        lambda: problem.accept_triton(filters=True),
    )
    filtered = problem.parameters(1, filters=True)
    found["probabilities, top-k and top-p"] = (
        lambda: sampling.sample_draft(problem.draft, filtered, problem.positions),
        lambda: problem.accept_probabilities(draft_probs, filters=True),
    )
    found["flashinfer"] = (lambda: problem.draft_flashinfer(0), lambda: problem.accept_flashinfer(draft_probs))
    found["argmax"] = (lambda: problem.draft.argmax(-1), lambda: problem.target.argmax(-1))
    return found


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every implementation at every batch size."""
    timer = Timer(budget_s=0.1, min_repetitions=5, max_repetitions=30)
    records = []
    for batch in args.batches:
        problem = Problem(batch, args.vocab, args.steps, args.temperature, getattr(torch, args.kept_dtype))
        for name, (draw, accept) in implementations(problem, args.blocks).items():
            say(f"batch {batch}, {name}")
            drawn, accepted = timer.events([draw]), timer.events([accept])
            draw_gb, accept_gb = problem.gigabytes()
            records.append(
                {
                    "implementation": name,
                    "batch": batch,
                    "draw_ms": drawn.ms,
                    "accept_ms": accepted.ms,
                    "round_ms": args.steps * drawn.ms + accepted.ms,
                    "least_gb": draw_gb + accept_gb,
                }
            )
        del problem
        torch.cuda.empty_cache()
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128, 224])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--steps", type=int, default=8, help="drafts per round")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--kept-dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2048, 4096, 8192], help="logits per program")
    parser.add_argument("--results", type=Path, help="folder for the report")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU: times would mean nothing; tests/test_triton_sampling.py checks the kernels on the CPU")
    records = measure(args)
    headers = ["implementation", "batch", "draw ms", "accept ms", f"round ms ({args.steps} draws)", "least GB"]
    keys = ["implementation", "batch", "draw_ms", "accept_ms", "round_ms", "least_gb"]
    table = markdown_table(headers, [[record[key] for key in keys] for record in records], right=range(1, 6))
    print(table)
    if args.results:
        about = stamp()
        name = f"sampling-{gpu_slug(about['gpu']['name'])}"
        text = f"# Sampling, {about['gpu']['name']}, vocabulary {args.vocab}\n\n{table}\n"
        write_reports(args.results, name, {**about, "records": records}, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
