"""KV slots that SGLang reserves for the next rounds of a request.

W = k + 1 is the verify window, C the committed length that the CPU knows.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache import allocation_sizing
from sglang.srt.runtime_context import get_server_args

from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import is_sparsespec, settings_of


def reserve_for_staggered_rounds(result: int, server_args: Any = None, *args: Any, **kwargs: Any) -> int | None:
    """``allocation_sizing.get_alloc_reserve_per_decode``: SGLang reserves 2W slots per request.

    They are counted from C, which under overlap scheduling lacks the tokens of the round in flight,
    at most W: on the device the length is L <= C + W. A lock-step round writes the window [L, L + W),
    so 2W are enough. A staggered round drafts on after its verification: from L' <= L + W it writes
    up to k drafts' inputs, [L', L' + k). The last position is C + 2W + k - 1 = C + 3W - 2: 3W slots
    cover it.
    """
    server_args = server_args if server_args is not None else get_server_args()
    if not is_sparsespec(server_args) or settings_of(server_args).schedule != "unified":
        return None  # None keeps the original result
    return result // 2 * 3


def row_room_for_reserve(result: int, server_args: Any = None, *args: Any, **kwargs: Any) -> int | None:
    """``allocation_sizing.get_req_to_token_extra_context_len``: SGLang widens rows by W + 4 tokens.

    A decoding request is given slots for up to 2W tokens past its committed ones (3W in staggered
    rounds, see above). At page size 1 SGLang does not count that in; with W above 4, a request near
    the context limit would write its slots into the row of another.
    """
    if not is_sparsespec(server_args if server_args is not None else get_server_args()):
        return None  # None keeps the original result
    # SGLang passes its arguments to both functions, or to none.
    given = () if server_args is None else (server_args,)
    return max(result, allocation_sizing.get_alloc_reserve_per_decode(*given))


def register_hooks() -> None:
    """Register the hooks of this module."""
    module = "sglang.srt.mem_cache.allocation_sizing."
    add_hook(module + "get_alloc_reserve_per_decode", reserve_for_staggered_rounds, "after")
    add_hook(module + "get_req_to_token_extra_context_len", row_room_for_reserve, "after")
