"""Open-loop load: requests arrive by a Poisson process, whether earlier ones are answered or not.

    python benchmarks/serving.py --model-path M --engines plain sparsespec --rates inf 25% 50% 75% 90% \\
        --dataset code:512 code:2048 code:8192 --new-tokens 128 512 1024 --requests 320 --results serving.jsonl --plot s.png

Each engine is started once as a server, with the same flags but for the algorithm. SGLang's own bench_serving then sends the
same requests at each of ``--rates`` from a flushed prefix cache. A rate is a number of requests per second, inf (all at
once), or a share of the capacity: of the requests per second that the first engine answered at inf. The tail of that run, in
which few requests are left, makes the capacity a low one. A request has one of ``--dataset`` and of ``--new-tokens``, drawn
for each, the same in every run.

Figures are bench_serving's: time to first token (TTFT), time per output token after it (TPOT), and output tokens per second
of the whole run, which at low rates are the load and not the limit. Goodput is the requests per second whose time per output
token was within ``--tpot-limit-ms``. The p99 of some hundred requests is that of a few, so the longest times to first token
are in the record.

The same command goes on after an interruption: runs of the same commit and device are not made again, and none is begun
after ``--time-limit``.

A server that runs already is measured as LABEL=BACKEND@URL (``--attach vllm=vllm@http://127.0.0.1:8000``; start vLLM with
VLLM_SERVER_DEV_MODE=1, for flushing its cache). ``--max-concurrency`` with rate inf keeps a batch full, as on a busy server.
Prompts of code and math begin with a line of their own, so that none is found in another's cached prefix. Outputs are made
to go on to their full length. The logs of servers and of bench_serving lie beside the results.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import requests
from _attached import Attached, ask
from _common import (
    CPU_BRIDGE,
    Dataset,
    EngineSpec,
    add_engine_options,
    add_prompt_options,
    add_turn_option,
    describe,
    make_prompts,
    markdown,
    marks,
    measuring,
    prompts_of,
    pyplot,
    read_records,
    repetition,
    same_origin,
    say,
    significant,
    stamp,
    starting,
    write_record,
)

#: bench_serving's figures by the names of the record.
FIGURES = {
    **{f"{stat}_{name}_ms": f"{stat}_{name}_ms" for name in ("ttft", "tpot", "itl") for stat in ("mean", "median", "p99")},
    "p99_latency_ms": "p99_e2e_latency_ms",
    "requests_per_s": "request_throughput",
    "mean_concurrency": "concurrency",
}
WARM_UP_TOKENS = 256
#: A word of one token in the tokenizers of GPT-2's kind.
WORD = " a"
#: How many of the longest times to first token a record has.
SLOWEST = 12


# -------------------------------------------------------------------------- servers


def server_flags(spec: EngineSpec, args: argparse.Namespace) -> list[str]:
    """An engine's arguments as flags of ``sglang.launch_server``."""
    flags: list[str] = []
    for key, value in spec.engine_args(args, args.max_running_requests).items():
        if value is None or value is False:
            continue
        flags.append(f"--{key.replace('_', '-')}")
        if isinstance(value, dict):
            flags.append(json.dumps(value))
        elif value is not True:
            flags += map(str, value if isinstance(value, list) else [value])
    return flags


@contextlib.contextmanager
def server(flags: Sequence[str], log: Path, device: str, timeout: float) -> Iterator[str]:
    """The URL of a server, which is started and, on leaving, stopped with all of its processes.

    Raises:
        RuntimeError: it ended, or is not ready after ``timeout`` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "sglang.launch_server", "--host", "127.0.0.1", "--port", str(port), *flags]
    environment = {**os.environ, "no_proxy": "127.0.0.1,localhost", **({CPU_BRIDGE: "1"} if device == "cpu" else {})}
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + timeout
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-500:]
                raise RuntimeError(f"the server ended or is not ready after {timeout:g} s: {tail}")
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_ready(url: str) -> bool:
    """Whether a server answers."""
    try:
        return requests.get(f"{url}/health", timeout=60).status_code == 200
    except requests.RequestException:
        return False


# ---------------------------------------------------------------------------- load


def write_prompts(args: argparse.Namespace, tokenizer: Any, path: Path) -> list[str]:
    """Write the requests as bench_serving's custom dataset; the prompts.

    Each prompt's own line keeps it out of another's cached prefix.
    """
    rng = random.Random(args.seed)
    drawn = [(rng.choice(args.dataset), rng.choice(args.new_tokens)) for _ in range(args.requests)]
    counts = Counter(dataset for dataset, _ in drawn)
    make_prompts(args.prompts, args.model_path, counts.items())
    sources = {dataset: iter(prompts_of(args.prompts, dataset, count)) for dataset, count in counts.items()}
    texts, lines = [], []
    for index, (dataset, length) in enumerate(drawn):
        text = tokenizer.decode(next(sources[dataset]))
        texts.append(text if dataset.context is None else f"# {index:05d}\n{text}")
        # bench_serving asks for as many tokens as the second turn has.
        turns = [{"content": texts[-1]}, {"content": words(tokenizer, length)}]
        lines.append(json.dumps({"conversations": turns}) + "\n")
    path.write_text("".join(lines))
    return texts


def words(tokenizer: Any, tokens: int) -> str:
    """A text that the tokenizer encodes as so many tokens.

    Raises:
        ValueError: it has no token for a short word.
    """
    text = WORD * (tokens - len(tokenizer.encode("")))
    if len(tokenizer.encode(text)) != tokens:
        raise ValueError(f"the tokenizer makes {len(tokenizer.encode(text))} tokens of {tokens} words")
    return text


def bench_command(rate: str, backend: str, url: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """The command line of one run."""
    made = [sys.executable, "-m", "sglang.benchmark.serving", "--backend", backend, "--base-url", url, "--flush-cache"]
    made += ["--model", args.model_path, "--tokenizer", args.model_path]
    made += ["--dataset-name", "custom", "--dataset-path", str(folder / "prompts.jsonl"), "--seed", str(args.seed)]
    made += ["--num-prompts", str(args.requests), "--request-rate", rate]
    made += ["--temperature", str(args.temperature), "--output-file", str(folder / "result.jsonl"), "--output-details"]
    if backend == "vllm":
        # --temperature reaches SGLang's own API only.
        made += ["--extra-request-body", json.dumps({"temperature": args.temperature})]
    if args.max_concurrency:
        made += ["--max-concurrency", str(args.max_concurrency)]
    # measure_server warms up: bench_serving would flush the cache right after its warm-up, which the server refuses while
    # the warm-up's last round is in flight (overlap scheduling).
    return [*made, "--warmup-requests", "0"]


def run_bench_serving(command: Sequence[str], output: Path, log: Path) -> dict[str, Any]:
    """Run bench_serving to its end; its result.

    Raises:
        RuntimeError: it failed, with the end of what it printed.
    """
    output.unlink(missing_ok=True)
    with log.open("ab") as sink:
        status = subprocess.run(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL).returncode
    if status or not output.exists():
        raise RuntimeError(f"bench_serving ended with {status}: {log.read_text(errors='replace')[-300:]}")
    return json.loads(output.read_text().splitlines()[-1])


def figures_of(result: dict[str, Any], tokenizer: Any, asked: int, tpot_limit_ms: float) -> dict[str, Any]:
    """A run's figures.

    Raises:
        RuntimeError: not all requests were answered.
    """
    if result["completed"] != asked:
        errors = [error for error in result["errors"] if error]
        raise RuntimeError(f"{result['completed']} of {asked} requests were answered: {errors[:1]}")
    repeats = repetition(tokenizer(text, add_special_tokens=False).input_ids for text in result["generated_texts"])
    accept = result.get("accept_length")
    per_token = [1000 * sum(itl) / max(1, n - 1) for itl, n in zip(result["itls"], result["output_lens"], strict=True)]
    within = sum(milliseconds <= tpot_limit_ms for milliseconds in per_token)
    slowest = sorted((1000 * seconds for seconds in result["ttfts"]), reverse=True)[:SLOWEST]
    return {
        "seconds": round(result["duration"], 3),
        "prompt_tokens": result["total_input_tokens"],
        "output_tokens": result["total_output_tokens"],
        "tokens_per_s": round(result["output_throughput"], 1),
        **{name: round(result[theirs], 3) for name, theirs in FIGURES.items()},
        "requests_within_tpot_limit": within,
        "goodput_requests_per_s": round(within / result["duration"], 3),
        # The server's, up to its last decode log line; None in short runs.
        "accept_length": round(accept, 3) if accept else None,
        "repetitive_prompts": sum(repeats),
        "slowest_ttft_ms": [round(milliseconds, 1) for milliseconds in slowest],
    }


def run_key(about: dict[str, Any], rate: str) -> str:
    """Name of a run: equal for runs that differ in nothing but the time."""
    origin = ("date", "command", "commit", "gpu", "packages", "python", "cpu_count")
    names = sorted(set(about) - set(origin))
    return hashlib.sha256(json.dumps([[about[name] for name in names], rate]).encode()).hexdigest()[:16]


class Runs:
    """The runs of this command that there are, earlier ones among them.

    Attributes:
        records: of both.
        failed: a run failed, or was not begun because of the time limit.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.failed = args, False
        self.records: list[dict[str, Any]] = []
        environment = stamp()
        kept = [record for record in read_records(args.results) if same_origin(record, environment)]
        self.earlier = {record["key"]: record for record in kept if "key" in record and "error" not in record}
        self.deadline = time.time() + args.time_limit if args.time_limit else float("inf")

    def left(self, about: dict[str, Any]) -> list[str]:
        """The rates to run; the records of others join those of this command."""
        rates = []
        for rate in self.args.rates:
            earlier = self.earlier.get(run_key(about, rate))
            if earlier is None:
                rates.append(rate)
            else:
                self.records.append(earlier)
        if rates and time.time() > self.deadline:
            say(f"{about['engine']}: not run at {' '.join(rates)}: the time limit was reached")
            self.failed = True
            return []
        return rates

    def keep(self, record: dict[str, Any]) -> None:
        """Write a record."""
        self.records.append(record)
        self.failed = self.failed or "error" in record
        write_record(self.args.results, record)
        shown = ("error", "tokens_per_s", "median_ttft_ms", "p99_ttft_ms", "p99_tpot_ms", "accept_length")
        figures = {name: record[name] for name in shown if name in record}
        say(f"{record['engine']}, {record['request_rate']}/s: {figures}")

    def capacity(self) -> float:
        """Requests per second that shares are of.

        Raises:
            RuntimeError: it is not known, since the first engine's run at inf failed.
        """
        first = self.args.engines[0].label if self.args.engines else None
        at_inf = [r for r in self.records if r["engine"] == first and r["request_rate"] == "inf" and "error" not in r]
        if self.args.capacity is None and not at_inf:
            raise RuntimeError(f"the capacity is not known: {first} has no run at inf")
        return self.args.capacity or at_inf[0]["requests_per_s"]

    def resolve(self, rate: str) -> dict[str, Any]:
        """What a record says of a rate as it was given."""
        if not rate.endswith("%"):
            return {"request_rate": rate}
        capacity = self.capacity()
        return {"request_rate": f"{capacity * float(rate[:-1]) / 100:.3f}", "rate_share": rate, "capacity": capacity}


def measure_server(
    runs: Runs,
    about: dict[str, Any],
    rates: Sequence[str],
    backend: str,
    url: str,
    texts: list[str],
    folder: Path,
    log: Path,
) -> None:
    """A record for each rate; of one that failed, with ``error``."""
    from transformers import AutoTokenizer

    args = runs.args
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    more: dict[str, Any] = {}
    if backend == "sglang":
        sampling = {"temperature": 0, "max_new_tokens": WARM_UP_TOKENS, "ignore_eos": True}
        ask(f"{url}/generate", {"text": texts[: args.warmup_requests], "sampling_params": sampling})
        state = ask(f"{url}/server_info")["internal_states"][0]
        more = {"attention_backend": state.get("decode_attention_backend") or state.get("attention_backend")}
    for rate in rates:
        with measuring(args.turns):
            if time.time() > runs.deadline:
                say(f"{about['engine']}: not run at {rate}: the time limit was reached")
                runs.failed = True
                break
            record = {**about, **more, "key": run_key(about, rate), "request_rate": rate}
            try:
                record.update(runs.resolve(rate))
                command = bench_command(record["request_rate"], backend, url, folder, args)
                result = run_bench_serving(command, folder / "result.jsonl", log)
                record.update(figures_of(result, tokenizer, args.requests, args.tpot_limit_ms))
                if about["engine"].startswith("sparsespec"):
                    state = ask(f"{url}/server_info")["internal_states"][0]
                    record["metrics"] = {key: value for key, value in state.items() if key.startswith("sparsespec_")}
            except RuntimeError as error:
                record["error"] = str(error)
        runs.keep(record)


def run(args: argparse.Namespace) -> Runs:
    """All servers, one after the other."""
    from transformers import AutoTokenizer

    results = Path(args.results).resolve()
    results.parent.mkdir(parents=True, exist_ok=True)
    runs = Runs(args)
    load = {
        "dataset": " ".join(map(str, args.dataset)),
        "output_len": args.new_tokens[0] if len(args.new_tokens) == 1 else args.new_tokens,
        "forced_lengths": True,
        "num_prompts": args.requests,
        "max_concurrency": args.max_concurrency,
        "seed": args.seed,
        "temperature": args.temperature,
        "tpot_limit_ms": args.tpot_limit_ms,
        "arrivals": "Poisson",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = write_prompts(args, AutoTokenizer.from_pretrained(args.model_path), folder / "prompts.jsonl")
        for spec in args.engines:
            flags = server_flags(spec, args)
            about = {**stamp(), **describe(spec, args), **load, "flags": flags}
            if not (rates := runs.left(about)):
                continue
            log = results.with_name(f"{results.stem}-{spec.file_name}.log")
            say(f"{spec.label}: the server starts, its log is {log}")
            try:
                with contextlib.ExitStack() as stack:
                    with starting(args.turns):
                        url = stack.enter_context(server(flags, log, args.device, args.start_timeout))
                    measure_server(runs, about, rates, "sglang", url, texts, folder, log.with_suffix(".bench.log"))
            except RuntimeError as error:
                runs.keep({**about, "request_rate": rates[0], "error": str(error)})
        for label, backend, url in args.attach:
            about = {**stamp(), "model": Path(args.model_path).name, "engine": label, "server_url": url, **load}
            if rates := runs.left(about):
                measure_server(runs, about, rates, backend, url, texts, folder, results.with_suffix(".bench.log"))
    return runs


# -------------------------------------------------------------------------- report


def table(records: Sequence[dict[str, Any]]) -> str:
    """All runs by rate, beside the first engine without speculation at the same rate."""
    rows = []
    for rate in dict.fromkeys(record["request_rate"] for record in records):
        runs = [record for record in records if record["request_rate"] == rate]
        plain = next((r for r in runs if r["engine"].startswith("plain") and "error" not in r), {})

        def ratio(record: dict[str, Any], name: str, plain: dict[str, Any] = plain) -> float | None:
            value, against = record.get(name), plain.get(name)
            return significant(value / against) if value is not None and against else None

        for record in runs:
            share = f"{rate} ({record['rate_share']})" if "rate_share" in record else rate
            row: dict[str, Any] = {"requests/s": share, "engine": record["engine"], "tokens/s": record.get("tokens_per_s")}
            for name, title in (("ttft", "TTFT"), ("tpot", "TPOT")):
                for statistic in ("median", "p99"):
                    row[f"{title} {statistic}, ms"] = significant(record.get(f"{statistic}_{name}_ms"))
                row[f"{title} p99 x plain"] = ratio(record, f"p99_{name}_ms")
            row["goodput, requests/s"] = significant(record.get("goodput_requests_per_s"))
            row["accept length"] = significant(record.get("accept_length"))
            row["remarks"] = "; ".join([*marks(record), *(["FAILED"] if "error" in record else [])])
            rows.append(row)
    return markdown(rows)


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """TTFT p99 and TPOT p99 by rate, a line for each engine."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    rates = list(dict.fromkeys(record["request_rate"] for record in records))
    for axes, (name, unit) in zip(panels, (("p99_ttft_ms", "TTFT p99, ms"), ("p99_tpot_ms", "TPOT p99, ms")), strict=True):
        for engine in dict.fromkeys(record["engine"] for record in records):
            points = [r for r in records if r["engine"] == engine and "error" not in r]
            label = " ".join([engine, *(marks(points[0]) if points else [])])
            axes.plot([rates.index(r["request_rate"]) for r in points], [r[name] for r in points], "o-", label=label)
        axes.set_xticks(range(len(rates)), rates)
        axes.set(xlabel="requests/s", ylabel=unit, ylim=(0, None))
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{records[0]['model']}, {records[0]['dataset']}, {records[0]['output_len']} tokens out", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_rate(text: str) -> str:
    """A rate as bench_serving takes it, or a share of the capacity."""
    if text != "inf" and not float(text.removesuffix("%")) > 0:
        raise ValueError(text)
    return text


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser, ["plain", "sparsespec"])
    parser.add_argument("--attach", nargs="+", type=Attached.parse, default=[], help="servers that run already")
    shares = "requests per second, or with %% a share of the capacity"
    parser.add_argument("--rates", nargs="+", type=parse_rate, default=["2", "4", "8", "inf"], help=shares)
    parser.add_argument("--capacity", type=float, help="requests per second (default: of the first engine at inf)")
    parser.add_argument("--dataset", nargs="+", type=Dataset.parse, default=[Dataset("code", 4096)])
    add_prompt_options(parser)
    add_turn_option(parser)
    parser.add_argument("--requests", type=int, default=200, help="of each run")
    parser.add_argument("--new-tokens", nargs="+", type=int, default=[512])
    parser.add_argument("--tpot-limit-ms", type=float, default=50, help="time per output token that goodput allows")
    parser.add_argument("--time-limit", type=float, default=0, help="seconds after which no run is begun; 0: none")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup-requests", type=int, default=8, help="sent at once before the first rate, not timed")
    parser.add_argument("--max-running-requests", type=int, default=256, help="of the servers")
    parser.add_argument("--max-concurrency", type=int, help="of bench_serving: requests that are under way at once")
    parser.add_argument("--start-timeout", type=float, default=1800, help="seconds until a server must be ready")
    parser.add_argument("--plot", type=Path, help="image to write")
    args = parser.parse_args(argv)
    if not args.results:
        parser.error("--results is needed")
    args.prompts = args.prompts or Path(args.results).with_suffix(".prompts.json")
    if any(dataset.name == "random" for dataset in args.dataset):
        parser.error("random token ids are no text, which servers are asked with")
    if any(rate.endswith("%") for rate in args.rates) and args.capacity is None:
        if not args.engines or args.engines[0].kind != "plain" or args.rates[0] != "inf":
            parser.error("shares of the capacity need --capacity, or a plain engine and the rate inf before all others")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given command line; 1 if a run failed."""
    args = parse_arguments(argv)
    if args.make_prompts:
        from transformers import AutoTokenizer

        write_prompts(args, AutoTokenizer.from_pretrained(args.model_path), Path(os.devnull))
        return 0
    # So that a program that is ended stops its server, which is in a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runs = run(args)
    print(table(runs.records), flush=True)
    if args.plot:
        plot(runs.records, args.plot)
    return int(runs.failed)


if __name__ == "__main__":
    sys.exit(main())
