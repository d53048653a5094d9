"""A round is launched shortly before the one before it ends, not when it begins.

SGLang's overlap loop launches round n + 1 once the results of round n - 1 are processed, which is when round n begins on
the device. A request that arrives while n runs is seen when n + 1 has been launched: its prefill waits for the rest of
n and for all of n + 1, one and a half rounds on average. That is little where a round is one forward; here it is k + 1.
So the loop waits while n runs, until a few forwards are left of it (:mod:`sglang_sparsespec.round_progress`) or a
message arrives; then it goes on as ever. ``--sparsespec-late-launch`` asks for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from sglang_sparsespec import round_progress
from sglang_sparsespec.scheduler_patch.hooks import add_hook

#: Seconds between two looks, a small part of a forward.
INTERVAL = 0.0002
#: Seconds after which a call goes on in any case: a device that hangs must not keep control messages out.
LONGEST = 1.0


def _reads_sockets(receiver: Any) -> bool:
    """Whether the receiver's rank is one that messages arrive at; the others get them by a broadcast and wait in that."""
    ps = receiver.ps
    return ps.pp_rank == 0 and ps.attn_tp_rank == 0 and ps.attn_cp_rank == 0


def _sockets_to_ask(receiver: Any) -> list[Any]:
    """The sockets that messages arrive at; none if one of them cannot be asked (a ring buffer of SGLang's Rust server)."""
    sockets = [socket for socket in (receiver.recv_from_tokenizer, receiver.recv_from_rpc) if socket is not None]
    return sockets if all(hasattr(socket, "poll") for socket in sockets) else []


def _has_message(sockets: Sequence[Any]) -> bool:
    return any(socket.poll(0) for socket in sockets)


def wait_for_launch(progress: round_progress.RoundProgress, sockets: Sequence[Any]) -> None:
    """Wait until the next round is to be launched, or a message is pending on one of the ``sockets``."""
    moment = progress.take_moment()
    # Without overlap the round is over by now, and this is all that happens.
    if moment is None or moment.query() or _has_message(sockets):
        return
    deadline = time.monotonic() + LONGEST
    while True:
        time.sleep(INTERVAL)
        is_time = moment.query()
        if is_time or _has_message(sockets) or time.monotonic() > deadline:
            break
    progress.note_wait(is_time)


def receive_until_launch(original: Callable[..., Any], receiver: Any) -> Any:
    """``SchedulerRequestReceiver.recv_requests``: SGLang takes what has arrived, at the top of its loop."""
    progress = round_progress.current()
    if progress is not None and _reads_sockets(receiver):
        sockets = _sockets_to_ask(receiver)
        if sockets:
            wait_for_launch(progress, sockets)
    return original(receiver)


def register_late_launch_hooks() -> None:
    """Register the hook of this module."""
    add_hook(
        "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver.recv_requests",
        receive_until_launch,
        "around",
    )
