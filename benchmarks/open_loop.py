"""Open-loop load: requests arrive by a Poisson process, whether earlier ones are answered or not.

    python benchmarks/open_loop.py --model-path M --engines plain:flashinfer sparsespec sparsespec+mixed-chunk \\
        --rates 2 4 8 inf --dataset code:4096 --output-len 512 --num-prompts 200 \\
        --results open_loop.jsonl --plot open_loop.png

On a CPU, for a look at the records only:

    python benchmarks/open_loop.py --model-path smollm2-135m-float32 --device cpu --dtype float32 \\
        --prefill-backend torch_native --engines plain:torch_native sparsespec+mixed-chunk --rates 1 inf \\
        --dataset code:256 --output-len 16 --num-prompts 4 --warmup-requests 1 --max-running-requests 8 \\
        --engine-args '{"max_total_tokens": 8000}' --results open_loop.jsonl

Each engine of ``--engines`` (names as in ``throughput.py``; behind one, ``+mixed-chunk`` adds --enable-mixed-chunk and
``+late-launch`` --sparsespec-late-launch) is started once as a server, with the same flags but for the algorithm. SGLang's
own bench_serving then sends the same requests at each of ``--rates`` (requests per second; inf: all at once, which saturates
the server), from a flushed prefix cache. All figures are bench_serving's, but for the last:

  ttft_ms          time to first token: waiting in the queue, prefill
  itl_ms           time between two arrivals of tokens at the client. Speculation brings several tokens at once, so look at
                   tpot_ms too: (last token's time - first token's) / (tokens - 1) of a request
  tokens_per_s     output tokens of the whole run / its time, arrivals included: at low rates it is the load, not the limit
  accept_length    the server's, up to its last decode log line; None in short runs
  slowest_ttft_ms  the longest times to first token, longest first
  metrics          what a server with SPARSESPEC has counted since its start, see the README

``--dataset`` is one of

  code:TOKENS, math:TOKENS, aime, olympiadbench    see ``_workloads.py``; each prompt of the first two begins with a line of
                 its own, so that none is found in another's cached prefix (questions repeat where there are fewer than
                 requests). Outputs have ``--output-len`` tokens
  random-ids     bench_serving's consecutive token ids from random starts, with lengths uniform between
                 ``--random-range-ratio`` and 1 times ``--input-len`` and ``--output-len``: for dummy weights, as accept
                 lengths on such text are those of no real load

``--prompt-file`` is a JSON-lines file in bench_serving's custom format, to be used instead. Outputs are made to go on to
their full length (ignore_eos, in the record as ``forced_lengths``).

Logs of servers and of bench_serving lie beside the results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import requests
from _common import REPO, append_json_line, clean, markdown_table, say, stamp
from _report import load_pyplot
from _server_job import as_record, base_command, run_bench_serving, write_dataset
from _workloads import Dataset
from throughput import add_start_options, engine_arguments

sys.path.append(str(REPO / "scripts"))

from quickstart import HOST, Server, ServerError, choose_port, server_environment  # noqa: E402

#: What may stand behind an engine's name, and the settings that it adds.
VARIANTS = {"+mixed-chunk": {"enable_mixed_chunk": True}, "+late-launch": {"sparsespec_late_launch": True}}
#: bench_serving's figures by the names of the record.
FIGURES = {
    **{f"{stat}_{name}_ms": f"{stat}_{name}_ms" for name in ("ttft", "tpot", "itl") for stat in ("mean", "median", "p99")},
    "p99_latency_ms": "p99_e2e_latency_ms",
    "requests_per_s": "request_throughput",
    "mean_concurrency": "concurrency",
}
WARM_UP_TOKENS = 256
#: How many of the longest times to first token a record has: the p99 of some hundred requests is one of a few.
SLOWEST = 12
#: Columns of the table, by the names of the record; ratios are added behind the two they belong to.
COLUMNS = {
    "requests_per_s": "requests/s",
    "tokens_per_s": "tokens/s",
    "mean_ttft_ms": "TTFT mean, ms",
    "median_ttft_ms": "TTFT median, ms",
    "p99_ttft_ms": "TTFT p99, ms",
    "p99_tpot_ms": "TPOT p99, ms",
    "p99_itl_ms": "ITL p99, ms",
    "accept_length": "accept length",
}
RATIOS = ("tokens_per_s", "p99_ttft_ms")


# -------------------------------------------------------------------------- servers


def split_engine(name: str) -> tuple[str, dict[str, Any]]:
    """An engine's name without what stands behind it, and the settings that that adds."""
    for suffix, settings in VARIANTS.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), settings
    return name, {}


def server_flags(name: str, args: argparse.Namespace) -> list[str]:
    """An engine's name as flags of ``sglang.launch_server``.

    Raises:
        SystemExit: no such name.
    """
    engine, more = split_engine(name)
    settings = {**engine_arguments(engine, args.max_running_requests, args), **more}
    flags: list[str] = []
    for key, value in settings.items():
        if value is None or value is False:
            continue
        flags.append(f"--{key.replace('_', '-')}")
        if isinstance(value, dict):
            flags.append(json.dumps(value))
        elif value is not True:
            flags += map(str, value if isinstance(value, list) else [value])
    return flags


def environment_of_server(args: argparse.Namespace) -> dict[str, str]:
    """Variables of servers."""
    variables = server_environment(Path(args.model_path).exists())
    if args.device == "cpu":
        from sglang_sparsespec.cpu_bridge import CPU_BRIDGE_ENV

        variables[CPU_BRIDGE_ENV] = "1"  # plain SGLang needs it too on a processor without AMX
    return variables


def log_beside(results: Path, name: str) -> Path:
    """The log of an engine's server."""
    return results.with_name(f"{results.stem}-{re.sub(r'[^a-z0-9]+', '-', name)}.log")


# ---------------------------------------------------------------------------- load


def make_dataset(args: argparse.Namespace, tokenizer: Any, path: Path) -> list[str]:
    """bench_serving's options for the requests; writes ``path`` if they are ours."""
    if args.prompt_file:
        return ["--dataset-name", "custom", "--dataset-path", str(args.prompt_file)]
    if args.dataset == "random-ids":
        made = ["--dataset-name", "random-ids", "--random-input-len", str(args.input_len)]
        made += ["--random-output-len", str(args.output_len), "--random-range-ratio", str(args.random_range_ratio)]
        return [*made, "--tokenize-prompt"]
    dataset = Dataset.parse(args.dataset)
    texts = [tokenizer.decode(prompt) for prompt in dataset.prompts(tokenizer, args.num_prompts)]
    if dataset.context is not None:
        texts = [f"# {index:05d}\n{text}" for index, text in enumerate(texts)]
    write_dataset(texts, path)
    return ["--dataset-name", "custom", "--dataset-path", str(path)]


def command(
    rate: str, count: int, dataset: list[str], url: str, output: Path, args: argparse.Namespace
) -> list[str]:
    """The command line of one run of ``count`` requests."""
    made = [*base_command("sglang", args.model_path, url, output), *dataset, "--request-rate", rate]
    made += ["--num-prompts", str(count), "--seed", str(args.seed), "--temperature", str(args.temperature)]
    # bench_serving would flush the cache right after its warm-up, which the server refuses while the warm-up's last
    # round is in flight (overlap scheduling). OpenLoop.run_engine warms up.
    made += ["--warmup-requests", "0"]
    if "custom" in dataset:
        made += ["--sharegpt-output-len", str(args.output_len)]
    return made


def ask(url: str, body: dict[str, Any] | None = None) -> requests.Response:
    """GET ``url``, or POST ``body`` as JSON, which a server may take ten minutes to answer.

    Raises:
        RuntimeError: no answer, or an error.
    """
    try:
        answer = requests.get(url, timeout=60) if body is None else requests.post(url, json=body, timeout=600)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise RuntimeError(f"{url}: {error}") from error
    return answer


def first_prompts(dataset: list[str], count: int) -> dict[str, Any]:
    """Prompts of ``dataset`` (see :func:`make_dataset`) as a server is asked for them; short ones where they are random."""
    if "custom" not in dataset:
        return {"input_ids": [list(range(1000 + start, 1500 + start)) for start in range(count)]}
    lines = Path(dataset[-1]).read_text().splitlines()[:count]
    return {"text": [json.loads(line)["conversations"][0]["content"] for line in lines]}


def warm_up(url: str, prompts: dict[str, Any]) -> None:
    """Let a server answer ``prompts``, all at once, with :data:`WARM_UP_TOKENS` tokens each.

    Raises:
        RuntimeError: it did not.
    """
    sampling = {"temperature": 0, "max_new_tokens": WARM_UP_TOKENS, "ignore_eos": True}
    ask(f"{url}/generate", {**prompts, "sampling_params": sampling})


def figures_of(result: dict[str, Any], tokenizer: Any, asked: int) -> dict[str, Any]:
    """A run's figures.

    Raises:
        RuntimeError: not all requests were answered.
    """
    record = as_record(result, tokenizer, asked)
    figures = {name: round(result[theirs], 3) for name, theirs in FIGURES.items()}
    slowest = sorted((1000 * seconds for seconds in result["ttfts"]), reverse=True)[:SLOWEST]
    return {**record, **figures, "slowest_ttft_ms": [round(milliseconds, 1) for milliseconds in slowest]}


def metrics_of(name: str, url: str) -> dict[str, Any] | None:
    """What a server with SPARSESPEC has counted since its start; None of another.

    Raises:
        RuntimeError: it does not answer.
    """
    if not name.startswith("sparsespec"):
        return None
    (state,) = ask(f"{url}/server_info").json()["internal_states"]
    return {key: value for key, value in state.items() if key.startswith("sparsespec_")}


def describe(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a record says about engine and requests."""
    simulated = os.environ.get("SGLANG_SIMULATE_ACC_LEN")
    of_random_ids = args.dataset == "random-ids" and not args.prompt_file
    return {
        "model": Path(args.model_path).name,
        "load_format": args.load_format,
        "engine": name,
        "flags": server_flags(name, args),
        "dataset": args.prompt_file.name if args.prompt_file else args.dataset,
        "input_len": args.input_len if of_random_ids else None,
        "random_range_ratio": args.random_range_ratio if of_random_ids else None,
        "output_len": args.output_len,
        "forced_lengths": True,
        "num_prompts": args.num_prompts,
        "seed": args.seed,
        "temperature": args.temperature,
        "arrivals": "Poisson",
        "simulated_accept_length": float(simulated) if simulated and name.startswith("sparsespec") else None,
    }


class OpenLoop:
    """All runs of one command.

    Attributes:
        records: finished and failed runs (these have ``error``).
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.args = args
        self.records: list[dict[str, Any]] = []
        self._environment = stamp()
        self._tokenizer = AutoTokenizer.from_pretrained(args.model_path)
        self._dataset = make_dataset(args, self._tokenizer, folder / "prompts.jsonl")
        self._output = folder / "result.jsonl"

    def run_engine(self, name: str) -> None:
        """Start an engine's server and run all rates against it."""
        args, log = self.args, log_beside(self.args.results, name)
        port = choose_port(0)
        line = [sys.executable, "-m", "sglang.launch_server", "--host", HOST, "--port", str(port)]
        say(f"{name}: the server starts, its log is {log}")
        try:
            with Server([*line, *server_flags(name, args)], port, log, environment_of_server(args)) as server:
                server.wait_until_ready(args.start_timeout)
                url = f"http://{HOST}:{port}"
                if args.warmup_requests:
                    say(f"{name}: {args.warmup_requests} requests to warm up")
                    warm_up(url, first_prompts(self._dataset, args.warmup_requests))
                for rate in args.rates:
                    self._run_rate(name, rate, url, log)
                    server.check_alive()
        except (ServerError, RuntimeError) as error:
            done = [record["request_rate"] for record in self.records if record["engine"] == name]
            for rate in args.rates[len(done) :]:
                self._write(name, rate, {"error": str(error)})

    def _run_rate(self, name: str, rate: str, url: str, log: Path) -> None:
        args = self.args
        least = f", {args.num_prompts / float(rate):.0f} s of arrivals" if rate != "inf" else ""
        say(f"{name}: {args.num_prompts} requests at {rate}/s{least}")
        try:
            result = self._bench(rate, args.num_prompts, url, log)
            figures = figures_of(result, self._tokenizer, args.num_prompts)
            self._write(name, rate, {**figures, "metrics": metrics_of(name, url)})
        except RuntimeError as error:
            self._write(name, rate, {"error": str(error)})

    def _bench(self, rate: str, count: int, url: str, log: Path) -> dict[str, Any]:
        line = command(rate, count, self._dataset, url, self._output, self.args)
        return run_bench_serving(line, self._output, log.with_suffix(".bench.log"))

    def _write(self, name: str, rate: str, figures: dict[str, Any]) -> None:
        record = {**self._environment, **describe(name, self.args), "request_rate": rate, **figures}
        self.records.append(record)
        append_json_line(self.args.results, clean(record))
        shown = {key: figures[key] for key in ("error", *COLUMNS) if key in figures}
        say(f"{name}: {rate}/s: " + ", ".join(f"{key} {value}" for key, value in shown.items()))


# -------------------------------------------------------------------------- report


def baseline_of(records: list[dict[str, Any]], rate: str) -> dict[str, Any] | None:
    """The first plain engine's run at the same rate."""
    return next((r for r in records if r["engine"].startswith("plain") and r["request_rate"] == rate), None)


def ratio(record: dict[str, Any], baseline: dict[str, Any] | None, name: str) -> float | None:
    """``record``'s figure relative to the baseline's, None where one is missing."""
    found = record.get(name)
    against = baseline.get(name) if baseline else None
    return found / against if found is not None and against else None


def table(records: list[dict[str, Any]]) -> str:
    """Markdown table of all runs, by rate."""
    headers = ["rate", "engine"]
    for name, title in COLUMNS.items():
        headers += [title, "x plain"] if name in RATIOS else [title]
    rows = []
    for rate in dict.fromkeys(record["request_rate"] for record in records):
        baseline = baseline_of(records, rate)
        for record in (r for r in records if r["request_rate"] == rate):
            row: list[Any] = [rate, record["engine"] + (" FAILED" if "error" in record else "")]
            for name in COLUMNS:
                row.append(record.get(name))
                if name in RATIOS:
                    row.append(ratio(record, baseline, name))
            rows.append(row)
    return markdown_table(headers, rows, right=range(2, len(headers)))


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """TTFT p99 and output throughput by rate, a line for each engine."""
    plt = load_pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    rates = list(dict.fromkeys(record["request_rate"] for record in records))
    for axes, (name, label) in zip(
        panels, (("p99_ttft_ms", "TTFT p99, ms"), ("tokens_per_s", "output tokens/s")), strict=True
    ):
        for engine in dict.fromkeys(record["engine"] for record in records):
            points = [r for r in records if r["engine"] == engine and "error" not in r]
            axes.plot([rates.index(r["request_rate"]) for r in points], [r[name] for r in points], "o-", label=engine)
        axes.set_xticks(range(len(rates)), rates)
        axes.set(xlabel="requests/s", ylabel=label, ylim=(0, None))
    panels[0].legend(fontsize=8)
    first = records[0]
    figure.suptitle(f"{first['model']}, {first['dataset']}, {first['output_len']} tokens out", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ----------------------------------------------------------------------------- main


def parse_rate(text: str) -> str:
    """A rate as bench_serving takes it."""
    if text != "inf" and not float(text) > 0:
        raise ValueError(text)
    return text


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_start_options(parser)
    parser.set_defaults(random_prompts=False)  # bench_serving wants a server with a tokenizer
    engines = ["plain:flashinfer", "sparsespec", *(f"sparsespec{suffix}" for suffix in VARIANTS)]
    parser.add_argument("--engines", nargs="+", default=engines)
    parser.add_argument("--rates", nargs="+", type=parse_rate, default=["2", "4", "8", "inf"], help="requests per second")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--dataset", default="code:4096", help="see above")
    load.add_argument("--prompt-file", type=Path, help="JSON lines in bench_serving's custom format")
    parser.add_argument("--num-prompts", type=int, default=200, help="requests of each run")
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--input-len", type=int, default=4096, help="longest prompt of random-ids")
    parser.add_argument("--random-range-ratio", type=float, default=0.5, help="of random-ids")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup-requests", type=int, default=8, help="sent at once before the first rate, not timed")
    parser.add_argument("--max-running-requests", type=int, default=256)
    parser.add_argument("--start-timeout", type=float, default=1800, help="seconds until a server must be ready")
    parser.add_argument("--results", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--plot", type=Path, help="image to write")
    args = parser.parse_args(argv)
    if len(set(args.engines)) < len(args.engines):
        parser.error("--engines: each only once")
    if args.prompt_file and not args.prompt_file.is_file():
        parser.error(f"--prompt-file {args.prompt_file}: no such file")
    if not args.prompt_file and args.dataset != "random-ids":
        try:
            Dataset.parse(args.dataset)
        except ValueError as error:
            parser.error(f"--{error}, or random-ids")
    # Servers have a folder of their own.
    args.results = args.results.resolve()
    if Path(args.model_path).exists():
        args.model_path = str(Path(args.model_path).resolve())
    for name in args.engines:
        server_flags(name, args)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.plot:
        load_pyplot()  # fails now if it is missing
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        loop = OpenLoop(args, Path(folder))
        for name in args.engines:
            loop.run_engine(name)
    print(table(loop.records), flush=True)
    if args.plot:
        plot(loop.records, args.plot)
    return int(any("error" in record for record in loop.records))


if __name__ == "__main__":
    sys.exit(main())
