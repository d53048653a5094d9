"""SPARSESPEC's part of ``/server_info`` and ``/set_internal_state``.

``speculate`` can be set while the server runs::

    curl -X POST http://127.0.0.1:30000/set_internal_state -H 'Content-Type: application/json' \
        -d '{"server_args": {"sparsespec_speculate": "never"}}'

SGLang answers with one boolean for each data-parallel replica: ``[true]`` when the value is in force, from the next round
on, and ``[false]`` when it was refused; then nothing is changed and the server's log says why. A value that is none of
always, auto and never is answered with HTTP 400.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import msgspec
from pydantic_core import CoreSchema, core_schema
from sglang.srt.managers.io_struct import SetInternalStateReqOutput

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.scheduler_patch.kv_manager.hooks import manager_of
from sglang_sparsespec.scheduler_patch.metrics_hooks import worker_of
from sglang_sparsespec.settings import SPECULATE, check_speculate, settings_of

logger = logging.getLogger(__name__)

#: Name of the setting in requests and answers.
SPECULATE_KEY = "sparsespec_speculate"


def add_internal_state(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """``Scheduler.get_internal_state``: SGLang's answer to ``/server_info``."""
    worker = worker_of(scheduler)
    if worker is None:
        return
    worker.metrics.refresh(wait=True)
    state = result.internal_state
    state.update(worker.metrics.as_dict())
    state[SPECULATE_KEY] = worker.planner.speculate
    state["sparsespec_acceptance_rates"] = [round(rate, 3) for rate in worker.planner.acceptance_rates]
    state["sparsespec_time_corrections"] = {
        requests: [round(factor, 3) for factor in factors]
        for requests, factors in worker.planner.time_corrections.items()
    }
    late = worker.planner.late_choice
    state["sparsespec_arrival_waits"], state["sparsespec_arrival_waits_too_long"] = late.waits, late.waits_too_long
    state["sparsespec_least_budget"] = worker.planner.budget.least
    # After a flush of the radix cache of an idle server, free must equal total again.
    allocator = scheduler.token_to_kv_pool_allocator
    # Where windows have a pool of their own, the size is that of the other one.
    available = getattr(allocator, "full_available_size", allocator.available_size)
    state["kv_tokens_free"] = available()
    state["kv_tokens_total"] = scheduler.max_total_num_tokens
    manager = manager_of(scheduler)
    if manager is not None:
        state.update(manager.metrics.as_dict(manager.utilisation))
        state["host_kv_tokens_free"] = manager.tier.host_pool.available_size()
        state["host_kv_tokens_total"] = manager.tier.host_pool.logical_size


def number_speculate(body: Any) -> Any:
    """The body of ``/set_internal_state`` with the name under :data:`SPECULATE_KEY` as its index in ``SPECULATE``.

    Raises:
        ValueError: it is not a name of ``SPECULATE``; SGLang answers with HTTP 400 and the message.
    """
    if not isinstance(body, dict):
        return body
    server_args = body.get("server_args")
    if not isinstance(server_args, dict) or SPECULATE_KEY not in server_args:
        return body
    name = server_args[SPECULATE_KEY]
    if name not in SPECULATE:
        raise ValueError(f"{SPECULATE_KEY} must be one of {', '.join(SPECULATE)}, got {name!r}.")
    return {**body, "server_args": {**server_args, SPECULATE_KEY: SPECULATE.index(name)}}


def schema_with_names(original: Callable[..., CoreSchema], *args: Any, **kwargs: Any) -> CoreSchema:
    """``SetInternalStateReq.__get_pydantic_core_schema__``: SGLang takes numbers only, over HTTP and between processes.

    Over HTTP our setting has a name, which is made a number before SGLang looks at the body.
    """
    return core_schema.no_info_before_validator_function(number_speculate, original(*args, **kwargs))


def set_speculate(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    """``Scheduler.set_internal_state``: SGLang refuses keys that it does not know.

    Every tensor-parallel rank is given the request before the same round, so all of them switch together. Our setting
    is changed only if SGLang takes the rest of the request.
    """
    worker = worker_of(scheduler)
    if worker is None or SPECULATE_KEY not in recv_req.server_args:
        return original(scheduler, recv_req)
    rest = dict(recv_req.server_args)
    number = rest.pop(SPECULATE_KEY)
    try:
        speculate = _name_of(number)
        check_speculate(dataclasses.replace(settings_of(scheduler.server_args), speculate=speculate))
    except ValueError as error:
        logger.warning("%s", error)
        return SetInternalStateReqOutput(updated=False)
    result = original(scheduler, msgspec.structs.replace(recv_req, server_args=rest))
    if result.updated:
        worker.planner.set_speculate(speculate)
        logger.info("%s is %s from the next round on.", SPECULATE_KEY, speculate)
    return result


def _name_of(number: Any) -> str:
    """The inverse of :func:`number_speculate`; other clients than SGLang's HTTP server may send any number."""
    if number not in range(len(SPECULATE)):
        numbers = ", ".join(f"{index} for {name}" for index, name in enumerate(SPECULATE))
        raise ValueError(f"{SPECULATE_KEY} must be one of {numbers}; got {number!r}.")
    return SPECULATE[int(number)]


def register_hooks() -> None:
    """Register the hooks of this module."""
    scheduler = "sglang.srt.managers.scheduler.Scheduler."
    add_hook(scheduler + "get_internal_state", add_internal_state, "after")
    add_hook(scheduler + "set_internal_state", set_speculate, "around")
    add_hook(
        "sglang.srt.managers.io_struct.SetInternalStateReq.__get_pydantic_core_schema__", schema_with_names, "around"
    )
