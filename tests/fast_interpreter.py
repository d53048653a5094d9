"""Triton's interpreter without the work that it repeats, and with its random bits from numpy.

It replaces the functions of ``triton.language`` at every call of a device function, ``tl.sum`` among them, which takes far
longer than the call itself. Only the end of the launch puts them back, so once per launch and module is enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.language import random
from triton.runtime import interpreter

#: Triton's own, of some hundred operations on tensors.
PHILOX = random.philox_impl
_patch_lang, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
_patched_for: set[str] = set()


def _patch_once(fn: Any) -> Any:
    if fn.__module__ in _patched_for:
        return interpreter._LangPatchScope()
    _patched_for.add(fn.__module__)
    return _patch_lang(fn)


def _launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
    _patched_for.clear()
    return _launch(self, *args, **kwargs)


def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any, n_rounds: Any) -> tuple[Any, ...]:
    """The bits that ``PHILOX`` gives."""
    if c0.dtype != tl.uint32:
        return PHILOX(c0, c1, c2, c3, k0, k1, n_rounds)
    given = (np.asarray(each.handle.data, dtype=np.uint64) for each in (c0, c1, c2, c3, k0, k1))
    kind, (a, b, c, d, low, high), mask = c0.type, given, np.uint64(0xFFFFFFFF)
    for _ in range(int(getattr(n_rounds, "value", n_rounds))):
        first, third = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (third >> np.uint64(32)) ^ b ^ low, third & mask, (first >> np.uint64(32)) ^ d ^ high, first & mask
        low, high = (low + np.uint64(0x9E3779B9)) & mask, (high + np.uint64(0xBB67AE85)) & mask
    return tuple(tl.tensor(interpreter.TensorHandle(x.astype(np.uint32), tl.uint32), kind) for x in (a, b, c, d))


def install() -> None:
    """Let kernels of this process, which has Triton's interpreter, run so; may be repeated."""
    interpreter._patch_lang = _patch_once
    interpreter.GridExecutor.__call__ = _launch_anew
    random.philox_impl = philox
