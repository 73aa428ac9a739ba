"""What compiled loops share: numba's settings, and how a task reads its data (see threads.py)."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.extending import intrinsic

# Contraction to fused multiply-add and reordered sums are allowed; NaN and infinity keep their meaning.
_OPTIONS: dict[str, Any] = {"cache": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}
_POINTER: Any = types.CPointer

# numba keeps compiled code as long as the file of a task stays as it is. What is compiled into it from other files is
# told by this number: a task mentions it, and what a task mentions is part of the key.
SOURCES = zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))

_NUMBA: Any = numba
carray: Any = _NUMBA.carray


def loop(function: Callable[..., Any]) -> Any:
    """A function for tasks to call."""
    # Not kept on its own: it is part of the tasks that call it, and changes of other files would not be noticed.
    return _NUMBA.njit(**{**_OPTIONS, "cache": False})(function)


def task(function: Callable[[Any], None]) -> Any:
    """A task: a compiled function of the address of int64 numbers, without the interpreter's lock."""
    signature = types.void(_POINTER(types.int64))
    try:
        return _NUMBA.cfunc(signature, **_OPTIONS)(function)
    except RuntimeError:
        # No folder to keep compiled code in: it is compiled anew in each process.
        return _NUMBA.cfunc(signature, **{**_OPTIONS, "cache": False})(function)


@loop
def task_data(address: Any, length: int, sources: int) -> Any:
    """A task's int64 data, as an array; sources is SOURCES."""
    return carray(address, (length,))


def _at(typingctx: Any, address: Any, bits: Any) -> Any:
    kind = {32: types.float32, 64: types.float64, 0: types.int64}[bits.literal_value]

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return _POINTER(kind)(address, bits), code


def _take(typingctx: Any, counter: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.atomic_rmw("add", values[0], context.get_constant(types.int64, 1), "monotonic")

    return types.int64(counter), code


# at(address, bits): the pointer at an address, to float32 (32), float64 (64) or int64 (0).
at: Any = intrinsic(prefer_literal=True)(_at)
# take(data): the next part that no thread took yet, an atomic increment of data[0].
take: Any = intrinsic(_take)
