"""The performance model: what it must obey, the measured points, and the advice made from it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_sparsespec import advise, perf_model
from sglang_sparsespec.config import SparseSpecConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import model as measured  # noqa: E402


def setup(context: int = 8192, batch: int = 32, **changes: Any) -> perf_model.Setup:
    base = perf_model.Setup(perf_model.MODELS["qwen3-8b"], perf_model.GPUS["h100"], context, batch)
    return dataclasses.replace(base, **changes)


# ------------------------------------------------------------------ measured points

POINTS = measured.read_points()


@pytest.mark.parametrize("point", [p for p in POINTS if p["kind"] == "steady"], ids=lambda point: point["id"])
def test_steady_points_are_met_within_the_stated_error(point: dict[str, Any]) -> None:
    assert abs(measured.point_error(point)) <= perf_model.STATED_ERROR


def test_constants_are_not_fitted_so_loosely_that_a_wrong_gpu_would_pass() -> None:
    # The same points on another card's data sheet miss the stated error: the check above can fail.
    other = [p for p in POINTS if p["kind"] == "steady"]
    errors = [abs(measured.point_error({**point, "gpu": "a100-80gb"})) for point in other]
    assert min(errors) > perf_model.STATED_ERROR


def test_every_point_names_a_source_that_exists_or_says_that_none_was_kept() -> None:
    for point in POINTS:
        if point["source"] is None:
            assert "not kept" in point["what"]
        else:
            assert (measured.RESULTS / point["source"]).is_file(), point["id"]


@pytest.mark.parametrize("point", [p for p in POINTS if (p["source"] or "").endswith(".log.txt")], ids=lambda p: p["id"])
def test_points_from_logs_are_in_them(point: dict[str, Any]) -> None:
    assert f"gen throughput (token/s): {point['value']:.2f}" in (measured.RESULTS / point["source"]).read_text()


def test_kernel_times_are_met() -> None:
    errors = measured.kernel_errors()
    assert {what: len(found) for what, found in errors.items()} == {"decode": 25, "draft": 26, "select": 25, "verify": 26}
    for what in ("decode", "draft", "verify"):
        assert max(map(abs, errors[what])) < 0.1, what
    # Selection is 2 to 6% of a round's attention; its shortest launches are met less well.
    assert max(map(abs, errors["select"])) < 0.2


# ------------------------------------------------------------------------- properties


@pytest.mark.parametrize("method", perf_model.METHODS)
def test_longer_contexts_and_larger_batches_take_longer_and_larger_batches_give_more(method: str) -> None:
    predict = perf_model.METHODS[method]
    by_context = [predict(setup(context=context)).cost.total for context in (512, 2048, 8192, 32768)]
    assert by_context == sorted(by_context) and len(set(by_context)) == 4
    by_batch = [predict(setup(batch=batch)) for batch in (1, 4, 16, 64, 256)]
    assert [p.cost.total for p in by_batch] == sorted(p.cost.total for p in by_batch)
    assert [p.tokens_per_s for p in by_batch] == sorted(p.tokens_per_s for p in by_batch)


@pytest.mark.parametrize("method", ["lock-step", "unified"])
def test_throughput_is_proportional_to_the_accept_length(method: str) -> None:
    predict = perf_model.METHODS[method]
    low, high = (predict(setup(accept_length=value)).tokens_per_s for value in (3.0, 6.0))
    assert high == pytest.approx(2 * low)


@pytest.mark.parametrize("method", perf_model.METHODS)
def test_a_faster_gpu_is_faster(method: str) -> None:
    gpus = [perf_model.GPUS[name] for name in ("a100-80gb", "h100", "h200")]
    rates = [perf_model.METHODS[method](setup(gpu=gpu)).tokens_per_s for gpu in gpus]
    assert rates == sorted(rates)


def test_the_gain_grows_with_the_context_and_shrinks_with_the_budget() -> None:
    gains = [perf_model.gain(setup(context=context)) for context in (1024, 4096, 16384, 65536)]
    assert gains == sorted(gains)
    budgets = [perf_model.gain(setup(sparse=SparseSpecConfig(budget_ratio=ratio))) for ratio in (0.5, 0.1, 0.05)]
    assert budgets == sorted(budgets)


def test_at_the_break_even_accept_length_both_are_equally_fast() -> None:
    case = setup()
    accept = perf_model.break_even_accept_length(case)
    assert perf_model.gain(dataclasses.replace(case, accept_length=accept)) == pytest.approx(1)


def test_below_the_crossover_speculation_is_slower_and_from_it_on_it_is_not() -> None:
    context = perf_model.crossover_context(setup())
    assert context is not None
    assert perf_model.gain(setup(context=context)) >= 1
    assert perf_model.gain(setup(context=int(context * 0.95))) < 1


def test_no_crossover_where_too_little_is_accepted() -> None:
    assert perf_model.crossover_context(setup(accept_length=1.0)) is None


def test_weights_and_kv_of_qwen3_8b() -> None:
    shape = perf_model.MODELS["qwen3-8b"]
    assert shape.weights() / 2 == pytest.approx(8.19e9, rel=0.01)
    assert shape.kv_per_token() == 147456
    assert shape.weights(tp=8) == pytest.approx(shape.weights() / 8, rel=0.01)
    assert shape.kv_per_token(tp=8) == 147456 / 8
    assert shape.kv_heads_per_gpu(16) == 1


def test_the_kv_pool_is_the_measured_one() -> None:
    # Its log: 296,640 tokens are 81% of the pool.
    assert setup().kv_capacity == pytest.approx(296640 / 0.81, rel=0.03)


def test_tensor_parallelism_costs_communication_and_saves_the_rest() -> None:
    one, two = (perf_model.plain(setup(tp=tp)).cost for tp in (1, 2))
    assert one.communication == 0 < two.communication
    assert two.products < one.products and two.attention < one.attention


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"context": 0}, "context"), ({"batch": 0}, "batch"), ({"accept_length": 9.5}, "k \\+ 1"), ({"tp": 3}, "--tp 3")],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        setup(**changes)


# ------------------------------------------------------------------------- models

CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}


def test_a_checkpoint_folder_gives_the_shape_of_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = perf_model.find_model(str(tmp_path))
    assert found == dataclasses.replace(perf_model.find_model("Qwen/Qwen3-8B"), name=tmp_path.name)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"num_experts": 64}, "mixture of experts"), ({"kv_lora_rank": 512}, "latent"), ({"hidden_size": None}, "hidden_size")],
)
def test_models_that_are_not_covered_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=named):
        perf_model.find_model(str(tmp_path))


# ------------------------------------------------------------------------- advise


def advised(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert advise.main(arguments) == 0
    return capsys.readouterr().out


def test_advise_says_that_it_predicts_and_recommends_serving_with(capsys: pytest.CaptureFixture[str]) -> None:
    text = advised(capsys, "--model", "Qwen/Qwen3-8B", "--gpu", "h100", "--context", "8192", "--batch", "32")
    assert "model prediction, not measured" in text
    assert "within 15% of the measured points" in text
    assert "Serve with SPARSESPEC" in text


def test_advise_says_from_which_context_speculation_pays(capsys: pytest.CaptureFixture[str]) -> None:
    text = advised(capsys, "--model", "qwen3-32b", "--gpu", "h200", "--tp", "4", "--context", "1024", "--batch", "256")
    assert "No gain by speculation" in text and "--sparsespec-speculate auto" in text
    assert "speculation pays from a context of" in text
    assert "hardly measured" in text


def test_advise_asks_to_measure_within_the_models_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Measure:" in advised(capsys, "--model", "qwen3-8b", "--gpu", "h100", "--context", "1536", "--batch", "32")


def test_advise_takes_the_largest_batch_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(advised(capsys, "--model", "qwen3-8b", "--gpu", "h100", "--context", "8192", "--json"))
    assert found["batch"] * 8192 <= found["kv_pool_tokens"] < (found["batch"] + 1) * 8192
    assert [row["method"] for row in found["methods"]] == ["plain", "lock-step", "unified"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "no-such-model"], "--model no-such-model"),
        (["--model", "qwen3-8b", "--batch", "4000"], "--batch 4000"),
        (["--model", "qwen3-32b", "--context", "131072"], "--tp"),
        (["--model", "qwen3-8b", "--budget-ratio", "2"], "--sparsespec-budget-ratio"),
    ],
)
def test_advise_names_what_is_wrong(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    assert advise.main([*arguments, "--gpu", "h100"]) == 2
    assert named in capsys.readouterr().err
