"""Everything that is measured on GPUs, in one command, the most telling first, on all GPUs at once.

    python benchmarks/suite.py --model-path M --draft-model-path D --small-model-path S --results suite/ --gpus 0,1
    python benchmarks/suite.py ... --steps rivals kv- --time-limit 900      # some of it, in 15 minutes
    python benchmarks/suite.py ... --list                                   # what would run

M is the model that is measured (Qwen2.5-Coder-1.5B in the published results), D a smaller one with its vocabulary, for
SGLang's STANDALONE, S a small one whose outputs are compared token by token (SmolLM2-135M). Each step is a program of
``benchmarks/`` or the GPU tests; it takes the next free GPU, or two, and has its log and results in ``--results``. A step
whose model is not there yet waits for it and lets others go first; one that waits for a second GPU does not. ``suite.jsonl``
there says how each ended; the same command goes on with what has not succeeded. With ``--time-limit`` steps that would not
fit are not begun, and what still runs at the end is ended.

Programs that time something share no GPU with another. They do share the host's processors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _common import REPO, append_json_line, say, utc_now
from run import end_group, read_results

HERE = Path(__file__).resolve().parent
GPU_TESTS = ("cuda_kernels", "triton_select", "triton_filters", "triton_sampling")
#: Arguments of engines: prefill graphs cost memory and start-up time; some models' own sampling defaults are refused.
ENGINE = {"sampling_defaults": "openai", "cuda_graph_backend_prefill": "disabled"}
PREFILL_TOKENS = [256, 512, 1024, 2112, 4224, 6336, 8192]
KV_BATCHES = [1, 16, 32, 48, 64, 96, 128, 160]
#: Qwen3-8B's shapes, for times with dummy weights.
SHAPES_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
}
SHAPES_FOLDER = "qwen3-8b-shapes"


@dataclass(frozen=True)
class Step:
    """A program to run.

    Attributes:
        name: of its log and its line in ``suite.jsonl``.
        command: what to run.
        seconds: what it takes at most; it is ended then.
        gpus: how many it needs.
        needs: files that must be there.
        after: steps that must have succeeded.
        environment: variables beside this process's own.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    gpus: int = 1
    needs: tuple[Path, ...] = ()
    after: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict, hash=False)


def program(name: str, *arguments: object) -> tuple[str, ...]:
    """The command of a program of this folder."""
    return (sys.executable, str(HERE / f"{name}.py"), *map(str, arguments))


def engine_args(**more: Any) -> list[str]:
    """``--engine-args`` of a program."""
    return ["--engine-args", json.dumps({**ENGINE, **more})]


@dataclass(frozen=True)
class Compared:
    """An engine whose outputs are compared with plain SGLang's.

    Attributes:
        options: of ``parity.py``.
        settings: further engine arguments.
        environment: variables.
    """

    options: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    environment: dict[str, str] = field(default_factory=dict, hash=False)


UNIFIED = ("--schedule", "unified")
#: Every so many iterations a request is moved to the host and back.
HOST_TIER = Compared(settings={"sparsespec_host_kv_gb": 4}, environment={"SPARSESPEC_TEST_OFFLOAD_INTERVAL": "8"})
ON_ONE_GPU = {
    "lockstep": Compared(),
    "unified": Compared(UNIFIED),
    "plain-rounds": Compared(settings={"sparsespec_speculate": "never"}),
    "auto": Compared(UNIFIED, {"sparsespec_speculate": "auto"}),
    "host": HOST_TIER,
    "prefill-graphs": Compared(settings={"cuda_graph_backend_prefill": "breakable", "cuda_graph_bs_prefill": [256, 4096]}),
}
ON_TWO_GPUS = {"lockstep": Compared(), "unified": Compared(UNIFIED), "host": HOST_TIER}


def parity_steps(name: str, model: Path, out: Path, gpus: int, engines: dict[str, Compared]) -> list[Step]:
    """A baseline, and what is compared with it."""
    # SGLang's default attention may be one that is not installed.
    common = {"attention_backend": "triton", "cuda_graph_bs_decode": [1, 4, 8, 16], "max_total_tokens": 60000}
    if gpus > 1:
        common |= {"tp_size": gpus, "enforce_disable_flashinfer_allreduce_fusion": True}
    options = ["--model-path", model, "--device", "cuda", "--dtype", "bfloat16", "--max-new-tokens", 192]
    options += ["--short", 10, "--problems", 20, "--long", 4]
    baseline, results = out / f"{name}-baseline.json", out / f"{name}.jsonl"
    needs, first = (model / "config.json",), f"{name}-baseline"
    steps = [
        Step(first, program("parity", "baseline", *options, *engine_args(**common), "--output", baseline), 150, gpus, needs)
    ]
    for label, engine in engines.items():
        arguments = [*options, *engine_args(**common, **engine.settings), *engine.options]
        command = program("parity", "compare", *arguments, "--baseline", baseline, "--results", results)
        steps.append(Step(f"{name}-{label}", command, 150, gpus, needs, (first,), engine.environment))
    return steps


def kv_manager_steps(model: Path, out: Path, seconds: float) -> list[Step]:
    """The KV manager's engines, one step each."""
    arguments = ["--requests", 400, "--prompt-tokens", 512, "--min-new-tokens", 200, "--max-new-tokens", 16000]
    arguments += ["--max-total-tokens", 200_000, "--max-running-requests", 160, "--host-kv-gb", 12]
    arguments += ["--time-limit", seconds, "--results", out / "kv_manager.jsonl"]
    arguments += engine_args(cuda_graph_bs_decode=KV_BATCHES)
    return [
        Step(
            f"kv-{name.replace(':', '-')}",
            program("kv_manager", "--model-path", model, *arguments, "--engines", name),
            seconds + 150,
            needs=(model / "config.json",),
        )
        for name in (
            "sparsespec:host",
            "sparsespec:retract",
            "plain:default",
            "plain:aggressive",
            "sparsespec:retract-aggressive",
        )
    ]


def kill_step(model: Path) -> Step:
    """A scheduler that is killed while KV moves, and the next server."""
    command = (sys.executable, "-m", "pytest", "-q", "-s", "-n", "0", str(REPO / "tests" / "test_kv_manager_gpu.py"))
    environment = {"SPARSESPEC_TEST_MODEL": str(model)}
    return Step("kill", command, 300, needs=(model / "config.json",), environment=environment)


def open_loop_steps(model: Path, out: Path) -> list[Step]:
    """Poisson arrivals, a step for each engine."""
    arguments = ["--rates", 8, 16, "inf", "--dataset", "code:2048", "--output-len", 512, "--num-prompts", 320]
    arguments += ["--max-running-requests", KV_BATCHES[-1]]
    # Prompts come one or a few at a time, so prefill's graphs matter, as they do to users; these are their sizes.
    graphs = {"cuda_graph_backend_prefill": "breakable", "cuda_graph_bs_prefill": PREFILL_TOKENS}
    arguments += [*engine_args(cuda_graph_bs_decode=KV_BATCHES, **graphs), "--results", out / "open_loop.jsonl"]
    return [
        Step(
            f"open-{name.replace(':', '-')}",
            program("open_loop", "--model-path", model, *arguments, "--engines", name),
            400,
            needs=(model / "config.json",),
        )
        for name in ("plain:flashinfer", "sparsespec", "sparsespec+late-launch", "sparsespec+mixed-chunk")
    ]


def profile_steps(model: Path, out: Path) -> list[Step]:
    """Idle share of a round: of 8B shapes, where acceptance is simulated, and of the model."""
    recorded = ["--new-tokens", 512, "--delay", 1.5, "--results", out / "profile"]
    recorded += engine_args(cuda_graph_bs_decode=[64, 128])
    shapes = ["--model-path", out / SHAPES_FOLDER, "--load-format", "dummy", "--random-prompts"]
    # The first for the idle share, the second for what the schedule moves most.
    shapes += ["--case", "4096x64", "576x128"]
    return [
        Step(
            "profile-8b",
            program("profile_steps", *shapes, "--engines", "sparsespec", "sparsespec:pillar:unified", *recorded),
            260,
            environment={"SGLANG_SIMULATE_ACC_LEN": "7.16"},
        ),
        Step(
            "profile",
            program("profile_steps", "--model-path", model, "--engines", "sparsespec", "--case", "8192x64", *recorded),
            150,
            needs=(model / "config.json",),
        ),
    ]


def all_steps(args: argparse.Namespace) -> list[Step]:
    """Everything, in order of importance."""
    out, model, drafter = args.results, args.model_path, args.draft_model_path

    def matrix(preset: str, seconds: float, draft_model: Path | None = None) -> Step:
        name = preset.removeprefix("h100-")
        arguments = ["--model-path", model, "--results", out / f"{name}.jsonl", "--time-limit", seconds - 60]
        needs = [model / "config.json"]
        if draft_model is not None:
            arguments += ["--draft-model-path", draft_model]
            needs.append(draft_model / "config.json")
        return Step(name, program("run", preset, *arguments), seconds, needs=tuple(needs))

    graded = ["--max-new-tokens", 4096, "--concurrency", 128, "--results", out / "accuracy.jsonl"]
    graded += engine_args(cuda_graph_bs_decode=[1, 16, 32, 64, 96, 128])
    small_lists = ["--shapes", "qwen2.5-coder-1.5b", "--batches", 32, 64, "--contexts", 8192, 32768]
    tests = [str(REPO / "tests" / f"test_{name}.py") for name in GPU_TESTS]
    return [
        Step("tests", (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "8", *tests), 240),
        kill_step(args.small_model_path),
        *kv_manager_steps(model, out, args.kv_seconds),
        *open_loop_steps(model, out),
        Step(
            "accuracy", program("accuracy", "--model-path", model, *graded), 300, needs=(model / "config.json",)
        ),
        matrix("h100-rivals", 900, drafter),
        matrix("h100-speculate", 600),
        *profile_steps(model, out),
        *parity_steps("parity", args.small_model_path, out, 1, ON_ONE_GPU),
        *parity_steps("parity-tp2", drafter, out, 2, ON_TWO_GPUS),
        Step("kernels", program("kernels", "--output", out), 260),
        # The batches whose draft attention misses its goal on an H100.
        Step("sweep", program("kernels", "--sweep", "--kinds", "draft", *small_lists, "--output", out), 260),
        Step("sampling", program("sampling", "--results", out), 120),
        matrix("h100-policies", 900),
        matrix("h100-schedules", 900),
        matrix("h100-long", 900),
    ]


def write_shapes(folder: Path) -> None:
    """A checkpoint folder without weights: the configuration of Qwen3-8B's shapes."""
    from transformers import Qwen3Config

    Qwen3Config(**SHAPES_8B, architectures=["Qwen3ForCausalLM"], tie_word_embeddings=False).save_pretrained(folder)


class Suite:
    """Runs steps side by side on the GPUs.

    Args:
        steps: in the order in which they are begun, unless a model is missing.
        gpus: numbers as in ``CUDA_VISIBLE_DEVICES``.
        folder: of logs and ``suite.jsonl``.
        deadline: by ``time.monotonic()``; steps are begun if their time fits before it, and ended then.
        patience: seconds to wait for missing models when nothing runs.

    Attributes:
        succeeded, failed: names of steps, those that were not begun among the latter.
    """

    def __init__(
        self, steps: Sequence[Step], gpus: Sequence[str], folder: Path, deadline: float, patience: float = 0
    ) -> None:
        self._waiting = list(steps)
        self._free = list(gpus)
        self._num_gpus = len(gpus)
        self._folder = folder
        self._deadline = deadline
        self._patience = patience
        self._running: dict[str, tuple[Step, subprocess.Popen[bytes], list[str], float]] = {}
        self.succeeded: set[str] = set()
        self.failed: set[str] = set()

    def run(self, poll: float = 0.5) -> None:
        """Until every step has ended, or none can be begun any more."""
        idle_since = time.monotonic()
        try:
            while self._running or self._waiting:
                self._drop_hopeless()
                self._begin_steps()
                self._end_steps()
                if self._running:
                    idle_since = time.monotonic()
                elif self._waiting and time.monotonic() - idle_since > self._patience:
                    self._drop(lambda step: next((f"{path} is missing" for path in step.needs if not path.exists()), ""))
                time.sleep(poll)
        finally:
            for name in list(self._running):
                self._end(name, "ended with the suite")

    def _drop_hopeless(self) -> None:
        """Give up steps that can no longer be begun."""
        left = self._deadline - time.monotonic()

        def why(step: Step) -> str:
            if step.gpus > self._num_gpus:
                return f"it needs {step.gpus} GPUs (--gpus)"
            if step.seconds > left:
                return f"its {step.seconds:.0f} s are more than is left of the time limit"
            return next((f"{name} has not succeeded" for name in step.after if name in self.failed), "")

        self._drop(why)

    def _drop(self, why: Callable[[Step], str]) -> None:
        for step in list(self._waiting):
            if reason := why(step):
                self._waiting.remove(step)
                self.failed.add(step.name)
                say(f"{step.name}: not run: {reason}")

    def _begin_steps(self) -> None:
        for step in list(self._waiting):
            if not set(step.after) <= self.succeeded or not all(path.exists() for path in step.needs):
                continue
            if step.gpus > len(self._free):
                break  # or it would never get two
            self._waiting.remove(step)
            self._begin(step)

    def _begin(self, step: Step) -> None:
        taken, self._free = self._free[: step.gpus], self._free[step.gpus :]
        say(f"{step.name}: begins on GPU {','.join(taken)}")
        environment = {**os.environ, **step.environment, "CUDA_VISIBLE_DEVICES": ",".join(taken)}
        with (self._folder / f"{step.name}.log").open("ab") as log:
            process = subprocess.Popen(
                step.command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=REPO, start_new_session=True
            )
        self._running[step.name] = (step, process, taken, time.monotonic())

    def _end_steps(self) -> None:
        for name, (step, process, _, began) in list(self._running.items()):
            now = time.monotonic()
            if process.poll() is not None:
                self._end(name)
            elif now - began > step.seconds or now > self._deadline:
                self._end(name, "took too long" if now < self._deadline else "the time limit was reached")

    def _end(self, name: str, why: str = "") -> None:
        """Record a step's end; with ``why``, end it."""
        step, process, taken, began = self._running.pop(name)
        # Servers and workers that it left behind would keep its GPU's memory.
        end_group(process)
        self._free += taken
        status = process.returncode
        succeeded = status == 0 and not why
        (self.succeeded if succeeded else self.failed).add(name)
        record = {"step": name, "date": utc_now(), "status": status, "why": why, "gpus": taken}
        append_json_line(self._folder / "suite.jsonl", {**record, "seconds": round(time.monotonic() - began, 1)})
        say(f"{name}: {'done' if succeeded else why or f'failed with status {status}, see {name}.log'}")


def chosen(steps: Sequence[Step], names: Sequence[str] | None) -> list[Step]:
    """The steps whose names are or begin with one of ``names`` (None: all), and those that they come after."""
    whole = {step.name for step in steps}

    def is_meant(step: Step, name: str) -> bool:
        return step.name == name or (name not in whole and step.name.startswith(name))

    wanted = {step.name for step in steps if names is None or any(is_meant(step, name) for name in names)}
    wanted |= {name for step in steps if step.name in wanted for name in step.after}
    return [step for step in steps if step.name in wanted]


def done_before(folder: Path) -> set[str]:
    """Names of the steps that succeeded in an earlier run."""
    records = read_results(folder / "suite.jsonl")
    return {record["step"] for record in records if record["status"] == 0 and not record["why"]}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--draft-model-path", type=Path, required=True)
    parser.add_argument("--small-model-path", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True, help="folder of logs and results")
    parser.add_argument("--gpus", default="0", help="their numbers, with commas between; default: 0")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only these, or those that begin so, in this order")
    parser.add_argument("--time-limit", type=float, default=0, help="seconds for everything; 0: none")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for models when nothing else is left")
    parser.add_argument("--kv-seconds", type=float, default=60, help="length of a run of the KV manager")
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    args = parser.parse_args(argv)
    args.results = args.results.resolve()
    for name in ("model_path", "draft_model_path", "small_model_path"):
        setattr(args, name, getattr(args, name).resolve())
    return args


def in_order(steps: Sequence[Step], names: Sequence[str] | None) -> list[Step]:
    """Steps by which of ``names`` they begin with first; others before those that come after them."""
    if names is None:
        return list(steps)
    rank = {step.name: next((i for i, name in enumerate(names) if step.name.startswith(name)), 0) for step in steps}
    return sorted(steps, key=lambda step: rank[step.name])


def main(argv: list[str] | None = None) -> int:
    """Run with the given command line; 1 if a step failed or was not run."""
    args = parse_arguments(argv)
    found = in_order(chosen(all_steps(args), args.steps), args.steps)
    if args.list:
        for step in found:
            print(f"{step.name:<32}{step.gpus} GPU, {step.seconds:.0f} s at most: {' '.join(step.command)}")
        return 0
    args.results.mkdir(parents=True, exist_ok=True)
    if any(step.name == "profile-8b" for step in found):
        write_shapes(args.results / SHAPES_FOLDER)
    done = done_before(args.results)
    deadline = time.monotonic() + (args.time_limit or float("inf"))
    left = [step for step in found if step.name not in done]
    suite = Suite(left, args.gpus.split(","), args.results, deadline, args.patience)
    suite.succeeded |= done
    suite.run()
    return int(not {step.name for step in found} <= suite.succeeded)


if __name__ == "__main__":
    sys.exit(main())
