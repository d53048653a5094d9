"""``/server_info`` and ``/set_internal_state``: what is shown, and ``sparsespec_speculate`` without a restart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Body, FastAPI
from fastapi.testclient import TestClient
from sglang.srt.managers.io_struct import (
    SetInternalStateReq,
    SetInternalStateReqOutput,
    msgpack_decode,
    msgpack_encode,
)

from sglang_sparsespec.scheduler_patch import internal_state, metrics_hooks
from sglang_sparsespec.scheduler_patch.internal_state import (
    SPECULATE_KEY,
    add_internal_state,
    number_speculate,
    set_speculate,
)
from sglang_sparsespec.settings import SPECULATE, Settings


class Worker:
    """Stands in for ``SparseSpecWorker``."""

    def __init__(self) -> None:
        self.planner = SimpleNamespace(
            speculate="auto",
            set_speculate=self.set_speculate,
            acceptance_rates=[0.91234, 2 / 3],
            time_corrections={"4-7": [1.05432, 0.999]},
            late_choice=SimpleNamespace(waits=9, waits_too_long=2),
            budget=SimpleNamespace(least=256),
        )
        self.metrics = SimpleNamespace(refresh=lambda wait: None, as_dict=lambda: {"sparsespec_accept_length": 3.5})

    def set_speculate(self, value: str) -> None:
        self.planner.speculate = value


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(metrics_hooks, "SparseSpecWorker", Worker)
    return Worker()


# ------------------------------------------------------------------------------ showing


def scheduler_of(worker: Any, policy: str = "pillar") -> SimpleNamespace:
    settings = Settings(draft_policy=policy)
    return SimpleNamespace(
        draft_worker=worker,
        server_args=SimpleNamespace(speculative_algorithm="SPARSESPEC", _sparsespec_settings=settings),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 90),
        max_total_num_tokens=100,
    )


def test_metrics_setting_and_pool_are_shown(worker: Worker) -> None:
    result = SimpleNamespace(internal_state={"last_gen_throughput": 1.0})
    worker.planner.speculate = "never"
    add_internal_state(result, scheduler_of(worker))
    assert result.internal_state == {
        "last_gen_throughput": 1.0,
        "sparsespec_accept_length": 3.5,
        "sparsespec_speculate": "never",
        "sparsespec_acceptance_rates": [0.912, 0.667],
        "sparsespec_time_corrections": {"4-7": [1.054, 0.999]},
        "sparsespec_arrival_waits": 9,
        "sparsespec_arrival_waits_too_long": 2,
        "sparsespec_least_budget": 256,
        "kv_tokens_free": 90,
        "kv_tokens_total": 100,
    }


def test_the_host_tier_is_shown(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = SimpleNamespace(
        metrics=SimpleNamespace(as_dict=lambda utilisation: {"sparsespec_kv_utilisation": utilisation}),
        utilisation=0.1,
        tier=SimpleNamespace(host_pool=SimpleNamespace(available_size=lambda: 7, logical_size=8)),
    )
    monkeypatch.setattr(internal_state, "manager_of", lambda scheduler: manager)
    result = SimpleNamespace(internal_state={})
    add_internal_state(result, scheduler_of(worker))
    shown = {name: result.internal_state[name] for name in ("sparsespec_kv_utilisation", "host_kv_tokens_free")}
    assert shown == {"sparsespec_kv_utilisation": 0.1, "host_kv_tokens_free": 7}
    assert result.internal_state["host_kv_tokens_total"] == 8


@pytest.mark.parametrize("other", [None, SimpleNamespace()])
def test_nothing_is_shown_for_other_algorithms(other: Any) -> None:
    result = SimpleNamespace(internal_state={})
    add_internal_state(result, SimpleNamespace(draft_worker=other))
    assert result.internal_state == {}


# ----------------------------------------------------------------- setting, in the scheduler


class SGLang:
    """Stands in for ``Scheduler.set_internal_state``: takes what SGLang takes, and records it."""

    def __init__(self, accepts: bool = True) -> None:
        self.accepts = accepts
        self.asked: list[dict[str, Any]] = []

    def __call__(self, scheduler: Any, recv_req: SetInternalStateReq) -> SetInternalStateReqOutput:
        self.asked.append(recv_req.server_args)
        return SetInternalStateReqOutput(updated=self.accepts)


def request(**server_args: Any) -> SetInternalStateReq:
    """As it reaches the scheduler."""
    return SetInternalStateReq(**number_speculate({"server_args": server_args}))


@pytest.mark.parametrize("value", SPECULATE)
def test_the_planner_takes_the_value(worker: Worker, value: str) -> None:
    original = SGLang()
    req = request(sparsespec_speculate=value)
    assert set_speculate(original, scheduler_of(worker), req).updated
    assert worker.planner.speculate == value
    assert original.asked == [{}] and SPECULATE_KEY in req.server_args, "SGLang's request is as it was"


def test_the_rest_of_a_request_is_sglangs(worker: Worker) -> None:
    original = SGLang()
    req = request(sparsespec_speculate="never", pp_max_micro_batch_size=8)
    assert set_speculate(original, scheduler_of(worker), req).updated
    assert original.asked == [{"pp_max_micro_batch_size": 8}] and worker.planner.speculate == "never"


def test_a_request_that_sglang_refuses_changes_nothing(worker: Worker) -> None:
    answer = set_speculate(SGLang(accepts=False), scheduler_of(worker), request(sparsespec_speculate="never", unknown=1))
    assert not answer.updated and worker.planner.speculate == "auto"


@pytest.mark.parametrize("number", [-1, 3, 0.5, float("nan")])
def test_an_unknown_number_is_refused_and_the_scheduler_lives(
    worker: Worker, number: float, caplog: pytest.LogCaptureFixture
) -> None:
    original = SGLang()
    answer = set_speculate(original, scheduler_of(worker), SetInternalStateReq(server_args={SPECULATE_KEY: number}))
    assert not answer.updated and original.asked == [] and worker.planner.speculate == "auto"
    assert "sparsespec_speculate must be one of 0 for always, 1 for auto, 2 for never" in caplog.text


@pytest.mark.parametrize(("value", "accepted"), [("auto", False), ("never", False), ("always", True)])
def test_policies_for_study_speculate_always(
    worker: Worker, value: str, accepted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    worker.planner.speculate = "always"
    answer = set_speculate(SGLang(), scheduler_of(worker, "full"), request(sparsespec_speculate=value))
    assert answer.updated == accepted and worker.planner.speculate == "always"
    assert accepted or f"--sparsespec-speculate {value} together with --sparsespec-draft-policy full" in caplog.text


@pytest.mark.parametrize("other", [None, SimpleNamespace()])
def test_other_algorithms_requests_are_sglangs(other: Any) -> None:
    original, req = SGLang(accepts=False), request(sparsespec_speculate="never")
    assert not set_speculate(original, SimpleNamespace(draft_worker=other), req).updated
    assert original.asked == [req.server_args]


def test_a_request_without_the_setting_is_sglangs(worker: Worker) -> None:
    original = SGLang()
    set_speculate(original, scheduler_of(worker), request(pp_max_micro_batch_size=8))
    assert original.asked == [{"pp_max_micro_batch_size": 8}] and worker.planner.speculate == "auto"


# ------------------------------------------------------------------------ setting, over HTTP


@pytest.fixture
def client(plugin: None) -> TestClient:
    """A server with SGLang's request type, as its route declares it; it answers with what the scheduler receives."""
    app = FastAPI()

    def route(obj=Body()):  # type: ignore[no-untyped-def]  # noqa: B008
        return msgpack_decode(msgpack_encode(obj)).server_args

    route.__annotations__ = {"obj": SetInternalStateReq}
    app.post("/set_internal_state")(route)
    return TestClient(app)


def post(client: TestClient, **server_args: Any) -> Any:
    return client.post("/set_internal_state", json={"server_args": server_args})


@pytest.mark.parametrize("value", SPECULATE)
def test_names_arrive_as_numbers(client: TestClient, value: str) -> None:
    answer = post(client, sparsespec_speculate=value, pp_max_micro_batch_size=8)
    assert answer.status_code == 200
    assert answer.json() == {"sparsespec_speculate": SPECULATE.index(value), "pp_max_micro_batch_size": 8}


@pytest.mark.parametrize("value", ["sometimes", "Auto", 1, None, ["auto"], {}])
def test_other_values_are_answered_with_what_is_allowed(client: TestClient, value: Any) -> None:
    answer = post(client, sparsespec_speculate=value)
    assert answer.status_code == 422  # SGLang answers with 400 instead: its handler is not part of this server
    assert f"sparsespec_speculate must be one of always, auto, never, got {value!r}" in answer.text


def test_requests_without_the_setting_are_checked_as_before(client: TestClient) -> None:
    assert post(client, pp_max_micro_batch_size=8).json() == {"pp_max_micro_batch_size": 8}
    assert post(client, pp_max_micro_batch_size="many").status_code == 422
    assert client.post("/set_internal_state", json={}).status_code == 422
    assert client.post("/set_internal_state", json=[1]).status_code == 422
    assert client.post("/set_internal_state", json={"server_args": 1}).status_code == 422


#: Asks SGLang's own app, whose tokenizer manager answers with what it is given.
OWN_ROUTE = """
import sys
from types import SimpleNamespace
from sglang.srt.plugins import load_plugins
load_plugins()
assert "sglang.srt.entrypoints.http_server" not in sys.modules
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server

async def answer(obj):
    return obj.server_args

http_server.set_global_state(SimpleNamespace(tokenizer_manager=SimpleNamespace(set_internal_state=answer)))
client = TestClient(http_server.app)
for name in ("never", "sometimes"):
    answered = client.post("/set_internal_state", json={"server_args": {"sparsespec_speculate": name}})
    print("ANSWER", answered.status_code, answered.text)
"""


def test_sglangs_own_route_has_the_names() -> None:
    """The hook is in force before SGLang declares the route: ``sglang.launch_server`` loads plugins first."""
    done = subprocess.run([sys.executable, "-c", OWN_ROUTE], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    taken, refused = [line.split(maxsplit=2)[1:] for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert taken == ["200", '{"sparsespec_speculate":2}']
    assert refused[0] == "400" and "must be one of always, auto, never, got 'sometimes'" in refused[1]
