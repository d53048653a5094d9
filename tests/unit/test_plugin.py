"""Loading: found by SGLang, loud where it fails, and without effect where it is not asked for."""

from __future__ import annotations

import importlib.metadata
import json
import os
import runpy
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from preloaded import start_program
from sglang_parts import resolved

from sglang_sparsespec import ALGORITHM, ATTENTION_BACKEND, hook_registry, sglang_compat
from sglang_sparsespec import plugin as plugin_module
from sglang_sparsespec.plugin import PluginUnavailableError
from sglang_sparsespec.sglang_compat import SUPPORTED, VERSION

OTHER_VERSION = "0.5.22"
SENTENCE = (
    f"sglang-sparsespec needs sglang {SUPPORTED[0]} or {SUPPORTED[1]}, but sglang {OTHER_VERSION} is installed; run `pip "
    f"install sglang=={SUPPORTED[-1]}`, or install the release of sglang-sparsespec that is made for {OTHER_VERSION}."
)
#: In a program: a function that resolves ``ServerArgs`` where that does not happen as they are made.
RESOLVE = """
def resolved(args):
    if hasattr(args, "resolve_once"):
        args.resolve_once()
    return args
"""

#: Engine and ServerArgs under a wrong SGLang version; prints one JSON object.
WRONG_VERSION_IN_CODE = RESOLVE + """
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
    "server_args": lambda: resolved(ServerArgs(**asked)),
    "not_asked_for": lambda: resolved(ServerArgs(model_path=model, device="cpu")),
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
RESOLVED_ARGS = RESOLVE + """
import dataclasses, json, os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
prometheus = "prometheus_client" in sys.modules
from sglang.srt import server_args as sa
def values(args):
    fields = args.resolved_dict() if hasattr(args, "resolved_dict") else dataclasses.asdict(args)
    return json.loads(json.dumps(fields, default=str))
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
    found[name] = values(resolved(sa.ServerArgs(**common, **case)))
line = ["--model-path", sys.argv[1], "--device", "cpu", "--random-seed", "1", "--port", "31150"]
found["command line"] = values(resolved(sa.prepare_server_args(line)))
found["vllm"] = "vllm" in sys.modules
found["prometheus"] = prometheus
found["loaded"] = "sglang_sparsespec.worker" in sys.modules
found["environment"] = {k: v for k, v in os.environ.items() if "SPARSE" in k}
print("ANSWER " + json.dumps(found))
"""


class Child:
    """A process that is started now and waited for when its result is needed."""

    def __init__(self, folder: Path, *arguments: str, first_on_path: str = "", **env: str) -> None:
        folder.mkdir()
        self._out, self._err = folder / "out", folder / "err"
        path = os.pathsep.join(filter(None, [first_on_path, os.environ.get("PYTHONPATH")]))
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = start_program(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env},
            )

    def result(self) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        return self._process.wait(timeout=600), self._out.read_text(), self._err.read_text()

    def answer(self) -> dict[str, Any]:
        """The JSON object the process printed."""
        status, out, err = self.result()
        assert status == 0, err[-4000:]
        return json.loads(out[out.index("ANSWER ") + len("ANSWER ") :].splitlines()[0])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def wrong_version(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ``PYTHONPATH`` under which the installed SGLang says it is another version."""
    folder = tmp_path_factory.mktemp("wrong_version")
    info = folder / f"sglang-{OTHER_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {OTHER_VERSION}\n")
    return str(folder)


@pytest.fixture(scope="module")
def children(
    wrong_version: str, llama: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Child]]:
    """All child processes of this module, forked from one that has imported SGLang (preloaded.py)."""
    folder = tmp_path_factory.mktemp("children")
    for name, program in (("code", WRONG_VERSION_IN_CODE), ("resolve", RESOLVED_ARGS)):
        (folder / f"{name}.py").write_text(program)
    code, resolve = str(folder / "code.py"), str(folder / "resolve.py")
    serve = ["-m", "sglang.launch_server", "--model-path", llama, "--device", "cpu", "--port", "31152"]
    asked = [*serve, "--speculative-algorithm", "sparsespec"]
    started = {
        "command line": Child(folder / "a", *asked, first_on_path=wrong_version),
        "code": Child(folder / "b", code, llama, first_on_path=wrong_version),
        "with plugin": Child(folder / "c", resolve, llama, SGLANG_PLUGINS="sparsespec"),
        "without plugin": Child(folder / "d", resolve, llama, SGLANG_PLUGINS="another"),
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

    assert isinstance(SpeculativeAlgorithm.from_string(ALGORITHM), SparseSpecAlgorithm)
    assert ATTENTION_BACKEND in ATTENTION_BACKENDS and ATTENTION_BACKEND in ATTENTION_BACKEND_CHOICES
    hook_registry.assert_hooks_applied()


# ----------------------------------------------------------------------------- loud


def test_a_wrong_sglang_version_stops_a_server_that_asks_for_the_algorithm(
    children: dict[str, Child],
) -> None:
    status, _, err = children["command line"].result()
    assert status == 1
    assert err.strip().splitlines()[-1] == SENTENCE
    assert err.count("sglang-sparsespec") == SENTENCE.count("sglang-sparsespec"), "once, without a traceback"


@pytest.mark.parametrize("version", ["0.5.16", "0.5.18", "0.5.22", "0.5.24", "0.6.0", "0.5.23.post1", "unknown"])
def test_every_other_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    found = runpy.run_path(sglang_compat.__file__)
    assert found["VERSION"] == version and not found["IS_SUPPORTED"]
    monkeypatch.setattr(sglang_compat, "IS_SUPPORTED", found["IS_SUPPORTED"])
    monkeypatch.setattr(sglang_compat, "VERSION", version)
    with pytest.raises(PluginUnavailableError) as refused:
        plugin_module.check_environment()
    assert str(refused.value) == SENTENCE.replace(OTHER_VERSION, version)


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
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.speculative import spec_registry

    registry: dict[str, Any] = {}
    monkeypatch.setattr(Engine, "server_args_class", vars(Engine)["server_args_class"])
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


#: What the entry point calls, and where it finds it.
STEPS = {
    "register_algorithm": "sglang_sparsespec.algorithm",
    "register_attention_backend": "sglang_sparsespec.algorithm",
    "register_flags": "sglang_sparsespec.flags",
    "register_all_hooks": "sglang_sparsespec.scheduler_patch",
}


def register_and_fail(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the entry point with ``step`` failing, SPARSESPEC not on the command line."""
    for name, module in STEPS.items():
        # What succeeds must not be registered a second time in this process.
        if name != "register_algorithm":
            monkeypatch.setattr(f"{module}.{name}", lambda: None)
    monkeypatch.setattr(f"{STEPS[step]}.{step}", fail_with(RuntimeError("broken")))
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(RuntimeError, match="broken"):
        plugin_module.register()


@pytest.mark.parametrize("step", STEPS)
def test_a_plugin_that_failed_halfway_refuses_its_algorithm(
    step: str, scratch_registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch, llama: str
) -> None:
    from sglang.srt.server_args import ServerArgs

    register_and_fail(step, monkeypatch)
    assert list(scratch_registry) == [ALGORITHM]
    with pytest.raises(PluginUnavailableError, match="failed to load: RuntimeError: broken"):
        resolved(ServerArgs(model_path=llama, device="cpu", speculative_algorithm=ALGORITHM))


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

    target = "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup"
    assert target in HookRegistry._patched
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {target})
    return target


def test_a_hook_that_sglang_could_not_apply_is_only_logged_by_sglang(
    plugin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the plugin checks for itself."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(hook_registry, "_TARGETS", [])
    monkeypatch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list))
    missing = "sglang.srt.mem_cache.kv_cache_builder.a_function_that_was_renamed"
    hook_registry.add_hook(missing, lambda result: None, "after")
    HookRegistry.apply_hooks()
    with pytest.raises(RuntimeError, match=f"partly loaded.*{missing}.*reinstall sglang=={VERSION}"):
        hook_registry.assert_hooks_applied()


def test_half_applied_hooks_are_refused_at_start_up(half_applied: str, llama: str) -> None:
    from sglang.srt.server_args import ServerArgs

    with pytest.raises(RuntimeError, match=half_applied):
        resolved(ServerArgs(model_path=llama, device="cpu", speculative_algorithm=ALGORITHM))


def test_half_applied_hooks_are_refused_by_the_worker(half_applied: str) -> None:
    """In the scheduler process, which loads plugins anew."""
    from sglang_sparsespec.worker import SparseSpecWorker

    nothing: Any = None
    with pytest.raises(RuntimeError, match=half_applied):
        SparseSpecWorker(server_args=nothing, target_worker=nothing)


def test_no_hooks_at_all_are_refused(plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook_registry, "_TARGETS", [])
    with pytest.raises(RuntimeError, match="not applied: all"):
        hook_registry.assert_hooks_applied()


# --------------------------------------------------------------------- not asked for


def test_sglang_resolves_its_arguments_as_without_the_plugin(children: dict[str, Child]) -> None:
    with_plugin, without = children["with plugin"].answer(), children["without plugin"].answer()
    assert with_plugin.pop("loaded") and not without.pop("loaded")
    assert with_plugin.keys() == without.keys()
    for case in without:
        assert with_plugin[case] == without[case], case
    assert without["cpu"]["attention_backend"], "the cases must have been resolved"
    assert with_plugin["vllm"] is False and "SPARSESPEC_CPU_BRIDGE" not in with_plugin["environment"]


def test_the_scheduler_reports_no_metrics_of_the_plugin(plugin: None) -> None:
    from sglang_sparsespec.scheduler_patch import internal_state, metrics_hooks

    state: dict[str, Any] = {}
    for draft_worker in (None, SimpleNamespace()):
        scheduler = SimpleNamespace(draft_worker=draft_worker)
        internal_state.add_internal_state(SimpleNamespace(internal_state=state), scheduler)
        metrics_hooks.report_draft_metrics(None, SimpleNamespace(scheduler=scheduler))
    assert state == {}


def test_importing_the_package_imports_no_sglang() -> None:
    """So that a wrong SGLang version can be reported instead of failing on import."""
    code = "import sys, sglang_sparsespec.plugin; print([m for m in sys.modules if m.startswith('sglang.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.strip() == "[]", done.stderr


def test_loading_leaves_prometheus_to_sglang(children: dict[str, Child]) -> None:
    """SGLang makes a folder for the metrics of several processes, which ``prometheus_client`` reads as it is imported."""
    assert children["with plugin"].answer()["prometheus"] is False
