"""Compiled tasks: what is emitted for a task becomes machine code once, and is kept for later processes.

A task is a function of int64 numbers, void task(int64 *data). Several threads call it with the same numbers and take
parts of the work until none are left (see threads.py). The first numbers mean the same in all tasks.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import platformdirs
from llvmlite import ir

from qconv.backends.lanes import Lanes, Value
from qconv.backends.threads import MEMORY, ROOM

# Parts taken, parts there are; threads that came (MEMORY and ROOM, bytes for each and a multiple of 64: threads.py).
TAKEN, PARTS, CAME = 0, 1, 2
OWN = 5  # where a task's own numbers start

_WHOLE = ir.IntType(64)
_LOCK = threading.Lock()


class Data:
    """A task's numbers, and what they point to, while its code is emitted.

    Args:
        lanes: Where the code goes.
        pointer: To the numbers.
    """

    def __init__(self, lanes: Lanes, pointer: Value) -> None:
        self._lanes, self.pointer = lanes, pointer

    def __getitem__(self, field: int) -> Value:
        return self._lanes.fixed(self.pointer, field)

    def floats(self, field: int) -> Value:
        """Pointer to floats."""
        return self._lanes.builder.inttoptr(self[field], self._lanes.scalar.as_pointer())

    def doubles(self, field: int) -> Value:
        """Pointer to float64."""
        return self._lanes.builder.inttoptr(self[field], ir.DoubleType().as_pointer())

    def wholes(self, field: int) -> Value:
        """Pointer to int64."""
        return self._lanes.builder.inttoptr(self[field], _WHOLE.as_pointer())

    def table(self, field: int, row: Value, columns: int) -> list[Value]:
        """A row of a table of int64 that nothing changes."""
        lanes, pointer = self._lanes, self.wholes(field)
        return [lanes.fixed(pointer, lanes.plus(lanes.times(row, columns), k)) for k in range(columns)]

    def memory(self) -> Value:
        """Pointer to this thread's ROOM bytes, at the start of a cache line; to be asked for once."""
        b = self._lanes.builder
        return b.inttoptr(b.add(self[MEMORY], b.mul(self._count(CAME), self[ROOM])), self._lanes.scalar.as_pointer())

    @contextmanager
    def parts(self) -> Iterator[Value]:
        """Repeat what is emitted inside for every part that this thread takes."""
        b = self._lanes.builder
        head, body, end = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        part = self._count(TAKEN)
        b.cbranch(b.icmp_signed("<", part, self[PARTS]), body, end)
        b.position_at_end(body)
        yield part
        b.branch(head)
        b.position_at_end(end)

    def _count(self, field: int) -> Value:
        """A number that is one higher for the next who asks."""
        b = self._lanes.builder
        place = b.gep(self.pointer, [self._lanes.index(field)], source_etype=_WHOLE)
        return b.atomic_rmw("add", place, self._lanes.index(1), "monotonic")


@dataclass(frozen=True)
class Task:
    """Compiled code.

    Args:
        address: Of void task(int64 *data).
    """

    address: int


@dataclass(frozen=True)
class Machine:
    """What code is compiled for, and where compiled code lies in this process."""

    target: Any
    engine: Any
    key: bytes


@cache
def machine() -> Machine:
    """This one.

    Raises:
        RuntimeError: LLVM cannot compile for it.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple, cpu, features = llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    # Constants by their addresses: LLVM's loader misplaces them where they are relative on x86.
    reloc = "static" if triple.startswith("x86_64") else "default"
    target = llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=2, reloc=reloc, codemodel="jitdefault", jit=True
    )
    module = llvm.parse_assembly("")
    module.triple = triple
    # Code is kept for the sources that emit it and the machine that it is for.
    sources = zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    key = f"{sources} {llvmlite.__version__} {triple} {cpu} {features}"
    return Machine(target, llvm.create_mcjit_compiler(module, target), key.encode())


def task(emit: Callable[[Lanes, Data], None], name: str, bits: int) -> Task:
    """Compiled code for a task, from this process, from a file or made now.

    Args:
        emit: Emits its code.
        name: Tells it from all other tasks: the same name always means the same code.
        bits: 32 or 64, of its floats.
    """
    with _LOCK:
        here = machine()
        symbol = f"qconv_{name}_{bits}"
        address = here.engine.get_function_address(symbol)
        if not address:
            path = _folder() / f"{symbol}-{hashlib.sha256(here.key).hexdigest()[:16]}"
            code = _read(path)
            if code is None:
                code = _compiled(here, emit, symbol, bits)
                _write(path, code)
            here.engine.add_object_file(llvm.ObjectFileRef.from_data(code))
            here.engine.finalize_object()
            address = here.engine.get_function_address(symbol)
        return Task(address)


def _compiled(machine: Machine, emit: Callable[[Lanes, Data], None], symbol: str, bits: int) -> bytes:
    """Machine code, as the bytes of an object file."""
    module = ir.Module(symbol)
    module.triple, module.data_layout = machine.target.triple, str(machine.target.target_data)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_WHOLE.as_pointer()]), symbol)
    builder = ir.IRBuilder(function.append_basic_block())
    lanes = Lanes(builder, bits)
    emit(lanes, Data(lanes, function.args[0]))
    builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    # Vectors are written down already: what LLVM's vectorizers would look for costs time and finds nothing.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False
    passes = llvm.create_pass_builder(machine.target, options)
    passes.getModulePassManager().run(parsed, passes)
    code: bytes = machine.target.emit_object(parsed)
    return code


def _folder() -> Path:
    """Where compiled code is kept: QCONV_CACHE, or the user's folder for such files."""
    chosen = os.environ.get("QCONV_CACHE")
    return (Path(chosen) if chosen else platformdirs.user_cache_path("qconv")) / "loops"


def _read(path: Path) -> bytes | None:
    """What _write left there, or None if there is nothing or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == checksum else None


def _write(path: Path, code: bytes) -> None:
    """Keep code with its checksum. Where that cannot be done, it is compiled anew in each process."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        Path(file.name).replace(path)
