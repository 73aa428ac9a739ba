"""How many circuits a training step takes on a device, whatever wraps the backend."""

from __future__ import annotations

from functools import partial

from circuits.circuit import Circuit
from qconv.backends.protocol import Compiled, Composed, Differentiating, circuit_sizes
from qconv.gradients import METHODS, executions


def step_circuits(compiled: Compiled, circuit: Circuit, patches: int, filters: int, *, inputs: bool) -> int:
    """Circuits that a device runs for one forward and backward pass, every measurement setting of every evaluation.

    Args:
        compiled: What evaluates the circuit; by parameter shifts where it does not say otherwise.
        circuit: The kernel.
        patches: Number of patches.
        filters: Number of filters.
        inputs: See `executions`.
    """
    if isinstance(compiled, Composed):
        again = patches * filters * len(circuit_sizes(compiled, circuit)) if compiled.evaluates_again else 0
        return again + sum(step_circuits(part, own, patches, filters, inputs=inputs) for own, part in compiled.parts)
    evaluations = compiled.executions if isinstance(compiled, Differentiating) else partial(executions, circuit)
    return len(circuit_sizes(compiled, circuit)) * evaluations(patches, filters, inputs=inputs)


def gradient_method(compiled: Compiled) -> str:
    """How a device would take a compiled circuit's gradients, in a word."""
    if isinstance(compiled, Composed):
        return gradient_method(compiled.parts[0][1])
    return compiled.method if isinstance(compiled, Differentiating) else METHODS[0]
