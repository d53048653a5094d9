"""Fixtures and options shared by the tests."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from environment import SetupError
from fetch_model import ensure_model
from preloaded import FOLDER_ENV, INTERPRET_ENV, address_of_parent, forks_programs, index_what_hooks_replace
from run_tests import MODEL_VARIABLE, contract_is_verified

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait actively keep other processes of a small machine from their work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if os.environ.get(INTERPRET_ENV) == "1":
    import fast_interpreter

    fast_interpreter.install()

#: Files of more than some five seconds, the longest first. Taken in this order, they end on all pytest workers alike.
LONGEST_FIRST = (
    "engine/test_greedy_parity.py",
    "engine/test_sampling_distribution.py",
    "server/test_openai_api.py",
    "server/test_robustness.py",
    "kernels/test_triton_sampling.py",
    "engine/test_unified.py",
    "engine/test_kv_manager.py",
    "engine/test_prefill_interleave.py",
    "server/test_answers.py",
    "rounds/test_unified_rounds.py",
    "engine/test_penalties.py",
    "kernels/test_triton_sampling_sm90.py",
    "engine/test_architectures.py",
    "tools/test_scripts.py",
    "kernels/test_triton_kernels.py",
    "engine/test_triton_kernels.py",
    "kernels/test_triton_sm90.py",
    "engine/test_draft_policies.py",
    "unit/test_internal_state.py",
    "engine/test_draft_weights.py",
    "engine/test_lora.py",
    "tools/test_benchmarks_throughput.py",
    "unit/test_import_direction.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked nightly or contract, too")


def pytest_configure(config: pytest.Config) -> None:
    if FOLDER_ENV not in os.environ:
        os.environ[FOLDER_ENV] = tempfile.mkdtemp(prefix="sparsespec-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(FOLDER_ENV), ignore_errors=True))
    if not hasattr(config, "workerinput") and config.getoption("tx", None) and forks_programs():
        # Each of pytest-xdist's workers; what they are forked from is imported now, so that they do not wait for each other.
        address_of_parent("0")
        program = f"{sys.executable} {Path(__file__).with_name('forked_python.py')}"
        config.option.tx = [f"popen//python={program}" for _ in config.option.tx]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only ``--all`` runs, and put long files first."""
    left_out = set()
    asked = " ".join([config.getoption("markexpr", ""), *config.args])
    if not config.getoption("--all"):
        left_out = {"nightly", "contract"} if contract_is_verified() else {"nightly"}
        left_out = {name for name in left_out if name not in asked}
    dropped = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in set(dropped)]
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session")
def model_path() -> str:
    """Folder of a small real model in float32, fetched once; fails if it cannot be had."""
    given = os.environ.get(MODEL_VARIABLE)
    if given:
        if not (Path(given) / "config.json").is_file():
            pytest.fail(f"{MODEL_VARIABLE}={given} is not a checkpoint folder (no config.json in it).")
        return given
    try:
        return str(ensure_model("smollm2-135m", "float32"))
    except SetupError as error:
        pytest.fail(f"The test model could not be fetched: {error} Set {MODEL_VARIABLE} to a checkpoint folder instead.")


@pytest.fixture(scope="session")
def plugin() -> None:
    """SGLang's plugins are loaded in this process, as at the start of a server."""
    from sglang.srt.plugins import load_plugins

    from sglang_sparsespec.hook_registry import assert_hooks_applied

    if forks_programs():
        index_what_hooks_replace()
    load_plugins()
    assert_hooks_applied()


@pytest.fixture
def serving_args(plugin: None) -> Iterator[object]:
    """Resolve ``ServerArgs``, and publish them as SGLang's process-wide ones: ``serving_args(args)``."""
    from sglang_parts import publishing

    with publishing() as publish:
        yield publish
