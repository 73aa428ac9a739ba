"""State vectors by compiled loops, as a torch operator.

With the `fast` extra (llvmlite), on the CPU, blocks of patches go through all gates without leaving the nearest caches,
forward and backward. Second derivatives, other devices and torch.func take the plain torch path.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from circuits.circuit import Circuit
from qconv.backends.operators import fast_installed, many, through_plain, watched
from qconv.backends.state_program import Program, Tables, runs
from qconv.backends.threads import run

Plain = Callable[[Tensor, Tensor], Tensor]

# It is faster than torch on any number of wires that was measured, 2 to 14; the tables double with each.
MAX_WIRES = 12
_CACHE = 2**16  # bytes of a block's tiles
_MOST_TILES = 8

_CIRCUITS: dict[str, Circuit] = {}


def register(circuit: Circuit) -> str | None:
    """Key of a circuit for `evaluate`, or None where the loops do not apply."""
    if not fast_installed() or circuit.n_wires > MAX_WIRES or not circuit.n_inputs or not runs(circuit):
        return None
    key = hashlib.sha256(circuit.text().encode()).hexdigest()
    _CIRCUITS[key] = circuit
    return key


@lru_cache(maxsize=256)
def program(key: str) -> Program:
    """The program of a registered circuit."""
    return Program(_CIRCUITS[key])


class Runner:
    """A program with its tables in memory.

    Args:
        program: The circuit.
        dtype: torch.float32 or torch.float64.
    """

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        # Kept, since asking for a module takes half a microsecond.
        from qconv.backends import state_loops as loops
        from qconv.backends.lanes import BYTES

        self._loops, self._bits = loops, 32 if dtype == torch.float32 else 64
        self._lanes = 8 * BYTES // self._bits
        circuit, tables = program.circuit, Tables(program)
        self.inputs, self.observables = circuit.n_inputs, len(circuit.observables)
        self._numbers, self._slopes = tables.numbers, tables.slopes
        head, state = 2 * len(program.waves) + 4 * len(program.chains), 2 * 2**circuit.n_wires
        self._rows = head + state + 1, head + 2 * state + 4 + len(program.waves)
        self._kept = {
            loops.WAVE_INPUTS: tables.wave_inputs,
            loops.WAVE_NUMBERS: tables.waves.astype(f"f{self._bits // 8}"),
            loops.CHAIN_TABLE: tables.chains,
            loops.CHAIN_WAVES: tables.chain_waves,
            loops.GATE_TABLE: tables.gates,
            loops.GATE_NUMBERS: tables.gate_numbers,
            loops.ENTRIES: (tables.entries + head) * self._lanes,
            loops.READ_TABLE: tables.reads,
        }
        data = np.zeros(loops.LENGTH, dtype=np.int64)
        for field, array in self._kept.items():
            data[field] = array.ctypes.data
        data[loops.SHARED_LENGTH], data[loops.SUMS_LENGTH] = tables.numbers, tables.slopes
        data[loops.WIRES], data[loops.N_WEIGHTS] = circuit.n_wires, circuit.n_weights
        data[loops.WAVES], data[loops.CHAINS] = len(program.waves), len(program.chains)
        data[loops.READS] = self.observables
        self._template = (ctypes.c_int64 * loops.LENGTH).from_buffer_copy(data.tobytes())

    def _data(self, inputs: Tensor, weights: Tensor, out: Tensor, shared: Tensor, rows: int) -> Any:
        """What the loops are told; `out` is (F, n_obs, P), of any strides."""
        loops, patches = self._loops, inputs.shape[0]
        data = type(self._template).from_buffer_copy(self._template)
        tiles = max(1, min(_MOST_TILES, 8 * _CACHE // (rows * self._lanes * self._bits)))
        block = tiles * self._lanes
        # As many parts on any number of threads: their sums are added in one order and results repeat bit for bit.
        chunk = block * max(1, -(-patches // (block * max(16, 128 // len(weights)))))
        by_filter, by_value, by_patch = out.stride()
        data[loops.PARTS], data[loops.ROOM] = -(-patches // chunk), tiles * rows * self._lanes * self._bits // 8
        data[loops.CHUNK : loops.CALL] = [
            chunk,
            patches,
            len(weights),
            inputs.data_ptr(),
            *inputs.stride(),
            weights.data_ptr(),
            *weights.stride(),
            out.data_ptr(),
            by_patch,
            by_filter,
            by_value,
            0,
            0,
            shared.data_ptr(),
            0,
            tiles,
            rows * self._lanes,
        ]
        return data

    def forward(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Inputs (P, n_inputs), weights (F, n_weights) -> (F, n_obs, P)."""
        loops = self._loops
        result = inputs.new_empty(len(weights), self.observables, len(inputs))
        if result.numel() == 0:
            return result
        shared = inputs.new_empty(len(weights), self._numbers)
        data = self._data(inputs, weights, result, shared, self._rows[0])
        run(loops.shared_task(False, self._bits), data, 1)
        run(loops.block_task(False, self._bits), data, data[loops.PARTS])
        return result

    def backward(
        self, grad: Tensor, inputs: Tensor, weights: Tensor, wanted: tuple[bool, bool] = (True, True)
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients (n_inputs, P) and (F, n_weights), None for what is not wanted, from (F, n_obs, P)."""
        loops = self._loops
        to_inputs = inputs.new_zeros(self.inputs, len(inputs)) if wanted[0] else None
        to_weights = weights.new_zeros(weights.shape) if wanted[1] else None
        if grad.numel() == 0:
            return to_inputs, to_weights
        shared = inputs.new_empty(len(weights), self._numbers)
        data = self._data(inputs, weights, grad, shared, self._rows[1])
        sums = inputs.new_zeros(data[loops.PARTS], len(weights), self._slopes)
        data[loops.SUMS] = sums.data_ptr()
        data[loops.TO_INPUTS] = 0 if to_inputs is None else to_inputs.data_ptr()
        run(loops.shared_task(False, self._bits), data, 1)
        run(loops.block_task(True, self._bits), data, data[loops.PARTS])
        if to_weights is not None:
            data[loops.TO_WEIGHTS] = to_weights.data_ptr()
            run(loops.shared_task(True, self._bits), data, 1)
        return to_inputs, to_weights


@lru_cache(maxsize=256)
def runner(key: str, dtype: torch.dtype) -> Runner:
    """The runner of a registered circuit."""
    return Runner(program(key), dtype)


class Eager(torch.autograd.Function):
    """The loops outside torch.compile: the dispatcher's bookkeeping would cost as much as they do."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weights: Tensor, key: str, plain: Plain) -> Tensor:
        """See Runner.forward."""
        ctx.save_for_backward(inputs, weights)
        ctx.key, ctx.plain = key, plain
        return runner(key, inputs.dtype).forward(inputs, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See Runner.backward; a second derivative is taken through the plain torch path."""
        inputs, weights = ctx.saved_tensors
        if torch.is_grad_enabled() or many(grad):

            def plain(inputs: Tensor, weights: Tensor) -> Tensor:
                return cast(Tensor, ctx.plain(inputs, weights).permute(1, 2, 0))

            return *through_plain(plain, (inputs, weights), grad), None, None
        to_inputs, to_weights = runner(ctx.key, inputs.dtype).backward(grad, inputs, weights, ctx.needs_input_grad[:2])
        return None if to_inputs is None else to_inputs.t(), to_weights, None, None


# torch.compile and export see operators that they need not look into.
@torch.library.custom_op("qconv::circuit_states", mutates_args=())
def circuit_states(inputs: Tensor, weights: Tensor, key: str) -> Tensor:
    """See Runner.forward."""
    return runner(key, inputs.dtype).forward(inputs, weights)


@circuit_states.register_fake
def _(inputs: Tensor, weights: Tensor, key: str) -> Tensor:
    return inputs.new_empty(weights.shape[0], len(_CIRCUITS[key].observables), inputs.shape[0])


@torch.library.custom_op("qconv::circuit_states_backward", mutates_args=())
def circuit_states_backward(grad: Tensor, inputs: Tensor, weights: Tensor, key: str) -> tuple[Tensor, Tensor]:
    """See Runner.backward."""
    to_inputs, to_weights = runner(key, inputs.dtype).backward(grad, inputs, weights)
    return cast(Tensor, to_inputs), cast(Tensor, to_weights)


@circuit_states_backward.register_fake
def _(grad: Tensor, inputs: Tensor, weights: Tensor, key: str) -> tuple[Tensor, Tensor]:
    return inputs.new_empty(inputs.shape[1], inputs.shape[0]), weights.new_empty(weights.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, weights, ctx.key = inputs
    ctx.save_for_backward(values, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    to_inputs, to_weights = circuit_states_backward(grad, *ctx.saved_tensors, ctx.key)
    return to_inputs.t(), to_weights, None


circuit_states.register_autograd(_backward, setup_context=_setup)


def evaluate(key: str | None, inputs: Tensor, weights: Tensor, plain: Plain) -> Tensor | None:
    """Expectation values (P, F, n_obs) by the compiled loops, or None where they do not apply.

    Args:
        key: Of a registered circuit; None for none.
        inputs: (P, n_inputs).
        weights: (F, n_weights).
        plain: The same function in torch operations, for second derivatives.
    """
    if key is None or not inputs.is_cpu or torch._C._are_functorch_transforms_active():
        return None
    if torch.compiler.is_compiling():
        values = cast(Tensor, circuit_states(inputs, weights, key))
    elif watched(inputs, weights):
        return None
    elif torch.is_grad_enabled() and (inputs.requires_grad or weights.requires_grad):
        values = Eager.apply(inputs, weights, key, plain)  # type: ignore[no-untyped-call]
    else:
        values = runner(key, inputs.dtype).forward(inputs, weights)
    return values.permute(2, 0, 1)
