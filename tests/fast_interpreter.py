"""Triton's interpreter without the work that it repeats, and with its random bits from numpy.

It replaces the functions of ``triton.language`` at every call of a device function, ``tl.sum`` among them, which takes far
longer than the call itself. Only the end of the launch puts them back, so once per launch and module is enough. Types of
blocks are made anew for each result, although kernels have few; and each sum of integers is checked for an overflow that is
reported under ``debug`` alone.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core, random
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

#: Triton's own, of some hundred operations on tensors.
PHILOX = random.philox_impl
_patch_lang, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
_patched_for: set[str] = set()
_get_np_dtype = interpreter._get_np_dtype
_np_dtypes: dict[str, np.dtype] = {}
_broadcast = TritonSemantic.broadcast_impl_value
_check_overflow = TritonSemantic.binary_op_sanitize_overflow_impl


def _patch_once(fn: Any) -> Any:
    if fn.__module__ in _patched_for:
        return interpreter._LangPatchScope()
    _patched_for.add(fn.__module__)
    return _patch_lang(fn)


def _launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
    _patched_for.clear()
    return _launch(self, *args, **kwargs)


def _np_dtype(kind: Any) -> np.dtype:
    if kind.name not in _np_dtypes:
        _np_dtypes[kind.name] = _get_np_dtype(kind)
    return _np_dtypes[kind.name]


@functools.cache
def _block_shape(shape: tuple[int, ...]) -> tuple[Any, int, str]:
    """What a block's type has of its shape: the shape, the number of elements and the shape's text."""
    if not shape:
        raise TypeError("0d block_type is forbidden")
    values = core.tuple(shape)
    return values, core.validate_block_shape(values), str(values)


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    self.element_ty = element_ty
    self.shape, self.numel, text = _block_shape((*core._unwrap_shape(shape),))
    self.name = f"<{text}, {element_ty}>"


@functools.cache
def _tensor_shape(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """What a tensor has of its shape: the number of elements and the shape."""
    return core.constexpr(int(np.prod(shape, dtype=int))), core.tuple([core.constexpr(size) for size in shape])


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _tensor_shape((*type.shape,) if type.is_block() else ())


def _broadcast_others(self: Any, lhs: Any, rhs: Any) -> Any:
    shapes = [(*each.type.shape,) if each.type.is_block() else () for each in (lhs, rhs)]
    return (lhs, rhs) if shapes[0] == shapes[1] else _broadcast(self, lhs, rhs)


def _check_overflow_if_reported(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
    if self.builder.options.debug:
        _check_overflow(self, lhs, rhs, binary_op)


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
    interpreter._get_np_dtype = _np_dtype
    random.philox_impl = philox
    core.block_type.__init__ = _init_block_type
    core.tensor.__init__ = _init_tensor
    TritonSemantic.broadcast_impl_value = _broadcast_others
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow_if_reported
