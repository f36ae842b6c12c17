"""Makes Triton's CPU interpreter compute bf16, and products of matrices, as a GPU does (Triton 3.6 to 3.9).

The interpreter keeps bf16 as uint16 bit patterns and lets numpy do arithmetic on them. Here operands are widened to
fp32 and results rounded to the nearest even. Call ``install`` once, after TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import TensorHandle


def _is_bf16(dtype: Any) -> bool:
    return dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    if not _is_bf16(handle.dtype):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(values: Any) -> Any:
    """fp32 to bf16 bits, nearest even; every NaN becomes the one quiet NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def install() -> None:
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "pearl_bf16", False):
        return
    plain_binary = builder.binary_op
    plain_cast, plain_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> TensorHandle:
        # In which order numpy's BLAS adds depends on a row's place in the matrix; a GPU treats all rows alike.
        left, right = (_widen(handle).data.astype(d.data.dtype) for handle in (a, b))
        return TensorHandle(np.einsum("...mk,...kn->...mn", left, right) + d.data, d.dtype.scalar)

    def binary_op(self: Any, left: TensorHandle, right: TensorHandle, op: Any) -> TensorHandle:
        if not _is_bf16(left.dtype):
            return plain_binary(self, left, right, op)
        result = op(_widen(left).data, _widen(right).data)
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return TensorHandle(_round(result), tl.bfloat16)

    def cast(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        before, after = source.dtype.scalar, target.scalar
        if before != after and after == tl.bfloat16:
            return TensorHandle(_round(source.data.astype(np.float32)), after)
        if before != after and before == tl.bfloat16:
            return TensorHandle(_widen(source).data.astype(interpreter._get_np_dtype(target)), after)
        return plain_cast(self, source, target)

    def fp_to_fp(self: Any, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
        kinds = (source.dtype.scalar, target.scalar)
        if tl.bfloat16 in kinds and all(kind.primitive_bitwidth != 8 for kind in kinds):
            return cast(self, source, target)
        return plain_fp_to_fp(self, source, target, rounding)

    builder.create_dot, builder.binary_op = create_dot, binary_op
    builder.cast_impl, builder.create_fp_to_fp = cast, fp_to_fp
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: TensorHandle(_round(np.array([value], np.float32)), tl.bfloat16)
    _let_loops_have_computed_bounds()
    _scan_modules_once()
    builder.pearl_bf16 = True


def _let_loops_have_computed_bounds() -> None:
    """They are arrays of one element, which Triton 3.6 cannot convert since numpy 2.4."""
    plain_patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor


def _scan_modules_once() -> None:
    """Each call of a device function looks through Triton's modules for what is left to patch: mostly nothing."""
    plain_patch = interpreter._patch_builtin
    names: dict[Any, list[str]] = {}

    def patch_builtin(package: Any, *rest: Any) -> None:
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        if names[package] and tl.core.is_builtin(getattr(package, names[package][0])):
            plain_patch(package, *rest)

    interpreter._patch_builtin = patch_builtin
