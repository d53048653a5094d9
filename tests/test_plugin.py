"""Loading: found by SGLang, loud where it fails, and without effect where it is not asked for."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_sparsespec import ALGORITHM, ATTENTION_BACKEND, SGLANG_VERSION
from sglang_sparsespec import plugin as plugin_module
from sglang_sparsespec.plugin import PluginUnavailableError

OTHER_VERSION = "0.5.16"
SENTENCE = (
    f"sglang-sparsespec needs sglang=={SGLANG_VERSION}, but sglang {OTHER_VERSION} is installed; "
    f"run `pip install sglang=={SGLANG_VERSION}`"
)

#: Engine and ServerArgs under a wrong SGLang version; prints one JSON object.
WRONG_VERSION_IN_CODE = """
import json, sys
import sglang
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
model, found = sys.argv[1], {}
asked = dict(model_path=model, device="cpu", speculative_algorithm="SPARSESPEC")
attempts = {
    "engine": lambda: sglang.Engine(**asked),
    "engine_with_settings": lambda: sglang.Engine(**asked, sparsespec_min_budget=64),
    "server_args": lambda: ServerArgs(**asked),
    "not_asked_for": lambda: ServerArgs(model_path=model, device="cpu"),
}
for name, attempt in attempts.items():
    try:
        attempt()
        found[name] = "no error"
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print("ANSWER " + json.dumps(found))
"""

#: What SGLang resolves without SPARSESPEC; prints one JSON object.
RESOLVED_ARGS = """
import dataclasses, json, os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt import server_args as sa
common = dict(model_path=sys.argv[1], random_seed=1, port=31150, nccl_port=31151)
cases = {
    "cpu": dict(device="cpu"),
    "cuda": dict(device="cuda", mem_fraction_static=0.8),
    "deterministic": dict(device="cuda", mem_fraction_static=0.8, enable_deterministic_inference=True),
    "triton": dict(device="cuda", mem_fraction_static=0.8, attention_backend="triton"),
    "ngram": dict(device="cuda", mem_fraction_static=0.8, speculative_algorithm="NGRAM"),
    "torch_native": dict(device="cpu", attention_backend="torch_native", disable_cuda_graph=True),
}
found = {}
for name, case in cases.items():
    found[name] = json.loads(json.dumps(dataclasses.asdict(sa.ServerArgs(**common, **case)), default=str))
line = ["--model-path", sys.argv[1], "--device", "cpu", "--random-seed", "1", "--port", "31150"]
found["command line"] = json.loads(json.dumps(dataclasses.asdict(sa.prepare_server_args(line)), default=str))
found["vllm"] = "vllm" in sys.modules
found["environment"] = {k: v for k, v in os.environ.items() if "SPARSE" in k}
print("ANSWER " + json.dumps(found))
"""


class Child:
    """A Python process started now and waited for when its result is needed."""

    def __init__(self, *arguments: str, first_on_path: str = "", **env: str) -> None:
        path = os.pathsep.join(filter(None, [first_on_path, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env},
        )
        self._result: tuple[int, str, str] | None = None

    def result(self) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        if self._result is None:
            out, err = self._process.communicate(timeout=600)
            self._result = self._process.returncode, out, err
        return self._result

    def answer(self) -> dict[str, Any]:
        """The JSON object the process printed."""
        status, out, err = self.result()
        assert status == 0, err[-4000:]
        return json.loads(out[out.index("ANSWER ") + len("ANSWER ") :].splitlines()[0])

    def kill(self) -> None:
        if self._result is None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture(scope="module")
def wrong_version(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ``PYTHONPATH`` under which the installed SGLang says it is another version."""
    folder = tmp_path_factory.mktemp("wrong_version")
    info = folder / f"sglang-{OTHER_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {OTHER_VERSION}\n")
    return str(folder)


@pytest.fixture(scope="module")
def children(wrong_version: str, model_path: str) -> Iterator[dict[str, Child]]:
    """All child processes of this module; importing SGLang takes each some 15 s."""
    serve = ["-m", "sglang.launch_server", "--model-path", model_path, "--device", "cpu", "--port", "31152"]
    started = {
        "command line": Child(*serve, "--speculative-algorithm", "sparsespec", first_on_path=wrong_version),
        "code": Child("-c", WRONG_VERSION_IN_CODE, model_path, first_on_path=wrong_version),
        "with plugin": Child("-c", RESOLVED_ARGS, model_path, SGLANG_PLUGINS="sparsespec"),
        "without plugin": Child("-c", RESOLVED_ARGS, model_path, SGLANG_PLUGINS="another"),
    }
    yield started
    for child in started.values():
        child.kill()


# ---------------------------------------------------------------------------- found


def test_the_entry_point_is_installed() -> None:
    found = importlib.metadata.entry_points(group="sglang.srt.plugins", name="sparsespec")
    assert [entry.load() for entry in found] == [plugin_module.register]


def test_loading_registers_algorithm_backend_and_hooks(plugin: None) -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from sglang_sparsespec.algorithm import SparseSpecAlgorithm
    from sglang_sparsespec.scheduler_patch.hooks import assert_hooks_applied

    assert isinstance(SpeculativeAlgorithm.from_string(ALGORITHM), SparseSpecAlgorithm)
    assert ATTENTION_BACKEND in ATTENTION_BACKENDS and ATTENTION_BACKEND in ATTENTION_BACKEND_CHOICES
    assert_hooks_applied()


# ----------------------------------------------------------------------------- loud


def test_a_wrong_sglang_version_stops_a_server_that_asks_for_the_algorithm(
    children: dict[str, Child],
) -> None:
    status, _, err = children["command line"].result()
    assert status == 1
    assert err.strip().splitlines()[-1].startswith(SENTENCE)


@pytest.mark.parametrize("how", ["engine", "server_args", "engine_with_settings"])
def test_a_wrong_sglang_version_is_an_error_in_code_that_asks_for_the_algorithm(
    how: str, children: dict[str, Child]
) -> None:
    assert children["code"].answer()[how].startswith(f"PluginUnavailableError: {SENTENCE}")


def test_a_wrong_sglang_version_is_no_error_where_the_algorithm_is_not_asked_for(
    children: dict[str, Child],
) -> None:
    assert children["code"].answer()["not_asked_for"] == "no error"


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        (["--speculative-algorithm", "SPARSESPEC"], True),
        (["--speculative-algorithm=sparsespec", "--port", "1"], True),
        (["--speculative-algo", "SparseSpec"], True),
        (["--speculative-algorithm", "NGRAM"], False),
        (["--speculative-algorithm"], False),
        (["--served-model-name", "SPARSESPEC"], False),
        ([], False),
    ],
)
def test_the_command_line_is_read_as_sglang_reads_it(argv: list[str], asked: bool) -> None:
    assert plugin_module.asked_for_on_command_line(["launch_server.py", *argv]) is asked


@pytest.fixture
def scratch_registry(plugin: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """SGLang's registries and arguments, to be changed without leaving traces."""
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative import spec_registry

    registry: dict[str, Any] = {}
    monkeypatch.setattr(ServerArgs, "__init__", ServerArgs.__init__)
    hooks = {target: list(registered) for target, registered in HookRegistry._hooks.items()}
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list, hooks))
    monkeypatch.setattr(spec_registry, "_REGISTRY", registry)
    return registry


def fail_with(error: Exception) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


def test_a_failure_while_loading_ends_the_process_that_asks_for_the_algorithm(
    scratch_registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sglang_sparsespec.algorithm.register_algorithm", fail_with(TypeError("changed")))
    monkeypatch.setattr(sys, "argv", ["x", "--speculative-algorithm", ALGORITHM])
    with pytest.raises(SystemExit) as stopped:
        plugin_module.register()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "sglang-sparsespec failed to load: TypeError: changed"
    )


def register_and_fail(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the entry point with ``target`` failing, SPARSESPEC not on the command line."""
    for name in ("register_flags", "register_hooks", "register_metrics_hooks", "register_backend"):
        module = {"register_flags": "config", "register_backend": "attention_backend.backend"}.get(name)
        module = module or f"scheduler_patch.{'metrics_hooks' if 'metrics' in name else 'hooks'}"
        # What succeeds must not be registered a second time in this process.
        monkeypatch.setattr(f"sglang_sparsespec.{module}.{name}", lambda: None)
    monkeypatch.setattr(target, fail_with(RuntimeError("broken")))
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(RuntimeError, match="broken"):
        plugin_module.register()


@pytest.mark.parametrize(
    "target",
    [
        "sglang_sparsespec.algorithm.register_algorithm",  # before the algorithm exists
        "sglang_sparsespec.scheduler_patch.hooks.register_hooks",  # after it was registered
    ],
)
def test_a_plugin_that_failed_halfway_refuses_its_algorithm(
    target: str, scratch_registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch, model_path: str
) -> None:
    from sglang.srt.server_args import ServerArgs

    register_and_fail(target, monkeypatch)
    assert list(scratch_registry) == [ALGORITHM]
    with pytest.raises(PluginUnavailableError, match="failed to load: RuntimeError: broken"):
        ServerArgs(model_path=model_path, device="cpu", speculative_algorithm=ALGORITHM)


def test_cuda_without_flashinfer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PluginUnavailableError, match="FlashInfer.*pip install flashinfer-python"):
        plugin_module.check_environment()


# ---------------------------------------------------------------- half-applied hooks


@pytest.fixture
def half_applied(plugin: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """One hook of the plugin is not in force; returns its target."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    target = "sglang.srt.mem_cache.kv_cache_builder.get_draft_kv_pool"
    assert target in HookRegistry._patched
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {target})
    return target


def test_a_hook_that_sglang_could_not_apply_is_only_logged_by_sglang(
    plugin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the plugin checks for itself."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_sparsespec.scheduler_patch import hooks

    monkeypatch.setattr(hooks, "_TARGETS", [])
    monkeypatch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list))
    missing = "sglang.srt.mem_cache.kv_cache_builder.a_function_that_was_renamed"
    hooks.add_hook(missing, lambda result: None, "after")
    HookRegistry.apply_hooks()
    with pytest.raises(RuntimeError, match=f"partly loaded.*{missing}.*reinstall sglang=={SGLANG_VERSION}"):
        hooks.assert_hooks_applied()


def test_half_applied_hooks_are_refused_at_start_up(half_applied: str, model_path: str) -> None:
    from sglang.srt.server_args import ServerArgs

    with pytest.raises(RuntimeError, match=half_applied):
        ServerArgs(model_path=model_path, device="cpu", speculative_algorithm=ALGORITHM)


def test_half_applied_hooks_are_refused_by_the_worker(half_applied: str) -> None:
    """In the scheduler process, which loads plugins anew."""
    from sglang_sparsespec.worker import SparseSpecWorker

    nothing: Any = None
    with pytest.raises(RuntimeError, match=half_applied):
        SparseSpecWorker(nothing, 0, nothing, 0, nothing)


def test_no_hooks_at_all_are_refused(plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_sparsespec.scheduler_patch import hooks

    monkeypatch.setattr(hooks, "_TARGETS", [])
    with pytest.raises(RuntimeError, match="not applied: all"):
        hooks.assert_hooks_applied()


# --------------------------------------------------------------------- not asked for


def test_sglang_resolves_its_arguments_as_without_the_plugin(children: dict[str, Child]) -> None:
    with_plugin, without = children["with plugin"].answer(), children["without plugin"].answer()
    assert with_plugin.keys() == without.keys()
    for case in without:
        assert with_plugin[case] == without[case], case
    assert without["cpu"]["attention_backend"], "the cases must have been resolved"
    assert with_plugin["vllm"] is False and "SPARSESPEC_CPU_BRIDGE" not in with_plugin["environment"]


@pytest.fixture
def serving_plain(serving_args: Callable[[Any], None], model_path: str) -> None:
    """This process serves on CPU without speculation."""
    from sglang.srt.server_args import ServerArgs

    serving_args(ServerArgs(model_path=model_path, device="cpu"))


def test_other_algorithms_draft_kv_pool_is_found(plugin: None) -> None:
    from sglang.srt.mem_cache.kv_cache_builder import get_draft_kv_pool
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    pool = object()
    runner = SimpleNamespace(token_to_kv_pool=pool)
    worker: Any = SimpleNamespace(draft_worker=SimpleNamespace(draft_runner=runner))
    args: Any = SimpleNamespace(enable_multi_layer_eagle=False)
    eagle = SpeculativeAlgorithm.EAGLE
    assert get_draft_kv_pool(draft_worker=worker, spec_algorithm=eagle, server_args=args) is pool
    assert (
        get_draft_kv_pool(draft_worker=None, spec_algorithm=SpeculativeAlgorithm.NONE, server_args=args)
        is None
    )


def test_other_algorithms_capture_their_own_verify_input(plugin: None) -> None:
    from sglang.srt.speculative.ngram_info import NgramVerifyInput
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm, create_dummy_verify_input

    args: Any = SimpleNamespace(speculative_num_draft_tokens=5)
    mask = torch.ones(1, dtype=torch.bool)
    assert create_dummy_verify_input(SpeculativeAlgorithm.NONE, args, mask, 5, False) is None
    ngram = create_dummy_verify_input(SpeculativeAlgorithm.NGRAM, args, mask, 5, False)
    assert isinstance(ngram, NgramVerifyInput) and ngram.custom_mask is mask


def test_other_algorithms_capture_graphs_with_their_own_input(plugin: None) -> None:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from sglang_sparsespec.scheduler_patch.hooks import verify_graph_spec_info

    runner = SimpleNamespace(model_runner=SimpleNamespace(spec_algorithm=SpeculativeAlgorithm.NGRAM))
    assert verify_graph_spec_info("original", runner) is None, "None keeps the original"


@pytest.mark.parametrize("backend", ["torch_native", "intel_amx", "triton", "flashinfer"])
def test_triton_support_of_other_backends_is_unchanged(backend: str, serving_plain: None) -> None:
    from sglang.srt.utils.common import support_triton

    assert support_triton(backend) is support_triton.__wrapped__(backend)


def test_kv_pools_prepare_to_move_tokens_as_before(serving_plain: None) -> None:
    from sglang_sparsespec.scheduler_patch.hooks import no_kv_move_kernel

    prepared: list[object] = []
    pool = object()
    no_kv_move_kernel(prepared.append, pool)
    assert prepared == [pool]


def test_slots_are_assigned_by_sglang(serving_plain: None) -> None:
    from sglang_sparsespec.scheduler_patch.hooks import assign_slots_on_cpu

    calls: list[tuple[object, ...]] = []
    a, b, c, d, e = (torch.tensor([i]) for i in range(5))
    assign_slots_on_cpu(lambda *args: calls.append(args), a, b, c, d, e, 1)
    assert calls == [(a, b, c, d, e, 1)]


def test_penalties_are_accepted_without_the_algorithm(plugin: None) -> None:
    from sglang_sparsespec.scheduler_patch.hooks import refuse_inexact_request

    manager = SimpleNamespace(server_args=SimpleNamespace(speculative_algorithm=None))
    request = SimpleNamespace(sampling_params={"frequency_penalty": 0.5}, custom_logit_processor="x")
    refuse_inexact_request(None, manager, request)


def test_the_scheduler_reports_no_metrics_of_the_plugin(plugin: None) -> None:
    from sglang_sparsespec.scheduler_patch import metrics_hooks

    state: dict[str, Any] = {}
    for draft_worker in (None, SimpleNamespace()):
        scheduler = SimpleNamespace(draft_worker=draft_worker)
        metrics_hooks.add_internal_state(SimpleNamespace(internal_state=state), scheduler)
        metrics_hooks.report_draft_metrics(None, SimpleNamespace(scheduler=scheduler))
    assert state == {}


def test_the_cpu_bridge_is_not_installed() -> None:
    """Only serving SPARSESPEC on CPU, or its variable, provides the missing ``vllm`` module."""
    from sglang_sparsespec.cpu_bridge import CPU_BRIDGE_ENV

    code = (
        "import sys\n"
        "from sglang_sparsespec.cpu_bridge import install_cpu_bridge_if_asked\n"
        "install_cpu_bridge_if_asked(); print('vllm' in sys.modules)"
    )
    for value, installed in (("0", "False"), ("1", "True")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, CPU_BRIDGE_ENV: value},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == installed, done.stderr


def test_importing_the_package_imports_no_sglang() -> None:
    """So that a wrong SGLang version can be reported instead of failing on import."""
    code = "import sys, sglang_sparsespec.plugin; print([m for m in sys.modules if m.startswith('sglang.')])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.stdout.strip() == "[]", done.stderr
