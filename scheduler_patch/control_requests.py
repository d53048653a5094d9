"""Requests that change or ask the scheduler itself: one that fails is answered, and does not end the server."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
from sglang.srt.managers import io_struct

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import is_sparsespec

logger = logging.getLogger(__name__)


def failure_of(request_type: type, message: str) -> Any:
    """SGLang's answer that says that a request of ``request_type`` has failed; None if it has no such answer."""
    output = getattr(io_struct, request_type.__name__.removesuffix("Input") + "Output", None)
    if output is None:
        return None
    fields = {field.name: field for field in msgspec.structs.fields(output)}
    if "success" not in fields:
        return None
    values: dict[str, Any] = {name: None for name, field in fields.items() if field.required}
    values |= {name: message for name in ("message", "error_message") if name in fields}
    return output(**{**values, "success": False})


def answer_failures(result: None, scheduler: Any) -> None:
    """``Scheduler.init_request_dispatcher``: SGLang ends the scheduler at any error in a request of this kind.

    An example is ``/update_weights_from_tensor`` with a text that is no tensor. The routes answer with HTTP 400 and the
    message where a request has failed.
    """
    if not is_sparsespec(scheduler.server_args):
        return
    handlers = scheduler._request_dispatcher._mapping

    def guarded(request_type: type, handler: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def handle(request: Any) -> Any:
            try:
                return handler(request)
            except Exception as error:
                logger.exception("%s has failed.", request_type.__name__)
                return failure_of(request_type, f"{type(error).__name__}: {error}")

        return handle

    for request_type, handler in handlers.items():
        if failure_of(request_type, "") is not None:
            handlers[request_type] = guarded(request_type, handler)


def register_hooks() -> None:
    """Register the hook of this module."""
    add_hook("sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher", answer_failures, "after")
