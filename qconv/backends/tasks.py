"""Compiled tasks: what is emitted for a task becomes machine code once, and is kept for later processes.

A task is a function of int64 numbers, void task(int64 *data). Several threads call it with the same numbers and take
parts of the work until none are left (see threads.py). The first numbers mean the same in all tasks.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from qconv.backends import kept_code
from qconv.backends.lanes import Lanes, Value
from qconv.backends.threads import CAME, MEMORY, ROOM, TAKEN

PARTS = 1  # how many there are
OWN = 5  # where a task's own numbers start

_WHOLE = ir.IntType(64)
_LOCK = threading.RLock()


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
    """What code is compiled for, and where compiled code lies in this process.

    Args:
        target: What LLVM compiles for.
        engine: Holds the code; never freed, as tasks are addresses in it.
        key: Tells machines, compilers and the sources of tasks apart; None if there are no sources to read.
    """

    target: Any
    engine: Any
    key: str | None


# A process that is forked while another thread compiles would wait for that thread, which it does not have.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


@cache
def _machine() -> Machine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # Where a process may not make code, this says so while there still is another way.
    llvm.check_jit_execution()
    triple, cpu = llvm.get_process_triple(), llvm.get_host_cpu_name()
    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # not known for this processor: its name must do
        features = ""
    # Constants by their addresses: LLVM's loader misplaces them where they are relative on x86.
    reloc = "static" if triple.startswith("x86_64") else "default"
    target = llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=2, reloc=reloc, codemodel="jitdefault", jit=True
    )
    module = llvm.parse_assembly("")
    module.triple = target.triple
    sources = hashlib.sha256()
    files = sorted(Path(__file__).parent.glob("*.py"))
    for path in files:
        sources.update(path.name.encode() + path.read_bytes())
    versions = f"{llvmlite.__version__} {llvm.llvm_version_info}"
    key = f"{sources.hexdigest()} {versions} {triple} {cpu} {features}" if files else None
    return Machine(target, llvm.create_mcjit_compiler(module, target), key)


def machine() -> Machine:
    """This one.

    Raises:
        RuntimeError: LLVM cannot compile for it.
    """
    with _LOCK:
        return _machine()


_TASKS: dict[str, Task] = {}


def task(emit: Callable[[Lanes, Data], None], name: str, bits: int) -> Task:
    """Compiled code for a task, from this process, from a file or made now.

    Args:
        emit: Emits its code.
        name: Tells it from all other tasks: the same name always means the same code.
        bits: 32 or 64, of its floats.
    """
    with _LOCK:
        symbol = f"qconv_{name}_{bits}"
        if symbol not in _TASKS:
            here = _machine()
            code = kept_code.read(here.key, symbol)
            if code is None:
                code = _compiled(here, emit, symbol, bits)
                kept_code.write(here.key, symbol, code)
            here.engine.add_object_file(llvm.ObjectFileRef.from_data(code))
            here.engine.finalize_object()
            _TASKS[symbol] = Task(here.engine.get_function_address(symbol))
        return _TASKS[symbol]


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
