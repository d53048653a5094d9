"""What the benchmarks share: engines by name, workloads, records that say where they came from, tables."""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import functools
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
PACKAGES = ("torch", "triton", "flashinfer-python", "sglang", "sglang-kernel", "sglang-sparsespec", "vllm")
#: SGLang's variable for acceptance that is drawn instead of decided. A record made under it says so.
SIMULATE = "SGLANG_SIMULATE_ACC_LEN"
#: Plain SGLang needs this project's substitute for missing CPU kernels too, on a processor without AMX.
CPU_BRIDGE = "SPARSESPEC_CPU_BRIDGE"


def say(message: str) -> None:
    """Print one progress line at once, on stderr: stdout has the results."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------- records


def commit() -> str:
    """The commit of this checkout, with ``+changes`` if files differ; ``SPARSESPEC_COMMIT`` where git is missing."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(REPO), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("SPARSESPEC_COMMIT", "unknown")


def stamp() -> dict[str, Any]:
    """Date, commit, command, versions and device of a record."""
    import torch

    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = {
            "name": properties.name,
            "count_visible": torch.cuda.device_count(),
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": packages,
        "cpu_count": os.cpu_count(),
        "gpu": gpu,
    }


def device_name(record: dict[str, Any]) -> str:
    """The GPU's name, or ``CPU``."""
    return record["gpu"]["name"] if record.get("gpu") else "CPU"


def clean(value: Any) -> Any:
    """``value`` with NaN and infinities as None, which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    return value


def write_record(path: str | Path | None, record: dict[str, Any]) -> str:
    """``record`` as one JSON line, appended to ``path`` if there is one; it is on disk when this returns."""
    line = json.dumps(clean(record))
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    return line


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a results file; an empty list if there is none.

    A last line that an interruption cut short is removed from the file, so that the next record begins a line.
    """
    path = Path(path)
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        say(f"{path}: the last line is not whole and is dropped")
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def same_origin(record: dict[str, Any], environment: dict[str, Any]) -> bool:
    """Whether a record is of the commit and device of ``environment``: only such records may be continued."""
    return record["commit"] == environment["commit"] and device_name(record) == device_name(environment)


# ------------------------------------------------------------------------- engines

#: SGLang's own speculative algorithms, by the names that ``--engines`` takes.
SGLANG_SPECULATION = {"ngram": "NGRAM", "standalone": "STANDALONE", "eagle3": "EAGLE3"}
#: vLLM's by the names that follow ``vllm:``; the values are its documentation's example.
VLLM_SPECULATION = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4},
    "ngram_gpu": {"method": "ngram_gpu", "num_speculative_tokens": 5, "prompt_lookup_max": 4},
}
ENGINES_HELP = (
    "each KIND[:DETAIL][,SETTING=VALUE ...]. KIND: plain, sparsespec, ngram, standalone or eagle3 (in throughput.py also "
    "vllm). DETAIL: an attention backend (default: SGLang's choice), sparsespec's draft policy and schedule, or vLLM's "
    "ngram or ngram_gpu. SETTING: an argument of sglang.Engine, or vllm.LLM"
)
#: Settings of one engine that change what its model computes.
LOSSY_SETTINGS = ("quantization", "kv_cache_dtype")
NOT_LOSSLESS = "not lossless"


@dataclass(frozen=True)
class EngineSpec:
    """An engine by name, such as ``sparsespec:pillar:unified,sparsespec_kernels=flashinfer``.

    Attributes:
        settings: further arguments of ``sglang.Engine``, or of ``vllm.LLM``; values are JSON, or else text.
    """

    label: str
    kind: str
    details: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def file_name(self) -> str:
        """The label as part of a file's name. Labels that differ in signs alone have the same."""
        return re.sub(r"[^a-z0-9]+", "-", self.label)

    @classmethod
    def parse(cls, text: str) -> EngineSpec:
        """From its name.

        Raises:
            ArgumentTypeError: no such engine.
        """
        name, *given = re.split(r",(?=\w+=)", text)
        kind, *details = name.split(":")
        most = {"plain": 1, "sparsespec": 2, "vllm": 1, **dict.fromkeys(SGLANG_SPECULATION, 1)}
        if len(details) > most.get(kind, -1) or (kind == "vllm" and not set(details) <= set(VLLM_SPECULATION)):
            raise argparse.ArgumentTypeError(f"no engine {text!r}; {ENGINES_HELP}")
        settings = {}
        for item in given:
            key, _, value = item.partition("=")
            try:
                settings[key] = json.loads(value)
            except ValueError:
                settings[key] = value
        return cls(text, kind, tuple(details), settings)

    @classmethod
    def parse_sglang(cls, text: str) -> EngineSpec:
        """As :meth:`parse`, for programs that run SGLang alone.

        Raises:
            ArgumentTypeError: no such engine, or vLLM.
        """
        spec = cls.parse(text)
        if spec.kind == "vllm":
            raise argparse.ArgumentTypeError("only throughput.py starts vLLM; serving.py measures its server with --attach")
        return spec

    def vllm_args(self, args: argparse.Namespace, max_batch: int) -> dict[str, Any]:
        """Arguments of ``vllm.LLM``, whose own defaults stand where these are not needed for the same load.

        Its statistics are on, as its server has them, since accept lengths come from them.
        """
        found: dict[str, Any] = {
            "model": args.model_path,
            "load_format": args.load_format,
            "dtype": args.dtype,
            "seed": 0,
            "max_num_seqs": max_batch,
            "enable_prefix_caching": True,
            "disable_log_stats": False,
            "tensor_parallel_size": args.engine_args.get("tp_size", 1),
            "skip_tokenizer_init": args.engine_args.get("skip_tokenizer_init", False),
        }
        if self.details:
            found["speculative_config"] = dict(VLLM_SPECULATION[self.details[0]])
        return {**found, **self.settings}

    def engine_args(self, args: argparse.Namespace, max_batch: int) -> dict[str, Any]:
        """Arguments of ``sglang.Engine``.

        No attention backend is set unless the name has one, so that plain SGLang and its own speculation run as they do by
        default on the device. The exception is a CPU, where ``plain`` means ``plain:torch_native``: the default needs AMX.
        """
        detail = self.details[0] if self.details else ""
        found: dict[str, Any] = {
            "model_path": args.model_path,
            "load_format": args.load_format,
            "device": args.device,
            "dtype": args.dtype,
            "random_seed": 0,
            "log_level": args.log_level,
            "max_running_requests": max_batch,
        }
        if args.device != "cpu":
            found["cuda_graph_max_bs_decode"] = max_batch
        elif self.kind != "sparsespec":
            found.update(disable_cuda_graph=True, attention_backend="torch_native")
        if self.kind == "sparsespec":
            found["speculative_algorithm"] = "SPARSESPEC"
            for name, value in zip(("sparsespec_draft_policy", "sparsespec_schedule"), self.details, strict=False):
                found[name] = value
        else:
            if self.kind in SGLANG_SPECULATION:
                found["speculative_algorithm"] = SGLANG_SPECULATION[self.kind]
            if detail:
                found["attention_backend"] = detail
        return {**found, **args.engine_args, **self.settings}


def add_engine_options(parser: argparse.ArgumentParser, engines: Sequence[str], vllm: bool = False) -> None:
    """``--engines``, with ``vllm`` among them or not, and what all engines have in common."""
    parse = EngineSpec.parse if vllm else EngineSpec.parse_sglang
    parser.add_argument("--engines", nargs="*", type=parse, default=list(map(parse, engines)), help=ENGINES_HELP)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights, for random:TOKENS prompts")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="JSON object of sglang.Engine arguments")
    parser.add_argument("--log-level", default="warning")
    parser.add_argument("--results", help="JSON-lines file to append to")


def add_turn_option(parser: argparse.ArgumentParser) -> None:
    """Several commands on one GPU, without their engines' starts one after the other."""
    parser.add_argument(
        "--turns",
        type=Path,
        help="lock file: of the commands that are given the same one, all start their engines at once, each measures alone, "
        "and none while another starts. All engines must fit in the GPU's memory (max_total_tokens). Start SPARSESPEC "
        "first: it measures its table of times when it starts",
    )


def starting(turns: Path | None) -> contextlib.AbstractContextManager[None]:
    """While an engine starts: others may start too, and none is measured. Without ``turns``, nothing."""
    return _locked(turns, fcntl.LOCK_SH)


def measuring(turns: Path | None) -> contextlib.AbstractContextManager[None]:
    """While an engine is measured: no other one is, and none starts. Without ``turns``, nothing."""
    return _locked(turns, fcntl.LOCK_EX)


@contextlib.contextmanager
def _locked(turns: Path | None, how: int) -> Iterator[None]:
    if turns is None:
        yield
        return
    with turns.open("a") as file:
        fcntl.flock(file, how)
        try:
            yield
        finally:
            # Closing would not do: a process that was forked meanwhile has the file open too.
            fcntl.flock(file, fcntl.LOCK_UN)


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Where prompts are kept between runs, and how to make them on a machine that has nothing else to do."""
    parser.add_argument("--prompts", type=Path, help="JSON file of prompts (default: beside --results)")
    parser.add_argument("--make-prompts", action="store_true", help="make --prompts for this load, and run nothing")


def start_engine(settings: dict[str, Any]) -> Any:
    """``sglang.Engine`` with ``settings``."""
    if settings["device"] == "cpu":
        os.environ[CPU_BRIDGE] = "1"
    import sglang

    return sglang.Engine(**settings)


def internal_state(engine: Any) -> dict[str, Any]:
    """What an engine's scheduler says of itself, as under ``internal_states`` in ``/server_info``."""
    return engine.get_server_info()["internal_states"][0]


def attention_backends(engine: Any) -> dict[str, str | None]:
    """The attention backends that SGLang has chosen for a running engine."""
    state = internal_state(engine)
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    return {name: state.get(name) for name in names}


def flush(engine: Any, timeout: float = 60) -> None:
    """Drop what earlier runs left in the radix cache and in n-gram tables.

    Raises:
        RuntimeError: the engine refused, as it does while requests run, for ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not engine.flush_cache().success:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the engine's cache could not be flushed for {timeout:g} s")
        time.sleep(0.1)


class Progress(NamedTuple):
    """How far an engine is at one time.

    Attributes:
        t: ``time.time()``.
        generated: tokens since its start, by its own count.
        running: requests in its batch.
    """

    t: float
    generated: float
    running: int


@dataclass
class Served:
    """What came of requests that were sent as others ended.

    Attributes:
        outputs: as of ``sglang.Engine.generate``, in the order of the prompts.
        progress: samples from before the first request to after the last.
        started, turns, drains, ended: ``time.time()`` of the first request, of the first end of a request, of the first
            end with none left to take its place, and of the last end.
    """

    outputs: list[dict[str, Any]]
    progress: list[Progress]
    started: float
    turns: float
    drains: float
    ended: float


class OutOfTime(Exception):
    """The time limit was reached before a sample was whole."""


def simulated_accept_length(kind: str) -> float | None:
    """The accept length that an engine of ``kind`` is made to have; None if its acceptance is real."""
    given = float(os.environ.get(SIMULATE) or 0)
    return given if given > 0 and kind not in ("plain", "vllm") else None


def describe(spec: EngineSpec, args: argparse.Namespace) -> dict[str, Any]:
    """What a record says about its engine."""
    common = {} if spec.kind == "vllm" else args.engine_args
    return {
        "model": Path(args.model_path).name,
        "load_format": args.load_format,
        "dtype": args.dtype,
        "engine": spec.label,
        "label": spec.label,
        "engine_args": {**common, **spec.settings},
        "tp_size": {**args.engine_args, **spec.settings}.get("tp_size", 1),
        "lossless": not set(spec.settings) & set(LOSSY_SETTINGS),
        "simulated_accept_length": simulated_accept_length(spec.kind),
    }


def marks(record: dict[str, Any]) -> list[str]:
    """What no figure of a record may be shown without."""
    found = []
    if record.get("simulated_accept_length") is not None:
        found.append("SIMULATED acceptance")
    if record.get("load_format") == "dummy":
        found.append("dummy weights")
    if record.get("lossless") is False:
        found.append(NOT_LOSSLESS)
    return found


# ----------------------------------------------------------------------- workloads

#: Data files of questions, and the key of the question in each line.
QUESTIONS = {"aime": ("aime24.jsonl", "problem"), "olympiadbench": ("olympiadbench.jsonl", "question")}
CODE_READING = "code-reading"
CORPORA = ("math", "code")
INSTRUCTION = "\n\nReason step by step, and put the final answer within \\boxed{}."
NGRAM = 8
#: Below this share of distinct n-grams an output counts as repeating itself.
LEAST_DISTINCT = 0.5


def read_data(name: str) -> list[dict[str, Any]]:
    """The lines of the question file of ``aime`` or ``olympiadbench``."""
    return [json.loads(line) for line in (DATA / QUESTIONS[name][0]).read_text().splitlines()]


def chat_prompt(tokenizer: Any, question: str) -> list[int]:
    """A question as the model is asked it, as token ids: in its chat template, or as plain text if it has none."""
    return _chat_ids(tokenizer, [("user", question + INSTRUCTION)], "\n\nSolution:")


def _chat_ids(tokenizer: Any, turns: Sequence[tuple[str, str]], plain_ending: str) -> list[int]:
    """Turns (role, text) as token ids; ``plain_ending`` follows where the model has no chat template."""
    templated = bool(getattr(tokenizer, "chat_template", None))
    if templated:
        messages = [{"role": role, "content": text} for role, text in turns]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    else:
        text = "\n\n".join(text for _, text in turns) + plain_ending
    # A template writes the special tokens itself.
    return tokenizer(text, add_special_tokens=not templated).input_ids


def _functions(least_lines: int = 20, most_lines: int = 60) -> list[tuple[str, str, str]]:
    """Functions of the installed Python library (module, name, source), the same order in every run."""
    found = []
    for file, text in _library_sources():
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                if least_lines <= node.end_lineno - node.lineno + 1 <= most_lines:
                    found.append((file.removesuffix(".py"), node.name, "\n".join(lines[node.lineno - 1 : node.end_lineno])))
    random.Random(0).shuffle(found)
    return found


def _code_reading(module: str, name: str, source: str) -> list[tuple[str, str]]:
    """A function to be read and used, in the shape of LiveCodeBench's prompts (system turn, question, format, answer)."""
    question = (
        f"This is the function `{name}` of Python's module `{module}`:\n\n```python\n{source}\n```\n\n"
        "Follow it step by step for an input that reaches most of its branches. Then write a program that reads inputs "
        "for it, one a line, and prints what it returns for each, or the name of the exception that it raises."
    )
    form = "Read from standard input, write to standard output, and put the whole program between these delimiters."
    return [
        ("system", "You are an expert Python programmer. You solve the question with a correct Python program."),
        ("user", f"### Question:\n{question}\n\n### Format: {form}\n```python\n# YOUR CODE HERE\n```\n\n### Answer:\n\n"),
    ]


@functools.cache
def _library_sources() -> list[tuple[str, str]]:
    """File names and texts of the installed Python library's modules."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [(path.name, path.read_text(errors="replace")) for path in paths]


@functools.cache
def _asked(name: str) -> list[str]:
    """The questions of a data file."""
    return [row[QUESTIONS[name][1]] for row in read_data(name)]


def corpus_text(name: str, index: int = 0) -> str:
    """``code`` (Python library sources) or ``math`` (OlympiadBench problems) as one text; ``index`` moves its beginning."""
    if name == "code":
        files = _library_sources()
        files = files[index * 3 % len(files) :] + files
        return "\n\n".join(f"# {file}\n{text}" for file, text in files[:60])
    asked = _asked("olympiadbench")
    asked = asked[index * 37 % len(asked) :] + asked
    return "\n\n".join(f"Problem {i + 1}. {question}" for i, question in enumerate(asked))


#: What follows the cut of a corpus.
ENDINGS = {
    "code": "\n\n# A summary of the functions above, each with what it returns:\n",
    "math": "\n\nA detailed solution of Problem 1, step by step.\n\nSolution:",
}


@dataclass(frozen=True)
class Dataset:
    """A workload by name.

    ``aime`` and ``olympiadbench`` are questions as they are, ``aime+olympiadbench`` those of the one and then of the other.
    ``code-reading`` asks about functions of the installed Python library in the shape of LiveCodeBench's prompts; its
    problems are not LiveCodeBench's. ``math:TOKENS`` (OlympiadBench problems, then the request to
    solve one) and ``code:TOKENS`` (installed Python library sources, to be continued by a summary; not LiveCodeBench) are
    cut to that many tokens, and ``code+math:TOKENS`` takes the two in turn. ``random:TOKENS`` are random token ids, for
    dummy weights.
    """

    name: str
    context: int | None = None

    @classmethod
    def parse(cls, text: str) -> Dataset:
        """From its text form.

        Raises:
            ArgumentTypeError: no such dataset, or a length where there is none, or none where one is needed.
        """
        name, _, length = text.partition(":")
        if (name == CODE_READING or set(name.split("+")) <= set(QUESTIONS)) and not length:
            return cls(name)
        if (name == "random" or set(name.split("+")) <= set(CORPORA)) and length.isdigit() and int(length) > 0:
            return cls(name, int(length))
        forms = "aime, olympiadbench, aime+olympiadbench, code-reading, {code,math,code+math}:TOKENS or random:TOKENS"
        raise argparse.ArgumentTypeError(f"dataset {text!r}: expected {forms}")

    def __str__(self) -> str:
        return self.name if self.context is None else f"{self.name}:{self.context}"

    def prompts(self, model_path: str, count: int) -> list[list[int]]:
        """``count`` prompts as token ids, the same in every run; questions begin again where there are fewer.

        Raises:
            ValueError: a corpus is too short for the context.
        """
        if self.name == "random":
            generator = random.Random(0)
            return [[generator.randrange(1000, 30000) for _ in range(self.context or 0)] for _ in range(count)]
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_path)
        if self.name == CODE_READING:
            functions = [_code_reading(*function) for function in _functions()]
            return [_chat_ids(tokenizer, functions[index % len(functions)], "") for index in range(count)]
        if self.context is None:
            asked = [question for name in self.name.split("+") for question in _asked(name)]
            return [chat_prompt(tokenizer, asked[index % len(asked)]) for index in range(count)]
        return [self._cut(tokenizer, index) for index in range(count)]

    def _cut(self, tokenizer: Any, index: int) -> list[int]:
        assert self.context is not None
        corpora = self.name.split("+")
        name = corpora[index % len(corpora)]
        text = corpus_text(name, index // len(corpora))
        tail = tokenizer(ENDINGS[name], add_special_tokens=False).input_ids
        head = tokenizer(text[: 8 * self.context], add_special_tokens=False).input_ids
        if len(head) + len(tail) < self.context:
            raise ValueError(f"the corpus {self.name} has no {self.context} tokens; use a shorter context")
        return head[: self.context - len(tail)] + tail


def make_prompts(path: Path, model_path: str, wanted: Iterable[tuple[Dataset, int]]) -> None:
    """See that the file of prompts has so many of each dataset; those that it has stay as they are.

    Engines of different environments, and machines, read the same token ids from it, and none spends time on making them.

    Raises:
        ValueError: the file is another model's.
    """
    model, found = Path(model_path).name, _read_prompts(path)
    if found["model"] not in (None, model):
        raise ValueError(f"{path} has prompts of {found['model']}, not of {model}; give another file by --prompts")
    counts: dict[Dataset, int] = {}
    for dataset, count in wanted:
        counts[dataset] = max(count, counts.get(dataset, 0))
    lacking = {dataset: count for dataset, count in counts.items() if len(found["prompts"].get(str(dataset), ())) < count}
    if lacking:
        made = {str(dataset): dataset.prompts(model_path, count) for dataset, count in lacking.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps({"model": model, "prompts": {**found["prompts"], **made}}))
        beside.replace(path)


def prompts_of(path: Path, dataset: Dataset, count: int) -> list[list[int]]:
    """The first ``count`` prompts of a dataset in a file of prompts, as token ids.

    Raises:
        ValueError: it has fewer.
    """
    found = _read_prompts(path)["prompts"].get(str(dataset), [])
    if len(found) < count:
        raise ValueError(f"{path} has {len(found)} prompts of {dataset}, {count} are needed")
    return found[:count]


def _read_prompts(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"model": None, "prompts": {}}


def distinct_share(tokens: Sequence[Any]) -> float:
    """Share of distinct 8-grams among all 8-grams of an output: 1.0 if none repeats."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(outputs: Iterable[Sequence[Any]]) -> list[bool]:
    """Which outputs repeat themselves, which flatters every drafter."""
    return [distinct_share(output) < LEAST_DISTINCT for output in outputs]


# -------------------------------------------------------------------------- tables


def significant(value: float | None, digits: int = 3) -> float | None:
    """``value`` rounded to that many significant digits."""
    return None if value is None else float(f"{value:.{digits}g}")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of ``rows``; None is a dash."""
    import pandas

    frame = pandas.DataFrame(rows, dtype=object)
    return frame.to_markdown(index=False, floatfmt=",", intfmt=",", missingval="-")


def pyplot() -> Any:
    """Matplotlib without a display.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("Plots need matplotlib: pip install 'sglang-sparsespec[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
