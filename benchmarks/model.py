"""The performance model against what was measured, and its predictions for models that were not.

    python benchmarks/model.py [--output predictions.md]

First the error at every measured point (``results/measured_points.json`` gives each one's source) and at the kernel times
that the model was calibrated with; then predictions for Qwen3 models on H100 and H200, and the contexts from which
speculation pays. Predictions are labelled as such: they are not measurements.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from _common import REPO, markdown_table

from sglang_sparsespec import perf_model
from sglang_sparsespec.advise import LABEL

RESULTS = REPO / "benchmarks" / "results"
POINTS = RESULTS / "measured_points.json"
KERNELS = RESULTS / "2026-11-25-h100" / "kernels-h100-b5fbcde.jsonl"
#: The kernels that the model stands for, as ``kernels.py`` names them.
MODELLED_KERNELS = {
    ("decode", "flashinfer, tensor cores"),
    ("verify", "pillar"),
    ("draft", "pillar"),
    ("select", "pillar"),
}
INTRODUCTION = """# Performance model

Made by `python benchmarks/make_docs.py`; do not edit. The model is
[`sglang_sparsespec/perf_model.py`](../sglang_sparsespec/perf_model.py): a roofline of one forward, kernel by kernel, with
constants that were fitted once to one H100. Ask it about your own model and load:

```sh
python -m sglang_sparsespec.advise --model Qwen/Qwen3-8B --gpu h100 --context 8192 --batch 32
```

Not modelled: prefill, queues, the tail of a run, the cost of sampling (temperature above 0), ragged batches, prefix
sharing, mixture-of-experts models.

## Against measurements

Files are in [`benchmarks/results/`](../benchmarks/results); the points are in `measured_points.json` there.
"""
MODELS = ("Qwen3-1.7B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B")
GPUS = ("h100", "h200")
TPS = (1, 2, 4, 8)
CROSSOVER_BATCHES = (1, 4, 16, 64, 256)


def read_points(path: Path = POINTS) -> list[dict[str, Any]]:
    """The measured points."""
    return json.loads(path.read_text())["points"]


def point_setup(point: dict[str, Any]) -> perf_model.Setup:
    """A measured point as the model's input."""
    return perf_model.Setup(
        perf_model.find_model(point["model"]),
        perf_model.GPUS[point["gpu"]],
        point["context"],
        point["batch"],
        point["accept_length"] or perf_model.PAPER_ACCEPT_LENGTH,
        tp=point["tp"],
    )


def predict_point(point: dict[str, Any]) -> float:
    """The model's value in the unit of the point."""
    found = perf_model.METHODS[point["method"]](point_setup(point))
    return found.tokens_per_s if point["unit"] == "tokens_per_s" else found.cost.total * 1e3


def point_error(point: dict[str, Any]) -> float:
    """Predicted over measured, less one."""
    return predict_point(point) / point["value"] - 1


def points_table(points: list[dict[str, Any]]) -> str:
    """Measured beside predicted."""
    rows = [
        [
            point["model"],
            point["method"],
            f"{point['batch']} x {point['context']:,}",
            f"{point['accept_length']:g}{' (simulated)' if point['simulated_acceptance'] else ''}"
            if point["accept_length"] and point["method"] != "plain"
            else None,
            f"{point['value']:,.5g} {'tokens/s' if point['unit'] == 'tokens_per_s' else 'ms a step'}",
            f"{predict_point(point):,.5g}",
            f"{point_error(point):+.1%}",
            point["what"] + (f" ({point['note']})" if "note" in point else ""),
            f"`{point['source']}`" if point["source"] else "no file",
        ]
        for point in points
    ]
    headers = ["model", "method", "requests x context", "accept length", "measured", "predicted", "error", "what", "source"]
    return markdown_table(headers, rows, right=(4, 5, 6))


def kernel_errors(path: Path = KERNELS) -> dict[str, list[float]]:
    """Predicted over measured, less one, of every attention and selection time the model was fitted to, by job."""
    shapes = {"qwen3-8b": "Qwen3-8B", "qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B"}
    errors: dict[str, list[float]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        # Ragged batches hold other lengths than the nominal context.
        if row["kind"] != "row" or row["layout"] == "ragged" or (row["what"], row["name"]) not in MODELLED_KERNELS:
            continue
        setup = perf_model.Setup(
            perf_model.find_model(shapes[row["shape"]]), perf_model.GPUS["h100"], row["context"], row["batch"]
        )
        seconds = perf_model.kernel_seconds(setup, row["what"])
        errors.setdefault(row["what"], []).append(seconds * 1e3 / row["ms"] - 1)
    return errors


def kernels_table() -> str:
    """Errors of the kernels' times."""
    rows = [
        [what, len(found), f"{min(found):+.1%}", f"{max(found):+.1%}"] for what, found in sorted(kernel_errors().items())
    ]
    return markdown_table(["kernel", "times", "lowest error", "highest error"], rows, right=(1, 2, 3))


def setups(context: int, batch: int | None = None) -> list[perf_model.Setup]:
    """Every model, GPU and TP size at ``context``; the batch as given, or as large as fits (256 at most)."""
    found = []
    for name in MODELS:
        for gpu in GPUS:
            for tp in TPS:
                setup = perf_model.Setup(perf_model.find_model(name), perf_model.GPUS[gpu], context, batch or 1, tp=tp)
                largest = perf_model.largest_batch(setup)
                if largest:
                    found.append(setup if batch else dataclasses.replace(setup, batch=largest))
    return found


def predictions_table(context: int) -> str:
    """Throughput of the three methods."""
    rows = []
    for setup in setups(context):
        found = {name: predict(setup).tokens_per_s for name, predict in perf_model.METHODS.items()}
        rows.append(
            [
                setup.shape.name,
                setup.gpu.name,
                setup.tp,
                setup.batch,
                *(f"{value:,.0f}" for value in found.values()),
                f"{found['lock-step'] / found['plain']:.2f}",
                f"{found['unified'] / found['plain']:.2f}",
                f"{perf_model.break_even_accept_length(setup):.2f}",
            ]
        )
    methods = ["plain", "lock-step", "unified", "gain", "gain, unified"]
    headers = ["model", "GPU", "TP", "batch", *methods, "break-even accept length"]
    return markdown_table(headers, rows, right=range(2, 10))


def crossover_cells(setup: perf_model.Setup) -> list[str | None]:
    """The shortest context that pays, by batch; None if none does that fits the KV pool."""
    cells: list[str | None] = []
    for batch in CROSSOVER_BATCHES:
        case = dataclasses.replace(setup, batch=batch)
        context = perf_model.crossover_context(case)
        fits = context is not None and context * batch <= case.kv_capacity
        cells.append(f"{context:,}" if fits else None)
    return cells


def crossover_table() -> str:
    """Contexts from which lock-step SPARSESPEC is at least as fast as plain decoding, by batch."""
    rows = [[setup.shape.name, setup.gpu.name, setup.tp, *crossover_cells(setup)] for setup in setups(context=1, batch=1)]
    headers = ["model", "GPU", "TP", *(f"batch {batch}" for batch in CROSSOVER_BATCHES)]
    return markdown_table(headers, rows, right=range(2, 8))


def calibration_section() -> str:
    """The model against what was measured."""
    points = read_points()
    steady = [point for point in points if point["kind"] == "steady"]
    whole = [point for point in points if point["kind"] != "steady"]
    worst = max(abs(point_error(point)) for point in steady)
    return "\n\n".join(
        [
            f"Steady decoding, {len(steady)} points, largest error {worst:.1%}:",
            points_table(steady),
            "Whole runs, which the model does not predict (requests are admitted again first, and the last ones decode in "
            "smaller batches), so that it lies above them:",
            points_table(whole),
            "Kernel times that attention and selection were fitted to:",
            kernels_table(),
        ]
    )


def predictions_section() -> str:
    """What is predicted for models that were not measured."""
    parts = [
        f"Greedy decoding, bfloat16, k = {perf_model.DEFAULT_K}, budget ratio 0.05, accept length "
        f"{perf_model.PAPER_ACCEPT_LENGTH} (the paper's 6.16 of 8, and one). **Every number: {LABEL}.** H200 is scaled by "
        "data sheets, and TP above 1 rests on assumed link rates. Tokens per second of all requests; the batch is the "
        "largest that fits the KV pool, 256 at most."
    ]
    for context in (8192, 32768):
        parts += [f"Context {context:,} ({LABEL}):", predictions_table(context)]
    parts += [
        f"Shortest context from which lock-step SPARSESPEC is at least as fast as plain decoding ({LABEL}; -: there is "
        "none that fits the KV pool):",
        crossover_table(),
    ]
    return "\n\n".join(parts)


def page() -> str:
    """The whole page (``docs/performance-model.md``)."""
    return f"{INTRODUCTION}\n{calibration_section()}\n\n## Predictions\n\n{predictions_section()}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Markdown file to write instead of printing")
    args = parser.parse_args()
    if args.output:
        args.output.write_text(page())
    else:
        print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
