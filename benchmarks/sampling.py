"""Time of sampling in a round, k draws of drafts and the acceptance: this project's sampler beside FlashInfer's kernels.

    python benchmarks/sampling.py --batches 1 32 128 224 --results sampling.jsonl

- ``triton``: this project's sampler, which works from logits; also with top-k and top-p, and with min-p.
- ``flashinfer``: the draw is ``sampling_from_logits`` of logits / T, with the log-sum-exps and the copy of the logits that
  acceptance needs; the acceptance is ``chain_speculative_sampling`` on ``softmax``. With top-k and top-p both work on
  renormalised probabilities.
- ``argmax``: what a greedy batch does instead.
- ``penalties``: what frequency, presence and repetition penalties and ``min_new_tokens`` of all requests take beside that:
  of a draft step, and of a verification with the count of what it accepts. Each request has an output of --output tokens.

"least GB" is what has to be moved: the draft's logits read once and kept, the verification's read once, and both of one row
per request read again. Times are medians of ``flashinfer.testing.bench_gpu_time`` between events, with the L2 cache flushed.
Without a GPU, TRITON_INTERPRET=1 checks that everything runs (``--batches 2 --vocab 300``); the times mean nothing then.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from _common import markdown, say, significant, stamp, write_record

from sglang_sparsespec.sampling.penalties import Penalties
from sglang_sparsespec.sampling.sampler import Sampler

Call = Callable[[], Any]
TEMPERATURE, TOP_K, TOP_P, MIN_P = 0.7, 20, 0.95, 0.05
#: Likely tokens of a row.
LIKELY = 64
#: More draws than are timed.
MOST_DRAWS = 1 << 16


class Problem:
    """Random logits of one round; the draft's are the target's with some noise."""

    def __init__(self, batch: int, vocab: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.batch, self.vocab, self.k, self.dtype, self.device = batch, vocab, k, dtype, device
        # Of language models' kind: a few dozen likely tokens far above the rest.
        logits = 2.5 * torch.randn(batch * (k + 1), vocab, device=device)
        likely = torch.randint(vocab, (len(logits), LIKELY), device=device)
        logits.scatter_add_(1, likely, 10 + 3 * torch.randn(len(logits), LIKELY, device=device))
        self.target = logits.to(dtype).float()
        noise = torch.randn(batch, vocab, device=device) / 4
        self.draft = (self.target.view(batch, k + 1, vocab)[:, 0] + noise).to(dtype).float()
        self.temperatures = torch.full((batch, 1), TEMPERATURE, device=device)
        self.candidates = self.draft.topk(k + 1, dim=-1).indices

    def batch_info(self, filters: dict[str, float]) -> Any:
        """What SGLang's ``SamplingBatchInfo`` says of the batch, as far as the sampler reads it."""

        def column(name: str, otherwise: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full((self.batch,), filters.get(name, otherwise), dtype=dtype, device=self.device)

        return SimpleNamespace(
            temperatures=self.temperatures,
            top_ks=column("top_k", 1 << 30, torch.int32),
            top_ps=column("top_p", 1.0),
            min_ps=column("min_p", 0.0),
            is_all_greedy=False,
            is_any_greedy=False,
            need_top_k_sampling="top_k" in filters,
            need_top_p_sampling="top_p" in filters,
            need_min_p_sampling="min_p" in filters,
            sampling_seed=None,
            device=self.device,
        )

    def triton(self, **filters: float) -> tuple[Call, Call]:
        """A draw and an acceptance by this project's sampler."""
        sampler = Sampler(self.k, self.dtype, self.device, use_triton=True)
        parameters = SimpleNamespace(min_p=0.0, top_k=1 << 30, top_p=1.0, temperature=TEMPERATURE, sampling_seed=None)
        vars(parameters).update(filters)
        reqs: list[Any] = [SimpleNamespace(sampling_params=parameters)] * self.batch
        sampler.begin_round(self.batch_info(filters), reqs, self.batch, MOST_DRAWS)
        first = torch.arange(self.batch, device=self.device) * self.k
        positions = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        for step in range(self.k):
            self.candidates[:, step + 1] = sampler.draw(self.draft, first + step, positions)
        rows = positions.repeat_interleave(self.k + 1)
        return (
            lambda: sampler.draw(self.draft, first, positions),
            lambda: sampler.accept(self.candidates, self.target, rows),
        )

    def flashinfer(self, with_filters: bool) -> tuple[Call, Call]:
        """A draw and an acceptance by FlashInfer."""
        from flashinfer import sampling as kernels

        kept = torch.empty((self.batch, self.vocab), dtype=self.dtype, device=self.device)
        drafts = self.candidates[:, 1:].to(torch.int32).contiguous()

        def probabilities(logits: torch.Tensor) -> torch.Tensor:
            probs = kernels.softmax(logits, self.temperatures.expand(-1, len(logits) // self.batch).flatten())
            return kernels.top_p_renorm_probs(kernels.top_k_renorm_probs(probs, TOP_K), TOP_P) if with_filters else probs

        def draw() -> Any:
            if with_filters:
                return kernels.sampling_from_probs(probabilities(self.draft))
            kept.copy_(self.draft)
            scaled = self.draft / self.temperatures
            return kernels.sampling_from_logits(scaled), torch.logsumexp(scaled, dim=-1)

        draft_probs = probabilities(self.draft).unsqueeze(1).repeat(1, self.k, 1)

        def accept() -> Any:
            shaped = probabilities(self.target).view(self.batch, self.k + 1, -1)
            return kernels.chain_speculative_sampling(draft_probs, drafts, shaped)

        return draw, accept

    def penalties(self, output: int) -> tuple[Call, Call]:
        """The penalties of a draft step, and of an acceptance, after ``output`` tokens."""
        parameters = SimpleNamespace(
            frequency_penalty=0.1, presence_penalty=0.1, repetition_penalty=1.1, min_new_tokens=2 * output,
            stop_token_ids=None,
        )  # fmt: skip
        tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=0)
        reqs: list[Any] = [
            SimpleNamespace(
                req_pool_idx=row, sampling_params=parameters, tokenizer=tokenizer, origin_input_ids=[1],
                output_ids=torch.randint(self.vocab, (output,)).tolist(),
            )
            for row in range(self.batch)
        ]  # fmt: skip
        penalties = Penalties(self.batch, self.vocab, self.device, use_triton=True)
        penalties.begin_prefill(reqs)
        rows = torch.arange(self.batch, device=self.device)
        lengths, seen = torch.full_like(rows, output), torch.full_like(rows, self.k // 2)
        positions = (lengths.unsqueeze(1) + torch.arange(self.k + 1, device=self.device)).flatten()
        accepted = torch.full_like(rows, self.k // 2)

        def accept() -> None:
            penalties.apply(self.target, rows, positions, self.candidates)
            penalties.commit(rows, self.candidates, accepted)

        return lambda: penalties.apply(self.draft, rows, lengths, self.candidates, seen), accept

    @property
    def least_gb(self) -> float:
        """Least traffic of the k draws and of the acceptance."""
        row, kept = self.batch * self.vocab, self.dtype.itemsize
        return (self.k * row * (4 + kept) + row * (4 * (self.k + 1) + 4 + kept)) / 1e9


def implementations(problem: Problem, output: int) -> dict[str, tuple[Call, Call]]:
    """One draw and one acceptance of each."""
    found = {
        "triton": problem.triton(),
        "triton, top-k and top-p": problem.triton(top_k=TOP_K, top_p=TOP_P),
        "triton, min-p": problem.triton(min_p=MIN_P),
        "argmax": (lambda: problem.draft.argmax(-1), lambda: problem.target.argmax(-1)),
    }
    # They change the logits, so they come last.
    last = {"penalties": problem.penalties(output)}
    if problem.device.type == "cuda":
        found["flashinfer"] = problem.flashinfer(False)
        found["flashinfer, top-k and top-p"] = problem.flashinfer(True)
    return found | last


def milliseconds(call: Call) -> float:
    """Median time of a call."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    from flashinfer.testing import bench_gpu_time

    return median(bench_gpu_time(call, dry_run_time_ms=10, repeat_time_ms=100, cold_l2_cache=True))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every implementation at every batch size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records = []
    for batch in args.batches:
        problem = Problem(batch, args.vocab, args.steps, getattr(torch, args.kept_dtype), device)
        for name, (draw, accept) in implementations(problem, args.output).items():
            say(f"batch {batch}, {name}")
            draw_ms, accept_ms = milliseconds(draw), milliseconds(accept)
            record = {"implementation": name, "batch": batch, "draw_ms": draw_ms, "accept_ms": accept_ms}
            record |= {"round_ms": args.steps * draw_ms + accept_ms, "least_gb": problem.least_gb}
            settings = {"vocab": args.vocab, "steps": args.steps, "temperature": TEMPERATURE, "kept_dtype": args.kept_dtype}
            write_record(args.results, {**stamp(), **settings, **record})
            records.append({key: significant(value) if isinstance(value, float) else value for key, value in record.items()})
    return records


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128, 224])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--steps", type=int, default=8, help="drafts per round")
    parser.add_argument("--output", type=int, default=2048, help="tokens of each request that penalties count")
    parser.add_argument("--kept-dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--results", help="JSON-lines file to append to")
    return parser.parse_args(argv)


def main() -> int:
    print(markdown(measure(parse_arguments())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
